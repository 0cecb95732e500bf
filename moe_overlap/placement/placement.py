"""Where each expert lives: integers only, no tensors of tokens except in the id lookup (`lookup.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.placement.lookup import Tensor, one_slot_each, split_ids, sums_by_expert
from moe_overlap.placement.migration import MigrationPlan, Move
from moe_overlap.placement.selectors import Modulo, Selector, Weighted, selector_of
from moe_overlap.placement.split import Split

MOST = 2**20  # experts, slots, ranks


@dataclass(frozen=True)
class Placement:
    """A map from physical slots to logical experts. Immutable; equal placements are equal.

    P slots lie on W ranks in contiguous groups: rank w owns slots_by_rank[w] of them, which may be none; by default
    P // W. slot_to_expert[p] is the logical expert in slot p; every expert has at least one slot. home_slots[e] is the
    slot whose rank owns the parameters and the optimizer state of expert e, by default the expert's first; its other
    slots are copies of the weights. `selector` says which slot a token goes to where its expert has several. `epoch`
    counts changes of the map, and ranks compare it.

    Example: E = 4, W = 2, identity -> slot_to_expert (0, 1, 2, 3), rank 1 owns slots 2 and 3.
    """

    num_experts: int
    num_slots: int
    world_size: int
    slot_to_expert: tuple[int, ...]
    epoch: int = 0
    slots_by_rank: tuple[int, ...] = ()
    home_slots: tuple[int, ...] = ()
    selector: Selector = Modulo()
    _is_identity: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_experts", "world_size", "num_slots"):
            _check_integer(name, getattr(self, name), 1, MOST)
        _check_integer("epoch", self.epoch, 0, 2**31 - 1)
        even = self.num_slots % self.world_size == 0
        if not self.slots_by_rank and not even:
            raise ConfigError("num_slots", self.num_slots, f"a positive multiple of world_size ({self.world_size})")
        each = self.num_slots // self.world_size
        self._set("slots_by_rank", self.slots_by_rank or (each,) * self.world_size, self.world_size, self.num_slots)
        if sum(self.slots_by_rank) != self.num_slots:
            raise ConfigError("slots_by_rank", self.slots_by_rank, f"numbers that sum to num_slots ({self.num_slots})")
        self._set("slot_to_expert", self.slot_to_expert, self.num_slots, self.num_experts - 1)
        if set(self.slot_to_expert) != set(range(self.num_experts)):
            raise ConfigError("slot_to_expert", self.slot_to_expert, f"every expert of 0..{self.num_experts - 1}")
        homes = self.home_slots or tuple(_first_slots(self.slot_to_expert, self.num_experts))
        self._set("home_slots", homes, self.num_experts, self.num_slots - 1)
        if any(self.slot_to_expert[slot] != expert for expert, slot in enumerate(self.home_slots)):
            raise ConfigError("home_slots", self.home_slots, "for every expert one of its slots")
        # Read where torch.compile traces, which does not enter the lock of a cached_property (Python 3.11).
        object.__setattr__(self, "_is_identity", self.slot_to_expert == tuple(range(self.num_experts)))
        if not hasattr(self.selector, "shares"):
            raise ConfigError("selector", self.selector, "Modulo(), LocalFirst() or Weighted(...)")
        if self.has_replicas or isinstance(self.selector, Weighted):
            _ = self._split  # refuses shares that do not fit

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.slots_by_rank, self.slot_to_expert, self.home_slots, self.epoch, self.selector))

    def _set(self, name: str, value: Any, length: int, most: int) -> None:
        """A field as a tuple of so many integers from 0 to `most`."""
        try:
            numbers = tuple(value)
        except TypeError:
            raise ConfigError(name, value, "a tuple of integers") from None
        whole = set(map(type, numbers)) <= {int} or all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if len(numbers) != length or not whole or (numbers and not 0 <= min(numbers) <= max(numbers) <= most):
            raise ConfigError(name, value, f"{length} entries from 0 to {most}, integers")
        object.__setattr__(self, name, numbers)

    @classmethod
    def identity(cls, num_experts: int, world_size: int) -> Placement:
        """Expert i in slot i. Where the experts do not divide by the ranks, the first num_experts % world_size ranks
        have one more; ranks without any are possible."""
        _check_integer("num_experts", num_experts, 1, MOST)
        _check_integer("world_size", world_size, 1, MOST)
        each, more = divmod(num_experts, world_size)
        by_rank = tuple(each + (rank < more) for rank in range(world_size))
        return cls(num_experts, num_experts, world_size, tuple(range(num_experts)), slots_by_rank=by_rank)

    @classmethod
    def of_ranks(
        cls,
        experts_of_ranks: Sequence[Sequence[int]],
        *,
        homes: Sequence[int] | None = None,
        epoch: int = 0,
        selector: Selector | None = None,
    ) -> Placement:
        """From the experts of each rank, in the order of its slots. homes: the rank that owns each expert (its first
        slot there); None: that of its first slot."""
        try:
            slots = tuple(expert for experts in experts_of_ranks for expert in experts)
            by_rank = tuple(len(experts) for experts in experts_of_ranks)
        except TypeError:
            raise ConfigError("experts_of_ranks", experts_of_ranks, "a sequence of expert ids for each rank") from None
        bad = [one for one in slots if isinstance(one, bool) or not isinstance(one, int) or one < 0]
        if bad or not slots:
            raise ConfigError("experts_of_ranks", bad[0] if bad else (), "expert ids, integers of at least 0")
        owned = () if homes is None else _slots_on(homes, slots, by_rank)
        return cls(max(slots) + 1, len(slots), len(by_rank), slots, epoch, by_rank, owned, selector or Modulo())

    @property
    def slots_per_rank(self) -> int:
        """The slots of every rank. ConfigError where ranks have different numbers of them."""
        if len(set(self.slots_by_rank)) != 1:
            raise ConfigError("slots_by_rank", self.slots_by_rank, "as many slots on every rank")
        return self.slots_by_rank[0]

    @property
    def is_identity(self) -> bool:
        return self._is_identity

    @property
    def has_replicas(self) -> bool:
        return self.num_slots > self.num_experts

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """[W + 1]: rank w owns slots offsets[w] .. offsets[w + 1] - 1."""
        return (0, *accumulate(self.slots_by_rank))

    @cached_property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """The slots of each expert, its home first, the others ascending."""
        found: list[list[int]] = [[slot] for slot in self.home_slots]
        for slot, expert in enumerate(self.slot_to_expert):
            if slot != self.home_slots[expert]:
                found[expert].append(slot)
        return tuple(map(tuple, found))

    @cached_property
    def expert_of_slot(self) -> np.ndarray:
        """int64 [P]: slot_to_expert."""
        return np.array(self.slot_to_expert, dtype=np.int64)

    @cached_property
    def rank_of_slots(self) -> np.ndarray:
        """int64 [P]: the rank of each slot."""
        return np.repeat(np.arange(self.world_size), self.slots_by_rank)

    @cached_property
    def home_ranks(self) -> tuple[int, ...]:
        """[E]: the rank that owns each expert."""
        return tuple(self.rank_of_slots[list(self.home_slots)].tolist())

    @cached_property
    def digest(self) -> str:
        """Of all that ranks have to have in common beside the epoch."""
        parts = (self.num_experts, self.slots_by_rank, self.slot_to_expert, self.home_slots, self.selector.text)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def rank_of_slot(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise ConfigError("slot", slot, f"a slot from 0 to {self.num_slots - 1}")
        return int(self.rank_of_slots[slot])

    def slots_of_rank(self, rank: int) -> range:
        if not 0 <= rank < self.world_size:
            raise ConfigError("rank", rank, f"a rank from 0 to {self.world_size - 1}")
        return range(self.offsets[rank], self.offsets[rank + 1])

    def experts_of_ranks(self) -> list[list[int]]:
        """The experts of each rank, in the order of its slots."""
        return [[self.slot_to_expert[slot] for slot in self.slots_of_rank(rank)] for rank in range(self.world_size)]

    def with_homes(self, ranks: Sequence[int]) -> Placement:
        """The same slots, where ranks[e] owns expert e: its first slot there. ConfigError where there is none."""
        return replace(self, home_slots=_slots_on(ranks, self.slot_to_expert, self.slots_by_rank))

    def with_selector(self, selector: Selector) -> Placement:
        """The same slots under another choice among replicas."""
        return replace(self, selector=selector)

    def to_physical(self, topk_ids_TK: Tensor, *, source: int | None = None, blocks: int | None = None) -> Tensor:
        """Logical ids (any integer dtype, [T, ...], -1 = unused) to physical slots, same shape and dtype.

        The identity returns its argument. Where an expert has several slots, the choice follows from the rank `source`
        whose tokens these are, and from the counts of each of the `blocks` blocks of tokens, as in `physical_counts`;
        both are needed then. Ids have to be in range.
        """
        if self.is_identity:
            return topk_ids_TK
        if not self.has_replicas:
            return one_slot_each(self.home_slots, topk_ids_TK.device, topk_ids_TK.dtype)[topk_ids_TK.long()]
        if source is None or not 0 <= source < self.world_size:
            raise ConfigError("source", source, f"the rank of the tokens, from 0 to {self.world_size - 1}")
        if blocks is None or blocks < 1:
            raise ConfigError("blocks", blocks, "the number of blocks that counts are made of")
        return split_ids(topk_ids_TK, self._split, self.num_experts, source, blocks)

    def logical_counts(self, counts_BP: Tensor) -> Tensor:
        """int64 [BLOCKS, E] of counts by slot [BLOCKS, P]: what a rank announces."""
        return counts_BP if self.is_identity else sums_by_expert(counts_BP, self.slot_to_expert, self.num_experts)

    def physical_counts(self, counts: np.ndarray, sources: Sequence[int]) -> np.ndarray:
        """int64 [S, BLOCKS, P] of counts by expert [S, BLOCKS, E] that the ranks `sources` announced.

        A function of (this placement, source rank, block, counts) and of nothing else, so that any rank can tell what
        another one will send. Where an expert has several slots, each gets a run of the block's tokens of that expert,
        in token order: first its home, then the others ascending (`split.py`).
        """
        if counts.ndim != 3 or counts.shape != (len(sources), counts.shape[1], self.num_experts):
            raise ConfigError("counts", counts.shape, f"({len(sources)}, blocks, {self.num_experts})")
        if self.has_replicas:
            return self._split.counts(counts, tuple(sources))
        return counts if self.is_identity else counts[:, :, self.expert_of_slot]

    def diff(self, new: Placement) -> MigrationPlan:
        """What has to travel so that `new` holds. ConfigError where experts or ranks differ."""
        for name in ("num_experts", "world_size"):
            if getattr(self, name) != getattr(new, name):
                raise ConfigError(name, getattr(new, name), f"that of the placement before ({getattr(self, name)})")
        homes: list[Move] = []
        copies: list[Move] = []
        relabels: list[Move] = []
        here = {(int(rank), expert): slot for slot, (rank, expert) in
                reversed(list(enumerate(zip(self.rank_of_slots, self.slot_to_expert, strict=True))))}  # fmt: skip
        arrived = set()
        for slot, expert in enumerate(new.slot_to_expert):
            home, rank, old_home = slot == new.home_slots[expert], new.rank_of_slot(slot), self.home_slots[expert]
            if home and rank != self.home_ranks[expert]:
                homes.append(Move(expert, old_home, slot, self.home_ranks[expert], rank))
                arrived.add((rank, expert))
        for slot, expert in enumerate(new.slot_to_expert):
            rank, own = new.rank_of_slot(slot), here.get((new.rank_of_slot(slot), expert))
            if own is None and (rank, expert) not in arrived:
                copies.append(Move(expert, self.home_slots[expert], slot, self.home_ranks[expert], rank))
                arrived.add((rank, expert))
            elif own is not None and (slot >= self.num_slots or self.slot_to_expert[slot] != expert
                                      or self.rank_of_slot(slot) != rank):  # fmt: skip
                relabels.append(Move(expert, own, slot, rank, rank))
        return MigrationPlan(world_size=self.world_size, old_epoch=self.epoch, new_epoch=new.epoch,
                             home_moves=tuple(homes), copies=tuple(copies), relabels=tuple(relabels))  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it."""
        return {"experts_of_ranks": self.experts_of_ranks(), "homes": list(self.home_ranks), "epoch": self.epoch,
                "selector": self.selector.text}  # fmt: skip

    @classmethod
    def from_json(cls, value: object) -> Placement:
        """Raises ConfigError for anything that is no placement."""
        known = {"experts_of_ranks", "homes", "epoch", "selector"}
        if not isinstance(value, dict) or set(value) != known:
            raise ConfigError("placement", value, f"an object with {', '.join(sorted(known))}")
        homes = value["homes"]
        if not isinstance(homes, list):
            raise ConfigError("homes", homes, "a list of ranks")
        return cls.of_ranks(
            value["experts_of_ranks"], homes=homes, epoch=value["epoch"], selector=selector_of(value["selector"])
        )

    @cached_property
    def _split(self) -> Split:
        return Split(self.slots_of_expert, self.selector.shares(self))


def _first_slots(slot_to_expert: Sequence[int], num_experts: int) -> list[int]:
    first = [-1] * num_experts
    for slot in range(len(slot_to_expert) - 1, -1, -1):
        first[slot_to_expert[slot]] = slot
    return first


def _slots_on(ranks: Sequence[int], slot_to_expert: Sequence[int], slots_by_rank: Sequence[int]) -> tuple[int, ...]:
    """The first slot of each expert e on rank ranks[e]. ConfigError where there is none."""
    experts = max(slot_to_expert) + 1
    homes = [-1] * len(ranks)
    if any(isinstance(rank, bool) or not isinstance(rank, int) for rank in ranks):
        raise ConfigError("homes", list(ranks), "ranks, integers")
    if len(ranks) == experts:
        of_slots = (rank for rank, slots in enumerate(slots_by_rank) for _ in range(slots))
        for slot, (expert, rank) in enumerate(zip(slot_to_expert, of_slots, strict=True)):
            if homes[expert] < 0 and ranks[expert] == rank:
                homes[expert] = slot
    if len(ranks) != experts or -1 in homes:
        missing = homes.index(-1) if -1 in homes else experts
        raise ConfigError("homes", list(ranks), f"for every expert a rank that has it (expert {missing})")
    return tuple(homes)


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(name, value, f"an integer from {least} to {most}")
