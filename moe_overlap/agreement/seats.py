"""Where the slots of a placement stand in the tables of a step: on a grid, with as many seats for each rank.

Ranks may have different numbers of slots; counts, chunks and maps of a step want one number. So every rank has as many
seats as the busiest one has slots: first the experts whose home it is, in the order of its weights, then its copies of
other ranks' experts, by home rank and expert (the order in which their weights arrive), then empty seats, to which no
row goes. Where every slot is a home and all ranks have as many, seats are the slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.errors import ConfigError
from moe_overlap.placement.placement import Placement


class Copy(NamedTuple):
    """A slot that holds the weights of an expert whose parameters are another slot's, on rank `home`."""

    home: int
    expert: int


class Seats:
    """The seats of one placement; `seats_of` makes them.

    width: seats of a rank; num_seats: of all. homes[rank]: the experts whose parameters a rank has, in the order of its
    first seats; copies[rank]: those of its next ones. seat_of_slot: [P].
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.num_experts, self.world_size = placement.num_experts, placement.world_size
        home_slots = set(placement.home_slots)
        homes, copies, order = [], [], []
        for rank in range(self.world_size):
            slots = placement.slots_of_rank(rank)
            own = [slot for slot in slots if slot in home_slots]
            rest = sorted((slot for slot in slots if slot not in home_slots), key=self._copy_in)
            homes.append(tuple(placement.slot_to_expert[slot] for slot in own))
            copies.append(tuple(self._copy_in(slot) for slot in rest))
            order.append([*own, *rest])
        self.homes: tuple[tuple[int, ...], ...] = tuple(homes)
        self.copies: tuple[tuple[Copy, ...], ...] = tuple(copies)
        self.width = max(1, *map(len, order))
        self.num_seats = self.width * self.world_size
        self.seat_of_slot = np.empty(placement.num_slots, dtype=np.int64)
        self.expert_of_seat = np.full(self.num_seats, -1, dtype=np.int64)
        for rank, slots_in_order in enumerate(order):
            seats = rank * self.width + np.arange(len(slots_in_order))
            self.seat_of_slot[slots_in_order] = seats
            self.expert_of_seat[seats] = [placement.slot_to_expert[slot] for slot in slots_in_order]
        self._as_slots = bool((self.seat_of_slot == np.arange(placement.num_slots)).all())

    @property
    def has_copies(self) -> bool:
        return any(self.copies)

    @property
    def are_slots(self) -> bool:
        """Whether seat i is slot i, and there is no other seat."""
        return self._as_slots and self.num_seats == self.placement.num_slots

    @property
    def homes_in_order(self) -> bool:
        """Whether each rank is home to as many experts, the first rank to the first ones, in whatever order there."""
        each, left = divmod(self.num_experts, self.world_size)
        parts = [list(range(each * rank, each * rank + each)) for rank in range(self.world_size)]
        return not left and [sorted(own) for own in self.homes] == parts

    def of_ids(self, ids_TK: torch.Tensor, rank: int) -> torch.Tensor:
        """The seats of the choices of this rank's tokens, [T, K] logical experts, -1 = unused; same dtype.

        An id out of range, which `block_counts` refuses, becomes the seat that is out of range.
        """
        if self.are_slots and self.placement.is_identity:
            return ids_TK
        outside = (ids_TK < -1) | (ids_TK >= self.num_experts)
        inside_TK = ids_TK.masked_fill(outside, -1)
        slots_TK = self.placement.to_physical(inside_TK, source=rank, blocks=BLOCKS)
        if not self._as_slots:
            table = _seat_table(self, ids_TK.device)
            slots_TK = table[slots_TK.long()].to(ids_TK.dtype)
        return slots_TK.masked_fill(outside, self.num_seats)

    def counts(self, logical: np.ndarray, sources: range | list[int]) -> np.ndarray:
        """int64 [S, BLOCKS, num_seats] of counts by expert, [S, BLOCKS, E], that the ranks `sources` announced."""
        by_slot = self.placement.physical_counts(logical, sources)
        if self.are_slots:
            return by_slot
        found = np.zeros((*by_slot.shape[:2], self.num_seats), dtype=np.int64)
        found[:, :, self.seat_of_slot] = by_slot
        return found

    def by_expert(self, of_seats: torch.Tensor) -> torch.Tensor:
        """int64 [..., E] of numbers by seat, int64 [..., num_seats], on the CPU: the sums over the seats of each."""
        experts = torch.from_numpy(self.expert_of_seat)
        used = experts >= 0
        found = of_seats.new_zeros(*of_seats.shape[:-1], self.num_experts)
        return found.index_add_(-1, experts[used], of_seats[..., used])

    def _copy_in(self, slot: int) -> Copy:
        expert = self.placement.slot_to_expert[slot]
        return Copy(home=self.placement.rank_of_slot(self.placement.home_slots[expert]), expert=expert)


class StepRule(Protocol):
    """Where the experts are in a step, decided when its counts are known. The homes are those of the layer's own
    placement; copies that it has not are fetched for this step alone. A rule may have `relayed`, a bool that is looked
    at after each call: copies go from rank to rank (`relays.py`), where the schedule leaves that open."""

    @property
    def digest(self) -> int:
        """Equal on all ranks that decide alike."""

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """counts: int64 [W, BLOCKS, E], of each rank's choices, by logical expert; base: the layer's placement. A pure
        function of both, as each rank, and a recompute, calls it by itself."""


def seats_of_step(rule: StepRule, counts: np.ndarray, base: Seats) -> tuple[Seats, bool]:
    """The seats that a rule decides on; whether copies are relayed. Raises ConfigError where it would move a home."""
    placement = rule(counts, base.placement)
    relayed = bool(getattr(rule, "relayed", False))
    if placement is base.placement:
        return base, relayed
    seats = seats_of(placement)
    if seats.homes != base.homes:
        given = f"a placement with the homes {seats.homes}"
        raise ConfigError("rule", given, f"{base.homes}, those of the layer: migrate() moves homes")
    return seats, relayed


@lru_cache(maxsize=256)
def seats_of(placement: Placement) -> Seats:
    """The seats of a placement, made once."""
    return Seats(placement)


@lru_cache(maxsize=64)
def _seat_table(seats: Seats, device: torch.device) -> torch.Tensor:
    """int64 [P + 1]; the last entry is -1, so that -1 indexes it and stays."""
    return torch.from_numpy(np.append(seats.seat_of_slot, -1)).to(device)
