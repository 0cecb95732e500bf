"""The least time that any choice of copies and any split of the rows could take: a bound for `bench balance`.

The price is that of `planning.replication`, row by row: the busiest rank's rows, the rows that leave and enter each
rank on both wires, the copies that leave and enter it. Free are x[s, e, r], the rows of source s for expert e computed
on rank r, and y[e, r], whether r has a copy of e. All prices are maxima of linear functions, so this is a mixed integer
linear programme, solved by HiGHS (scipy, which is needed for this alone). Rows are divisible in it, an expert costs
nothing by itself, and any tree of two groups may be taken, not only that of `agreement/relays.py`; so no decision is
below its optimum, whether copies come from their homes (all of them in the first group) or from rank to rank.

A copy on r comes from its home in the first group (f), or in the second one from a rank of its node (n) or of another
one (i): y = f + n + i. Who sends in the second group has the expert: it is the home, or f of it is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load, Seat

LANES = (INTER, INTRA)
GAP = 1e-4  # relative, at which a bound is proven
Terms = dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """`seconds`: no decision takes less. `proven`: some choice of copies takes no more, but for what was left out; else
    there was no time to say so, and the bound may be far below all choices. `seats`: of the best choice found, its rows
    rounded; None where none was found."""

    seconds: float
    proven: bool
    seats: tuple[Seat, ...] | None


def has_solver() -> bool:
    """Whether there is scipy."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        return False
    return True


def oracle(load: Load, phases: Sequence[PhaseCosts], *, known_s: float, seconds: float = 30.0) -> Bound:
    """The bound of all phases together. known_s: the price of a decision that is known, which bounds the rows of a rank
    in a better one; it is the bound where there is no better one. seconds: of the solver, after which what is proven by
    then counts. ConfigError without scipy, and for a load that has copies already."""
    if not has_solver():
        raise ConfigError("oracle", "no scipy", "scipy installed (pip install scipy)")
    if len(load.seats) != load.counts.shape[1]:
        raise ConfigError("seats", len(load.seats), "the homes alone")
    from scipy import optimize

    programme = _Programme(load, phases, known_s)
    found = optimize.milp(
        programme.objective,
        constraints=optimize.LinearConstraint(*programme.constraints()),
        bounds=optimize.Bounds(0.0, programme.upper),
        integrality=programme.integrality,
        options={"time_limit": seconds, "mip_rel_gap": GAP},
    )
    if found.status == 2:  # no better one
        return Bound(seconds=known_s, proven=True, seats=None)
    bound = found.mip_dual_bound
    bound = 0.0 if bound is None or not np.isfinite(bound) else float(bound)
    seats = None if found.x is None else programme.seats(found.x)
    return Bound(seconds=min(bound, known_s), proven=found.status == 0 or bound >= known_s, seats=seats)


class _Programme:
    """Variables by name and place, each with its bounds; rows of the matrix as they are added."""

    def __init__(self, load: Load, phases: Sequence[PhaseCosts], known_s: float) -> None:
        self.load, self.phases = load, phases
        self.ranks, experts = range(len(load.counts)), range(load.counts.shape[1])
        self.wanted = [e for e in experts if load.counts[:, e].any()]
        self.home = [load.seats[e][1] for e in experts]
        self._index: dict[tuple[Any, ...], int] = {}
        self._upper: list[float] = []
        self._whole: list[bool] = []
        self._cost: Terms = {}
        self._rows: list[tuple[Terms, float, float]] = []
        row_s = sum(phase.row_s for phase in phases)
        rows_s = max(0.0, known_s - sum(phase.beside_s for phase in phases))
        self._most_rows = min(float(load.counts.sum()), rows_s / row_s) if row_s else float(load.counts.sum())
        self._crossing = [self._new("crossing", lane, upper=1.0, whole=True) for lane in LANES]
        self._rows_are_computed_where_the_expert_is()
        self._copies_come_from_somebody()
        for number, phase in enumerate(phases):
            self._phase(number, phase)

    @property
    def objective(self) -> np.ndarray:
        found = np.zeros(len(self._index))
        found[list(self._cost)] = list(self._cost.values())
        return found

    @property
    def upper(self) -> np.ndarray:
        return np.array(self._upper)

    @property
    def integrality(self) -> np.ndarray:
        return np.array(self._whole, dtype=int)

    def constraints(self) -> tuple[Any, Any, Any]:
        """(sparse matrix, lower, upper)."""
        from scipy.sparse import coo_matrix

        entries = [(i, j, value) for i, (row, _, _) in enumerate(self._rows) for j, value in row.items()]
        i, j, values = zip(*entries, strict=True)
        matrix = coo_matrix((values, (i, j)), shape=(len(self._rows), len(self._index)))
        return matrix, np.array([low for _, low, _ in self._rows]), np.array([high for _, _, high in self._rows])

    def seats(self, found: np.ndarray) -> tuple[Seat, ...]:
        """Of a solution; a home takes what rounding leaves."""
        homes, copies = [], list[Seat]()
        for e, home in enumerate(self.home):
            rows = int(self.load.counts[:, e].sum())
            for r in self.ranks if e in self.wanted else ():
                taken = round(sum(found[self._index["x", s, e, r]] for s in self._sources(e)))
                if r != home and min(taken, rows) > 0:
                    copies.append((e, r, min(taken, rows)))
                    rows -= copies[-1][2]
            homes.append((e, home, rows))
        return (*homes, *copies)

    def _new(self, *name: Any, upper: float = np.inf, whole: bool = False) -> int:
        self._index[name] = len(self._index)
        self._upper.append(upper)
        self._whole.append(whole)
        return self._index[name]

    def _sources(self, e: int) -> list[int]:
        return [s for s in self.ranks if self.load.counts[s, e]]

    def _away(self, e: int) -> list[int]:
        return [r for r in self.ranks if r != self.home[e]]

    def _lane(self, one: int, other: int) -> int:
        node = self.load.ranks_per_node
        return INTRA if one // node == other // node else INTER

    def _at_most(self, terms: Terms, most: float) -> None:
        if terms:
            self._rows.append((terms, -np.inf, most))

    def _equal(self, terms: Terms, value: float) -> None:
        self._rows.append((terms, value, value))

    def _longer(self, variable: int, terms: Terms, constant: float = 0.0) -> None:
        """variable >= sum of terms + constant."""
        terms = {i: -value for i, value in terms.items() if value}
        if terms or constant > 0:
            self._rows.append(({variable: 1.0, **terms}, constant, np.inf))

    def _rows_are_computed_where_the_expert_is(self) -> None:
        counts = self.load.counts
        for e in self.wanted:
            sources = self._sources(e)
            for s in sources:
                row = {self._new("x", s, e, r): 1.0 for r in self.ranks}
                self._equal(row, float(counts[s, e]))
            most = min(float(counts[:, e].sum()), self._most_rows)
            for r in self._away(e):
                y = self._new("y", e, r, upper=1.0, whole=True)
                self._at_most({**self._sum(("x", s, e, r) for s in sources), y: -most}, 0.0)
                for s in sources:
                    self._at_most({self._index["x", s, e, r]: 1.0, y: -float(counts[s, e])}, 0.0)
        for r in self.ranks:
            slots = self._sum(("y", e, r) for e in self.wanted if r != self.home[e])
            self._at_most(slots, float(self.load.spare[r]))
        for lane in LANES:
            crossing = {i: 1.0 for s, r, i in self._moves() if self._lane(s, r) == lane}
            self._at_most({**crossing, self._crossing[lane]: -float(counts.sum())}, 0.0)

    def _sum(self, names: Iterable[tuple[Any, ...]]) -> Terms:
        return {self._index[name]: 1.0 for name in names}

    def _moves(self) -> list[tuple[int, int, int]]:
        """(source, rank, variable) of rows that leave their rank."""
        return [(name[1], name[3], i) for name, i in self._index.items() if name[0] == "x" and name[1] != name[3]]

    def _copies_come_from_somebody(self) -> None:
        """Who sends which copy in which group, where some phase relays."""
        if not any(phase.relays for phase in self.phases):
            return
        for e in self.wanted:
            away = self._away(e)
            for r in away:
                f, n, i = (self._new(kind, e, r, upper=1.0, whole=kind == "f") for kind in "fni")
                self._equal({f: 1.0, n: 1.0, i: 1.0, self._index["y", e, r]: -1.0}, 0.0)
            for q in self.ranks:  # how many it sends in the second group, on each wire
                for lane in LANES:
                    others = [r for r in away if r != q and self._lane(q, r) == lane]
                    sent, most = self._new("sent", lane, e, q), float(len(others))
                    has = {} if q == self.home[e] else {self._index["f", e, q]: -most}
                    self._at_most({sent: 1.0, **has}, 0.0 if has else most)
            for first in range(0, len(self.ranks), self.load.ranks_per_node):
                inside = range(first, first + self.load.ranks_per_node)
                got = self._sum(("n", e, r) for r in inside if r in away)
                self._equal({**got, **{self._index["sent", INTRA, e, q]: -1.0 for q in inside}}, 0.0)
            got = self._sum(("i", e, r) for r in away)
            self._equal({**got, **{self._index["sent", INTER, e, q]: -1.0 for q in self.ranks}}, 0.0)

    def _ports(self, group: int, lane: int) -> list[Terms]:
        """Copies that leave and enter each rank on a wire: in one group from their homes (-1), or in each of two."""
        pairs = [(e, r) for e in self.wanted for r in self._away(e)]
        kind = "n" if lane == INTRA else "i"
        found = []
        for q in self.ranks:
            if group < 1:
                name = "y" if group < 0 else "f"
                mine = [(e, r) for e, r in pairs if self._lane(self.home[e], r) == lane]
                found.append(self._sum((name, e, r) for e, r in mine if self.home[e] == q))
                found.append(self._sum((name, e, r) for e, r in mine if r == q))
            else:
                found.append(self._sum(("sent", lane, e, q) for e in self.wanted))
                found.append(self._sum((kind, e, r) for e, r in pairs if r == q))
        return found

    def _in_turn(self, number: int, phase: PhaseCosts) -> Terms:
        """As `PhaseCosts._in_turn_s`."""
        inputs, copies, homes = (self._new(name, number) for name in ("inputs", "copies", "homes"))
        for r in self.ranks:
            rows = {i: self.home[name[2]] == r for name, i in self._index.items() if name[0] == "x" and name[3] == r}
            self._longer(inputs, dict.fromkeys(rows, phase.row_s - phase.wgrad_row_s))
            self._longer(copies, {i: phase.wgrad_row_s for i, at_home in rows.items() if not at_home})
            self._longer(homes, {i: phase.wgrad_row_s for i, at_home in rows.items() if at_home})
        return {inputs: 1.0, copies: 1.0, homes: 1.0}

    def _groups_s(self, number: int, phase: PhaseCosts) -> Terms:
        """The seconds of a phase's copies, as a sum of variables."""
        groups, most = {}, float(len(self.wanted) * len(self.ranks))
        for group in (0, 1) if phase.relays else (-1,):
            group_s = self._new("group", number, group)
            groups[group_s] = 1.0
            for lane in LANES:
                line = phase.copy[lane]
                used = self._new("used", number, group, lane, upper=1.0, whole=True)
                ports = [one for one in self._ports(group, lane) if one]
                for one in ports:
                    self._longer(group_s, {**{i: line.beta_s * n for i, n in one.items()}, used: line.alpha_s})
                    self._at_most({**one, used: -most}, 0.0)
        return groups

    def _phase(self, number: int, phase: PhaseCosts) -> None:
        compute, wire, window = (self._new(name, number) for name in ("compute", "wire", "window"))
        self._cost[window] = 1.0
        copy = self._groups_s(number, phase)
        here: dict[int, Terms] = {r: {} for r in self.ranks}
        for name, i in self._index.items():
            if name[0] == "x":
                at_home = self.home[name[2]] == name[3]
                here[name[3]][i] = phase.row_s - phase.wgrad_row_s * at_home
        for r in self.ranks:
            rows = self._sum(("x", s, e, r) for e in self.wanted for s in self._sources(e))
            self._longer(compute, dict.fromkeys(rows, phase.row_s))
        for lane in LANES:
            line = phase.exchange[lane]
            moves = [one for one in self._moves() if self._lane(one[0], one[1]) == lane]
            latency = {self._crossing[lane]: 2.0 * phase.chunks * line.alpha_s}
            for r in self.ranks:
                for place in (0, 1):
                    self._longer(wire, {**{one[2]: 2.0 * line.beta_s for one in moves if one[place] == r}, **latency})
        part = 1.0 / phase.chunks
        through = {compute: 1.0}
        if phase.wgrad_row_s and (phase.joined or phase.exposed_copies):
            through = self._in_turn(number, phase)
        if phase.joined:
            self._longer(window, {**through, wire: 1.0, **copy}, phase.beside_s)
            return
        exposed = copy if phase.exposed_copies else {}
        self._longer(window, {compute: 1.0, **exposed}, phase.beside_s)
        if not phase.wgrad_row_s:
            self._longer(window, {compute: 1.0, wire: part, **copy})
            self._longer(window, {compute: part, wire: 1.0, **copy})
            return
        dgrad = 1.0 - phase.wgrad_row_s / phase.row_s
        self._longer(window, {compute: 1.0, wire: part / 2, **exposed})
        self._longer(window, {compute: part * dgrad, wire: 1.0, **copy})
        for first in here.values() if not phase.exposed_copies else ():  # gradients of copies, after their weights'
            self._longer(window, {**first, **copy})
            self._longer(window, {**first, **copy, wire: part / 2}, -phase.beside_s)
