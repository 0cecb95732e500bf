"""row_map in Triton: a stable counting sort in three launches, without atomics.

1. Each block of slots is counted by expert; the programs also fill row_to_slot with -1.
2. The counts of each expert become, block by block, the number of its slots in earlier blocks.
3. Each slot's place is where its expert begins, plus its expert's slots in earlier blocks, plus those before it in its
   own block, which it counts by comparing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops.launch_triton import blocks, launch, power_of_two
from moe_overlap.ops.row_map import max_rows

_NO_LIMIT = 2**31 - 1
_BLOCK_SLOTS = 512
_BLOCK_COMPARED = 16


@triton.jit
def _expert_index(ids_ptr, slot_S, slots, first, last):
    """The experts of some slots counted from `first`; last - first for a slot without one."""
    id_S = tl.load(ids_ptr + slot_S, mask=slot_S < slots, other=-1)
    return tl.where((id_S >= first) & (id_S < last), id_S - first, last - first)


@triton.jit(do_not_specialize=["slots", "num_rows", "rows_each"])
def count_kernel(
    ids_ptr, counts_ptr, row_to_slot_ptr, slots, first, last, num_rows, rows_each,
    E_PAD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot_S = block * BLOCK_S + tl.arange(0, BLOCK_S)
    expert_E = tl.arange(0, E_PAD)
    count_E = tl.histogram(_expert_index(ids_ptr, slot_S, slots, first, last), E_PAD)
    experts = last - first
    tl.store(counts_ptr + block.to(tl.int64) * experts + expert_E, count_E, mask=expert_E < experts)
    begin = block * rows_each
    end = tl.minimum(begin + rows_each, num_rows)
    for row in range(begin, end, BLOCK_S):
        row_S = row + tl.arange(0, BLOCK_S)
        tl.store(row_to_slot_ptr + row_S, tl.full((BLOCK_S,), -1, tl.int32), mask=row_S < end)


@triton.jit(do_not_specialize=["num_blocks"])
def earlier_kernel(counts_ptr, totals_ptr, num_blocks, experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts[b, e] becomes the sum of counts[:b, e], totals[e] that of all."""
    expert_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    here_E = expert_E < experts
    total_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for begin in range(0, num_blocks, BLOCK_B):
        block_B = begin + tl.arange(0, BLOCK_B)
        here_BE = (block_B < num_blocks)[:, None] & here_E[None, :]
        place_BE = counts_ptr + block_B.to(tl.int64)[:, None] * experts + expert_E[None, :]
        count_BE = tl.load(place_BE, mask=here_BE, other=0)
        tl.store(place_BE, total_E[None, :] + tl.cumsum(count_BE, 0) - count_BE, mask=here_BE)
        total_E += tl.sum(count_BE, 0)
    tl.store(totals_ptr + expert_E, total_E, mask=here_E)


@triton.jit(do_not_specialize=["slots", "num_rows"])
def place_kernel(
    ids_ptr, earlier_ptr, totals_ptr, tokens_per_expert_ptr, offs_ptr, slot_to_row_ptr, row_to_slot_ptr,
    slots, first, last, align, capacity, num_rows,
    E_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    experts = last - first
    expert_E = tl.arange(0, E_PAD)
    real_E = expert_E < experts
    kept_E = tl.minimum(tl.load(totals_ptr + expert_E, mask=real_E, other=0), capacity)
    padded_E = (kept_E + align - 1) // align * align
    offs_E = tl.cumsum(padded_E, 0)
    if block == 0:
        tl.store(tokens_per_expert_ptr + expert_E, kept_E, mask=real_E)
        tl.store(offs_ptr + expert_E, offs_E, mask=real_E)

    place_S = tl.arange(0, BLOCK_S)
    slot_S = block * BLOCK_S + place_S
    index_S = _expert_index(ids_ptr, slot_S, slots, first, last)
    used_S = index_S < experts
    before_S = tl.load(earlier_ptr + block.to(tl.int64) * experts + index_S, mask=used_S, other=0)
    for begin in range(0, BLOCK_S, BLOCK_C):
        place_C = begin + tl.arange(0, BLOCK_C)
        index_C = _expert_index(ids_ptr, block * BLOCK_S + place_C, slots, first, last)
        same_SC = (index_S[:, None] == index_C[None, :]) & (place_C[None, :] < place_S[:, None])
        before_S += tl.sum(same_SC.to(tl.int32), 1)
    begin_S = tl.gather(offs_E - padded_E, index_S, 0)
    row_S = begin_S + before_S
    kept_S = used_S & (before_S < capacity)
    tl.store(slot_to_row_ptr + slot_S, tl.where(kept_S, row_S, -1), mask=slot_S < slots)
    tl.store(row_to_slot_ptr + row_S, slot_S, mask=kept_S & (row_S < num_rows))


def row_map(
    ids_TK: torch.Tensor, num_experts: int, first: int, last: int, align: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens_per_expert, offs, slot_to_row, row_to_slot): see ops/row_map.py. Bit for bit the reference's."""
    experts, slots, ids_TK = last - first, ids_TK.numel(), ids_TK.contiguous()
    num_rows = max_rows(slots, experts, align)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_TK.device)

    tokens_per_expert, offs, totals = integers(experts), integers(experts), integers(experts)
    slot_to_row, row_to_slot = integers(*ids_TK.shape), integers(num_rows)
    num_blocks = max(1, blocks(slots, _BLOCK_SLOTS))
    counts = integers(num_blocks, experts)
    # One lane more than experts: slots without one are counted there.
    padded, rows_each = power_of_two(experts + 1), blocks(num_rows, num_blocks)
    launch(
        count_kernel, (num_blocks,), ids_TK, counts, row_to_slot, slots, first, last, num_rows, rows_each,
        E_PAD=padded, BLOCK_S=_BLOCK_SLOTS,
    )  # fmt: skip
    launch(earlier_kernel, (blocks(experts, 8),), counts, totals, num_blocks, experts, BLOCK_B=256, BLOCK_E=8)
    launch(
        place_kernel, (num_blocks,),
        ids_TK, counts, totals, tokens_per_expert, offs, slot_to_row, row_to_slot,
        slots, first, last, align, _NO_LIMIT if capacity is None else min(capacity, _NO_LIMIT), num_rows,
        E_PAD=padded, BLOCK_S=_BLOCK_SLOTS, BLOCK_C=_BLOCK_COMPARED, num_warps=8,
    )  # fmt: skip
    return tokens_per_expert, offs, slot_to_row, row_to_slot
