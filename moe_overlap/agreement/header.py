"""What is compared once, when a transport opens: the configuration that its steps will have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe_overlap.agreement.sizes import HEADER_WORDS as HEADER_WORDS

MAGIC = 0x6D6F655F6F766C70  # "moe_ovlp"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one layer configuration fixes for the life of a transport; compared on all ranks when it opens. `dedup`:
    whether its records have room for what deduplication needs; `nodes`: for how many nodes they count rows."""

    num_experts: int
    num_slots: int
    hidden: int
    ffn_hidden: int
    top_k: int
    weight_dtype: int
    activation: int
    dedup: int = 0
    nodes: int = 0

    def to_tensor(self, *, world_size: int, gathered_ranks: int) -> torch.Tensor:
        """int64 [64]: magic, version, world size, up to how many ranks counts are gathered, then the fields in order;
        the rest is zero."""
        words = [
            MAGIC,
            VERSION,
            world_size,
            gathered_ranks,
            *(int(getattr(self, field.name)) for field in fields(self)),
        ]
        return torch.tensor(words + [0] * (HEADER_WORDS - len(words)), dtype=torch.int64)
