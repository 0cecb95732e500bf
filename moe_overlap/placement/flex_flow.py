"""The slots that FlexMoE's planner (`flex.py`) changes, and what a step with them costs.

All is kept from one change to the next: a change sums again what it touches, in the order in which NumPy sums a whole
row, so that it comes to the same bits as if all were summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.demand import balance_ratio, sync_s
from moe_overlap.placement.topology import Topology

LESS = 1 - 1e-9  # a change has to gain more than rounding does
# How much of a sum another order of summing may change, and more. Changes that come as near to the best one are summed
# in one order, that of `Flow.above`, so that always the same one is taken.
ROUNDING = 1e-11
Change = list[tuple[int, np.ndarray]]  # an expert and its new slots on the ranks


@dataclass
class Flow:
    """slots: int64 [W, E]; room: int64 [W]; load: int64 [E]; unit_s: float64 [W, E], seconds of a rank that gets all
    tokens of an expert; sync_s: float64 [W, E], for the experts' gradients. limit_s: what no rank should take longer
    than.

    Kept by `put`: count, int64 [E], slots of an expert, and size, int64 [W], of a rank; per_slot, float64 [E], rows of
    one slot; cost_s, float64 [W, E], what each expert costs a rank; seconds and rows, float64 [W], of a rank; ranks, of
    each expert; own, int64 [W, most], experts of each rank, E where there is none.

    A change is of few experts: slots, unit_s and sync_s are expert after expert in memory. What NumPy sums over experts
    is rank after rank, as it sums in another order otherwise.
    """

    slots: np.ndarray
    room: np.ndarray
    load: np.ndarray
    unit_s: np.ndarray
    sync_s: np.ndarray
    topology: Topology
    node: np.ndarray
    count: np.ndarray
    size: np.ndarray
    per_slot: np.ndarray
    cost_s: np.ndarray
    seconds: np.ndarray
    rows: np.ndarray
    ranks: list[np.ndarray]
    own: np.ndarray
    limit_s: float = 0.0

    @classmethod
    def of(cls, slots: np.ndarray, room: np.ndarray, traffic: np.ndarray, topology: Topology, threshold: float) -> Flow:
        wire_s = 4 * topology.row_bytes * (topology.byte_s.T @ traffic)
        load, experts = traffic.sum(axis=0), slots.shape[1]
        own = np.full((len(room), min(experts, int(room.max()))), experts)
        unit_s = 3 * topology.row_s * load + wire_s
        found = cls(
            np.array(slots, order="F"), room, load, np.array(unit_s, order="F"), np.zeros(slots.shape, order="F"),
            topology, topology.node_of_ranks, slots.sum(axis=0), slots.sum(axis=1), np.zeros(experts),
            np.zeros(slots.shape), np.zeros(len(room)), np.zeros(len(room)), [np.empty(0, dtype=np.int64)] * experts,
            own,
        )  # fmt: skip
        found.put([(expert, slots[:, expert].copy()) for expert in range(experts)])
        found.limit_s = threshold * float(found.seconds.mean())
        return found

    def sync(self, slots_of_expert: np.ndarray) -> np.ndarray:
        """float64 [W]: seconds of each rank for the gradients of one expert."""
        ranks = np.nonzero(slots_of_expert)[0]
        found = np.zeros(len(slots_of_expert))
        found[ranks] = sync_s(ranks.tolist(), self.topology)
        return found

    @property
    def ratio(self) -> float:
        return balance_ratio(self.rows)

    @property
    def full(self) -> np.ndarray:
        """bool [W]: ranks without a free slot."""
        found: np.ndarray = self.size >= self.room
        return found

    def may_leave(self, fixed: np.ndarray) -> np.ndarray:
        """bool [W, most]: which of `own` are experts that may leave. fixed: bool [W, E], those that may not."""
        found: np.ndarray = (self.own < len(self.load)) & ~np.take_along_axis(
            fixed, np.minimum(self.own, len(self.load) - 1), axis=1
        )
        return found

    def above(self, seconds: np.ndarray) -> float:
        """What ranks take above the limit, squared and summed. seconds: float64 [W]."""
        return float(self.above_each(seconds).sum())

    def above_each(self, seconds: np.ndarray) -> np.ndarray:
        """The summands of `above`."""
        found: np.ndarray = np.maximum(0.0, seconds - self.limit_s) ** 2
        return found

    def changed_s(self, change: Change) -> np.ndarray:
        """float64 [W]: seconds of each rank after a change."""
        found = self.seconds
        for expert, slots in change:
            before = self.slots[:, expert] / self.count[expert] * self.unit_s[:, expert]
            after = slots / slots.sum() * self.unit_s[:, expert]
            found = found + after + self.sync(slots) - before - self.sync_s[:, expert]
        return found

    def put(self, change: Change) -> None:
        touched = np.zeros(len(self.room), dtype=bool)
        for expert, slots in change:
            touched |= (self.slots[:, expert] > 0) | (slots > 0)
            self.size += slots - self.slots[:, expert]
            self.slots[:, expert] = slots
            self.ranks[expert] = np.nonzero(slots)[0]
            self.count[expert] = slots.sum()
            self.per_slot[expert] = self.load[expert] / self.count[expert]
            self.sync_s[:, expert] = self.sync(slots)
            self.cost_s[:, expert] = slots / self.count[expert] * self.unit_s[:, expert] + self.sync_s[:, expert]
        ranks = np.nonzero(touched)[0]
        self.seconds = self.seconds.copy()
        self.seconds[ranks] = self.cost_s[ranks].sum(axis=1)
        self.rows[ranks] = np.ascontiguousarray(self.slots[ranks] * self.per_slot).sum(axis=1)
        self._list(ranks)

    def _list(self, ranks: np.ndarray) -> None:
        """The experts that ranks have, in their order."""
        rank, expert = np.nonzero(self.slots[ranks])
        first = np.searchsorted(rank, np.arange(len(ranks)))
        self.own[ranks] = len(self.load)
        self.own[ranks[rank], np.arange(len(rank)) - first[rank]] = expert


def with_slots(slots: np.ndarray, more: dict[int, int]) -> np.ndarray:
    """Slots of an expert, on some ranks more or, below 0, fewer."""
    found = slots.copy()
    for rank, number in more.items():
        found[rank] += number
    return found


def ring_s(count: np.ndarray, one_node: np.ndarray, topology: Topology) -> np.ndarray:
    """`sync_s` of many experts: of their numbers of ranks, at least 1, and whether these are of one node."""
    rate = np.where(one_node, topology.intra_bytes_per_s, topology.inter_bytes_per_s)
    found: np.ndarray = 2 * (count - 1) / count * topology.expert_bytes / rate
    return found
