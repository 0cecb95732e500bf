"""The least time that any choice of copies and any split of the rows could take: a bound for `bench balance`.

The price is that of `planning.replication`, row by row: the busiest rank's rows, the rows that leave and enter each
rank on both wires, the copies that leave and enter it. Free are x[g, e, r], the rows of sources g for expert e computed
on rank r, and y[e, r], whether r has a copy of e. All prices are maxima of linear functions, so this is a mixed integer
linear programme, solved by HiGHS (scipy, which is needed for this alone). Rows are divisible in it, an expert costs
nothing by itself, and any tree of two groups may be taken, not only that of `agreement/relays.py`; so no decision is
below its optimum, whether copies come from their homes (all of them in the first group) or from rank to rank.

A copy on r comes from its home in the first group (f), or in the second one from a rank of its node (n) or of another
one (i): y = f + n + i. Who sends in the second group has the expert: it is the home, or f of it is 1.

What follows from this for whole numbers alone is said to the solver too, as parts of copies would be far too cheap:

- A port is used a whole number of times, so the busiest one of a wire is a whole variable, and is branched on.
- z[e, b]: node b, which is not the home's, has the expert. Then a copy came to it from outside, and only then are rows
  computed there, all ranks together; a copy on r comes from outside itself, or is passed on by a rank of its node that
  got it in the first group.
- No choice that takes longer than the known one is looked at.

Where the wire inside a node costs nothing, ranks of a node are one source of rows (g), and w[s, e] alone says how many
rows each of them sends to other nodes: whatever these are, the rows can be dealt out so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import INTER, INTRA, Load, Seat
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.planning.replication import priced

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

    unit_s = min(known_s, priced(load, load.seats, phases)) or 1.0  # the solver's tolerances are absolute
    programme = _Programme(load, [_in_units(phase, unit_s) for phase in phases], known_s / unit_s)
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
    bound = 0.0 if bound is None or not np.isfinite(bound) else float(bound) * unit_s
    seats = None if found.x is None else programme.seats(found.x)
    return Bound(seconds=min(bound, known_s), proven=found.status == 0 or bound >= known_s, seats=seats)


def _in_units(phase: PhaseCosts, unit_s: float) -> PhaseCosts:
    """The same costs in units of so many seconds."""

    def scaled(lines: tuple[AlphaBeta, AlphaBeta]) -> tuple[AlphaBeta, AlphaBeta]:
        inter, intra = (AlphaBeta(alpha_s=line.alpha_s / unit_s, beta_s=line.beta_s / unit_s) for line in lines)
        return inter, intra

    return replace(
        phase, row_s=phase.row_s / unit_s, wgrad_row_s=phase.wgrad_row_s / unit_s, expert_s=phase.expert_s / unit_s,
        beside_s=phase.beside_s / unit_s, exchange=scaled(phase.exchange), copy=scaled(phase.copy),
    )  # fmt: skip


def _costs(line: AlphaBeta) -> bool:
    return bool(line.alpha_s or line.beta_s)


class _Programme:
    """Variables by name and place, each with its bounds; rows of the matrix as they are added."""

    def __init__(self, load: Load, phases: Sequence[PhaseCosts], known_s: float) -> None:
        self.load, self.phases = load, phases
        self.ranks, experts = range(len(load.counts)), range(load.counts.shape[1])
        size = load.ranks_per_node
        self.nodes = [range(first, first + size) for first in range(0, len(self.ranks), size)]
        inside = any(_costs(phase.exchange[INTRA]) for phase in phases)
        self.groups = [range(r, r + 1) for r in self.ranks] if inside else self.nodes  # of sources
        self.rows = np.array([load.counts[group].sum(axis=0) for group in self.groups], dtype=float)
        self.lanes = LANES if inside else (INTER,)  # those that rows pay for
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
        self._rows_are_computed_where_the_expert_is()
        self._copies_come_from_somebody()
        self._nodes_have_what_came_to_them()
        self._moves = {lane: self._rows_through_ports(lane) for lane in self.lanes}
        self._crossing = {lane: self._whether_rows_cross(lane) for lane in self.lanes}
        for number, phase in enumerate(phases):
            self._phase(number, phase)
        self._at_most(self._cost, known_s)

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
                taken = round(sum(found[self._index["x", g, e, r]] for g in self._sources(e)))
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
        """Groups with rows for an expert."""
        return [g for g in range(len(self.groups)) if self.rows[g, e]]

    def _away(self, e: int) -> list[int]:
        return [r for r in self.ranks if r != self.home[e]]

    def _node(self, rank: int) -> int:
        return rank // self.load.ranks_per_node

    def _lane(self, one: int, other: int) -> int:
        return INTRA if self._node(one) == self._node(other) else INTER

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
        for e in self.wanted:
            sources = self._sources(e)
            for g in sources:
                self._equal({self._new("x", g, e, r): 1.0 for r in self.ranks}, self.rows[g, e])
                self._some_leave_the_node(g, e)
            most = min(float(self.load.counts[:, e].sum()), self._most_rows)
            for r in self._away(e):
                y = self._new("y", e, r, upper=1.0, whole=True)
                self._at_most({**self._sum(("x", g, e, r) for g in sources), y: -most}, 0.0)
                for g in sources:
                    self._at_most({self._index["x", g, e, r]: 1.0, y: -min(most, self.rows[g, e])}, 0.0)
        for r in self.ranks:
            slots = self._sum(("y", e, r) for e in self.wanted if r != self.home[e])
            self._at_most(slots, float(self.load.spare[r]))

    def _some_leave_the_node(self, g: int, e: int) -> None:
        """Which sources of a group send its rows to other nodes."""
        group = self.groups[g]
        if self.groups is self.nodes:
            counts = self.load.counts[:, e]
            leave = {self._new("w", s, e, upper=float(counts[s])): 1.0 for s in group if counts[s]}
            leave |= {self._index["x", g, e, r]: -1.0 for r in self.ranks if r not in group}
            self._equal(leave, 0.0)

    def _sum(self, names: Iterable[tuple[Any, ...]]) -> Terms:
        return {self._index[name]: 1.0 for name in names}

    def _rows_through_ports(self, lane: int) -> list[Terms]:
        """Rows that leave and enter each rank on a wire."""
        leave: list[Terms] = [{} for _ in self.ranks]
        enter: list[Terms] = [{} for _ in self.ranks]
        for name, i in self._index.items():
            if name[0] == "w":
                leave[name[1]][i] = 1.0
            elif name[0] == "x":
                group, r = self.groups[name[1]], name[3]
                if r not in group and self._lane(group[0], r) == lane:
                    enter[r][i] = 1.0
                    if self.groups is not self.nodes:
                        leave[group[0]][i] = 1.0
        return leave + enter

    def _whether_rows_cross(self, lane: int) -> int:
        crossing = self._new("crossing", lane, upper=1.0, whole=True)
        rows = {i: 1.0 for port in self._moves[lane] for i in port if port}
        self._at_most({**rows, crossing: -2.0 * float(self.load.counts.sum())}, 0.0)
        return crossing

    def _copies_come_from_somebody(self) -> None:
        """Who sends which copy in which group, where some phase relays."""
        relaying = [phase for phase in self.phases if phase.relays]
        if not relaying:
            return
        inside = any(_costs(phase.copy[INTRA]) for phase in relaying)
        for e in self.wanted:
            away = self._away(e)
            for r in away:
                f, n, i = (self._new(kind, e, r, upper=1.0, whole=kind != "n") for kind in "fni")
                self._equal({f: 1.0, n: 1.0, i: 1.0, self._index["y", e, r]: -1.0}, 0.0)
            for q in self.ranks:  # how many it sends in the second group, on each wire
                for lane in LANES if inside else (INTER,):
                    others = [r for r in away if r != q and self._lane(q, r) == lane]
                    sent, most = self._new("sent", lane, e, q), float(len(others))
                    has = {} if q == self.home[e] else {self._index["f", e, q]: -most}
                    self._at_most({sent: 1.0, **has}, 0.0 if has else most)
            for node in self.nodes if inside else ():
                got = self._sum(("n", e, r) for r in node if r in away)
                self._equal({**got, **{self._index["sent", INTRA, e, q]: -1.0 for q in node}}, 0.0)
            got = self._sum(("i", e, r) for r in away)
            self._equal({**got, **{self._index["sent", INTER, e, q]: -1.0 for q in self.ranks}}, 0.0)

    def _nodes_have_what_came_to_them(self) -> None:
        """z, and what follows from it. Of copies passed on inside a node this is all that is said where the wire
        there is free."""
        relays = any(phase.relays for phase in self.phases)
        for e, (b, node) in ((e, one) for e in self.wanted for one in enumerate(self.nodes)):
            if self.home[e] in node:
                continue
            z = self._new("z", e, b, upper=1.0, whole=True)
            came = self._sum((kind, e, r) for r in node for kind in ("fi" if relays else "y"))
            self._at_most({z: 1.0, **dict.fromkeys(came, -1.0)}, 0.0)
            first = self._sum(("f", e, r) for r in node) if relays else {}
            for r in node:
                y = self._index["y", e, r]
                self._at_most({y: 1.0, z: -1.0}, 0.0)
                if relays:
                    self._at_most({y: 1.0, self._index["i", e, r]: -1.0, **dict.fromkeys(first, -1.0)}, 0.0)
            for g in self._sources(e):
                here = self._sum(("x", g, e, r) for r in node)
                self._at_most({**here, z: -self.rows[g, e]}, 0.0)
            for s in node if self.groups is self.nodes else ():
                if rows := float(self.load.counts[s, e]):
                    self._rows.append(({self._index["w", s, e]: 1.0, z: rows}, rows, np.inf))
        for e in self.wanted if self.groups is self.nodes else ():
            home = self._node(self.home[e])
            others = self._sum(("z", e, b) for b in range(len(self.nodes)) if b != home)
            for s in self.nodes[home]:
                if rows := float(self.load.counts[s, e]):
                    self._at_most({self._index["w", s, e]: 1.0, **dict.fromkeys(others, -rows)}, 0.0)

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

    def _busiest(self, group: int, lane: int) -> tuple[int, int]:
        """Variables: the copies through the busiest port of a group's wire, and whether there are any."""
        if ("busiest", group, lane) not in self._index:
            most = float(len(self.wanted) * len(self.ranks))
            busiest = self._new("busiest", group, lane, upper=most, whole=True)
            used = self._new("used", group, lane, upper=1.0, whole=True)
            self._at_most({busiest: 1.0, used: -most}, 0.0)
            for port in self._ports(group, lane):
                self._longer(busiest, port)
        return self._index["busiest", group, lane], self._index["used", group, lane]

    def _groups_s(self, number: int, phase: PhaseCosts) -> Terms:
        """The seconds of a phase's copies, as a sum of variables."""
        groups = {}
        for group in (0, 1) if phase.relays else (-1,):
            group_s = self._new("group", number, group)
            groups[group_s] = 1.0
            for lane, line in zip(LANES, phase.copy, strict=True):
                if _costs(line):
                    busiest, used = self._busiest(group, lane)
                    self._longer(group_s, {busiest: line.beta_s, used: line.alpha_s})
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
            rows = self._sum(("x", g, e, r) for e in self.wanted for g in self._sources(e))
            self._longer(compute, dict.fromkeys(rows, phase.row_s))
        for lane in self.lanes:
            line = phase.exchange[lane]
            latency = {self._crossing[lane]: 2.0 * phase.chunks * line.alpha_s}
            for port in self._moves[lane]:
                self._longer(wire, {**dict.fromkeys(port, 2.0 * line.beta_s), **latency})
        part = 1.0 / phase.chunks
        through = {compute: 1.0}
        if phase.waits_in_turn:
            through = self._in_turn(number, phase)
        if phase.joined:
            self._longer(window, {**through, wire: 1.0, **copy}, phase.beside_s)
            return
        exposed = copy if phase.exposed_copies else {}
        self._longer(window, {**through, **exposed}, phase.beside_s)
        if not phase.wgrad_row_s:
            self._longer(window, {compute: 1.0, wire: part, **copy})
            self._longer(window, {compute: part, wire: 1.0, **copy})
            return
        dgrad = 1.0 - phase.wgrad_row_s / phase.row_s
        self._longer(window, {**through, wire: part / 2, **exposed})
        self._longer(window, {compute: part * dgrad, wire: 1.0, **copy})
        for first in here.values() if not phase.exposed_copies else ():  # gradients of copies, after their weights'
            self._longer(window, {**first, **copy})
            self._longer(window, {**first, **copy, wire: part / 2}, -phase.beside_s)
