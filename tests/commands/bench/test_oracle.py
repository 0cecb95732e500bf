"""The oracle against all sets of copies, all trees of two groups that bring them, and the best rows for each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from moe_overlap.commands.bench.oracle import GAP, oracle
from moe_overlap.planning.copy_costs import FREE, Computed, PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.planning.replication import decide

pytest.importorskip("scipy")
LANES = (INTER, INTRA)
Copies = dict[int, tuple[int, ...]]  # of each expert, the ranks with a copy
Ports = tuple[tuple[int, int], ...]  # of each group, copies through the busiest port of each wire


def line(beta_s, alpha_s=0.0):
    return AlphaBeta(alpha_s=alpha_s, beta_s=beta_s)


DEAR = {"exchange": (line(0.3, 1.0), line(0.05, 0.5)), "copy": (line(9.0, 2.0), line(2.0, 0.5))}
FREE_INSIDE = {"exchange": (line(0.3, 1.0), FREE), "copy": (line(9.0, 1.0), FREE)}
ROWS_FREE_INSIDE = {"exchange": (line(0.4), FREE), "copy": (line(6.0), line(3.0, 0.2))}
COPIES_FREE_INSIDE = {"exchange": (line(0.4), line(0.1)), "copy": (line(8.0), FREE)}


def all_copies(load: Load) -> Iterator[Copies]:
    """Every set of copies that there are slots for."""
    homes = [rank for _, rank, _ in load.seats]
    kept = []
    for r, slots in enumerate(load.spare):
        others = [e for e, home in enumerate(homes) if home != r]
        kept.append([some for n in range(slots + 1) for some in itertools.combinations(others, n)])
    for chosen in itertools.product(*kept):
        yield {e: tuple(r for r, own in enumerate(chosen) if e in own) for e in range(len(homes))}


def trees(home: int, ranks: tuple[int, ...]) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Every way of one expert to its copies, (group, sender, rank) each."""
    for n in range(len(ranks) + 1):
        for first in itertools.combinations(ranks, n):
            rest = [r for r in ranks if r not in first]
            for senders in itertools.product((home, *first), repeat=len(rest)):
                yield (*((0, home, r) for r in first), *((1, q, r) for q, r in zip(senders, rest, strict=True)))


def busiest(load: Load, hops: Sequence[tuple[int, int, int]], groups: int) -> Ports:
    used, size = Counter[tuple[int, int, bool, int]](), load.ranks_per_node
    for group, sender, rank in hops:
        lane = INTRA if sender // size == rank // size else INTER
        used.update([(group, lane, True, sender), (group, lane, False, rank)])
    most = [[0, 0] for _ in range(groups)]
    for (group, lane, _, _), count in used.items():
        most[group][lane] = max(most[group][lane], count)
    return tuple((inter, intra) for inter, intra in most)


def copy_seconds(phase: PhaseCosts, ports: Ports) -> float:
    def seconds(group):
        return max(one.alpha_s + one.beta_s * n if n else 0.0 for one, n in zip(phase.copy, group, strict=True))

    return sum(map(seconds, ports))


def ways(load: Load, phases: Sequence[PhaseCosts], copies: Copies) -> list[Ports]:
    """Of each phase the ports of its cheapest way; at most one phase relays, so that they may be chosen apart."""
    homes = [rank for _, rank, _ in load.seats]
    direct = busiest(load, [(0, homes[e], r) for e, ranks in copies.items() for r in ranks], 1)
    relayed = set[Ports]()
    if any(phase.relays for phase in phases):
        each = [list(trees(homes[e], ranks)) for e, ranks in copies.items()]
        relayed = {busiest(load, [hop for tree in one for hop in tree], 2) for one in itertools.product(*each)}
    return [min(relayed, key=lambda ports: copy_seconds(phase, ports)) if phase.relays else direct for phase in phases]


class Rows:
    """The linear programme of the rows where copies, and the wires that rows may take, are given."""

    def __init__(self, load: Load, copies: Copies, lanes: Sequence[int]) -> None:
        self.load, self.lanes, size = load, lanes, load.ranks_per_node
        self.homes = [rank for _, rank, _ in load.seats]
        self.names = [
            (s, e, r) for (s, e), n in np.ndenumerate(load.counts) if n
            for r in {self.homes[e], *copies[e]}
            if s == r or (INTRA if s // size == r // size else INTER) in lanes
        ]  # fmt: skip
        self.size = len(self.names)
        self.above: list[np.ndarray] = []  # each times (rows, times, 1) is at most 0

    def of(self, taken) -> np.ndarray:
        return np.array([float(taken(*name)) for name in self.names])

    def on(self, r: int) -> np.ndarray:
        return self.of(lambda s, e, to: to == r)

    def copied(self, r: int) -> np.ndarray:
        return self.of(lambda s, e, to: to == r != self.homes[e])

    def ports(self, lane: int) -> list[np.ndarray]:
        node = self.load.ranks_per_node

        def moved(s, to):
            return s != to and lane == (INTRA if s // node == to // node else INTER)

        ranks = range(len(self.load.counts))
        leave = [self.of(lambda s, e, to, r=r: moved(s, to) and s == r) for r in ranks]
        return leave + [self.of(lambda s, e, to, r=r: moved(s, to) and to == r) for r in ranks]


def least_rows(rows: Rows, phases: Sequence[PhaseCosts], ports: Sequence[Ports]) -> tuple[float, np.ndarray] | None:
    """(seconds, rows of each name) of the best rows; None where they cannot be anywhere."""
    from scipy.optimize import linprog

    ranks, count = range(len(rows.load.counts)), rows.size
    names = [(number, what) for number in range(len(phases)) for what in ("window", "busy", "wire", "in", "out", "own")]
    width, above, most = count + len(names), [], []

    def at_least(number, what, row, constant=0.0, **times):
        """A time of a phase >= row times rows + times + constant."""
        found = np.zeros(width)
        found[:count] = row
        for name, factor in {**times, what: times.get(what, 0.0) - 1.0}.items():
            found[count + names.index((number, name))] += factor
        above.append(found)
        most.append(-constant)

    for number, (phase, groups) in enumerate(zip(phases, ports, strict=True)):
        zero, copy_s, chunks = np.zeros(count), copy_seconds(phase, groups), phase.chunks
        dgrad_s = phase.row_s - phase.wgrad_row_s
        for r in ranks:
            on, copied = rows.on(r), rows.copied(r)
            at_least(number, "busy", phase.row_s * on)
            for what, seconds in (("in", dgrad_s * on), ("out", phase.wgrad_row_s * copied),
                                  ("own", phase.wgrad_row_s * (on - copied))):  # fmt: skip
                at_least(number, what, seconds)
        for lane in rows.lanes:
            sent = phase.exchange[lane]
            for port in rows.ports(lane):
                at_least(number, "wire", 2 * sent.beta_s * port, 2 * chunks * sent.alpha_s)
        in_turn = phase.wgrad_row_s and (phase.joined or phase.exposed_copies)
        through = {"in": 1.0, "out": 1.0, "own": 1.0} if in_turn else {"busy": 1.0}
        exposed_s = copy_s if phase.exposed_copies else 0.0
        part = 0.5 / chunks
        if phase.joined:
            at_least(number, "window", zero, phase.beside_s + copy_s, **through, wire=1.0)
        elif not phase.wgrad_row_s:
            at_least(number, "window", zero, phase.beside_s + exposed_s, busy=1.0)
            at_least(number, "window", zero, copy_s, busy=1.0, wire=2 * part)
            at_least(number, "window", zero, copy_s, busy=1.0 / chunks, wire=1.0)
        else:
            at_least(number, "window", zero, phase.beside_s + exposed_s, **through)
            at_least(number, "window", zero, exposed_s, **through, wire=part)
            at_least(number, "window", zero, copy_s, busy=dgrad_s / phase.row_s / chunks, wire=1.0)
            for r in ranks if copy_s > exposed_s else ():
                last = dgrad_s * rows.on(r) + phase.wgrad_row_s * rows.copied(r)
                at_least(number, "window", last, copy_s)
                at_least(number, "window", last, copy_s - phase.beside_s, wire=part)
    pairs = [(s, e) for (s, e), n in np.ndenumerate(rows.load.counts) if n]
    equal = [np.append(rows.of(lambda s, e, r, pair=pair: (s, e) == pair), np.zeros(len(names))) for pair in pairs]
    cost = np.append(np.zeros(count), [float(what == "window") for _, what in names])
    found = linprog(
        cost, A_ub=np.array(above), b_ub=most, A_eq=np.array(equal), b_eq=[rows.load.counts[p] for p in pairs]
    )
    return (found.fun, found.x[:count]) if found.status == 0 else None


def least_s(load: Load, phases: Sequence[PhaseCosts]) -> tuple[float, Copies]:
    """The optimum by trying everything, and its copies."""
    best: tuple[float, Copies] = np.inf, {}
    late = [any(phase.exchange[lane].alpha_s for phase in phases) for lane in LANES]  # else using a wire costs nothing
    for copies in all_copies(load):
        ports = ways(load, phases, copies)
        for lanes in itertools.product(*(((), (lane,)) if late[lane] else ((lane,),) for lane in LANES)):
            rows = Rows(load, copies, sum(lanes, ()))
            found = least_rows(rows, phases, ports)
            if found is not None and found[0] < best[0]:
                assert found[0] == pytest.approx(window_s(rows, phases, ports, found[1]), rel=1e-6)
                best = found[0], copies
    return best


def window_s(rows: Rows, phases: Sequence[PhaseCosts], ports: Sequence[Ports], found: np.ndarray) -> float:
    """The price of these rows, as the decision has it; where a wire may be used and is not, it has no latency."""
    ranks = range(len(rows.load.counts))
    computed = Computed(rows=[float(rows.on(r) @ found) for r in ranks], experts=[0] * len(ranks),
                        copied=[float(rows.copied(r) @ found) for r in ranks])  # fmt: skip
    moved = [max(float(port @ found) for port in rows.ports(lane)) for lane in LANES]
    return sum(phase.window_s(computed, moved, *groups) for phase, groups in zip(phases, ports, strict=True))


def drawn(seed: int, ranks: int, homes: Sequence[int], *, spare: int, per_node: int) -> Load:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, (ranks, len(homes)))
    counts[:, 0] += rng.integers(20, 60, ranks)  # hot
    counts[rng.random(counts.shape) < 0.1] = 0
    return Load.at_home(counts, homes, [spare] * ranks, ranks_per_node=per_node)


@pytest.mark.parametrize("lines", [DEAR, FREE_INSIDE, ROWS_FREE_INSIDE, COPIES_FREE_INSIDE])
@pytest.mark.parametrize(
    "more", [{"joined": True}, {"chunks": 3}, {"chunks": 2, "exposed_copies": True, "beside_s": 7.0}]
)
def test_the_optimum_is_that_of_trying_everything(lines, more):
    forward = PhaseCosts(row_s=1.0, relays=True, **lines, **more)
    phases = [forward, replace(forward, row_s=2.0, wgrad_row_s=1.0, relays=False)]
    used = 0
    for load, some in (
        (drawn(1, 4, [0, 2], spare=1, per_node=2), phases),
        (drawn(2, 4, [1, 1, 2], spare=1, per_node=2), phases[:1]),
        (drawn(3, 4, [0], spare=1, per_node=1), phases[1:]),
        (drawn(4, 6, [0], spare=1, per_node=2), phases[:1]),
    ):
        right, copies = least_s(load, some)
        known_s = decide(load, some, margin=0.0).predicted_s
        used += any(copies.values())
        for known in (known_s, 3 * known_s):
            found = oracle(load, some, known_s=known)
            assert found.proven and right * (1 - 1.1 * GAP) <= found.seconds <= right * (1 + 1e-6)
    assert used >= 2


def test_the_unit_of_time_changes_nothing():
    """The tolerances of the solver are absolute, and a step may take microseconds."""
    load = drawn(5, 4, [0, 1, 3], spare=2, per_node=2)
    found = []
    for unit in (1e-6, 1.0, 1e3):
        lines = {name: tuple(line(one.beta_s * unit, one.alpha_s * unit) for one in DEAR[name]) for name in DEAR}
        phases = [PhaseCosts(row_s=unit, relays=True, chunks=2, **lines)]
        bound = oracle(load, phases, known_s=decide(load, phases, margin=0.0).predicted_s)
        assert bound.proven
        found.append(bound.seconds / unit)
    assert found == pytest.approx([found[0]] * 3, rel=2 * GAP)
