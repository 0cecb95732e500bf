"""Where each expert lives: integers only, no tensors of tokens except the id lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from moe_overlap.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """A map from physical slots to logical experts.

    P slots lie on W ranks in contiguous groups of P // W: rank w owns slots [w*P//W, (w+1)*P//W).
    slot_to_expert[p] is the logical expert in slot p. `epoch` counts changes of the map, and ranks compare it.

    Example: E = 4, W = 2, identity -> slot_to_expert (0, 1, 2, 3), rank 1 owns slots 2 and 3.
    """

    num_experts: int
    num_slots: int
    world_size: int
    slot_to_expert: tuple[int, ...]
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError("num_experts", self.num_experts, "an integer of at least 1")
        if self.world_size < 1:
            raise ConfigError("world_size", self.world_size, "an integer of at least 1")
        if self.num_slots < 1 or self.num_slots % self.world_size:
            raise ConfigError("num_slots", self.num_slots, f"a positive multiple of world_size ({self.world_size})")
        if len(self.slot_to_expert) != self.num_slots:
            raise ConfigError("slot_to_expert", self.slot_to_expert, f"{self.num_slots} entries, one per slot")
        if set(self.slot_to_expert) != set(range(self.num_experts)):
            raise ConfigError("slot_to_expert", self.slot_to_expert, f"every expert of 0..{self.num_experts - 1}")
        if self.epoch < 0:
            raise ConfigError("epoch", self.epoch, "an integer of at least 0")

    @classmethod
    def identity(cls, num_experts: int, world_size: int) -> Placement:
        """Expert i in slot i. ConfigError when the experts do not divide evenly over the ranks."""
        if world_size >= 1 and num_experts % world_size:
            raise ConfigError("num_experts", num_experts, f"a multiple of the number of ranks ({world_size})")
        return cls(num_experts, num_experts, world_size, tuple(range(num_experts)))

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.world_size

    @property
    def is_identity(self) -> bool:
        return self.slot_to_expert == tuple(range(self.num_experts))

    def rank_of_slot(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise ConfigError("slot", slot, f"a slot from 0 to {self.num_slots - 1}")
        return slot // self.slots_per_rank

    def slots_of_rank(self, rank: int) -> range:
        if not 0 <= rank < self.world_size:
            raise ConfigError("rank", rank, f"a rank from 0 to {self.world_size - 1}")
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def to_physical(self, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """Logical ids (any integer dtype, any shape, -1 = unused) to physical slots, same shape and dtype.

        The identity returns its argument. Every expert needs exactly one slot: choosing among replicas is not
        available yet and raises NotImplementedError.
        """
        if self.is_identity:
            return topk_ids_TK
        if self.num_slots != self.num_experts:
            raise NotImplementedError("Placement.to_physical with replicated experts (num_slots > num_experts)")
        return _expert_to_slot(self, topk_ids_TK.device, topk_ids_TK.dtype)[topk_ids_TK.long()]

    def logical_counts(self, counts_BP: torch.Tensor) -> torch.Tensor:
        """int64 [BLOCKS, E] of counts by slot [BLOCKS, P]: what a rank announces."""
        if self.is_identity:
            return counts_BP
        experts = torch.tensor(self.slot_to_expert)
        return counts_BP.new_zeros(len(counts_BP), self.num_experts).index_add_(1, experts, counts_BP)

    def physical_counts(self, counts: np.ndarray, sources: Sequence[int]) -> np.ndarray:
        """int64 [S, BLOCKS, P] of counts by expert [S, BLOCKS, E] that the ranks `sources` announced.

        A function of (this placement, source rank, block, counts) and of nothing else, so that any rank can tell what
        another one will send. Where an expert has several slots, each gets a prefix of what is left of the block's
        tokens in token order, so that counts alone say which: no such choice is available yet, NotImplementedError.
        """
        if counts.shape != (len(sources), counts.shape[1], self.num_experts):
            raise ConfigError("counts", counts.shape, f"({len(sources)}, blocks, {self.num_experts})")
        if self.num_slots != self.num_experts:
            raise NotImplementedError("Placement.physical_counts with replicated experts (num_slots > num_experts)")
        return counts if self.is_identity else counts[:, :, list(self.slot_to_expert)]


@lru_cache(maxsize=64)
def _expert_to_slot(placement: Placement, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[E + 1]; the last entry is -1, so that the id -1 indexes it and stays -1."""
    slots = [-1] * (placement.num_experts + 1)
    for slot, expert in enumerate(placement.slot_to_expert):
        slots[expert] = slot
    return torch.tensor(slots, device=device, dtype=dtype)
