"""The candidates of the decision about copies of experts: seats that may be faster than those that a step has.

The compiled form (csrc/core/replication.cpp) makes the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load, Seat, lane_of, rank_rows

SWEEPS = 3  # of `level`


def node_copies(load: Load, phases: Sequence[PhaseCosts], most_copies: int) -> list[tuple[int, int]]:
    """(expert, node) of copies that spare the wire between nodes most: for each node as many as it has slots, together
    `most_copies`; those first of which the node's ranks have most rows. None where that wire is free."""
    if not any(phase.exchange[INTER].beta_s for phase in phases):
        return []
    ranks, experts = load.counts.shape
    size = load.ranks_per_node
    held = {(expert, rank // size) for expert, rank, _ in load.seats}
    found: list[tuple[int, int, int]] = []
    for node in range(ranks // size):
        inside = slice(node * size, (node + 1) * size)
        rows_E = load.counts[inside].sum(axis=0).tolist()
        pairs = sorted((-rows_E[e], e, node) for e in range(experts) if rows_E[e] and (e, node) not in held)
        found += pairs[: sum(load.spare[inside])]
    return [(expert, node) for _, expert, node in sorted(found)[:most_copies]]


def with_node_copies(load: Load, copies: Sequence[tuple[int, int]]) -> tuple[Seat, ...]:
    """The seats with these, each for the rows of its node: on the rank that got fewest of them, of these the one with
    fewest rows."""
    ranks, size = len(load.counts), load.ranks_per_node
    seats = [list(seat) for seat in load.seats]
    loads, got = rank_rows(load.seats, ranks), [0] * ranks
    for expert, node in copies:
        inside = range(node * size, (node + 1) * size)
        to = min((rank for rank in inside if got[rank] < load.spare[rank]), key=lambda rank: (got[rank], loads[rank]))
        moved = min(int(load.counts[inside.start : inside.stop, expert].sum()), seats[expert][2])
        got[to] += 1
        seats.append([expert, to, 0])
        _move(seats, loads, expert, len(seats) - 1, moved)
    return tuple((expert, rank, rows) for expert, rank, rows in seats)


def fill(
    load: Load, phases: Sequence[PhaseCosts], start: Sequence[Seat], target: int, most_copies: int
) -> tuple[Seat, ...]:
    """The seats when no rank keeps more than `target` rows that another one can take over, by so many more copies."""
    ranks = len(load.counts)
    seats, loads, spare = [list(seat) for seat in start], rank_rows(start, ranks), _spare(load, start)
    prices = _Gains.of(phases)
    for rank in sorted(range(ranks), key=lambda rank: (-loads[rank], rank)):
        own = [i for _, i in sorted((-seat[2], i) for i, seat in enumerate(seats) if seat[1] == rank)]
        while loads[rank] > target:
            found = _best_move(load, prices, seats, loads, spare if most_copies > 0 else [0] * ranks, own, target)
            if found is None:
                break
            i, j, to, moved = found
            if j < 0:
                j = len(seats)
                seats.append([seats[i][0], to, 0])
                spare[to] -= 1
                most_copies -= 1
            _move(seats, loads, i, j, moved)
    return tuple((expert, rank, rows) for expert, rank, rows in seats)


def _spare(load: Load, seats: Sequence[Seat]) -> list[int]:
    """Slots that are left on each rank."""
    spare = list(load.spare)
    for _, rank, _ in seats[len(load.seats) :]:
        spare[rank] -= 1
    return spare


def _move(seats: list[list[int]], loads: list[int], i: int, j: int, moved: int) -> None:
    seats[i][2] -= moved
    seats[j][2] += moved
    loads[seats[i][1]] -= moved
    loads[seats[j][1]] += moved


@dataclass(frozen=True)
class _Gains:
    """Of all phases: a row's compute; by wire its crossings, there and back, and a copy."""

    row_s: float
    crossing_s: tuple[float, float]
    copy_s: tuple[float, float]

    @classmethod
    def of(cls, phases: Sequence[PhaseCosts]) -> _Gains:
        row_s, crossing_s, copy_s = 0.0, [0.0, 0.0], [0.0, 0.0]
        for phase in phases:  # sum() would not round as the compiled form does (Python 3.12)
            row_s += phase.row_s
            for lane in (INTER, INTRA):
                crossing_s[lane] += 2.0 * phase.exchange[lane].beta_s
                copy_s[lane] += phase.copy[lane].beta_s
        return cls(row_s, (crossing_s[0], crossing_s[1]), (copy_s[0], copy_s[1]))


def _best_move(
    load: Load, prices: _Gains, seats: list[list[int]], loads: list[int], spare: Sequence[int], own: Sequence[int],
    target: int,
) -> tuple[int, int, int, int] | None:  # fmt: skip
    """Rows of one of a rank's `own` seats that gain most elsewhere: (seat, seat that takes them over or -1 for a new
    copy, its rank, rows)."""
    rank, size = seats[own[0]][1] if own else 0, load.ranks_per_node
    excess, best, best_gain_s = loads[rank] - target, None, 0.0
    most_s = prices.row_s + max(prices.crossing_s)  # what a row can gain
    for i in own:
        expert, _, rows = seats[i]
        if not rows or (best is not None and not most_s * rows > best_gain_s):
            continue
        taken = set()
        for j, (other, to, _) in enumerate(seats):
            if other != expert:
                continue
            taken.add(to)
            moved = min(rows, excess, target - loads[to])
            gain_s = (prices.row_s - prices.crossing_s[lane_of(rank, to, size)]) * moved
            if j != i and moved > 0 and (best is None or gain_s > best_gain_s):
                best, best_gain_s = (i, j, to, moved), gain_s
        home = load.seats[expert][1]
        for to in range(len(loads)):
            room = target - loads[to]
            if spare[to] < 1 or room < 1 or to in taken:
                continue
            wanted = int(load.counts[to, expert])
            moved = min(rows, max(excess, wanted), room)
            crossing_s, copy_s = prices.crossing_s[lane_of(rank, to, size)], prices.copy_s[lane_of(home, to, size)]
            gain_s = prices.row_s * moved + crossing_s * min(wanted, moved) - copy_s
            if best is None or gain_s > best_gain_s:
                best, best_gain_s = (i, -1, to, moved), gain_s
    return best


def level(load: Load, seats: Sequence[Seat]) -> tuple[Seat, ...]:
    """The seats with the rows of each expert shared out anew inside each node, so that its ranks have equally many."""
    found, loads, size = [list(seat) for seat in seats], rank_rows(seats, len(load.counts)), load.ranks_per_node
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (expert, rank, _) in enumerate(seats):
        groups.setdefault((expert, rank // size), []).append(i)
    shared = [group for _, group in sorted(groups.items()) if len(group) > 1]
    for _ in range(SWEEPS):
        for group in shared:
            rows = sum(found[i][2] for i in group)
            others = sorted((loads[found[i][1]] - found[i][2], i) for i in group)
            count, held = len(others), sum(height for height, _ in others)
            while count > 1 and (held + rows) // count < others[count - 1][0]:
                count -= 1
                held -= others[count][0]
            height, more = divmod(held + rows, count)
            for place, (below, i) in enumerate(others):
                taken = height - below + (place < more) if place < count else 0
                loads[found[i][1]] += taken - found[i][2]
                found[i][2] = taken
    return tuple((expert, rank, rows) for expert, rank, rows in found)


def near(load: Load, seats: Sequence[Seat], most_copies: int) -> Iterator[tuple[Seat, ...]]:
    """Seats that differ little: none; without a new copy; with one more, off the fullest ranks; with one elsewhere;
    with one for another one of its node."""
    seats, given, size = tuple(seats), len(load.seats), load.ranks_per_node
    loads, spare = rank_rows(seats, len(load.counts)), _spare(load, seats)
    emptiest = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    fullest = sorted(range(len(seats)), key=lambda i: (-loads[seats[i][1]], -seats[i][2], i))
    held = {seat[:2] for seat in seats}
    yield seats
    for i in _copies_to_spare(load, seats):
        fewer = _inherited(seats, i, size)
        yield (*fewer[:i], *fewer[i + 1 :])
    for i in fullest if len(seats) - given < most_copies else ():
        expert, rank, rows = seats[i]
        for to in emptiest:
            first = to // size * size
            wanted = int(load.counts[first : first + size, expert].sum())
            moved = min(rows, (loads[rank] - loads[to]) // 2 if rank // size == to // size else wanted)
            if spare[to] and (expert, to) not in held and moved > 0:
                yield (*seats[:i], (expert, rank, rows - moved), *seats[i + 1 :], (expert, to, moved))
    for i in range(given, len(seats)):
        expert, _, rows = seats[i]
        for to in emptiest:
            if spare[to] and (expert, to) not in held:
                yield (*seats[:i], (expert, to, rows), *seats[i + 1 :])
    for i in fullest:
        expert, rank, rows = seats[i]
        for j in range(given, len(seats)):
            _, to, freed = seats[j]
            moved = min(rows, (loads[rank] - loads[to] + freed) // 2)
            if rank // size == to // size and (expert, to) not in held and loads[to] < loads[rank] and moved > 0:
                other = _inherited(seats, j, size)
                other[i], other[j] = (expert, rank, rows - moved), (expert, to, moved)
                yield tuple(other)


def _copies_to_spare(load: Load, seats: Sequence[Seat]) -> list[int]:
    """The new copies: those at the ends of the wires with most of them first, of those the ones with fewest rows."""
    new = range(len(load.seats), len(seats))
    ends = {i: (load.seats[seats[i][0]][1], seats[i][1]) for i in new}  # home, rank
    lane = {i: lane_of(*ends[i], load.ranks_per_node) for i in new}
    sent = Counter((lane[i], ends[i][0]) for i in new)
    got = Counter((lane[i], ends[i][1]) for i in new)

    def key(i: int) -> tuple[int, int, int, int]:
        return lane[i], -max(sent[lane[i], ends[i][0]], got[lane[i], ends[i][1]]), seats[i][2], i

    return sorted(new, key=key)


def _inherited(seats: Sequence[Seat], i: int, ranks_per_node: int) -> list[Seat]:
    """The seats when the rows of seat i go to another one of its expert and node, else to the home."""
    found = list(seats)
    expert, rank, rows = seats[i]
    node = rank // ranks_per_node
    heirs = (j for j, seat in enumerate(seats) if j != i and seat[0] == expert and seat[1] // ranks_per_node == node)
    heir = next(heirs, expert)
    found[heir] = (expert, seats[heir][1], seats[heir][2] + rows)
    return found
