"""Tutel's switch between expert and data parallelism (arXiv 2206.03382, section 3.2), as a rule of the layer.

At degree d the W ranks are d groups of W / d ranks in a row, and every group has all the experts that its tokens want:
rows stay inside their group. Degree 1 is expert parallelism. At degree W no row travels, and every rank fetches the
experts of its own tokens: data parallelism whose weights are spread out as ZeRO spreads them. Owners, optimizer states
and checkpoints are the same at every degree; what differs is what travels, so that each step has the degree that its
counts make the fastest. Where one expert alone is worth copying, `ReplicationRule` finds more. Tutel's other choice,
an expert's width split over ranks, is `TensorParallelMoE`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moe_overlap.agreement.relays import Order
from moe_overlap.auto.replicate import Shares, held_with
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import Computed, PhaseCosts
from moe_overlap.planning.copy_load import check_count
from moe_overlap.planning.replication import MARGIN, check_options, faster_form

MOST_RELAYED = 128  # some ms to find the way of so many copies


@dataclass(frozen=True, kw_only=True)
class Degree:
    """A degree in one step. `hosts`: int64 [d, E], the rank at which each group computes an expert, -1 where none of
    its tokens wants it. `copies`: how many of these are not at home. `seconds`: predicted, with weights that go from
    rank to rank where `relayed`."""

    degree: int
    hosts: np.ndarray
    copies: int
    seconds: float
    relayed: bool


@dataclass(kw_only=True)
class ParallelismSwitch:
    """A `StepRule`: the degree of data parallelism of each step, by its counts and by costs equal on all ranks.

    phases: what is paid for a step, forward alone or both (`measured_costs`, `nominal_costs`), equal on all ranks.
    degrees: those to choose from, divisors of the ranks; None: all of them; with one alone there is no choice. margin:
    by what part a degree has to be faster than the lowest one. ranks_per_node: as the layer has it. `last`: what the
    last call chose, `relayed` whether its copies go from rank to rank, `seconds` what it priced each degree at: so one
    rule for each layer. The layer's placement has one slot for each expert. Who sends what is found in Python, so more
    than MOST_RELAYED copies come from their homes.
    """

    phases: Sequence[PhaseCosts]
    degrees: Sequence[int] | None = None
    ranks_per_node: int = 1
    margin: float = MARGIN
    last: Degree | None = field(default=None, init=False)
    seconds: dict[int, float] = field(default_factory=dict, init=False)
    relayed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        given = self.degrees
        bad = not isinstance(given, Sequence) or not given
        if given is not None and (bad or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given)):
            raise ConfigError("degrees", self.degrees, "None, or a sequence of integers of at least 1")
        check_count("ranks_per_node", self.ranks_per_node, least=1)
        check_options(self.phases, None, self.margin)

    @cached_property
    def digest(self) -> int:
        """Of everything that the choice depends on beside the counts."""
        degrees = None if self.degrees is None else sorted(set(self.degrees))
        parts = ("degrees", [phase.numbers for phase in self.phases], degrees, self.ranks_per_node, self.margin)
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") >> 1

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """counts: int64 [W, BLOCKS, E]. ConfigError for a placement with copies, and for a degree that does not divide
        the ranks."""
        counts_WE = counts.sum(axis=1)
        found = [self._priced(counts_WE, base, degree) for degree in self._degrees(base)]
        self.seconds = {one.degree: one.seconds for one in found}
        best = min(found, key=lambda one: (one.seconds, one.degree))
        self.last = best if best.seconds < found[0].seconds * (1 - self.margin) else found[0]
        self.relayed = self.last.relayed
        return base if self.last.degree == 1 else _placement(base, self.last)

    def slots_for_copies(self, base: Placement) -> int:
        """Of a rank, at the highest degree, where all experts are wanted."""
        highest = self._degrees(base)[-1]
        return max(len(_hosted(base, highest, rank)) for rank in range(base.world_size))

    def told(self) -> str:
        """What the last step did, for `explain()`; "" before the first."""
        if self.last is None:
            return ""
        each = ", ".join(f"{degree}: {1e3 * seconds:.3g} ms" for degree, seconds in self.seconds.items())
        how = " that go from rank to rank" if self.relayed else ""
        what = f"degree {self.last.degree} of data parallelism, {self.last.copies} copies{how}"
        return f"{what}; predicted by degree {each}"

    def _degrees(self, base: Placement) -> list[int]:
        ranks = base.world_size
        if base.has_replicas:
            expected = f"one for each of the {base.num_experts} experts, beside a ParallelismSwitch"
            raise ConfigError("placement", f"{base.num_slots} slots", expected)
        if ranks % self.ranks_per_node:
            raise ConfigError("ranks_per_node", self.ranks_per_node, f"a divisor of {ranks}")
        if self.degrees is None:
            return [degree for degree in range(1, ranks + 1) if ranks % degree == 0]
        wrong = [degree for degree in self.degrees if ranks % degree]
        if wrong:
            raise ConfigError("degrees", wrong[0], f"a divisor of the {ranks} ranks")
        return sorted(set(self.degrees))

    def _priced(self, counts_WE: np.ndarray, base: Placement, degree: int) -> Degree:
        ranks, experts = counts_WE.shape
        group = ranks // degree
        homes_E = np.asarray(base.home_ranks)
        rows_dE = counts_WE.reshape(degree, group, experts).sum(axis=1)
        wanted_dE = rows_dE > 0
        hosts_dE = np.arange(degree)[:, None] * group + homes_E % group
        in_group_Eg = homes_E[:, None] % group == np.arange(group)
        own_group_WW = np.arange(ranks)[:, None] // group == np.arange(ranks) // group
        rows_WW = np.tile(counts_WE @ in_group_Eg, degree) * own_group_WW
        hosted_W = np.bincount(hosts_dE[wanted_dE], minlength=ranks)
        orders = [Order(e, int(homes_E[e]), int(hosts_dE[d, e])) for d, e in np.argwhere(wanted_dE).tolist()
                  if hosts_dE[d, e] != homes_E[e]]  # fmt: skip
        loads_W = rows_WW.sum(axis=0)
        np.fill_diagonal(rows_WW, 0)
        own_W = np.zeros(ranks, dtype=np.int64)
        np.add.at(own_W, homes_E, rows_dE[homes_E // group, np.arange(experts)])
        computed = Computed(rows=loads_W.tolist(), copied=(loads_W - own_W).tolist(), experts=hosted_W.tolist())
        few = len(orders) <= MOST_RELAYED
        phases = self.phases if few else [replace(phase, relays=False) for phase in self.phases]
        seconds, relayed = faster_form(phases, computed, self._busiest(rows_WW), orders, self.ranks_per_node)
        hosts_dE = np.where(wanted_dE, hosts_dE, -1)
        return Degree(degree=degree, hosts=hosts_dE, copies=len(orders), seconds=seconds, relayed=relayed)

    def _busiest(self, moved_WW: np.ndarray) -> list[int]:
        """What leaves or enters the busiest rank, by wire (inter, intra)."""
        node_W = np.arange(len(moved_WW)) // self.ranks_per_node
        inside_WW = node_W[:, None] == node_W
        found = []
        for lane_WW in (moved_WW * ~inside_WW, moved_WW * inside_WW):
            found.append(int(max(lane_WW.sum(axis=0).max(), lane_WW.sum(axis=1).max())))
        return found


def _hosted(base: Placement, degree: int, rank: int) -> list[int]:
    """The experts of other ranks that `rank` computes at a degree where its group wants all."""
    group = base.world_size // degree
    return [e for e, home in enumerate(base.home_ranks) if home != rank and home % group == rank % group]


def _placement(base: Placement, chosen: Degree) -> Placement:
    """`base` with the copies of a degree, and every rank's rows in its own group."""
    group = base.world_size // chosen.degree
    copies: list[list[int]] = [[] for _ in range(base.world_size)]
    for hosts_E in chosen.hosts.tolist():
        for expert, host in enumerate(hosts_E):
            if host >= 0 and host != base.home_ranks[expert]:
                copies[host].append(expert)
    placed = Placement.of_ranks(held_with(base, copies), homes=base.home_ranks)
    shares = np.zeros((placed.world_size, placed.num_slots), dtype=np.int64)
    for slot, (expert, rank) in enumerate(zip(placed.slot_to_expert, placed.rank_of_slots.tolist(), strict=True)):
        shares[rank // group * group : (rank // group + 1) * group, slot] = 1
        if slot == placed.home_slots[expert]:
            shares[np.repeat(chosen.hosts[:, expert] < 0, group), slot] = 1  # of a group that has no rows for it
    return placed.with_selector(Shares(shares.tobytes(), placed.world_size))
