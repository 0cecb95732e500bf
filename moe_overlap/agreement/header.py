"""What is compared once, when a transport opens: the configuration that its steps will have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe_overlap.agreement.sizes import HEADER_WORDS as HEADER_WORDS

MAGIC = 0x6D6F655F6F766C70  # "moe_ovlp"
VERSION = 3
WEIGHTS_AT = ("output", "input")  # the position is the number that travels


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one layer configuration fixes for the life of a transport; compared on all ranks when it opens. `dedup`:
    whether its records have room for what deduplication needs; `nodes`: for how many nodes they count rows;
    `weights_at`: a position in WEIGHTS_AT, whether rows are weighed before they are sent."""

    num_experts: int
    num_slots: int
    hidden: int
    ffn_hidden: int
    top_k: int
    weight_dtype: int
    activation: int
    dedup: int = 0
    nodes: int = 0
    weights_at: int = 0

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


def difference(words: torch.Tensor, rank: int) -> str:
    """The first field that `rank` has another value of than rank 0, and both: of the headers of all ranks [W, 64]."""
    names = ("magic", "version", "world_size", "gathered_ranks", *(field.name for field in fields(Header)))
    place = int((words[0] != words[rank]).nonzero()[0])
    name = names[place] if place < len(names) else f"word {place}"
    values = [int(words[one, place]) for one in (0, rank)]
    if name == "weights_at" and set(values) <= {0, 1}:
        return f"{name}: {' and '.join(WEIGHTS_AT[value] for value in values)}"
    return f"{name}: {values[0]} and {values[1]}"
