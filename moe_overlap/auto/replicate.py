"""Copies of experts for one step, decided when its counts are known: `planning.replication` as a rule of the layer.

Every rank decides by itself from the agreed counts and from costs that are equal on all ranks (`digest`, compared in
the step's record), and so does a recompute. Costs that schedule="auto" has measured are those of several cuts: copies
and cut are then chosen together, in closed form; the order, and perhaps a faster cut, are searched for the step that
results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np

from moe_overlap.agreement.seats import StepRule
from moe_overlap.auto.kinds import CUTS
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.placement.selectors import MOST_SHARES
from moe_overlap.planning.copy_costs import GRADIENT_BYTES, PhaseCosts, costs_of
from moe_overlap.planning.copy_load import Load, check_count
from moe_overlap.planning.replication import MARGIN, Decision, check_limits, check_options, decide, split_seats
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.builders import SchedulePair, Schedules


@dataclass(frozen=True)
class Shares:
    """A selector that shares rows out as a decision did: for each source rank and slot, the rows that go there.

    table: int64 [W, P]; every rank gives the slots of each expert at least 1 together.
    """

    table: bytes
    ranks: int

    @property
    def text(self) -> str:
        return "shares " + hashlib.sha256(self.table).hexdigest()[:16]

    def shares(self, slots: object) -> np.ndarray:
        """As `Selector.shares`."""
        return np.frombuffer(self.table, dtype=np.int64).reshape(self.ranks, -1)


@dataclass(kw_only=True)
class ReplicationRule:
    """A `StepRule`: leave rows at the layer's own slots, move them among these, or copy experts for this step.

    phases: what is paid for a step, forward alone or both (`measured_costs`, `nominal_costs`), equal on all ranks.
    None: what the layer's schedule="auto" has measured, of backward too in a step with gradients, in that cut in which
    a decision is the fastest; rows are left while nothing is measured. ConfigError in a step of another schedule.
    spare: slots for copies on each rank, beside those of the layer's placement. ranks_per_node: as the layer has it.
    `last`: the decision of the last call, for whoever asks, `priced` the prices that it was made with, `seats_before`
    it, and `relayed`, whether its copies go from rank to rank: so one rule for each layer.
    """

    phases: Sequence[PhaseCosts] | None = None
    spare: int
    ranks_per_node: int = 1
    most_copies: int | None = None
    margin: float = MARGIN
    last: Decision | None = field(default=None, init=False)
    priced: Sequence[PhaseCosts] = field(default=(), init=False)
    seats_before: int = field(default=0, init=False)
    relayed: bool = field(default=False, init=False)
    _measured: WeakKeyDictionary[PlannedSchedule, dict[bool, MeasuredRule]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_count("spare", self.spare, least=0)
        check_count("ranks_per_node", self.ranks_per_node, least=1)
        if self.phases is None:
            check_limits(self.most_copies, self.margin)
        else:
            check_options(self.phases, self.most_copies, self.margin)

    @cached_property
    def digest(self) -> int:
        """Of everything that the decision depends on beside the counts."""
        return self.digest_with(() if self.phases is None else (self.phases,))

    def digest_with(self, cuts: Sequence[Sequence[PhaseCosts]]) -> int:
        """`digest`, with these prices."""
        parts = (
            [[phase.numbers for phase in phases] for phases in cuts],
            self.spare,
            self.ranks_per_node,
            self.most_copies,
            self.margin,
        )
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") >> 1

    def under(self, schedule: Schedules, *, grad: bool) -> StepRule:
        """The rule of a step that runs what `schedule` says: this one, or, without prices of its own, one with those of
        the schedule. Raises ConfigError where there will never be any."""
        if self.phases is not None:
            return self
        if isinstance(schedule, SchedulePair):
            expected = 'prices, or None beside schedule="auto" on several ranks, which measures them'
            raise ConfigError("rule.phases", None, expected)
        if not isinstance(schedule, PlannedSchedule):
            return MeasuredRule(rule=self, cuts=())
        known = self._measured.setdefault(schedule, {})
        if grad not in known:
            known[grad] = MeasuredRule(rule=self, cuts=costs_by_cut(schedule, grad=grad))
        return known[grad]

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """counts: int64 [W, BLOCKS, E]; base: the layer's placement, whose homes and copies stay."""
        if self.phases is None:
            raise ConfigError("phases", None, 'prices, where no layer with schedule="auto" calls the rule')
        return self.decided(counts, base, (self.phases,))

    def decided(self, counts: np.ndarray, base: Placement, cuts: Sequence[Sequence[PhaseCosts]]) -> Placement:
        """As `__call__`, by the prices of several cuts: the fastest decision in any of them, where it is faster than
        leaving the rows in any other by `margin`. Without prices rows stay."""
        self.last, self.priced, self.relayed = None, (), False
        if not cuts:
            return base
        load = load_of(counts, base, [self.spare] * base.world_size, self.ranks_per_node)
        self.seats_before = len(load.seats)
        found = [decide(load, phases, most_copies=self.most_copies, margin=self.margin) for phases in cuts]
        left_s = min(one.left_s for one in found)
        best = min(range(len(found)), key=lambda i: found[i].predicted_s)
        if not found[best].predicted_s < left_s * (1 - self.margin):
            best = min(range(len(found)), key=lambda i: found[i].left_s)
        self.last, self.priced = replace(found[best], left_s=left_s), cuts[best]
        self.relayed = self.last.relayed
        return base if self.last.left else placement_of(load, self.last, base)

    def slots_for_copies(self, base: Placement) -> int:
        """Of a rank, at most."""
        return self.spare

    def told(self) -> str:
        """What the last step did, for `explain()`; "" before the first."""
        one = self.last
        if one is None:
            return ""
        what = "left as it is" if one.left else f"{len(one.seats) - self.seats_before} new copies, rows shared out anew"
        how = " with copies that go from rank to rank" if one.relayed else ""
        cut = f" in {self.priced[0].chunks} chunk(s)" if self.phases is None else ""
        return f"{what}; predicted {1e3 * one.predicted_s:.3g} ms{how}{cut}, {1e3 * one.left_s:.3g} ms if left"


@dataclass(frozen=True, kw_only=True)
class MeasuredRule:
    """A `StepRule`: a `ReplicationRule` with measured prices, which it has for several ways of cutting a step."""

    rule: ReplicationRule
    cuts: tuple[tuple[PhaseCosts, ...], ...]

    @cached_property
    def digest(self) -> int:
        """As `ReplicationRule.digest`."""
        return self.rule.digest_with(self.cuts)

    @property
    def relayed(self) -> bool:
        """Of the last call."""
        return self.rule.relayed

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """As `ReplicationRule`."""
        return self.rule.decided(counts, base, self.cuts)


def costs_by_cut(schedule: PlannedSchedule, *, grad: bool) -> tuple[tuple[PhaseCosts, ...], ...]:
    """What a step costs, from a schedule's model, joined in one chunk and, where it may overlap, in each number of
    chunks that is searched; of both phases, or without gradients of forward."""
    model, (weights, gradients) = schedule.model, schedule.expert_bytes
    sizes: tuple[tuple[Phase, int, int], ...] = (("forward", weights, 1),)
    if grad:
        sizes += (("backward", gradients // GRADIENT_BYTES, GRADIENT_BYTES),)
    return tuple(
        tuple(
            costs_of(model, (phase,), row_bytes=schedule.row_bytes, expert_params=params, param_bytes=param_bytes,
                     chunks=chunks, joined=joined)[0]
            for phase, params, param_bytes in sizes
        )
        for chunks, joined in [(1, True), *((chunks, False) for chunks in CUTS if schedule.overlap)]
    )  # fmt: skip


def load_of(counts: np.ndarray, base: Placement, spare: Sequence[int], ranks_per_node: int) -> Load:
    """counts: int64 [W, BLOCKS, E]. The seats are the slots of `base`, homes first, with the rows that its selector
    gives them; its copies are fetched anew in every step, as in training."""
    by_slot = base.physical_counts(counts, range(base.world_size)).sum(axis=(0, 1))
    others = [slot for slots in base.slots_of_expert for slot in slots[1:]]
    ranks = base.rank_of_slots
    places = list(zip(base.slot_to_expert, ranks.tolist(), strict=True))
    if len(set(places)) < len(places):
        expert, rank = next(place for place in places if places.count(place) > 1)
        expected = "each expert once on a rank, where copies are decided on or priced"
        raise ConfigError("placement", f"expert {expert} twice on rank {rank}", expected)
    seats = [(base.slot_to_expert[slot], int(ranks[slot]), int(by_slot[slot])) for slot in (*base.home_slots, *others)]
    return Load(
        counts=counts.sum(axis=1), seats=tuple(seats), spare=tuple(spare), ranks_per_node=ranks_per_node, refetched=True
    )


def held_with(base: Placement, copies: Sequence[Sequence[int]]) -> list[list[int]]:
    """The experts of each rank, in the order of its slots, when it has these copies beside those of `base`."""
    return [[*own, *sorted(more)] for own, more in zip(base.experts_of_ranks(), copies, strict=True)]


def placement_of(load: Load, decision: Decision, base: Placement) -> Placement:
    """`base` with the decision's copies, and rows shared out as it says."""
    copies: list[list[int]] = [[] for _ in range(base.world_size)]
    for expert, rank in decision.copies(load):
        copies[rank].append(expert)
    held = held_with(base, copies)
    places = [(expert, rank) for rank, experts in enumerate(held) for expert in experts]
    slot_of = {place: slot for slot, place in enumerate(places)}
    shares = np.zeros((base.world_size, len(places)), dtype=np.int64)
    shares[:, [slot_of[place] for place in enumerate(base.home_ranks)]] = 1  # where an expert has no rows, or one slot
    slots = np.array([slot_of[expert, rank] for expert, rank, _ in decision.seats])
    sources, seats, rows = split_seats(load.counts, decision.seats, load.ranks_per_node).T
    homes = np.array([slot_of[expert, base.home_ranks[expert]] for expert, _, _ in decision.seats])
    shares[sources, homes[seats]] = 0
    shares[sources, slots[seats]] = rows
    shares = _fitting(shares, np.array([expert for expert, _ in places]))
    return Placement.of_ranks(held, homes=base.home_ranks, selector=Shares(shares.tobytes(), base.world_size))


def _fitting(shares: np.ndarray, expert_of_slot: np.ndarray) -> np.ndarray:
    """`shares` [W, P]; of an expert whose slots have more together on a rank than a selector may give, as the rows of
    many steps, smaller ones in the same proportion."""
    total = np.zeros((len(shares), int(expert_of_slot.max()) + 1), dtype=np.int64)
    np.add.at(total.T, expert_of_slot, shares.T)
    return shares // np.maximum(1, -(-total // MOST_SHARES))[:, expert_of_slot]
