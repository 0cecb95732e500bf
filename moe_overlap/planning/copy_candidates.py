"""The candidates of the decision about copies of experts: seats that may be faster than those that a step has.

The compiled form (csrc/core/replication.cpp) makes the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load, Seat, lane_of, rank_rows

SWEEPS = 3  # of `level`


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a rank's rows: `target` together, `copied` at copies, and `kept` at homes: -1, as many as the target has, or
    where ranks wait in turn what the other two leave. `inside`: new copies on the home's node alone."""

    target: int
    copied: int
    kept: int = -1
    inside: bool = False


def most_kept(load: Load, seats: Sequence[Seat], target: int) -> int:
    """The most rows that ranks may keep at homes, for those above it to find room at copies of their node's ranks, each
    of which takes the rest of the target."""
    ranks, experts = load.counts.shape
    homes, loads, size = rank_rows(seats[:experts], ranks), rank_rows(seats, ranks), load.ranks_per_node
    most = target
    for first in range(0, ranks, size):
        free = max(0, size * target - sum(loads[first : first + size]))  # room of homes that may be left
        ascending = sorted(homes[first : first + size])
        for count in range(1, size + 1):
            if count == size or count * ascending[count] - sum(ascending[:count]) > free:
                most = min(most, (free + sum(ascending[:count])) // count)
                break
    return most


def node_copies(load: Load, most_copies: int, ports: int, copied: int, in_node: int) -> tuple[Seat, ...]:
    """The seats with copies on nodes that lack an expert, for their ranks' rows, those with most rows first: at most
    `ports` from each rank and to each, where `copied` rows of them are computed, and on nodes that then have at most
    `in_node` rows. What has no room on one rank goes to another: the one that got fewest copies, then rows."""
    (ranks, experts), size = load.counts.shape, load.ranks_per_node
    seats, loads = [list(seat) for seat in load.seats], rank_rows(load.seats, ranks)
    sent, got, room = [0] * ranks, [0] * ranks, [copied] * ranks
    nodes = [sum(loads[first : first + size]) for first in range(0, ranks, size)]
    held = {(expert, rank // size) for expert, rank, _ in load.seats}
    rows_BE = load.counts.reshape(len(nodes), size, experts).sum(axis=1).tolist()
    wanted = {(e, b): rows_BE[b][e] for b in range(len(nodes)) for e in range(experts) if (e, b) not in held}
    taken = set()
    while wanted and most_copies > 0:
        expert, node = one = min(wanted, key=lambda one: (-wanted[one], one))
        home = load.seats[expert][1]
        free = [
            rank for rank in range(node * size, (node + 1) * size)
            if got[rank] < min(ports, load.spare[rank]) and (expert, rank) not in taken
        ]  # fmt: skip
        to = min(free, key=lambda rank: (got[rank], loads[rank], rank), default=home)
        moved = min(wanted[one], seats[expert][2], room[to], in_node - nodes[node])
        if to == home or sent[home] >= ports or moved <= 0:
            del wanted[one]
            continue
        wanted[one] -= moved
        taken.add((expert, to))
        most_copies -= 1
        sent[home] += 1
        got[to] += 1
        room[to] -= moved
        nodes[home // size] -= moved
        nodes[node] += moved
        seats.append([expert, to, 0])
        _move(seats, loads, expert, len(seats) - 1, moved)
    return tuple((expert, rank, rows) for expert, rank, rows in seats)


def fill(
    load: Load, phases: Sequence[PhaseCosts], start: Sequence[Seat], limits: Limits, most_copies: int
) -> tuple[Seat, ...]:
    """The seats when no rank keeps more rows than the limits allow that another one can take over, by so many more
    copies."""
    ranks, experts = load.counts.shape
    seats, loads, spare = [list(seat) for seat in start], rank_rows(start, ranks), _spare(load, start)
    copied, by_kind = rank_rows(start[experts:], ranks), limits.kept >= 0
    gives, limit = (rank_rows(start[:experts], ranks), limits.kept) if by_kind else (loads, limits.target)
    prices = _Gains.of(phases)

    def room(rank: int, *, home: bool = False) -> int:
        """Rows that a rank can take over at copies, or at a home."""
        below = limits.target - loads[rank]
        if by_kind:
            return 0 if home else limits.copied - copied[rank]
        return below if home else min(below, limits.copied - copied[rank])

    for rank in sorted(range(ranks), key=lambda rank: (-gives[rank], rank)):
        giving = start[:experts] if by_kind else seats
        own = [i for _, i in sorted((-seat[2], i) for i, seat in enumerate(giving) if seat[1] == rank)]
        while gives[rank] > limit:
            open_to = spare if most_copies > 0 else [0] * ranks
            found = _best_move(load, prices, seats, room, open_to, own, gives[rank] - limit, limits.inside)
            if found is None:
                break
            i, j, to, moved = found
            if j < 0:
                j = len(seats)
                seats.append([seats[i][0], to, 0])
                spare[to] -= 1
                most_copies -= 1
            _move(seats, loads, i, j, moved)
            copied[rank] -= moved if i >= experts else 0
            copied[to] += moved if j >= experts else 0
            if by_kind:
                gives[rank] -= moved
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
    load: Load, prices: _Gains, seats: list[list[int]], room: Callable[..., int], spare: Sequence[int],
    own: Sequence[int], excess: int, inside: bool,
) -> tuple[int, int, int, int] | None:  # fmt: skip
    """Rows of one of a rank's `own` seats that gain most elsewhere: (seat, seat that takes them over or -1 for a new
    copy, its rank, rows)."""
    rank, size = seats[own[0]][1] if own else 0, load.ranks_per_node
    best, best_gain_s = None, 0.0
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
            moved = min(rows, excess, room(to, home=j == expert))
            gain_s = (prices.row_s - prices.crossing_s[lane_of(rank, to, size)]) * moved
            if j != i and moved > 0 and (best is None or gain_s > best_gain_s):
                best, best_gain_s = (i, j, to, moved), gain_s
        home = load.seats[expert][1]
        for to in range(len(spare)):
            free = room(to)
            if spare[to] < 1 or free < 1 or to in taken or (inside and lane_of(home, to, size) == INTER):
                continue
            wanted = int(load.counts[to, expert])
            moved = min(rows, max(excess, wanted), free)
            crossing_s, copy_s = prices.crossing_s[lane_of(rank, to, size)], prices.copy_s[lane_of(home, to, size)]
            gain_s = prices.row_s * moved + crossing_s * min(wanted, moved) - copy_s
            if best is None or gain_s > best_gain_s:
                best, best_gain_s = (i, -1, to, moved), gain_s
    return best


def level(load: Load, seats: Sequence[Seat], limits: Limits) -> tuple[Seat, ...]:
    """The seats with the rows of each expert shared out anew inside each node, so that its ranks are equally far from
    their limits."""
    ranks, experts = load.counts.shape
    found, loads, size = [list(seat) for seat in seats], rank_rows(seats, ranks), load.ranks_per_node
    homes = rank_rows(seats[:experts], ranks)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (expert, rank, _) in enumerate(seats):
        groups.setdefault((expert, rank // size), []).append(i)
    shared = [group for _, group in sorted(groups.items()) if len(group) > 1]

    def height(i: int) -> int:
        """Of a seat's rank, without the seat's rows."""
        _, rank, rows = found[i]
        copied = loads[rank] - homes[rank] + limits.target - limits.copied
        if limits.kept >= 0:
            return (homes[rank] + limits.target - limits.kept if i < experts else copied) - rows
        return (loads[rank] if i < experts else max(loads[rank], copied)) - rows

    for _ in range(SWEEPS):
        for group in shared:
            rows = sum(found[i][2] for i in group)
            others = sorted((height(i), i) for i in group)
            count, held = len(others), sum(below for below, _ in others)
            while count > 1 and (held + rows) // count < others[count - 1][0]:
                count -= 1
                held -= others[count][0]
            even, more = divmod(held + rows, count)
            for place, (below, i) in enumerate(others):
                taken = even - below + (place < more) if place < count else 0
                loads[found[i][1]] += taken - found[i][2]
                homes[found[i][1]] += taken - found[i][2] if i < experts else 0
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
