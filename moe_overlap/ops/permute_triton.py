"""permute in Triton. Moves T * (1 + K) * D elements: a token's row is read once and written K times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops import checks
from moe_overlap.ops.launch_triton import blocks, launch, tile
from moe_overlap.ops.rows_triton import clear_unused, marks


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def permute_kernel(
    x_ptr, slot_to_row_ptr, out_ptr, used_ptr, tokens, num_rows, width,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here_T, here_D = token_T < tokens, col_D < width
    token_T = token_T.to(tl.int64)
    x_TD = tl.load(x_ptr + token_T[:, None] * width + col_D[None, :], mask=here_T[:, None] & here_D[None, :])
    for k in tl.static_range(K):
        row_T = tl.load(slot_to_row_ptr + token_T * K + k, mask=here_T, other=-1)
        kept_T = (row_T >= 0) & (row_T < num_rows)
        out_ptr_TD = out_ptr + row_T.to(tl.int64)[:, None] * width + col_D[None, :]
        tl.store(out_ptr_TD, x_TD, mask=kept_T[:, None] & here_D[None, :])
        if tl.program_id(1) == 0:
            tl.store(used_ptr + row_T, tl.full((BLOCK_T,), 1, tl.int8), mask=kept_T)


def permute(x_TD: torch.Tensor, slot_to_row_TK: torch.Tensor, offs: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """x_RD: see ops/permute.py. Any float dtype, bits are copied; `offs` is not needed."""
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why="-1 = no row, num_rows is the end")
    (tokens, width), top_k = x_TD.shape, slot_to_row_TK.shape[1]
    out_RD = torch.empty((num_rows, width), dtype=x_TD.dtype, device=x_TD.device)
    used_R = marks(out_RD)
    block_T, block_D = tile(width, elements=4096, widest=1024)
    launch(
        permute_kernel,
        (blocks(tokens, block_T) if top_k else 0, blocks(width, block_D)),
        x_TD.contiguous(), slot_to_row_TK.contiguous(), out_RD, used_R, tokens, num_rows, width,
        K=top_k, BLOCK_T=block_T, BLOCK_D=block_D,
    )  # fmt: skip
    return clear_unused(out_RD, used_R)
