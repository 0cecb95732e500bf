"""FlexMoE's last part (`flex.py`): slots of two ranks change places, so that experts stay within a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.flex_flow import ROUNDING, Change, Flow, ring_s, with_slots

MOST_PAIRS = 1 << 20  # that are looked at in one go
ROWS = 256  # of all ranks, that are summed in one go
Pair = tuple[float, int, int]  # how much less the exchanges of gradients take (below 0), and two seats


def cheaper(flow: Flow, fixed: np.ndarray) -> Change | None:
    """Two slots of two ranks that change places, where this makes the exchanges of gradients cheaper by most and no
    rank slower than the slowest is; None where there is none. The first expert is on several nodes."""
    total = float(flow.sync_s.sum())
    seats = Seats.of(flow, fixed)
    found = [_best(flow, seats, first, second, total) for first, second in _pairs(seats, flow.topology.nodes, total)]
    best = min((one for one in found if one is not None), default=None)
    return None if best is None else seats.change(flow, best[1], best[2])


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

    def more_s(self, seats: np.ndarray, nodes: np.ndarray) -> np.ndarray:
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


def _pairs(seats: Seats, nodes: int, total: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of seats of which one at least makes its exchange cheaper at the other's node; first and second in turn."""
    every = np.arange(nodes)
    less = seats.more_s(np.arange(len(seats.rank))[:, None], every) < -1e-10 * total
    seat, node = np.nonzero(less)
    begin, end = np.searchsorted(seats.node, every), np.searchsorted(seats.node, every, side="right")
    size = (end - begin)[node]
    cuts = np.nonzero(np.diff(np.cumsum(size) // MOST_PAIRS))[0] + 1
    for part in np.split(np.arange(len(seat)), cuts):
        here = np.repeat(seat[part], size[part])
        start = np.cumsum(size[part]) - size[part]
        there = np.repeat(begin[node[part]] - start, size[part]) + np.arange(len(here))
        yield here, there
        yield there, here


def _best(flow: Flow, seats: Seats, first: np.ndarray, second: np.ndarray, total: float) -> Pair | None:
    """The pair that makes the exchanges cheapest, of equal ones the first; None where none may be taken."""
    most = float(flow.seconds.max())
    first, second = _able(flow, seats, first, second, most)
    more_s = seats.more_s(first, seats.node[second]) + seats.more_s(second, seats.node[first])
    left = more_s < -0.9e-9 * total
    first, second, more_s = first[left], second[left], more_s[left]
    while len(first):
        near = more_s <= more_s.min() + ROUNDING * total
        one, two = first[near], second[near]
        exact_s = seats.summed(flow, one, seats.rank[two]) + seats.summed(flow, two, seats.rank[one])
        for i in np.lexsort((two, one, exact_s)).tolist():
            if exact_s[i] >= -1e-9 * total:
                break
            if flow.changed_s(seats.change(flow, one[i], two[i])).max() <= most:
                return float(exact_s[i]), int(one[i]), int(two[i])
        first, second, more_s = first[~near], second[~near], more_s[~near]
    return None


def _able(
    flow: Flow, seats: Seats, first: np.ndarray, second: np.ndarray, most: float
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of seats that may change places; not all of those after which a rank takes longer than `most` s."""
    rank, expert, other, back = seats.rank[first], seats.expert[first], seats.rank[second], seats.expert[second]
    able = seats.spread[first] & (other != rank) & (back != expert)
    able &= (flow.slots[rank, back] == 0) & (flow.slots[other, expert] == 0)
    for here, goes, comes in ((rank, expert, back), (other, back, expert)):
        at_least = flow.seconds[here] - flow.cost_s[here, goes] + flow.unit_s[here, comes] / flow.count[comes]
        able &= at_least <= most * (1 + 1e-9)
    return first[able], second[able]
