"""Logical ids of tokens to physical slots: the one file of this room with tensors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from moe_overlap.placement.split import Split

Tensor = torch.Tensor


def block_of_tokens(tokens: int, blocks: int, device: torch.device) -> torch.Tensor:
    """int64 [T]: the block of each token, where block b is [b*T//blocks, (b+1)*T//blocks): the last b with
    b*T//blocks <= t. Made where the ids are, as a copy from the host would wait."""
    block_T = torch.arange(blocks - 1, blocks * tokens + blocks - 1, blocks, device=device)
    return block_T.floor_divide_(max(1, tokens))


@lru_cache(maxsize=64)
def one_slot_each(slot_of_expert: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[E + 1]; the last entry is -1, so that the id -1 indexes it and stays -1."""
    return torch.tensor([*slot_of_expert, -1], device=device, dtype=dtype)


def split_ids(ids_TK: torch.Tensor, split: Split, num_experts: int, source: int, blocks: int) -> torch.Tensor:
    """Slots of the choices of rank `source`, same shape and dtype as ids_TK (first dimension: tokens; -1 = unused).

    Choices sorted by (block, expert), in token order, are runs that the split cuts into runs of slots. The host reads
    nothing of the device.
    """
    tables = _tables(split, source, blocks, ids_TK.device)
    block_T = block_of_tokens(ids_TK.shape[0], blocks, ids_TK.device)
    width = num_experts + 1  # the unused stand before the experts of their block
    keys = (block_T.reshape(-1, *[1] * (ids_TK.dim() - 1)) * width + (ids_TK + 1)).reshape(-1)
    counts = torch.zeros(blocks * width, dtype=torch.int64, device=keys.device)
    counts = counts.index_add_(0, keys, torch.ones_like(keys)).reshape(blocks, width)
    rows = counts[:, tables.expert + 1]
    if len(split.several):
        bounds = (rows[:, tables.several] * tables.upper + tables.phase) // tables.total
        before = bounds.roll(1, dims=1).masked_fill(tables.first, 0)
        rows[:, tables.several] = bounds - before
    runs = torch.cat([counts[:, :1], rows], dim=1).reshape(-1)
    slots = torch.repeat_interleave(tables.order.repeat(blocks), runs, output_size=keys.numel())
    found = torch.empty_like(slots)
    found[keys.sort(stable=True).indices] = slots
    return found.reshape(ids_TK.shape).to(ids_TK.dtype)


class _Tables:
    """A split for one source rank on a device; `order` begins with -1, the slot of the unused."""

    def __init__(self, split: Split, source: int, blocks: int, device: torch.device) -> None:
        upper, total, phase = split.terms((source,), blocks)
        self.order = torch.from_numpy(np.append(-1, split.order)).to(device)
        self.expert = torch.from_numpy(split.expert).to(device)
        self.several = torch.from_numpy(split.several).to(device)
        self.first = torch.from_numpy(split.first).to(device)
        self.upper, self.total = (torch.from_numpy(one[0, 0].copy()).to(device) for one in (upper, total))
        self.phase = torch.from_numpy(phase[0]).to(device)


@lru_cache(maxsize=64)
def _tables(split: Split, source: int, blocks: int, device: torch.device) -> _Tables:
    return _Tables(split, source, blocks, device)


def sums_by_expert(counts_BP: torch.Tensor, slot_to_expert: tuple[int, ...], num_experts: int) -> torch.Tensor:
    """int64 [B, E] of counts by slot, [B, P]."""
    experts = torch.tensor(slot_to_expert, device=counts_BP.device)
    return counts_BP.new_zeros(len(counts_BP), num_experts).index_add_(1, experts, counts_BP)
