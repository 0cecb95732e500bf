"""The counts that a rank announces: rows of each block of its tokens for each slot.

Block b of a rank's T tokens is [b*T//16, (b+1)*T//16): from counts of this granularity any chunk count from 1 to 16
follows without asking the ranks again.
"""

from __future__ import annotations

import torch

from moe_overlap.errors import ConfigError

BLOCKS = 16


def block_counts(slots_TK: torch.Tensor, num_slots: int) -> torch.Tensor:
    """int64 [BLOCKS, P] on the CPU: rows of each token block for each slot; ids of -1 do not count.

    Raises ConfigError("topk_ids") for an id outside -1..P-1. One device-to-host read.
    """
    tokens, top_k = slots_TK.shape
    bounds = torch.tensor([b * tokens // BLOCKS for b in range(1, BLOCKS)], dtype=torch.int64, device=slots_TK.device)
    block_T = torch.bucketize(torch.arange(tokens, device=slots_TK.device), bounds, right=True)
    ids = slots_TK.to(torch.int64)
    valid = (ids >= 0) & (ids < num_slots)
    flat = torch.where(valid, block_T[:, None] * num_slots + ids, BLOCKS * num_slots)
    flat = torch.where((ids < -1) | (ids >= num_slots), BLOCKS * num_slots + 1, flat)
    counts = torch.bincount(flat.reshape(-1), minlength=BLOCKS * num_slots + 2).cpu()
    if int(counts[-1]) > 0:
        bad = ids[(ids < -1) | (ids >= num_slots)]
        raise ConfigError("topk_ids", int(bad.reshape(-1)[0]), f"expert ids from -1 to {num_slots - 1}")
    return counts[: BLOCKS * num_slots].reshape(BLOCKS, num_slots)
