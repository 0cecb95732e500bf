"""FlexMoE's expansion (`flex.py`): one more slot of an expert, asked of all ranks at once.

Wherever the slot is, the ranks that have the expert get the same number of its tokens less. Else few ranks change: the
one that gets the slot and, where another expert leaves it, those that get the tokens of that one. So a candidate is
these few ranks (`Trials`), and what all ranks take above the limit is a sum once for all and what these few change of
it. That is right up to rounding: candidates as near to the best one as rounding are summed again, as `Flow.above` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_overlap.placement.flex_flow import LESS, ROUNDING, Change, Flow, ring_s, with_slots

Offer = tuple[float, float, int, Change | None]  # what ranks take above the limit then, what this one takes, the rank


def expansion(flow: Flow, fixed: np.ndarray) -> Change | None:
    """One more slot for the most loaded expert that this helps, in one that is free or that another expert leaves; None
    where it helps none."""
    most = LESS * flow.above(flow.seconds)
    leavers = Leavers.of(flow, fixed)
    hottest, *others = np.argsort(-flow.per_slot, kind="stable").tolist()
    found = _helped(flow, leavers, hottest, most)
    if found is None and others:
        hope = _hope(flow, leavers)
        found = next((one for hot in others if hope[hot] and (one := _helped(flow, leavers, hot, most))), None)
    return found


def _helped(flow: Flow, leavers: Leavers, hot: int, most: float) -> Change | None:
    """One more slot for an expert, where that is best, after which ranks take less than `most` above the limit."""
    new, node = flow.slots[:, hot] == 0, flow.node[flow.ranks[hot]]
    inside = new & (flow.node == node[0]) & (node[0] == node[-1])  # the expert stays in one node
    offers = [_best(flow, leavers, hot, np.nonzero(some)[0], most) for some in (inside, new & ~inside)]
    return min([one for one in offers if one is not None], default=(0.0, 0.0, 0, None))[3]


def _hope(flow: Flow, leavers: Leavers) -> np.ndarray:
    """bool [E]: experts that one more slot may help; asking this of all is less work than trying a few of them. All
    others have no slot on a rank above the limit, and on no rank could they have one in the place of another expert so
    that ranks take less above the limit."""
    _, more = _least_more(flow, leavers)
    on_slow_ranks: np.ndarray = flow.slots[flow.seconds > flow.limit_s] > 0
    return np.logical_or(on_slow_ranks.any(axis=0), np.any(more < 0, axis=0))


def _least_more(flow: Flow, leavers: Leavers) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], float64 [N, E]: full ranks, and at least what ranks take more above the limit where an expert that has
    no slot on a rank above it gets one there: the rank, those that the leaving expert shrinks on, and where it goes.
    Infinite where the expert cannot come; on full ranks that are not among the N it is never below 0."""
    above, parts = flow.seconds > flow.limit_s, flow.above_each(flow.seconds)
    # others: where a rank's expert shrinks, what other ranks that are above the limit take more above it, or less.
    least_s = flow.seconds * (1 - ROUNDING)
    listed = above[leavers.rank] & (leavers.rank != leavers.leaves)
    leaves, rank = leavers.leaves[listed], leavers.rank[listed]
    then_s = least_s[rank] + leavers.steps_s[:, listed].sum(axis=0)
    others = np.bincount(leaves, flow.above_each(then_s) - parts[rank], len(parts))
    ranks = np.nonzero(flow.full & (above | (others < 0)))[0]
    may = (flow.slots[ranks] == 0) & (leavers.goes_rows[ranks, None] < flow.per_slot)
    shrinks = leavers.shrinks_rows[ranks, None] < flow.per_slot
    # What the rank takes more itself, [N, E]: the expert comes, without its exchange of gradients, the other leaves.
    arrived_s = least_s[ranks, None] + flow.unit_s[ranks] / (flow.count + 1)
    padded_s = np.append(flow.cost_s[ranks], np.zeros((len(ranks), 1)), axis=1)
    shrunk_s, gone_s = (np.take_along_axis(padded_s, one[ranks, None], 1) for one in (leavers.shrinks, leavers.goes))
    more = flow.above_each(arrived_s - np.where(shrinks, shrunk_s, gone_s)) - parts[ranks, None]
    more += np.where(shrinks, others[ranks, None], _arriving(flow, leavers.goes[ranks]))
    return ranks, np.where(may, more, np.inf)


def _arriving(flow: Flow, cold: np.ndarray) -> np.ndarray:
    """float64 [N, E]: at least what the fastest rank with a free slot takes more above the limit when one of N experts
    goes there, and each expert, whose ranks get faster, has one slot more. Infinite where no slot is free."""
    free = ~flow.full
    if not free.any():
        return np.full((len(cold), len(flow.load)), np.inf)
    had_s = flow.slots[free] / flow.count / (flow.count + 1) * flow.unit_s[free] + flow.sync_s[free]
    least_s = (flow.seconds[free, None] - had_s).min(axis=0) * (1 - ROUNDING)
    unit_s = np.append(flow.unit_s[free].min(axis=0), 0.0)[cold]
    found: np.ndarray = flow.above_each(least_s + unit_s[:, None]) - flow.above_each(least_s)
    return found


@dataclass(frozen=True)
class Leavers:
    """The expert of each rank that leaves where another one gets a slot there: the one with the fewest tokens per slot,
    of those that have other slots (`shrinks`) or else of all, to another rank (`goes`), but no home that stays. Experts
    int64 [W], and their tokens per slot float64 [W], infinite where there is none.

    What shrinking changes, in one list for all full ranks: `rank` has a slot of the expert that leaves rank `leaves`,
    and takes `steps_s` [4, N] more: for tokens and gradients then, and for those before, below 0. They are apart as
    `Flow.changed_s` adds them one after another, and so is it done here.
    """

    shrinks: np.ndarray
    shrinks_rows: np.ndarray
    goes: np.ndarray
    goes_rows: np.ndarray
    leaves: np.ndarray
    rank: np.ndarray
    steps_s: np.ndarray

    @classmethod
    def of(cls, flow: Flow, fixed: np.ndarray) -> Leavers:
        rows = np.where(flow.may_leave(fixed), np.append(flow.per_slot, np.inf)[flow.own], np.inf)
        several = np.where(np.append(flow.count, 0)[flow.own] > 1, rows, np.inf)
        every = np.arange(len(rows))
        shrinks, goes = flow.own[every, several.argmin(axis=1)], flow.own[every, rows.argmin(axis=1)]
        full = np.nonzero(flow.full & (several.min(axis=1) < np.inf))[0]
        return cls(shrinks, several.min(axis=1), goes, rows.min(axis=1), *_shrunk(flow, full, shrinks[full]))


def _shrunk(flow: Flow, leaves: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, ...]:
    """`Leavers.leaves`, `rank` and `steps_s`, for an expert of each of some ranks."""
    lists = [flow.ranks[expert] for expert in experts.tolist()]
    size = np.array([len(one) for one in lists], dtype=np.int64)
    rank = np.concatenate([leaves[:0], *lists])
    last = np.cumsum(size) - 1
    first = last - size + 1  # of each expert's ranks in `rank`; next, of those that still have it
    gone = flow.slots[leaves, experts] == 1
    first += gone & (rank[first] == leaves)
    last -= gone & (rank[last] == leaves)
    ring = ring_s(size - gone, flow.node[rank[first]] == flow.node[rank[last]], flow.topology)
    leaves, expert = np.repeat(leaves, size), np.repeat(experts, size)
    slots, unit_s, count = flow.slots[rank, expert], flow.unit_s[rank, expert], flow.count[expert]
    left = slots - (rank == leaves)
    after_s = left / (count - 1) * unit_s, np.where(left > 0, np.repeat(ring, size), 0.0)
    return leaves, rank, np.stack([*after_s, -slots / count * unit_s, -flow.sync_s[rank, expert]])


@dataclass(frozen=True)
class Trials:
    """One more slot of an expert, on each of some ranks, and what ranks take then: `rank` takes `then_s` where the slot
    is on rank `on`, all others `rest_s`, [W]. cold: int64 [W], the expert that leaves a rank for it, E for none; it
    goes to rank `to`, where it does so (goes: bool [W]), or shrinks."""

    on: np.ndarray
    rank: np.ndarray
    then_s: np.ndarray
    rest_s: np.ndarray
    cold: np.ndarray
    goes: np.ndarray
    to: int

    @classmethod
    def of(cls, flow: Flow, leavers: Leavers, hot: int, ranks: np.ndarray) -> Trials:
        """The expert's exchange of gradients has to be equally fast with each of the ranks."""
        more = with_slots(flow.slots[:, hot], {int(ranks[0]): 1})
        rest_s = flow.changed_s([(hot, more)])
        rest_s[ranks] = flow.seconds[ranks]
        taken_s = rest_s.copy()
        taken_s[ranks] += 1 / more.sum() * flow.unit_s[ranks, hot]
        taken_s[ranks] += flow.sync(more)[ranks[0]]

        asked, full = np.zeros(len(rest_s), dtype=bool), flow.full
        asked[ranks] = True
        shrinks = asked & full & (leavers.shrinks_rows < flow.per_slot[hot])
        goes = asked & full & ~shrinks & (leavers.goes_rows < flow.per_slot[hot]) & (not full.all())
        to = int(np.where(full, np.inf, rest_s).argmin())
        cold = np.where(shrinks, leavers.shrinks, np.where(goes, leavers.goes, len(flow.load)))

        listed = shrinks[leavers.leaves]
        on, rank = leavers.leaves[listed], leavers.rank[listed]
        shrunk_s = np.where(on == rank, taken_s[rank], rest_s[rank])
        for more_s in leavers.steps_s[:, listed]:
            shrunk_s += more_s
        free, going = np.nonzero(asked & ~full)[0], np.nonzero(goes)[0]
        return cls(
            np.concatenate([free, on, going, going]),
            np.concatenate([free, rank, going, np.full(len(going), to)]),
            np.concatenate([
                taken_s[free], shrunk_s, taken_s[going] - flow.unit_s[going, cold[going]],
                rest_s[to] + flow.unit_s[to, cold[going]],
            ]),
            rest_s, cold, goes, to,
        )  # fmt: skip

    def above(self, flow: Flow, ranks: np.ndarray) -> np.ndarray:
        """What ranks take above the limit where the slot comes to each of some ranks, as `Flow.above` sums it."""
        row = np.full(len(self.rest_s), -1)
        row[ranks] = np.arange(len(ranks))
        listed = row[self.on] >= 0
        parts = np.tile(flow.above_each(self.rest_s), (len(ranks), 1))
        parts[row[self.on[listed]], self.rank[listed]] = flow.above_each(self.then_s[listed])
        found: np.ndarray = parts.sum(axis=1)
        return found

    def change(self, flow: Flow, hot: int, rank: int) -> Change:
        found, cold = [(hot, with_slots(flow.slots[:, hot], {rank: 1}))], int(self.cold[rank])
        if cold < len(flow.load):
            more = {rank: -1, self.to: 1} if self.goes[rank] else {rank: -1}
            found.append((cold, with_slots(flow.slots[:, cold], more)))
        return found


def _best(flow: Flow, leavers: Leavers, hot: int, ranks: np.ndarray, most: float) -> Offer | None:
    """The best of some ranks for one more slot of an expert; None where ranks take at least `most` above the limit
    with any."""
    if not len(ranks):
        return None
    trials = Trials.of(flow, leavers, hot, ranks)
    parts = flow.above_each(trials.rest_s)
    base, change = float(parts.sum()), flow.above_each(trials.then_s) - parts[trials.rank]
    above = base + np.bincount(trials.on, change, len(parts))  # of the slot on each rank, up to rounding
    changed = np.bincount(trials.on, np.abs(change), len(parts))
    slack = ROUNDING * (base + changed)
    able = np.unique(trials.on)
    if not len(able) or (above - slack)[able].min() >= most:
        return None
    near = able[(above - slack)[able] <= (above + slack)[able].min()]
    again = near[changed[near] > 0]  # without a change it is `base`, exactly
    above[again] = trials.above(flow, again)
    own_s, own = np.zeros(len(parts)), trials.on == trials.rank
    own_s[trials.on[own]] = trials.then_s[own]
    rank = int(near[np.lexsort((own_s[near], above[near]))[0]])
    return (above[rank], own_s[rank], rank, trials.change(flow, hot, rank)) if above[rank] < most else None
