"""Copies of experts for one step, decided when its counts are known: `planning.replication` as a rule of the layer.

Every rank decides by itself from the agreed counts and from costs that are equal on all ranks (`digest`, compared in
the step's record), and so does a recompute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import Load, check_count
from moe_overlap.planning.replication import MARGIN, Decision, check_options, decide, split_rows


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
    spare: slots for copies on each rank, beside those of the layer's placement. ranks_per_node: as the layer has it.
    `last`: the decision of the last call, for whoever asks, `seats_before` it, and `relayed`, whether its copies go
    from rank to rank: so one rule for each layer.
    """

    phases: Sequence[PhaseCosts]
    spare: int
    ranks_per_node: int = 1
    most_copies: int | None = None
    margin: float = MARGIN
    last: Decision | None = field(default=None, init=False)
    seats_before: int = field(default=0, init=False)
    relayed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_count("spare", self.spare, least=0)
        check_count("ranks_per_node", self.ranks_per_node, least=1)
        check_options(self.phases, self.most_copies, self.margin)

    @cached_property
    def digest(self) -> int:
        """Of everything that the decision depends on beside the counts."""
        parts = (
            [phase.numbers for phase in self.phases],
            self.spare,
            self.ranks_per_node,
            self.most_copies,
            self.margin,
        )
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") >> 1

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """counts: int64 [W, BLOCKS, E]; base: the layer's placement, whose homes and copies stay."""
        load = load_of(counts, base, [self.spare] * base.world_size, self.ranks_per_node)
        self.seats_before = len(load.seats)
        self.last = decide(load, self.phases, most_copies=self.most_copies, margin=self.margin)
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
        return f"{what}; predicted {1e3 * one.predicted_s:.3g} ms{how}, {1e3 * one.left_s:.3g} ms if left"


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


def with_copies(base: Placement, copies: Sequence[Sequence[int]]) -> Placement:
    """`base` with copies of the experts given for each rank; the homes stay."""
    ranks = zip(base.experts_of_ranks(), copies, strict=True)
    return Placement.of_ranks([[*own, *sorted(more)] for own, more in ranks], homes=base.home_ranks)


def placement_of(load: Load, decision: Decision, base: Placement) -> Placement:
    """`base` with the decision's copies, and rows shared out as it says."""
    copies: list[list[int]] = [[] for _ in range(base.world_size)]
    for expert, rank in decision.copies(load):
        copies[rank].append(expert)
    placed = with_copies(base, copies)
    shares = np.zeros((placed.world_size, placed.num_slots), dtype=np.int64)
    shares[:, list(placed.home_slots)] = 1  # where a rank has no rows of an expert, and where there is one slot
    seats = zip(placed.slot_to_expert, placed.rank_of_slots.tolist(), strict=True)
    slot_of = {seat: slot for slot, seat in enumerate(seats)}
    places: list[list[tuple[int, int]]] = [[] for _ in range(base.num_experts)]
    for expert, rank, rows in decision.seats:
        places[expert].append((rank, rows))
    for expert, found in enumerate(places):
        if len(found) > 1:
            column = load.counts[:, expert]
            shares[column > 0, placed.home_slots[expert]] = 0
            for source, rank, rows in split_rows(column.tolist(), found, load.ranks_per_node):
                shares[source, slot_of[expert, rank]] = rows
    return placed.with_selector(Shares(shares.tobytes(), placed.world_size))
