"""The least time that any choice of copies and any split of the rows could take: a bound for `bench balance`.

The price is that of `planning.replication`, row by row: the busiest rank's rows, the rows that leave and enter each
rank on both wires, the copies that leave and enter it. Free are x[s, e, r], the rows of source s for expert e computed
on rank r, and y[e, r], whether r has a copy of e. All prices are maxima of linear functions, so with y in {0, 1} this
is a mixed integer linear programme; with 0 <= y <= 1 it is a linear one, whose optimum no choice beats. It is solved by
HiGHS (scipy, which is needed for this alone). Rows are divisible in it. Copies come from their home.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.replication import INTER, INTRA, Load

LANES = (INTER, INTRA)


def oracle_s(load: Load, phases: Sequence[PhaseCosts], *, whole_copies: bool = False, seconds: float = 30.0) -> float:
    """Seconds of all phases. whole_copies: copies are whole (exact, but for what is said above; branch and bound, for
    small shapes: what is proven after so many `seconds` counts), else a lower bound of it.

    No latency is in it, nor what an expert costs by itself. ConfigError without scipy, for a load that has copies
    already, and for copies that may go from rank to rank.
    """
    try:
        from scipy import optimize
    except ImportError:
        raise ConfigError("oracle", "no scipy", "scipy installed (pip install scipy)") from None
    if len(load.seats) != load.counts.shape[1]:
        raise ConfigError("seats", len(load.seats), "the homes alone")
    if any(phase.relays for phase in phases):
        raise ConfigError("phases", "relays", "copies that come from their homes")
    programme = _Programme(load, phases)
    constraints = optimize.LinearConstraint(*programme.constraints())
    found = optimize.milp(
        programme.objective,
        constraints=constraints,
        bounds=optimize.Bounds(0.0, programme.upper),
        integrality=programme.integrality if whole_copies else None,
        options={"time_limit": seconds},
    )
    bound = found.mip_dual_bound if whole_copies and found.mip_dual_bound is not None else found.fun
    if bound is None:
        raise ConfigError("oracle", found.message, "a programme that can be solved in this time")
    return float(bound)


class _Programme:
    """Variables: x by (source, expert, rank), where that source has rows for the expert; y by (expert, rank), but for
    homes; then for each phase its compute, wire, copy and window seconds."""

    def __init__(self, load: Load, phases: Sequence[PhaseCosts]) -> None:
        self.load, self.phases = load, phases
        ranks, experts = load.counts.shape
        self.wanted = [e for e in range(experts) if load.counts[:, e].any()]
        everywhere = range(ranks)
        rows = [(s, e, r) for e in self.wanted for s in everywhere if load.counts[s, e] for r in everywhere]
        self.x = {one: i for i, one in enumerate(rows)}
        copies = [(e, r) for e in self.wanted for r in range(ranks) if r != load.seats[e][1]]
        self.y = {pair: len(self.x) + i for i, pair in enumerate(copies)}
        self.first_time = len(self.x) + len(self.y)
        self.size = self.first_time + 4 * len(phases)
        self.objective = np.zeros(self.size)
        self.objective[self.first_time + 3 :: 4] = 1.0
        self.upper = np.full(self.size, np.inf)
        for index in self.y.values():
            self.upper[index] = 1.0
        self.integrality = np.zeros(self.size)
        self.integrality[list(self.y.values())] = 1
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def constraints(self) -> tuple[Any, Any, Any]:
        """(sparse matrix, lower, upper)."""
        from scipy.sparse import coo_matrix

        self._all_rows_are_computed_where_the_expert_is()
        for number, phase in enumerate(self.phases):
            self._phase(number, phase)
        entries = [(i, j, value) for i, (row, _, _) in enumerate(self.rows) for j, value in row.items()]
        i, j, values = zip(*entries, strict=True)
        matrix = coo_matrix((values, (i, j)), shape=(len(self.rows), self.size))
        return matrix, np.array([low for _, low, _ in self.rows]), np.array([high for _, _, high in self.rows])

    def _all_rows_are_computed_where_the_expert_is(self) -> None:
        counts = self.load.counts
        ranks = range(len(counts))
        for (s, e), n in np.ndenumerate(counts):
            if n:
                self.rows.append(({self.x[s, e, r]: 1.0 for r in ranks}, float(n), float(n)))
        for (e, r), y in self.y.items():
            for s in ranks:
                if counts[s, e]:
                    self.rows.append(({self.x[s, e, r]: 1.0, y: -float(counts[s, e])}, -np.inf, 0.0))
        for r in ranks:
            slots = {y: 1.0 for (_, to), y in self.y.items() if to == r}
            if slots:
                self.rows.append((slots, -np.inf, float(self.load.spare[r])))

    def _phase(self, number: int, phase: PhaseCosts) -> None:
        compute, wire, copy, window = range(self.first_time + 4 * number, self.first_time + 4 * number + 4)
        ranks = range(len(self.load.counts))
        for r in ranks:
            self._at_least(compute, {i: phase.row_s for (_, _, to), i in self.x.items() if to == r})
        for lane in LANES:
            beta_s, copy_s = 2.0 * phase.exchange[lane].beta_s, phase.copy[lane].beta_s
            for r in ranks:
                crossing = [(s, to, i) for (s, _, to), i in self.x.items() if s != to and self._lane(s, to) == lane]
                self._at_least(wire, {i: beta_s for s, _, i in crossing if s == r})
                self._at_least(wire, {i: beta_s for _, to, i in crossing if to == r})
                copied = [(self.load.seats[e][1], to, y) for (e, to), y in self.y.items()]
                copied = [(home, to, y) for home, to, y in copied if self._lane(home, to) == lane]
                self._at_least(copy, {y: copy_s for home, _, y in copied if home == r})
                self._at_least(copy, {y: copy_s for _, to, y in copied if to == r})
        part = 1.0 / phase.chunks
        if phase.joined:
            self._at_least(window, {compute: 1.0, wire: 1.0, copy: 1.0}, phase.beside_s)
            return
        exposed = 1.0 if phase.exposed_copies else 0.0
        self._at_least(window, {compute: 1.0, copy: exposed}, phase.beside_s)
        if not phase.wgrad_row_s:
            self._at_least(window, {compute: 1.0, wire: part, copy: 1.0})
            self._at_least(window, {compute: part, wire: 1.0, copy: 1.0})
            return
        dgrad = 1.0 - phase.wgrad_row_s / phase.row_s
        self._at_least(window, {compute: 1.0, wire: part / 2, copy: exposed})
        self._at_least(window, {compute: part * dgrad, wire: 1.0, copy: 1.0})
        for r in ranks if not phase.exposed_copies else ():  # gradients of copies, after those of their weights
            first = {i: phase.row_s - phase.wgrad_row_s * (self.load.seats[e][1] == r)
                     for (_, e, to), i in self.x.items() if to == r}  # fmt: skip
            self._at_least(window, {**first, copy: 1.0})
            self._at_least(window, {**first, copy: 1.0, wire: part / 2}, -phase.beside_s)

    def _at_least(self, variable: int, terms: dict[int, float], constant: float = 0.0) -> None:
        """variable >= sum of terms + constant."""
        if terms:
            self.rows.append(({variable: 1.0, **{i: -value for i, value in terms.items()}}, constant, np.inf))

    def _lane(self, one: int, other: int) -> int:
        node = self.load.ranks_per_node
        return INTRA if one // node == other // node else INTER
