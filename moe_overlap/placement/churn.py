"""Churn control: a new placement keeps what can stay, and changes no more than a budget allows.

Planners say which experts a rank should have; which rank that is, which slot and whose home is settled here. A move is
an expert's weights that cross a link (`MigrationPlan.moves`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from moe_overlap.native import native
from moe_overlap.placement.demand import balance_ratio, rank_load
from moe_overlap.placement.packing import assign
from moe_overlap.placement.placement import Placement
from moe_overlap.placement.selectors import LocalFirst, Modulo, Selector
from moe_overlap.placement.topology import Topology

Ranks = list[list[int]]  # the experts of each rank's slots
Cost = Callable[[np.ndarray], float]  # of a map int64 [W, E], slots of each rank for each expert


def settle(
    wanted: Ranks, traffic: np.ndarray, topology: Topology, current: Placement | None, budget: int | None, *,
    interchange: bool = True, selector: Selector | None = None, cost: Cost | None = None,
) -> Placement:  # fmt: skip
    """A placement of the experts `wanted` on each rank, as near to `current` as can be.

    interchange: ranks of a node, and nodes, with as many slots may change places, as for a planner that looks at loads
    alone. With a budget of fewer moves than that takes, as many steps towards it as fit, the best for `cost` first;
    never a placement that costs more than the current one. cost: None, the balance. An unchanged map is `current`.
    """
    if current is None:
        return Placement.of_ranks(wanted, selector=selector)
    made = _like(wanted, current, selector, topology.node_size if interchange else 0)
    if budget is not None and current.diff(made).moves > budget:
        load = traffic.sum(axis=0).astype(np.float64)
        wanted = _towards(made.experts_of_ranks(), cost or partial(_ratio, load), current, budget)
        made = _like(wanted, current, selector)
        if cost is None and balance_ratio(rank_load(made, traffic)) > balance_ratio(rank_load(current, traffic)):
            return current
    same = (made.slot_to_expert, made.slots_by_rank, made.selector.text)
    return current if same == (current.slot_to_expert, current.slots_by_rank, current.selector.text) else made


def _like(wanted: Ranks, current: Placement, selector: Selector | None, node_size: int = 0) -> Placement:
    """In an order in which slots that stay keep their place; homes stay where the expert still is. node_size: as in
    `kept`."""
    if selector is None:  # shares are of one map's slots
        selector = current.selector if isinstance(current.selector, Modulo | LocalFirst) else Modulo()
    experts, homes, slots = kept(wanted, current, node_size)
    return Placement(current.num_experts, len(experts), current.world_size, tuple(experts), current.epoch + 1,
                     tuple(slots), tuple(homes), selector)  # fmt: skip


def kept(wanted: Ranks, current: Placement, node_size: int) -> tuple[list[int], list[int], list[int]]:
    """(the experts of all slots, the slot of each expert's home, the slots of each rank): `wanted`, in an order in
    which slots that stay keep their place. A home stays on its rank where that still has the expert, else it is its
    first slot's. node_size: so many ranks in a row, and such nodes, may change what they want where they have as many
    slots, so that most of it is there already; 0: none.

    Compiled in csrc/core/churn.cpp.
    """
    planner = native.planner()
    if planner is None:
        return kept_reference(wanted, current, node_size)
    flat, slots = [expert for own in wanted for expert in own], [len(own) for own in wanted]
    found: tuple[list[int], list[int], list[int]] = planner.kept(
        flat, slots, current.slot_to_expert, current.slots_by_rank, current.home_ranks, node_size
    )
    return found


def kept_reference(wanted: Ranks, current: Placement, node_size: int) -> tuple[list[int], list[int], list[int]]:
    """`kept` in plain Python: the definition the compiled one is tested against."""
    old = current.experts_of_ranks()
    if node_size:
        wanted = _nearest(wanted, old, node_size)
    ordered = [_in_place(new, before) for new, before in zip(wanted, old, strict=True)]
    made = Placement.of_ranks(ordered)
    homes = []
    for slots, before in zip(made.slots_of_expert, current.home_ranks, strict=True):
        own = [slot for slot in slots if made.rank_of_slots[slot] == before]
        homes.append((own or slots)[0])
    return list(made.slot_to_expert), homes, list(made.slots_by_rank)


def _in_place(new: Sequence[int], old: Sequence[int]) -> list[int]:
    """The experts `new`, those that are in `old` too at the same place."""
    left = Counter(new)
    found: list[int | None] = [None] * len(new)
    for place, expert in enumerate(old[: len(new)]):
        if left[expert]:
            found[place] = expert
            left[expert] -= 1
    rest = iter([expert for expert in new if _taken(left, expert)])
    return [next(rest) if expert is None else expert for expert in found]


def _taken(left: Counter[int], expert: int) -> bool:
    if left[expert]:
        left[expert] -= 1
        return True
    return False


def _nearest(wanted: Ranks, old: Ranks, size: int) -> Ranks:
    """The same lists, on the ranks that have most of them already: ranks of a node change places, then nodes."""
    nodes = len(wanted) // size
    experts = 1 + max(expert for one in (*wanted, *old) for expert in one)
    kept = np.minimum(_table(wanted, experts), 1) @ np.minimum(_table(old, experts), 1).T
    slots = np.array([len(one) for one in wanted])
    kept[slots[:, None] != slots[None, :]] = -(2**30)  # a rank keeps its number of slots
    best = {}
    whole = np.zeros((nodes, nodes), dtype=np.int64)
    for a in range(nodes):
        for b in range(nodes):
            part = kept[a * size : (a + 1) * size, b * size : (b + 1) * size]
            best[a, b] = assign(-part)
            whole[a, b] = sum(int(part[row, column]) for row, column in enumerate(best[a, b]))
    found: Ranks = [[]] * len(wanted)
    for a, b in enumerate(assign(-whole)):
        for row, column in enumerate(best[a, b]):
            found[b * size + column] = wanted[a * size + row]
    return found


Step = list[tuple[int, int | None, int | None]]  # (rank, expert that it drops, expert that it takes)


def _towards(wanted: Ranks, cost: Cost, current: Placement, budget: int) -> Ranks:
    """Single steps from the current map to the one that is wanted, each the cheapest of those possible, with the fewest
    moves where they tie, until the budget is used or no step helps."""
    experts = current.num_experts
    old = _table(current.experts_of_ranks(), experts)
    now, goal, homes = old.copy(), _table(wanted, experts), np.array(current.home_ranks)
    least = cost(now)
    while True:
        best: tuple[float, int, Step] | None = None
        for step in _steps(now, goal):
            _apply(now, step, 1)
            entry = (cost(now), moves(now, old, homes), step)
            _apply(now, step, -1)
            if entry[1] <= budget and (best is None or entry[:2] < best[:2]):
                best = entry
        if best is None or best[0] >= least:
            return [np.repeat(np.arange(experts), row).tolist() for row in now]
        least = best[0]
        _apply(now, best[2], 1)


def _table(ranks: Ranks, experts: int) -> np.ndarray:
    """int64 [W, E], slots of each rank for each expert."""
    return np.array([np.bincount(np.array(one, dtype=np.int64), minlength=experts) for one in ranks])


def _ratio(load: np.ndarray, now: np.ndarray) -> float:
    return balance_ratio(now @ (load / now.sum(axis=0)))


def moves(now: np.ndarray, old: np.ndarray, homes: np.ndarray) -> int:
    """What `diff` finds: experts that are new on a rank, and homes that move to a rank that had a copy."""
    experts = np.arange(now.shape[1])
    first = (now > 0).argmax(axis=0)
    moved = (now[homes, experts] == 0) & (old[first, experts] > 0)
    return int(((now > 0) & (old == 0)).sum() + moved.sum())


def _steps(now: np.ndarray, goal: np.ndarray) -> list[Step]:
    """Maps that are one step nearer: a rank takes an expert that it should have into a slot that is free or that holds
    one it should not have; the latter, where it is nowhere else, goes to a rank that gives up the former."""
    count, size, most = now.sum(axis=0), now.sum(axis=1), goal.sum(axis=1)
    gives = [np.nonzero(row > 0)[0].tolist() for row in now - goal]
    found: list[Step] = []
    for rank, row in enumerate(goal - now):
        for takes in np.nonzero(row > 0)[0].tolist():
            if size[rank] < most[rank]:
                found.append([(rank, None, takes)])
            for drops in gives[rank]:
                if count[drops] > 1:
                    found.append([(rank, drops, takes)])
                else:
                    others = [q for q in range(len(now)) if q != rank and takes in gives[q]]
                    found += [[(rank, drops, takes), (q, takes, drops)] for q in others]
        if size[rank] > most[rank]:
            found += [[(rank, drops, None)] for drops in gives[rank] if count[drops] > 1]
    return found


def _apply(now: np.ndarray, step: Step, sign: int) -> None:
    for rank, drops, takes in step:
        if drops is not None:
            now[rank, drops] -= sign
        if takes is not None:
            now[rank, takes] += sign
