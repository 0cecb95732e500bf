"""FlexMoE's last part (`flex.py`): slots of two ranks change places, so that experts stay within a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.flex_flow import ROUNDING, Change, Flow, ring_s, with_slots

ROWS = 256  # of all ranks, that are summed in one go


def cheaper(flow: Flow, fixed: np.ndarray) -> Change | None:
    """Two slots of two ranks that change places, where this makes the exchanges of gradients cheaper by most and no
    rank slower than the slowest is; None where there is none. The first expert is on several nodes, of equal pairs the
    first one is taken."""
    total, most = float(np.ascontiguousarray(flow.sync_s).sum()), float(flow.seconds.max())
    seats = Seats.of(flow, fixed)
    found = [_gaining(flow, seats, node, total) for node in range(flow.topology.nodes)]
    one, two, more_s = (np.concatenate(part) for part in zip(*found, strict=True))
    spread = np.concatenate([seats.spread[one], seats.spread[two]])
    first, second = np.concatenate([one, two])[spread], np.concatenate([two, one])[spread]
    more_s = np.concatenate([more_s, more_s])[spread]
    while len(first):
        near = more_s <= more_s.min() + ROUNDING * total  # any of these may be the best one
        one, two = first[near], second[near]
        exact_s = seats.summed(flow, one, seats.rank[two]) + seats.summed(flow, two, seats.rank[one])
        for i in np.lexsort((two, one, exact_s)).tolist():
            if exact_s[i] >= -1e-9 * total:
                break
            change = seats.change(flow, one[i], two[i])
            if flow.changed_s(change).max() <= most:
                return change
        first, second, more_s = first[~near], second[~near], more_s[~near]
    return None


@dataclass(frozen=True)
class Seats:
    """The slots that may change places: int64 [P], rank by rank, expert by expert. spread: bool [P], experts on several
    nodes. near: the node of all other ranks of the expert, -1 where they are on several. Where the slot goes to another
    rank the expert is on `after` ranks, whose exchanges of gradients take `there_s` more than before, together, if that
    rank is of node `near`, else `else_s`, up to rounding."""

    rank: np.ndarray
    expert: np.ndarray
    node: np.ndarray
    spread: np.ndarray
    after: np.ndarray
    near: np.ndarray
    there_s: np.ndarray
    else_s: np.ndarray

    @classmethod
    def of(cls, flow: Flow, fixed: np.ndarray) -> Seats:
        rank, expert = np.nonzero((flow.slots > 0) & ~fixed)
        ends = np.array([[one[0], one[min(1, len(one) - 1)], one[max(-2, -len(one))], one[-1]] for one in flow.ranks])
        ranks = np.array([len(one) for one in flow.ranks])[expert]
        first, second, before_last, last = ends[expert].T
        gone = flow.slots[rank, expert] == 1  # else one is left
        node, after = flow.node, ranks + 1 - gone
        first_node = node[np.where(gone & (first == rank), second, first)]
        last_node = node[np.where(gone & (last == rank), before_last, last)]
        spread = node[first] != node[last]
        near = np.where((first_node == last_node) & (after > 1), first_node, -1)
        now_s = ranks * ring_s(ranks, ~spread, flow.topology)
        there_s = after * ring_s(after, near >= 0, flow.topology) - now_s
        else_s = after * ring_s(after, np.zeros(len(rank), dtype=bool), flow.topology) - now_s
        return cls(rank, expert, node[rank], spread, after, near, there_s, else_s)

    def more_s(self, seats: np.ndarray, nodes: np.ndarray | int) -> np.ndarray:
        """float64: what the exchanges take more when seats' slots go to nodes, up to rounding."""
        found: np.ndarray = np.where(self.near[seats] == nodes, self.there_s[seats], self.else_s[seats])
        return found

    def summed(self, flow: Flow, seats: np.ndarray, to: np.ndarray) -> np.ndarray:
        """float64: `more_s` of seats whose slots go to ranks, as NumPy sums all ranks of an expert."""
        both, index = np.unique(seats * len(flow.room) + to, return_inverse=True)
        found = np.empty(len(both))
        for begin in range(0, len(both), ROWS):
            seat, new = np.divmod(both[begin : begin + ROWS], len(flow.room))
            found[begin : begin + ROWS] = self._summed(flow, seat, new)
        return found[index]

    def _summed(self, flow: Flow, seats: np.ndarray, to: np.ndarray) -> np.ndarray:
        expert, every = self.expert[seats], np.arange(len(seats))
        each_s = ring_s(self.after[seats], self.near[seats] == flow.node[to], flow.topology)
        parts = np.where(flow.slots.T[expert] > 0, each_s[:, None], 0.0)
        gone = flow.slots[self.rank[seats], expert] == 1
        parts[every[gone], self.rank[seats[gone]]] = 0.0
        parts[every, to] = each_s
        return parts.sum(axis=1) - np.ascontiguousarray(flow.sync_s.T[expert]).sum(axis=1)

    def change(self, flow: Flow, first: int, second: int) -> Change:
        rank, other = int(self.rank[first]), int(self.rank[second])
        return [
            (int(self.expert[seat]), with_slots(flow.slots[:, self.expert[seat]], {old: -1, new: 1}))
            for seat, old, new in ((first, rank, other), (second, other, rank))
        ]


def _gaining(flow: Flow, seats: Seats, node: int, total: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of seats, the first one's slot gets cheaper at the node, which is the second one's, that may change places
    so that exchanges get cheaper; and what these take more, below 0, up to rounding. Most of the pairs after which a
    rank takes longer than the slowest are left out, not all."""
    goes = np.nonzero(seats.more_s(np.arange(len(seats.rank)), node) < -1e-10 * total)[0]
    comes = np.nonzero(seats.node == node)[0]
    one, two = np.repeat(goes, len(comes)), np.tile(comes, len(goes))
    more_s = seats.more_s(one, node) + seats.more_s(two, seats.node[one])
    gains = more_s < -0.9e-9 * total
    one, two, more_s = one[gains], two[gains], more_s[gains]
    rank, expert, other, back = seats.rank[one], seats.expert[one], seats.rank[two], seats.expert[two]
    able = (flow.slots[rank, back] == 0) & (flow.slots[other, expert] == 0)  # so neither rank nor expert is the same
    for here, old, new in ((rank, expert, back), (other, back, expert)):
        at_least = flow.seconds[here] - flow.cost_s[here, old] + flow.unit_s[here, new] / flow.count[new]
        able &= at_least <= flow.seconds.max() * (1 + 1e-9)
    return one[able], two[able], more_s[able]
