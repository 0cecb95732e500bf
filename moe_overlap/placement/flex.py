"""FlexMoE's placement (SIGMOD 2023, arXiv 2304.03946): expand, shrink and migrate vExperts while balance is bad.

A vExpert is one slot of an expert. Of an expert's tokens each of its n slots gets 1/n. The time of a step is that of
the slowest rank (equation 5): its experts (7), its rows (8), and the exchange of gradients of the experts that it
shares with other ranks (9). While the balance ratio (6) is above a threshold, the policy maker (algorithm 2) looks for
one change that makes this time less: the expert with the most tokens per slot gets one more, on the rank where that
helps most, in a slot that is free or that the rank's expert with the fewest tokens per slot, of those with others,
gives up. Migrations then change slots of two ranks where that makes the exchange of gradients cheaper and no rank
slower than the slowest was.

Where the most loaded expert cannot be helped, the next one is tried, since the slowest rank may be another's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.demand import balance_ratio, sync_s
from moe_overlap.placement.topology import Topology


@dataclass
class Flow:
    """The slots of a placement and what a step with them costs. slots: int64 [W, E]; room: int64 [W]; unit_s: float64
    [W, E], seconds of a rank that gets all tokens of an expert."""

    slots: np.ndarray
    room: np.ndarray
    load: np.ndarray
    unit_s: np.ndarray
    sync_s: np.ndarray
    topology: Topology

    @classmethod
    def of(cls, slots: np.ndarray, room: np.ndarray, traffic: np.ndarray, topology: Topology) -> Flow:
        wire_s = 4 * topology.row_bytes * (topology.byte_s.T @ traffic)
        unit_s = 3 * topology.row_s * traffic.sum(axis=0) + wire_s
        found = cls(slots, room, traffic.sum(axis=0), unit_s, np.zeros(slots.shape), topology)
        for expert in range(slots.shape[1]):
            found.sync_s[:, expert] = found.sync(slots[:, expert])
        return found

    def sync(self, slots_of_expert: np.ndarray) -> np.ndarray:
        """float64 [W]: seconds of each rank for the gradients of one expert."""
        ranks = np.nonzero(slots_of_expert)[0]
        return np.where(slots_of_expert > 0, sync_s(ranks.tolist(), self.topology), 0.0)

    @property
    def rank_s(self) -> np.ndarray:
        """float64 [W]."""
        share = self.slots / self.slots.sum(axis=0)
        found: np.ndarray = (share * self.unit_s + self.sync_s).sum(axis=1)
        return found

    @property
    def ratio(self) -> float:
        return balance_ratio((self.slots * (self.load / self.slots.sum(axis=0))).sum(axis=1))

    def column_s(self, expert: int, slots: np.ndarray) -> np.ndarray:
        """float64 [W]: what an expert costs each rank with other slots."""
        found: np.ndarray = slots / slots.sum() * self.unit_s[:, expert] + self.sync(slots)
        return found

    def put(self, expert: int, slots: np.ndarray) -> None:
        self.slots[:, expert] = slots
        self.sync_s[:, expert] = self.sync(slots)


def flex_slots(flow: Flow, homes: np.ndarray, *, threshold: float, budget: int | None) -> np.ndarray:
    """int64 [W, E], the slots of each expert on each rank.

    homes: int64 [E], ranks that keep at least one slot of each expert. budget: how many slots may be filled, None: any
    number. An expert gets no second slot on a rank, which would have no effect on balance.
    """
    left = flow.slots.size if budget is None else budget
    while left > 0 and flow.ratio > threshold:
        change = _expansion(flow, homes)
        if change is None:
            break
        for expert, slots in change:
            flow.put(expert, slots)
        left -= 1
    while left >= 2:
        change = _migration(flow, homes)
        if change is None:
            break
        for expert, slots in change:
            flow.put(expert, slots)
        left -= 2
    return flow.slots


Change = list[tuple[int, np.ndarray]]  # an expert and its new slots on the ranks


def _expansion(flow: Flow, homes: np.ndarray) -> Change | None:
    """One more slot for a loaded expert, with or without a slot of another one; None where nothing helps."""
    count = flow.slots.sum(axis=0)
    per_slot = flow.load / count
    now_s = flow.rank_s
    cold = _coldest(flow, homes, per_slot)
    for hot in np.argsort(-per_slot, kind="stable").tolist():
        best: tuple[float, Change] | None = None
        for rank in np.nonzero(flow.slots[:, hot] == 0)[0].tolist():
            change = [(hot, _with(flow.slots[:, hot], rank, 1))]
            if flow.slots[rank].sum() >= flow.room[rank]:
                shrunk = cold.get(rank)
                if shrunk is None or shrunk == hot or per_slot[shrunk] >= per_slot[hot]:
                    continue
                change.append((shrunk, _with(flow.slots[:, shrunk], rank, -1)))
            seconds = float(_changed_s(flow, now_s, change).max())
            if best is None or seconds < best[0]:
                best = seconds, change
        if best is not None and best[0] < now_s.max():
            return best[1]
    return None


def _with(slots: np.ndarray, rank: int, more: int) -> np.ndarray:
    found = slots.copy()
    found[rank] += more
    return found


def _coldest(flow: Flow, homes: np.ndarray, per_slot: np.ndarray) -> dict[int, int]:
    """The expert with the fewest tokens per slot that each rank could give up: not its home's, and not its last."""
    found = {}
    for rank in range(len(flow.room)):
        may = (flow.slots[rank] > 0) & (homes != rank)
        if may.any():
            found[rank] = int(np.where(may, per_slot, np.inf).argmin())
    return found


def _changed_s(flow: Flow, now_s: np.ndarray, change: Change) -> np.ndarray:
    """float64 [W]: seconds of each rank after a change."""
    found = now_s
    for expert, slots in change:
        found = found + flow.column_s(expert, slots) - flow.column_s(expert, flow.slots[:, expert])
    return found


def _migration(flow: Flow, homes: np.ndarray) -> Change | None:
    """Two slots of two ranks, no homes, that change places, where this makes the exchanges of gradients cheaper by
    most and no rank slower than the slowest is; None where there is none."""
    now_s, total = flow.rank_s, float(flow.sync_s.sum())
    copies = [(rank, expert) for rank, expert in np.argwhere(flow.slots > 0).tolist() if homes[expert] != rank]
    best: tuple[float, Change] | None = None
    for index, (rank, expert) in enumerate(copies):
        for other, second in copies[index + 1 :]:
            if other == rank or second == expert or flow.slots[rank, second] or flow.slots[other, expert]:
                continue
            change = [
                (expert, _with(_with(flow.slots[:, expert], rank, -1), other, 1)),
                (second, _with(_with(flow.slots[:, second], other, -1), rank, 1)),
            ]
            cheaper = sum(float(flow.sync(slots).sum() - flow.sync_s[:, one].sum()) for one, slots in change)
            if cheaper < -1e-9 * total and (best is None or cheaper < best[0]):
                if _changed_s(flow, now_s, change).max() <= now_s.max():
                    best = cheaper, change
    return None if best is None else best[1]
