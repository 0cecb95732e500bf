"""What a decision about copies of experts is made of: the counts of a step, and where its rows are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_overlap.errors import ConfigError

INTER, INTRA = 0, 1

Seat = tuple[int, int, int]  # expert, rank, rows computed there


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be decided about: one step of one layer.

    counts: int64 [W, E], rows of each rank's tokens for each expert. seats: where they are computed as things are; the
    first E are the homes, in the order of the experts, the others copies that exist, no two of an expert on one rank.
    spare: by rank, slots for copies beside these, E at most. `refetched`: copies that exist are fetched in each step.
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
        object.__setattr__(self, "spare", tuple(min(slots, experts) for slots in self.spare))
        if self.ranks_per_node < 1 or ranks % self.ranks_per_node:
            raise ConfigError("ranks_per_node", self.ranks_per_node, f"a divisor of {ranks}")
        seat_experts, seat_ranks, seat_rows = zip(*self.seats, strict=True) if self.seats else ((),) * 3
        places = set(zip(seat_experts, seat_ranks, strict=True))
        inside = self.seats and all(0 <= min(n) and max(n) < most for n, most in (
            (seat_experts, experts), (seat_ranks, ranks), (seat_rows, math.inf)))  # fmt: skip
        if seat_experts[:experts] != tuple(range(experts)) or len(places) != len(self.seats) or not inside:
            raise ConfigError("seats", self.seats[:experts], f"the {experts} homes in order, then copies elsewhere")
        computed = list(seat_rows[:experts])
        for expert, _, rows in self.seats[experts:]:
            computed[expert] += rows
        if computed != counts.sum(axis=0).tolist():
            raise ConfigError("seats", computed, "all rows of every expert")

    @classmethod
    def at_home(
        cls, counts: np.ndarray, homes: Sequence[int], spare: Sequence[int], *, ranks_per_node: int = 1
    ) -> Load:
        """With no copies. homes: [E], the rank of each expert."""
        rows = np.asarray(counts, dtype=np.int64).sum(axis=0).tolist()
        seats = tuple((expert, rank, n) for expert, (rank, n) in enumerate(zip(homes, rows, strict=True)))
        return cls(counts=counts, seats=seats, spare=tuple(spare), ranks_per_node=ranks_per_node)


def rank_rows(seats: Sequence[Seat], ranks: int) -> list[int]:
    """[W]: the rows that each rank computes."""
    found = [0] * ranks
    for _, rank, rows in seats:
        found[rank] += rows
    return found


def lane_of(one: int, other: int, ranks_per_node: int) -> int:
    return INTRA if one // ranks_per_node == other // ranks_per_node else INTER


def check_count(name: str, value: object, *, least: int) -> None:
    """Raises ConfigError for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(name, value, f"an integer of at least {least}")
