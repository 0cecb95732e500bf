"""Leave rows where they are, move them to copies of their experts, or copy experts' weights: which is fastest?

A function of agreed integers and of calibrated costs, so that all ranks decide alike. "Leave it" is a candidate like
any other, and wins unless another one is faster by `margin`.

Candidates (`copy_candidates.py`) begin with the seats that there are, or with copies for the wire's sake: of the
experts that a node's ranks want most and that live on another one, as many as there are slots, and parts of these. From
there a target is the most rows that a rank may compute. Ranks above it, the fullest first, hand rows to other seats of
the expert or to new copies on ranks that have a slot and room left, each time where most is gained: the rows that are
taken over, those that need not cross then, less the copy itself. A new copy takes the rows above the target, or all of
its rank's own if these are more. Targets lie between the mean and the fullest rank, denser near the mean, where the
number of copies grows; one is the mean of the fullest node, and some more lie around the best. Where ranks and experts
are few, so that tries are cheap, there are two more kinds.

- Copies between nodes by how often a port is used for them, none, once or twice, as a second use costs as much as the
  first; then copies inside nodes alone (`node_copies`, `fill`), and rows levelled there. With limits on rows at copies:
  gradients of copies are hidden by what a rank computes for its own experts, and where ranks wait for those of copies
  and then for those of homes, each time for the slowest, both kinds are levelled (`most_kept`).
- A search from the best: rows shared out anew inside the nodes, a copy less, one more, one elsewhere, one for another
  one.

Each is priced exactly: rows of every rank, rows that leave and enter each rank on both wires, copies that leave and
enter it. Among an expert's seats, rows stay on their rank first, then on their node, evenly (`split_rows`). Where the
costs allow it (`PhaseCosts.relays`), each is priced with its copies from their homes and with the same copies from rank
to rank (`agreement/relays.py`), and has the lower price; the first where they tie.

The compiled form (csrc/core/replication.cpp) and the reference here give the same doubles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real

import numpy as np

from moe_overlap.agreement.relays import Order, Ports, direct_ports, relays_of
from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.planning.copy_candidates import Limits, fill, level, most_kept, near, node_copies
from moe_overlap.planning.copy_costs import Computed, PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load, Seat, check_count, lane_of, rank_rows

TARGETS, FEW_TARGETS, NEAR_TARGETS, REFINED = 12, (0, 2, 4, 7), (0, 1, 2, 3), 4
PORTS, ABOVE = (0, 1, 2), (0, 1, 2, 4)  # uses of a port between nodes; targets above the mean, in 32nds of it
LEAST_TRIES, MANY_TRIES, WORK = 12, 40, 18_000  # tries; more of them where ranks times experts are few
TIE = 1e-9  # relative; rounding must not choose
MARGIN = 0.01
UNLIMITED = Limits(target=0, copied=0)  # of levelled rows

Lanes = tuple[list[int], list[int]]


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
    most = sum(load.spare) if most_copies is None else min(most_copies, sum(load.spare))
    planner = native.planner()
    if planner is None:
        return decide_reference(load, phases, most_copies=most, margin=margin)
    left_s, predicted_s, left, seats, relayed = planner.decide_replication(
        load.counts, load.ranks_per_node, load.seats, load.spare, load.refetched, [phase.numbers for phase in phases],
        most, margin)  # fmt: skip
    return Decision(left=left, left_s=left_s, predicted_s=predicted_s, seats=seats, relayed=relayed)


def check_options(phases: Sequence[PhaseCosts], most_copies: int | None, margin: float) -> None:
    """Raises ConfigError for options of `decide` that say nothing."""
    given = [type(one).__name__ for one in phases] if isinstance(phases, Sequence) else type(phases).__name__
    if not given or not isinstance(given, list) or not all(isinstance(one, PhaseCosts) for one in phases):
        expected = "the PhaseCosts of forward, or of both phases: what nominal_costs and measured_costs return"
        raise ConfigError("phases", given, expected)
    check_limits(most_copies, margin)


def check_limits(most_copies: int | None, margin: float) -> None:
    """`check_options`, without prices."""
    if most_copies is not None:
        check_count("most_copies", most_copies, least=0)
    if isinstance(margin, bool) or not isinstance(margin, Real) or not 0 <= float(margin) < 1:
        raise ConfigError("margin", margin, "a part of the time, from 0 to below 1")


def decide_reference(load: Load, phases: Sequence[PhaseCosts], *, most_copies: int, margin: float) -> Decision:
    """`decide` in plain Python: the definition the compiled one is tested against."""
    left_s, left_relayed = price(load, load.seats, phases)
    ranks, experts = load.counts.shape
    tries = max(LEAST_TRIES, WORK // (ranks * experts))
    best = _Best(load, phases, tries, tries >= MANY_TRIES, seconds=left_s, seats=load.seats, relayed=left_relayed)
    targets = range(TARGETS) if best.many else NEAR_TARGETS
    if len(load.seats) > experts:
        best.try_targets(load.seats, targets, 0)
    best.try_targets(load.seats, targets, most_copies)
    if best.many:
        best.try_ports(most_copies)
        best.try_nodes(most_copies)
    while any(best.tries and best.attempt_levelled(seats) for seats in near(load, best.seats, most_copies)):
        pass
    if not best.seconds < left_s * (1 - margin):
        return Decision(left=True, left_s=left_s, predicted_s=left_s, seats=load.seats, relayed=left_relayed)
    return Decision(left=False, left_s=left_s, predicted_s=best.seconds, seats=best.seats, relayed=best.relayed)


@dataclass
class _Best:
    """The best of the seats that were tried; `tries`: how many more may be. `many`: there were enough of them for the
    whole; else targets near the mean are tried, and what differs little from the best."""

    load: Load
    phases: Sequence[PhaseCosts]
    tries: int
    many: bool
    seconds: float
    seats: tuple[Seat, ...]
    relayed: bool
    limits: Limits = UNLIMITED

    def attempt(self, seats: Sequence[Seat], limits: Limits = UNLIMITED) -> bool:
        """Whether these are faster, and now the best. New copies without rows are none."""
        if not self.tries:
            return False
        self.tries -= 1
        seconds, relayed = price(self.load, seats, self.phases)
        if not seconds < self.seconds * (1 - TIE):
            return False
        given = len(self.load.seats)
        kept = [seat for number, seat in enumerate(seats) if number < given or seat[2]]
        self.seconds, self.seats, self.relayed, self.limits = seconds, tuple(kept), relayed, limits
        return True

    def attempt_levelled(self, seats: Sequence[Seat], limits: Limits | None = None) -> bool:
        """`attempt`, with rows levelled inside nodes, within the limits of the best or these; the best itself takes no
        try."""
        limits = limits or self.limits
        found = level(self.load, seats, limits)
        return found != self.seats and self.attempt(found, limits)

    def try_ports(self, most_copies: int) -> None:
        """Copies between nodes by how often a port is used for them, then copies inside nodes, with rows levelled."""
        load, rows = self.load, int(self.load.counts.sum())
        before, mean = None, -(-rows // len(load.counts))
        for ports in PORTS[load.ranks_per_node == 1 :]:
            free = node_copies(load, most_copies, ports, rows, rows)
            if free == before:
                break
            before = free
            targets = [mean + mean * j // 32 for j in ABOVE]
            for target in targets if ports else [_fullest_node(load, free), *targets]:
                for limits, in_node in self._port_limits(free, target, ports, most_copies) if self.tries else ():
                    start = node_copies(load, most_copies, ports, limits.copied, in_node)
                    more = most_copies - (len(start) - len(load.seats))
                    seats = fill(load, self.phases, start, limits, more)
                    if len(seats) > len(load.seats):
                        self.attempt_levelled(seats, limits)

    def try_nodes(self, most_copies: int) -> None:
        """Copies that spare the wire between nodes most, and parts of these."""
        load, (_, experts), rows = self.load, self.load.counts.shape, int(self.load.counts.sum())
        copies = most_copies
        for quarters in (4, 2, 1, 3):
            start = node_copies(load, copies * quarters // 4, experts, rows, rows)
            made = len(start) - len(load.seats)
            copies = made if quarters == 4 else copies
            if made:
                self.attempt(start)
                self.try_targets(start, FEW_TARGETS, most_copies - made)

    def _port_limits(
        self, free: tuple[Seat, ...], target: int, ports: int, most_copies: int
    ) -> list[tuple[Limits, int]]:
        """Limits of ranks and of nodes. Where ranks wait in turn, as much at homes as can be, and half of it; else as
        many rows of copies that the weight gradients of homes hide the gradients of copies, and some more."""
        load, rows = self.load, int(self.load.counts.sum())
        if any(phase.waits_in_turn for phase in self.phases):
            kept = most_kept(load, free, target)
            kept = most_kept(load, node_copies(load, most_copies, ports, target - kept, rows), target)
            found = [Limits(target=target, copied=target - n, kept=n, inside=True) for n in (kept, kept // 2)]
            return [(limits, rows) for limits in found[: 1 + (kept > 0)]]
        hidden = 0.0
        for phase in self.phases:
            if phase.wgrad_row_s > 0 and ports:
                hidden = max(hidden, (phase.copy[INTER].alpha_s + phase.copy[INTER].beta_s * ports) / phase.wgrad_row_s)
        evenly = load.ranks_per_node * target
        choices = [(hidden, rows), (hidden, evenly), (0.75 * hidden, evenly)] if 0 < hidden < target else [
            (0.0, rows), *([(0.0, evenly)] if ports else [])]  # fmt: skip
        return [(Limits(target=target, copied=target - int(n), inside=True), most) for n, most in choices]

    def try_targets(self, start: Sequence[Seat], places: Sequence[int], most_copies: int) -> None:
        """Targets at these places, from the fullest rank's rows on down, and at the mean of the fullest node; then more
        around the best of the places."""
        loads = rank_rows(start, len(self.load.counts))
        most, mean = max(loads), -(-sum(loads) // len(loads))
        targets = [*(mean + (most - mean) * j * j // (TARGETS * TARGETS) for j in places), most]

        def attempt_at(target: int) -> bool:
            limits = Limits(target=target, copied=target)
            return bool(self.tries) and self.attempt(fill(self.load, self.phases, start, limits, most_copies))

        low, high = 0, -1
        for j in reversed(range(len(places))):
            if attempt_at(targets[j]):
                low, high = targets[max(0, j - 1)], targets[j + 1]
        attempt_at(_fullest_node(self.load, start))
        refined = REFINED if self.many else 1
        for i in range(1, refined + 1) if high >= low else ():
            attempt_at(low + (high - low) * i // (refined + 1))


def _fullest_node(load: Load, seats: Sequence[Seat]) -> int:
    """The mean of its ranks' rows."""
    loads, size = rank_rows(seats, len(load.counts)), load.ranks_per_node
    return max(-(-sum(loads[first : first + size]) // size) for first in range(0, len(loads), size))


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
                lane = lane_of(source, to, load.ranks_per_node)
                out[lane][source] += rows
                into[lane][to] += rows
    busiest = [max(*out[lane], *into[lane]) for lane in (INTER, INTRA)]
    computed = Computed(rows=rank_rows(seats, ranks), copied=copied, experts=hosted)

    return faster_form(phases, computed, busiest, copies, load.ranks_per_node)


def faster_form(
    phases: Sequence[PhaseCosts], computed: Computed, rows: Sequence[int], copies: Sequence[Order], ranks_per_node: int
) -> tuple[float, bool]:
    """(seconds of all phases, whether copies are relayed then): with all copies from their homes, or, where that is
    faster, weights from rank to rank in the phases that may. rows: of the busiest rank, by wire."""
    direct = direct_ports(copies, ranks_per_node)

    def seconds(*weights: Ports) -> float:
        """With weights in these groups where a phase relays them, and all else between the homes and the copies."""
        total = 0.0  # sum() would not round as the compiled form does (Python 3.12)
        for phase in phases:
            total += phase.window_s(computed, rows, *(weights if phase.relays else [direct]))
        return total

    direct_s = seconds(direct)
    if not seconds() < direct_s * (1 - TIE):  # copies that may be relayed are hidden, or there are none
        return direct_s, False
    found = relays_of(tuple(copies), ranks_per_node)
    relayed_s = direct_s if found is None else seconds(*found.ports)
    return (relayed_s, True) if relayed_s < direct_s * (1 - TIE) else (direct_s, False)


def split_rows(
    counts_W: Sequence[int], places: Sequence[tuple[int, int]], ranks_per_node: int
) -> list[tuple[int, int, int]]:
    """(source, rank, rows): how the rows of one expert, by source rank, are shared out over `places` (rank, rows).

    Rows stay on their rank first, then on their node, evenly: each source keeps the same part of its rows there and
    each place has the same part of its room left for rows of other nodes, so that no port has all that cross. Each
    place gets exactly its rows, which sum to those of the sources.
    """
    left, room = list(counts_W), [rows for _, rows in places]
    found: list[tuple[int, int, int]] = []

    def take(source: int, j: int, rows: int) -> None:
        if rows:
            left[source] -= rows
            room[j] -= rows
            found.append((source, places[j][0], rows))

    def spread(sources: Sequence[int], here: Sequence[int]) -> None:
        """As many rows as there is room for, from each source and to each place its part of them."""
        wanted, free = sum(left[source] for source in sources), sum(room[j] for j in here)
        moved = min(wanted, free)
        if not moved:
            return
        given = _parts([left[source] for source in sources], moved, wanted)
        taken = _parts([room[j] for j in here], moved, free)
        i = 0
        for j, rows in zip(here, taken, strict=True):
            while rows:
                some = min(rows, given[i])
                take(sources[i], j, some)
                rows -= some
                given[i] -= some
                i += not given[i]

    for j, (rank, _) in enumerate(places):
        take(rank, j, min(left[rank], room[j]))
    for first in range(0, len(left), ranks_per_node):
        here = [j for j, (rank, _) in enumerate(places) if first <= rank < first + ranks_per_node]
        spread(range(first, first + ranks_per_node), here)
    spread(range(len(left)), range(len(places)))
    return found


def split_seats(counts_WE: np.ndarray, seats: Sequence[Seat], ranks_per_node: int) -> np.ndarray:
    """int64 [N, 3] (source, number of the seat, rows), as `split_rows` says, of all experts with several seats."""
    planner = native.planner()
    if planner is None:
        return split_seats_reference(counts_WE, seats, ranks_per_node)
    return planner.split_rows(counts_WE, tuple(seats), ranks_per_node)


def split_seats_reference(counts_WE: np.ndarray, seats: Sequence[Seat], ranks_per_node: int) -> np.ndarray:
    """`split_seats` in plain Python: the definition the compiled one is tested against."""
    of_expert: dict[int, dict[int, int]] = defaultdict(dict)  # the number of the seat on each rank
    for number, (expert, rank, _) in enumerate(seats):
        of_expert[expert][rank] = number
    found = [
        (source, places[rank], rows)
        for expert, places in sorted(of_expert.items())
        if len(places) > 1
        for source, rank, rows in split_rows(
            counts_WE[:, expert].tolist(), [(rank, seats[number][2]) for rank, number in places.items()], ranks_per_node
        )
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _parts(of: Sequence[int], moved: int, total: int) -> list[int]:
    """`moved` of the `total`, each its part."""
    ends = [moved * end // total for end in accumulate(of)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
