"""FlexMoE's planner in plain steps, every candidate summed anew: what `moe_overlap/placement/flex.py` has to come to,
bit for bit. It is what the package had before the planner asked all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.churn import moves
from moe_overlap.placement.demand import balance_ratio, sync_s
from moe_overlap.placement.topology import Topology


@dataclass
class Flow:
    """The slots of a placement and what a step with them costs. slots: int64 [W, E]; room: int64 [W]; unit_s: float64
    [W, E], seconds of a rank that gets all tokens of an expert. limit_s: what no rank should take longer than."""

    slots: np.ndarray
    room: np.ndarray
    load: np.ndarray
    unit_s: np.ndarray
    sync_s: np.ndarray
    topology: Topology
    limit_s: float = 0.0
    _seconds: np.ndarray | None = None  # what `seconds` is until the next change

    @classmethod
    def of(cls, slots: np.ndarray, room: np.ndarray, traffic: np.ndarray, topology: Topology, threshold: float) -> Flow:
        wire_s = 4 * topology.row_bytes * (topology.byte_s.T @ traffic)
        unit_s = 3 * topology.row_s * traffic.sum(axis=0) + wire_s
        found = cls(slots, room, traffic.sum(axis=0), unit_s, np.zeros(slots.shape), topology)
        for expert in range(slots.shape[1]):
            found.sync_s[:, expert] = found.sync(slots[:, expert])
        found.limit_s = threshold * float(found.seconds.mean())
        return found

    def sync(self, slots_of_expert: np.ndarray) -> np.ndarray:
        """float64 [W]: seconds of each rank for the gradients of one expert."""
        ranks = np.nonzero(slots_of_expert)[0]
        return np.where(slots_of_expert > 0, sync_s(ranks.tolist(), self.topology), 0.0)

    @property
    def cost_s(self) -> np.ndarray:
        """float64 [W, E]: what each expert costs a rank."""
        found: np.ndarray = self.slots / self.slots.sum(axis=0) * self.unit_s + self.sync_s
        return found

    @property
    def seconds(self) -> np.ndarray:
        """float64 [W]: what each rank takes. Kept from one change to the next, as every candidate asks for it."""
        if self._seconds is None:
            self._seconds = self.cost_s.sum(axis=1)
        return self._seconds

    @property
    def per_slot(self) -> np.ndarray:
        """float64 [E]: rows of one slot."""
        found: np.ndarray = self.load / self.slots.sum(axis=0)
        return found

    @property
    def ratio(self) -> float:
        return balance_ratio((self.slots * self.per_slot).sum(axis=1))

    def above(self, seconds: np.ndarray) -> float:
        """What ranks take above the limit, squared and summed. seconds: float64 [W]."""
        return float((np.maximum(0.0, seconds - self.limit_s) ** 2).sum())

    def changed_s(self, change: Change) -> np.ndarray:
        """float64 [W]: seconds of each rank after a change."""
        found = self.seconds
        for expert, slots in change:
            before = self.slots[:, expert] / self.slots[:, expert].sum() * self.unit_s[:, expert]
            after = slots / slots.sum() * self.unit_s[:, expert]
            found = found + after + self.sync(slots) - before - self.sync_s[:, expert]
        return found

    def table(self, change: Change) -> np.ndarray:
        """int64 [W, E]: the slots after a change."""
        found = self.slots.copy()
        for expert, slots in change:
            found[:, expert] = slots
        return found

    def put(self, change: Change) -> None:
        for expert, slots in change:
            self.slots[:, expert] = slots
            self.sync_s[:, expert] = self.sync(slots)
        self._seconds = None


LESS = 1 - 1e-9  # a change has to gain more than rounding does
Change = list[tuple[int, np.ndarray]]  # an expert and its new slots on the ranks


def flex_slots(
    flow: Flow, homes: np.ndarray, *, threshold: float, budget: int | None, keep_homes: bool = False
) -> np.ndarray:
    """int64 [W, E], the slots of each expert on each rank.

    homes: int64 [E], ranks of the homes; with keep_homes each keeps a slot there, else an expert has one anywhere.
    budget: how many weights may cross a link (`churn.moves`), None: any number. An expert gets no second slot on a
    rank, which would have no effect on balance.
    """
    before = flow.slots.copy()
    fixed = np.zeros(flow.slots.shape, dtype=bool)
    if keep_homes:
        fixed[homes, np.arange(len(homes))] = True

    def made(change: Change | None) -> bool:
        if change is None or (budget is not None and moves(flow.table(change), before, homes) > budget):
            return False
        flow.put(change)
        return True

    while flow.ratio > threshold:
        slowest = flow.slots[flow.seconds.argmax()]
        over = flow.per_slot[slowest > 0].max() > threshold * flow.load.sum() / len(flow.room)
        steps = (_expansion, _exchange) if over else (_exchange, _expansion)
        if not any(made(step(flow, fixed)) for step in steps):
            break
    while flow.topology.nodes > 1 and made(_cheaper(flow, fixed)):
        pass
    return flow.slots


def _expansion(flow: Flow, fixed: np.ndarray) -> Change | None:
    """One more slot for the most loaded expert that this helps, in one that is free or that another expert leaves; None
    where it helps none."""
    now = flow.above(flow.seconds)
    for hot in np.argsort(-flow.per_slot, kind="stable").tolist():
        best: tuple[float, float, int, Change] | None = None
        for rank in np.nonzero(flow.slots[:, hot] == 0)[0].tolist():
            more: Change = [(hot, _with(flow.slots[:, hot], {rank: 1}))]
            full = flow.slots[rank].sum() >= flow.room[rank]
            change = _making_room(flow, fixed, rank, hot, more) if full else more
            if change is None:
                continue
            seconds = flow.changed_s(change)
            entry = flow.above(seconds), float(seconds[rank]), rank, change
            if best is None or entry[:3] < best[:3]:
                best = entry
        if best is not None and best[0] < LESS * now:
            return best[3]
    return None


def _making_room(flow: Flow, fixed: np.ndarray, rank: int, hot: int, change: Change) -> Change | None:
    """`change`, and the expert with the fewest tokens per slot gives its slot on the rank up: one that has others
    (shrink), else any, which goes to the fastest rank that has a free slot. Not a home that stays."""
    per_slot, count = flow.per_slot, flow.slots.sum(axis=0)
    may = (flow.slots[rank] > 0) & ~fixed[rank] & (per_slot < per_slot[hot])
    for several in (True, False):
        able = may & (count > 1) if several else may
        if not able.any():
            continue
        cold = int(np.where(able, per_slot, np.inf).argmin())
        if several:
            return [*change, (cold, _with(flow.slots[:, cold], {rank: -1}))]
        seconds = flow.changed_s(change)
        free = (flow.slots.sum(axis=1) < flow.room) & (flow.slots[:, cold] == 0)
        if free.any():
            to = int(np.where(free, seconds, np.inf).argmin())
            return [*change, (cold, _with(flow.slots[:, cold], {rank: -1, to: 1}))]
    return None


def _with(slots: np.ndarray, more: dict[int, int]) -> np.ndarray:
    found = slots.copy()
    for rank, number in more.items():
        found[rank] += number
    return found


def _exchange(flow: Flow, fixed: np.ndarray) -> Change | None:
    """An expert of the slowest rank moves to another rank, or changes places with one there, so that the slower of
    both gets as fast as can be; None where no rank gets faster so, or others slower by more."""
    cost_s = flow.cost_s
    seconds = flow.seconds
    slowest = int(seconds.argmax())
    found: list[tuple[float, int, int, int | None]] = []
    for expert in np.nonzero((flow.slots[slowest] > 0) & ~fixed[slowest])[0].tolist():
        count = flow.slots[:, expert].sum()
        arriving_s = flow.unit_s[:, expert] / count + flow.sync_s[slowest, expert]
        for other in np.nonzero(flow.slots[:, expert] == 0)[0].tolist():
            backs: list[int | None] = [
                one for one in np.nonzero((flow.slots[other] > 0) & ~fixed[other])[0].tolist()
                if not flow.slots[slowest, one]
            ]  # fmt: skip
            if flow.slots[other].sum() < flow.room[other]:
                backs.append(None)
            for back in backs:
                here, there = seconds[slowest] - cost_s[slowest, expert], seconds[other] + arriving_s[other]
                if back is not None:
                    here += flow.unit_s[slowest, back] / flow.slots[:, back].sum() + flow.sync_s[other, back]
                    there -= cost_s[other, back]
                if max(here, there) < LESS * seconds[slowest]:
                    found.append((float(max(here, there)), expert, other, back))
    for _, expert, other, back in sorted(found, key=lambda one: one[0]):
        change = [(expert, _with(flow.slots[:, expert], {slowest: -1, other: 1}))]
        if back is not None:
            change.append((back, _with(flow.slots[:, back], {slowest: 1, other: -1})))
        after = flow.changed_s(change)  # with the exchanges of gradients as they are then
        if after.max() <= seconds[slowest] and flow.above(after) < LESS * flow.above(seconds):
            return change
    return None


def _cheaper(flow: Flow, fixed: np.ndarray) -> Change | None:
    """Two slots of two ranks that change places, where this makes the exchanges of gradients cheaper by most and no
    rank slower than the slowest is; None where there is none."""
    now_s, total = flow.seconds, float(flow.sync_s.sum())
    best: tuple[float, Change] | None = None
    for rank, expert, other, second in _pairs(flow, fixed):
        change = [
            (expert, _with(flow.slots[:, expert], {rank: -1, other: 1})),
            (second, _with(flow.slots[:, second], {other: -1, rank: 1})),
        ]
        cheaper = sum(float(flow.sync(slots).sum() - flow.sync_s[:, one].sum()) for one, slots in change)
        if cheaper < -1e-9 * total and (best is None or cheaper < best[0]):
            if flow.changed_s(change).max() <= now_s.max():
                best = cheaper, change
    return None if best is None else best[1]


def _pairs(flow: Flow, fixed: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(rank, expert, other rank, expert) of slots that may change places; the first expert is on several nodes."""
    may = [(rank, expert) for rank, expert in np.argwhere((flow.slots > 0) & ~fixed).tolist()]
    node = flow.topology.node_of_ranks
    spread = [len(set(node[np.nonzero(column)[0]].tolist())) > 1 for column in flow.slots.T]
    for rank, expert in may:
        for other, second in may if spread[expert] else ():
            if other != rank and second != expert and not flow.slots[rank, second] and not flow.slots[other, expert]:
                yield rank, expert, other, second
