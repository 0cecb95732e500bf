"""FlexMoE's placement (SIGMOD 2023, arXiv 2304.03946): expand, shrink and migrate vExperts while balance is bad.

A vExpert is one slot of an expert. Of an expert's tokens each of its n slots gets 1/n. The time of a step is that of
the slowest rank (equation 5): its experts (7), its rows (8), and the exchange of gradients of the experts that it
shares with other ranks (9). While the balance ratio (6) is above a threshold, one change at a time is made (algorithm
2), and each makes what ranks take above a limit less, squared and summed: of several ranks above it one expert may help
any. The limit stands from the first on, the threshold times the mean then, so that no map comes back and it ends.

- expand: the expert with the most tokens per slot gets one more, in a slot that is free or that the rank's expert with
  the fewest tokens per slot gives up: one that has others (shrink), else one that goes to a free slot elsewhere;
- migrate: an expert of the slowest rank goes to a free slot of another rank, or changes places with one of its experts.

Where one slot alone of the slowest rank is over the threshold its expert is expanded; else migrations come first, as
they take no slot. Where the most loaded expert cannot be helped, the next one is tried, since the slowest rank may be
another's. Then slots of two ranks change places where that makes the exchange of gradients cheaper and no rank slower
than the slowest was.
"""

from __future__ import annotations

import numpy as np

from moe_overlap.placement.churn import moves
from moe_overlap.placement.flex_expand import expansion
from moe_overlap.placement.flex_flow import LESS, Change, Flow, with_slots
from moe_overlap.placement.flex_regroup import cheaper


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
    moved = 0

    def made(change: Change | None) -> bool:
        nonlocal moved
        if change is None:
            return False
        experts = [expert for expert, _ in change]
        old, home = before[:, experts], homes[experts]
        more = moves(np.stack([slots for _, slots in change], axis=1), old, home)
        more -= moves(flow.slots[:, experts], old, home)
        if budget is not None and moved + more > budget:
            return False
        moved += more
        flow.put(change)
        return True

    while flow.ratio > threshold:
        slowest = flow.slots[flow.seconds.argmax()]
        over = flow.per_slot[slowest > 0].max() > threshold * flow.load.sum() / len(flow.room)
        steps = (expansion, _exchange) if over else (_exchange, expansion)
        if not any(made(step(flow, fixed)) for step in steps):
            break
    while flow.topology.nodes > 1 and made(cheaper(flow, fixed)):
        pass
    return flow.slots


def _exchange(flow: Flow, fixed: np.ndarray) -> Change | None:
    """An expert of the slowest rank moves to another rank, or changes places with one there, so that the slower of
    both gets as fast as can be; None where no rank gets faster so, or others slower by more."""
    seconds = flow.seconds
    slowest, above = int(seconds.argmax()), flow.above(seconds)
    experts = np.nonzero((flow.slots[slowest] > 0) & ~fixed[slowest])[0].tolist()
    may = flow.may_leave(fixed)
    found = np.concatenate([np.empty((4, 0)), *(_faster(flow, may, slowest, expert) for expert in experts)], axis=1)
    for expert, other, back in found[1:, found[0].argsort(kind="stable")].astype(np.int64).T.tolist():
        change = [(expert, with_slots(flow.slots[:, expert], {slowest: -1, other: 1}))]
        if back < len(flow.load):
            change.append((back, with_slots(flow.slots[:, back], {slowest: 1, other: -1})))
        after = flow.changed_s(change)  # with the exchanges of gradients as they are then
        if after.max() <= seconds[slowest] and flow.above(after) < LESS * above:
            return change
    return None


def _faster(flow: Flow, may: np.ndarray, slowest: int, expert: int) -> np.ndarray:
    """float64 [4, N]: where an expert of the slowest rank may go. What the slower of both ranks takes then, which is
    less than now, with exchanges of gradients as they are; the expert, the other rank, and the expert that comes back,
    E for none. may: bool [W, most], which of `flow.own` may leave."""
    seconds, nobody = flow.seconds, len(flow.load)
    others = np.nonzero(flow.slots[:, expert] == 0)[0]
    here_s = seconds[slowest] - flow.cost_s[slowest, expert]
    there_s = seconds[others] + (flow.unit_s[others, expert] / flow.count[expert] + flow.sync_s[slowest, expert])
    rank, back = others[:, None], np.minimum(flow.own[others], nobody - 1)
    slower_s = np.maximum(
        here_s + (flow.unit_s[slowest, back] / flow.count[back] + flow.sync_s[rank, back]),
        there_s[:, None] - flow.cost_s[rank, back],
    )
    slower_s[~may[others] | (flow.slots[slowest, back] > 0)] = np.inf
    alone_s = np.where(flow.full[others], np.inf, np.maximum(here_s, there_s))
    slower_s = np.concatenate([slower_s, alone_s[:, None]], axis=1)
    row, column = np.nonzero(slower_s < LESS * seconds[slowest])
    backs = np.append(flow.own[others], np.full((len(others), 1), nobody), axis=1)
    return np.stack([slower_s[row, column], np.full(len(row), expert), others[row], backs[row, column]])
