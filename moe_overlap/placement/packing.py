"""How many replicas of each expert, on which ranks: EPLB's and SYMI's algorithms, and an assignment.

EPLB (github.com/deepseek-ai/EPLB; DeepSeek-V3 report, section 3.4): groups of experts are packed onto nodes, inside
each node the expert with the most load per replica gets one more until the slots are used, and the replicas are packed
onto the node's ranks: by load, descending, each onto the lightest rank that has room. SYMI (arXiv 2504.19925, appendix
A.3): as many replicas as the expert's share of all slots, at least one, corrected one by one where they are furthest
off.

Beyond both: ranks may have different numbers of slots; an expert is not twice on a rank where that is possible
(`distinct`); and a slot of an expert may be pinned to its home.

The compiled form (csrc/core/placement.cpp) and the reference here give the same integers from the same doubles. Ties
go to the first everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from moe_overlap.native import native

Ints = Sequence[int]


def eplb(
    loads: list[list[float]], slots: Ints, homes: Ints, *, nodes: int, groups: int, distinct: bool
) -> list[list[int]]:
    """The experts of all slots, rank by rank, for each of the loads [E]. slots: of each rank. homes: the rank that has
    to have each expert, with 1 node only; empty: none. groups: of experts in a row, that go to a node together."""
    planner = native.planner()
    if planner is not None:
        found: list[list[int]] = planner.eplb(loads, slots, homes, nodes, groups, distinct)
        return found
    return [eplb_reference(load, slots, homes, nodes=nodes, groups=groups, distinct=distinct) for load in loads]


def proportional(loads: list[list[float]], slots: Ints, homes: Ints, *, contiguous: bool) -> list[list[int]]:
    """As `eplb`, by SYMI's numbers of replicas. contiguous: slots are filled expert by expert, as SYMI's are; else they
    are packed as EPLB's."""
    planner = native.planner()
    if planner is not None:
        found: list[list[int]] = planner.proportional(loads, slots, homes, contiguous)
        return found
    return [proportional_reference(load, slots, homes, contiguous=contiguous) for load in loads]


def assign(cost: np.ndarray) -> list[int]:
    """The column of each row with the least sum of costs, int64 [rows, columns >= rows], no column twice."""
    planner = native.planner()
    return assign_reference(cost) if planner is None else [int(one) for one in planner.assign(cost.tolist())]


class Item(NamedTuple):
    """One slot to be placed: an expert, its part of the expert's load, and the rank that it has to be on (-1: any)."""

    expert: int
    share: float
    pinned: int = -1


def eplb_reference(
    load: list[float], slots: Ints, homes: Ints, *, nodes: int, groups: int, distinct: bool
) -> list[int]:
    """`eplb` of one load in plain Python: the definition the compiled one is tested against."""
    experts, ranks, order = len(load), len(slots) // nodes, _by_nodes(load, nodes, groups)
    found: list[int] = []
    for node in range(nodes):
        own = order[node * (experts // nodes) : (node + 1) * (experts // nodes)]
        room = slots[node * ranks : (node + 1) * ranks]
        most = _most_replicas(room) if distinct else sum(room)
        count, extra = _replicated([load[expert] for expert in own], sum(room), most)
        items = _items(own, extra, count, load, homes)
        found += [items[one].expert for pack in pack_items(items, room, distinct=distinct) for one in pack]
    return found


def proportional_reference(load: list[float], slots: Ints, homes: Ints, *, contiguous: bool) -> list[int]:
    """`proportional` of one load in plain Python."""
    experts, total, given = len(load), 0.0, sum(slots)
    for one in load:
        total += one
    most = given if contiguous else _most_replicas(slots)
    goal = [one / total * given if total > 0 else given / experts for one in load]
    count = [min(most, math.floor(max(one, 1.0))) for one in goal]
    while sum(count) > given:
        count[_best(experts, lambda e: count[e] > 1, lambda e: count[e] - goal[e])] -= 1
    while sum(count) < given:
        count[_best(experts, lambda e: count[e] < most, lambda e: goal[e] - count[e])] += 1
    if contiguous:
        return [expert for expert, number in enumerate(count) for _ in range(number)]
    extra = [expert for expert, number in enumerate(count) for _ in range(number - 1)]
    items = _items(list(range(experts)), extra, count, load, homes)
    return [items[one].expert for pack in pack_items(items, slots, distinct=True) for one in pack]


def pack_items(items: Sequence[Item], room: Ints, *, distinct: bool) -> list[list[int]]:
    """The items of each pack, as they came there. Pinned ones come first; where every pack takes one, item i goes to
    pack i."""
    packs: list[list[int]] = [[] for _ in room]
    if all(one == 1 for one in room) and all(item.pinned < 0 for item in items):
        return [[one] for one in range(len(items))]
    loads = [0.0] * len(room)
    order = sorted(
        range(len(items)), key=lambda one: (items[one].pinned < 0, -items[one].share * (items[one].pinned < 0))
    )
    for one in order:
        item, pack = items[one], items[one].pinned
        if pack < 0:
            free = [p for p, taken in enumerate(packs) if len(taken) < room[p]]
            other = [p for p in free if not (distinct and _holds(items, packs[p], item.expert))]
            pack = min(other or free, key=lambda p: loads[p])
        packs[pack].append(one)
        loads[pack] += item.share
    if distinct:
        _part_doubles(items, packs)
    return packs


def _part_doubles(items: Sequence[Item], packs: list[list[int]]) -> None:
    """An expert that is twice on a rank changes places with one of another rank, the nearest in load."""
    for p, pack in enumerate(packs):
        for place in range(len(pack)):
            item = items[pack[place]]
            if item.pinned >= 0 or sum(items[one].expert == item.expert for one in pack) < 2:
                continue
            others = [
                (abs(items[one].share - item.share), q, there)
                for q, other in enumerate(packs)
                if q != p and not _holds(items, other, item.expert)
                for there, one in enumerate(other)
                if items[one].pinned < 0 and not _holds(items, pack, items[one].expert)
            ]
            if others:
                _, q, there = min(others)
                pack[place], packs[q][there] = packs[q][there], pack[place]


def assign_reference(cost: np.ndarray) -> list[int]:
    """`assign` in NumPy: the Hungarian method with potentials; rows enter one by one along a shortest augmenting
    path."""
    rows, columns = cost.shape
    far = np.iinfo(np.int64).max
    of_row, of_column = np.zeros(rows + 1, dtype=np.int64), np.zeros(columns + 1, dtype=np.int64)
    row_in, before = np.zeros(columns + 1, dtype=np.int64), np.zeros(columns + 1, dtype=np.int64)
    for row in range(1, rows + 1):
        row_in[0], column = row, 0
        least, done = np.full(columns + 1, far), np.zeros(columns + 1, dtype=bool)
        while True:
            done[column] = True
            here = row_in[column]
            open_columns = np.nonzero(~done)[0]
            reduced = cost[here - 1, open_columns - 1] - of_row[here] - of_column[open_columns]
            closer = open_columns[reduced < least[open_columns]]
            least[closer], before[closer] = reduced[reduced < least[open_columns]], column
            column_next = open_columns[np.argmin(least[open_columns])]
            step = least[column_next]
            of_row[row_in[done]] += step
            of_column[done] -= step
            least[open_columns] -= step
            column = int(column_next)
            if not row_in[column]:
                break
        while column:
            row_in[column] = row_in[before[column]]
            column = int(before[column])
    found = [0] * rows
    for j in range(1, columns + 1):
        if row_in[j]:
            found[int(row_in[j]) - 1] = j - 1
    return found


def _replicated(load: list[float], slots: int, most: int) -> tuple[list[int], list[int]]:
    """Slots of each expert, and the experts that got one more, in this order: always that with the most load a slot."""
    count, extra = [1] * len(load), []
    for _ in range(slots - len(load)):
        best = _best(len(load), lambda i: count[i] < most, lambda i: load[i] / count[i])
        count[best] += 1
        extra.append(best)
    return count, extra


def _by_nodes(load: list[float], nodes: int, groups: int) -> list[int]:
    """The experts in the order of their nodes."""
    size = len(load) // groups
    totals = [list(accumulate(load[g * size : (g + 1) * size], initial=0.0))[-1] for g in range(groups)]
    packs = pack_items([Item(g, one) for g, one in enumerate(totals)], [groups // nodes] * nodes, distinct=False)
    return [group * size + i for pack in packs for group in pack for i in range(size)]


def _items(experts: Ints, extra: Ints, count: Ints, load: list[float], homes: Ints) -> list[Item]:
    """One for each of `experts`, then the replicas beyond."""
    share = [load[expert] / number for expert, number in zip(experts, count, strict=True)]
    first = [Item(e, s, homes[e] if homes else -1) for e, s in zip(experts, share, strict=True)]
    return first + [Item(experts[i], share[i]) for i in extra]


def _most_replicas(slots: Ints) -> int:
    """Ranks with any slot: more replicas of an expert would share a rank."""
    return max(1, sum(one > 0 for one in slots))


def _holds(items: Sequence[Item], pack: Ints, expert: int) -> bool:
    return any(items[one].expert == expert for one in pack)


def _best(count: int, may: Callable[[int], bool], key: Callable[[int], float]) -> int:
    """The first index with the highest key, of those that may be taken, else of all."""
    return max([i for i in range(count) if may(i)] or range(count), key=key)
