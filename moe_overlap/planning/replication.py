"""Leave rows where they are, move them to copies of their experts, or copy experts' weights: which is fastest?

A function of agreed integers and of calibrated costs, so that all ranks decide alike. "Leave it" is a candidate like
any other, and wins unless another one is faster by `margin`.

A candidate is a target: the most rows that a rank may compute. Ranks above it, the fullest first, hand rows to seats of
the same expert elsewhere, then, their largest expert first, to new copies on ranks that have a slot and room left. The
place of a copy is the one with the largest gain: the rows it takes over, those of its own tokens that need not cross
then, less the copy itself. It takes the rows above the target, or all of its rank's own if these are more. (A copy for
the wire's sake alone, from a rank below every target, is never made.) Targets lie between the mean and the fullest
rank, denser near the mean, where the number of copies grows (12, and 4 more around the best). Each is priced exactly:
rows of every rank, rows that leave and enter each rank on both wires, copies that leave and enter it. Among an expert's
seats, rows stay on their rank first, then on their node (`split_rows`). Where the costs allow it (`PhaseCosts.relays`),
each is priced with its copies from their homes and with the same copies from rank to rank (`agreement/relays.py`), and
has the lower price; the first where they tie.

The compiled form (csrc/core/replication.cpp) and the reference here give the same doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_overlap.agreement.relays import Order, Ports, direct_ports, relays_of
from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.planning.copy_costs import Computed, PhaseCosts

TARGETS, REFINED = 12, 4
TIE = 1e-9  # relative; rounding must not choose
MARGIN = 0.01
INTER, INTRA = 0, 1

Seat = tuple[int, int, int]  # expert, rank, rows computed there
Lanes = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be decided about: one step of one layer.

    counts: int64 [W, E], rows of each rank's tokens for each expert. seats: where they are computed as things are; the
    first E are the homes, in the order of the experts, the others copies that exist, no two of an expert on one rank.
    spare: by rank, slots for copies beside these. `refetched`: existing copies are fetched in every step too.
    """

    counts: np.ndarray
    seats: tuple[Seat, ...]
    spare: tuple[int, ...]
    ranks_per_node: int = 1
    refetched: bool = False

    def __post_init__(self) -> None:
        counts = np.ascontiguousarray(self.counts, dtype=np.int64)
        if counts.ndim != 2 or not counts.size or counts.min() < 0:
            raise ConfigError("counts", counts.shape, "rows by rank and expert, [W, E], none below 0")
        object.__setattr__(self, "counts", counts)
        ranks, experts = counts.shape
        if len(self.spare) != ranks or min(self.spare) < 0:
            raise ConfigError("spare", self.spare, f"{ranks} numbers of slots")
        if self.ranks_per_node < 1 or ranks % self.ranks_per_node:
            raise ConfigError("ranks_per_node", self.ranks_per_node, f"a divisor of {ranks}")
        homes = [expert for expert, _, _ in self.seats[:experts]]
        places = {(expert, rank) for expert, rank, _ in self.seats}
        inside = all(0 <= e < experts and 0 <= r < ranks and rows >= 0 for e, r, rows in self.seats)
        if homes != list(range(experts)) or len(places) != len(self.seats) or not inside:
            raise ConfigError("seats", self.seats[:experts], f"the {experts} homes in order, then copies elsewhere")
        computed = np.zeros(experts, dtype=np.int64)
        np.add.at(computed, [e for e, _, _ in self.seats], [rows for _, _, rows in self.seats])
        if (computed != counts.sum(axis=0)).any():
            raise ConfigError("seats", computed.tolist(), "all rows of every expert")

    @classmethod
    def at_home(
        cls, counts: np.ndarray, homes: Sequence[int], spare: Sequence[int], *, ranks_per_node: int = 1
    ) -> Load:
        """With no copies. homes: [E], the rank of each expert."""
        rows = np.asarray(counts, dtype=np.int64).sum(axis=0).tolist()
        seats = tuple((expert, rank, n) for expert, (rank, n) in enumerate(zip(homes, rows, strict=True)))
        return cls(counts=counts, seats=seats, spare=tuple(spare), ranks_per_node=ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """seats: those of the load in their order, then new copies, each with the rows that it computes. `left`: nothing
    changes. `left_s`, `predicted_s`: the seconds of leaving it and of this. `relayed`: weights go from rank to rank."""

    left: bool
    left_s: float
    predicted_s: float
    seats: tuple[Seat, ...]
    relayed: bool = False

    def copies(self, load: Load) -> tuple[tuple[int, int], ...]:
        """(expert, rank) of the new copies."""
        return tuple((expert, rank) for expert, rank, _ in self.seats[len(load.seats) :])


def decide(
    load: Load, phases: Sequence[PhaseCosts], *, most_copies: int | None = None, margin: float = MARGIN
) -> Decision:
    """The fastest of the candidates. `phases`: what is paid for this load, forward alone or both phases. most_copies:
    None, as many as there are slots. margin: by what part it has to be faster than leaving it."""
    check_options(phases, most_copies, margin)
    most = sum(load.spare) if most_copies is None else most_copies
    planner = native.planner()
    if planner is None:
        return decide_reference(load, phases, most_copies=most, margin=margin)
    left_s, predicted_s, left, seats, relayed = planner.decide_replication(
        load.counts, load.ranks_per_node, load.seats, load.spare, load.refetched, [phase.numbers for phase in phases],
        most, margin)  # fmt: skip
    return Decision(left=left, left_s=left_s, predicted_s=predicted_s, seats=tuple(seats), relayed=relayed)


def check_options(phases: Sequence[PhaseCosts], most_copies: int | None, margin: float) -> None:
    """Raises ConfigError for options of `decide` that say nothing."""
    given = [type(one).__name__ for one in phases] if isinstance(phases, Sequence) else type(phases).__name__
    if not phases or not isinstance(given, list) or not all(isinstance(one, PhaseCosts) for one in phases):
        expected = "the PhaseCosts of forward, or of both phases: what nominal_costs and measured_costs return"
        raise ConfigError("phases", given, expected)
    check_limits(most_copies, margin)


def check_limits(most_copies: int | None, margin: float) -> None:
    """`check_options`, without prices."""
    if most_copies is not None:
        check_count("most_copies", most_copies, least=0)
    if not 0 <= margin < 1:
        raise ConfigError("margin", margin, "a part of the time, from 0 to below 1")


def check_count(name: str, value: object, *, least: int) -> None:
    """Raises ConfigError for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(name, value, f"an integer of at least {least}")


def decide_reference(load: Load, phases: Sequence[PhaseCosts], *, most_copies: int, margin: float) -> Decision:
    """`decide` in plain Python: the definition the compiled one is tested against."""
    left_s, left_relayed = price(load, load.seats, phases)
    best_s, best_seats, best_relayed = left_s, load.seats, left_relayed
    best_target, best_copies = -1, most_copies
    loads = rank_rows(load.seats, len(load.counts))
    most, mean = max(loads), -(-sum(loads) // len(loads))
    squares = TARGETS * TARGETS
    targets = [mean + (most - mean) * j * j // squares for j in range(TARGETS)]
    allowed = [0, most_copies] if len(load.seats) > load.counts.shape[1] else [most_copies]
    for copies in allowed:
        for j in reversed(range(TARGETS)):
            seats = fill(load, phases, targets[j], copies)
            seconds, relayed = price(load, seats, phases)
            if seconds < best_s * (1 - TIE):
                best_s, best_seats, best_relayed, best_target, best_copies = seconds, seats, relayed, j, copies
    if best_target >= 0:
        low = targets[max(0, best_target - 1)]
        high = targets[best_target + 1] if best_target + 1 < TARGETS else most
        for i in range(1, REFINED + 1):
            seats = fill(load, phases, low + (high - low) * i // (REFINED + 1), best_copies)
            seconds, relayed = price(load, seats, phases)
            if seconds < best_s * (1 - TIE):
                best_s, best_seats, best_relayed = seconds, seats, relayed
    if not best_s < left_s * (1 - margin):
        return Decision(left=True, left_s=left_s, predicted_s=left_s, seats=load.seats, relayed=left_relayed)
    return Decision(left=False, left_s=left_s, predicted_s=best_s, seats=best_seats, relayed=best_relayed)


def rank_rows(seats: Sequence[Seat], ranks: int) -> list[int]:
    """[W]: the rows that each rank computes."""
    found = [0] * ranks
    for _, rank, rows in seats:
        found[rank] += rows
    return found


def fill(load: Load, phases: Sequence[PhaseCosts], target: int, most_copies: int) -> tuple[Seat, ...]:
    """The seats when no rank keeps more than `target` rows that another one can take over."""
    ranks = len(load.counts)
    seats = [list(seat) for seat in load.seats]
    spare, loads = list(load.spare), rank_rows(load.seats, ranks)
    order = sorted(range(ranks), key=lambda rank: (-loads[rank], rank))
    for rank in order:
        if loads[rank] <= target:
            break
        _to_existing(seats, loads, rank, target)
        most_copies -= _to_copies(load, phases, seats, loads, spare, rank, target, most_copies)
    return tuple((expert, rank, rows) for expert, rank, rows in seats)


def _to_existing(seats: list[list[int]], loads: list[int], rank: int, target: int) -> None:
    """Hand rows of `rank` above the target to other seats of their experts."""
    for i in range(len(seats)):
        if seats[i][1] != rank:
            continue
        for j in range(len(seats)):
            if j == i or seats[j][0] != seats[i][0]:
                continue
            moved = min(seats[i][2], loads[rank] - target, target - loads[seats[j][1]])
            if moved > 0:
                _move(seats, loads, i, j, moved)


def _move(seats: list[list[int]], loads: list[int], i: int, j: int, moved: int) -> None:
    seats[i][2] -= moved
    seats[j][2] += moved
    loads[seats[i][1]] -= moved
    loads[seats[j][1]] += moved


def _to_copies(
    load: Load, phases: Sequence[PhaseCosts], seats: list[list[int]], loads: list[int], spare: list[int], rank: int,
    target: int, most_copies: int,
) -> int:  # fmt: skip
    """Hand rows of `rank` above the target to new copies; how many were made."""
    made, stuck = 0, set()
    while loads[rank] > target and made < most_copies:
        own = [i for i, seat in enumerate(seats) if seat[1] == rank and seat[2] > 0 and i not in stuck]
        if not own:
            break
        i = max(own, key=lambda i: (seats[i][2], -i))
        to = _best_rank(load, phases, seats, loads, spare, i, target)
        if to < 0:
            stuck.add(i)
            continue
        wanted = int(load.counts[to, seats[i][0]])
        moved = min(seats[i][2], max(loads[rank] - target, wanted), target - loads[to])
        seats.append([seats[i][0], to, 0])
        spare[to] -= 1
        made += 1
        _move(seats, loads, i, len(seats) - 1, moved)
    return made


def _best_rank(
    load: Load, phases: Sequence[PhaseCosts], seats: list[list[int]], loads: list[int], spare: list[int], i: int,
    target: int,
) -> int:  # fmt: skip
    """Where a copy of the expert of seat i gains most; -1: nowhere."""
    expert, rank, rows = seats[i]
    home = load.seats[expert][1]
    taken = {seat[1] for seat in seats if seat[0] == expert}
    row_s = sum(phase.row_s for phase in phases)
    crossing_s = [sum(2.0 * phase.exchange[lane].beta_s for phase in phases) for lane in (INTER, INTRA)]
    copy_s = [sum(phase.copy[lane].beta_s for phase in phases) for lane in (INTER, INTRA)]
    best, best_gain_s = -1, 0.0
    for to in range(len(loads)):
        room = target - loads[to]
        if spare[to] < 1 or room < 1 or to in taken:
            continue
        wanted = int(load.counts[to, expert])
        moved = min(rows, max(loads[rank] - target, wanted), room)
        own = min(wanted, moved)
        lane, copied = _lane(rank, to, load.ranks_per_node), _lane(home, to, load.ranks_per_node)
        gain_s = row_s * moved + crossing_s[lane] * own - copy_s[copied]
        if best < 0 or gain_s > best_gain_s:
            best, best_gain_s = to, gain_s
    return best


def _lane(one: int, other: int, ranks_per_node: int) -> int:
    return INTRA if one // ranks_per_node == other // ranks_per_node else INTER


def priced(load: Load, seats: Sequence[Seat], phases: Sequence[PhaseCosts]) -> float:
    """Seconds of all phases when the rows are computed at `seats`."""
    return price(load, seats, phases)[0]


def price(load: Load, seats: Sequence[Seat], phases: Sequence[PhaseCosts]) -> tuple[float, bool]:
    """(seconds of all phases when the rows are computed at `seats`, whether copies are relayed then)."""
    ranks, experts = load.counts.shape
    out: Lanes = ([0] * ranks, [0] * ranks)
    into: Lanes = ([0] * ranks, [0] * ranks)
    copies: list[Order] = []
    of_expert: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    copied, hosted = [0] * ranks, [0] * ranks
    for number, (expert, rank, rows) in enumerate(seats):
        of_expert[expert].append((rank, rows))
        hosted[rank] += rows > 0
        copied[rank] += rows if number >= experts else 0
        if number >= experts and rows and (load.refetched or number >= len(load.seats)):
            copies.append(Order(expert, load.seats[expert][1], rank))
    for expert, places in enumerate(of_expert):
        for source, to, rows in split_rows(load.counts[:, expert].tolist(), places, load.ranks_per_node):
            if source != to:
                lane = _lane(source, to, load.ranks_per_node)
                out[lane][source] += rows
                into[lane][to] += rows
    busiest = [max(*out[lane], *into[lane]) for lane in (INTER, INTRA)]
    computed = Computed(rows=rank_rows(seats, ranks), copied=copied, experts=hosted)

    direct = direct_ports(copies, load.ranks_per_node)

    def seconds(*weights: Ports) -> float:
        """With weights in these groups where a phase relays them, and all else between the homes and the copies."""
        total = 0.0  # sum() would not round as the compiled form does (Python 3.12)
        for phase in phases:
            total += phase.window_s(computed, busiest, *(weights if phase.relays else [direct]))
        return total

    direct_s = seconds(direct)
    if not seconds() < direct_s * (1 - TIE):  # copies that may be relayed are hidden, or there are none
        return direct_s, False
    found = relays_of(tuple(copies), load.ranks_per_node)
    relayed_s = direct_s if found is None else seconds(*found.ports)
    return (relayed_s, True) if relayed_s < direct_s * (1 - TIE) else (direct_s, False)


def split_rows(
    counts_W: Sequence[int], places: Sequence[tuple[int, int]], ranks_per_node: int
) -> list[tuple[int, int, int]]:
    """(source, rank, rows): how the rows of one expert, by source rank, are shared out over `places` (rank, rows).

    Rows stay on their rank first, then on their node, then go in the order of ranks; each place gets exactly its rows,
    which sum to those of the sources.
    """
    left, room = list(counts_W), [rows for _, rows in places]
    found: list[tuple[int, int, int]] = []

    def take(source: int, j: int) -> None:
        rows = min(left[source], room[j])
        if rows:
            left[source] -= rows
            room[j] -= rows
            found.append((source, places[j][0], rows))

    for j, (rank, _) in enumerate(places):
        take(rank, j)
    for j, (rank, _) in enumerate(places):
        first = rank // ranks_per_node * ranks_per_node
        for source in range(first, first + ranks_per_node):
            take(source, j)
    for j in range(len(places)):
        for source in range(len(left)):
            if not room[j]:
                break
            take(source, j)
    return found
