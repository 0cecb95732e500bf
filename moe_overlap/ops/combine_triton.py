"""combine and its backward in Triton: gathers in the order of k, sums in float32 (float64 for float64), no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops import checks
from moe_overlap.ops.launch_triton import accumulator, blocks, contiguous, launch, power_of_two, tile
from moe_overlap.ops.rows_triton import clear_unused, marks


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def combine_kernel(
    y_ptr, slot_to_row_ptr, weights_ptr, residual_ptr, out_ptr, tokens, num_rows, width,
    ACC: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    col_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here_T, here_D = token_T < tokens, col_D < width
    token_T = token_T.to(tl.int64)
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    for k in tl.static_range(K):
        row_T = tl.load(slot_to_row_ptr + token_T * K + k, mask=here_T, other=-1)
        kept_T = (row_T >= 0) & (row_T < num_rows)
        y_ptr_TD = y_ptr + row_T.to(tl.int64)[:, None] * width + col_D[None, :]
        part_TD = tl.load(y_ptr_TD, mask=kept_T[:, None] & here_D[None, :], other=0.0).to(ACC)
        if weights_ptr is not None:
            # A slot without a row adds nothing even where its weight is NaN.
            weight_T = tl.load(weights_ptr + token_T * K + k, mask=kept_T, other=0.0).to(ACC)
            part_TD = part_TD * weight_T[:, None]
        sum_TD += part_TD
    place_TD = token_T[:, None] * width + col_D[None, :]
    here_TD = here_T[:, None] & here_D[None, :]
    if residual_ptr is not None:
        sum_TD += tl.load(residual_ptr + place_TD, mask=here_TD, other=0.0).to(ACC)
    tl.store(out_ptr + place_TD, sum_TD.to(out_ptr.dtype.element_ty), mask=here_TD)


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def combine_backward_kernel(
    dy_ptr, y_ptr, slot_to_row_ptr, weights_ptr, dy_rows_ptr, dweights_ptr, used_ptr, tokens, num_rows, width,
    ACC: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program goes through whole rows where dweights are wanted, so that their sums have one order."""
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k_K = tl.arange(0, K_PAD)
    here_T = token_T < tokens
    token_T = token_T.to(tl.int64)
    dots_TK = tl.zeros((BLOCK_T, K_PAD), dtype=ACC)
    for start in range(tl.program_id(1) * BLOCK_D, width, tl.num_programs(1) * BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        here_D = col_D < width
        place_TD = token_T[:, None] * width + col_D[None, :]
        dy_TD = tl.load(dy_ptr + place_TD, mask=here_T[:, None] & here_D[None, :], other=0.0).to(ACC)
        for k in tl.static_range(K):
            row_T = tl.load(slot_to_row_ptr + token_T * K + k, mask=here_T, other=-1)
            kept_T = (row_T >= 0) & (row_T < num_rows)
            row_TD = row_T.to(tl.int64)[:, None] * width + col_D[None, :]
            kept_TD = kept_T[:, None] & here_D[None, :]
            scaled_TD = dy_TD
            if weights_ptr is not None:
                weight_T = tl.load(weights_ptr + token_T * K + k, mask=kept_T, other=0.0).to(ACC)
                scaled_TD = dy_TD * weight_T[:, None]
            tl.store(dy_rows_ptr + row_TD, scaled_TD.to(dy_rows_ptr.dtype.element_ty), mask=kept_TD)
            if y_ptr is not None:
                y_TD = tl.load(y_ptr + row_TD, mask=kept_TD, other=0.0).to(ACC)
                # A token without a row has dy times the zero loaded here, which is NaN where dy is.
                dot_T = tl.sum(tl.where(kept_T[:, None], dy_TD * y_TD, 0.0), 1)
                dots_TK += tl.where(k_K[None, :] == k, dot_T[:, None], 0.0)
            if start == 0:
                tl.store(used_ptr + row_T, tl.full((BLOCK_T,), 1, tl.int8), mask=kept_T)
    if y_ptr is not None:
        dweights_ptr_TK = dweights_ptr + token_T[:, None] * K + k_K[None, :]
        tl.store(dweights_ptr_TK, dots_TK.to(dweights_ptr.dtype.element_ty), mask=here_T[:, None] & (k_K < K)[None, :])


def combine(
    y_RD: torch.Tensor,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    residual_TD: torch.Tensor | None,
) -> torch.Tensor:
    """y_TD: see ops/combine.py. Reads T * K * D elements and writes T * D."""
    checks.check_values("slot_to_row", slot_to_row_TK, -1, y_RD.shape[0], why="-1 = no row, the rows of y are the end")
    (num_rows, width), (tokens, top_k) = y_RD.shape, slot_to_row_TK.shape
    out_TD = torch.empty((tokens, width), dtype=y_RD.dtype, device=y_RD.device)
    block_T, block_D = tile(width, elements=1024, widest=1024)
    launch(
        combine_kernel,
        (blocks(tokens, block_T), blocks(width, block_D)),
        y_RD.contiguous(), slot_to_row_TK.contiguous(), contiguous(weights_TK), contiguous(residual_TD), out_TD,
        tokens, num_rows, width,
        ACC=accumulator(y_RD.dtype), K=top_k, BLOCK_T=block_T, BLOCK_D=block_D,
    )  # fmt: skip
    return out_TD


def combine_backward(
    dy_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    num_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy_RD, dweights_TK): see ops/combine.py. Reads T * D elements, and R * D of y for dweights, and writes R * D."""
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why="-1 = no row, num_rows is the end")
    (tokens, width), top_k, device = dy_TD.shape, slot_to_row_TK.shape[1], dy_TD.device
    dy_RD = torch.empty((num_rows, width), dtype=dy_TD.dtype, device=device)
    if weights_TK is None:
        y_RD = None
    used_R, dweights_TK = marks(dy_RD), dy_TD.new_empty((0,))
    if weights_TK is not None and y_RD is not None:
        dweights_TK = torch.zeros((tokens, top_k), dtype=weights_TK.dtype, device=device)
    # Rows in one warp each: their sums then need no shared memory.
    block_T, block_D = tile(width, elements=2048, widest=256)
    launch(
        combine_backward_kernel,
        (blocks(tokens, block_T) if top_k else 0, 1 if y_RD is not None else blocks(width, block_D)),
        dy_TD.contiguous(), contiguous(y_RD), slot_to_row_TK.contiguous(), contiguous(weights_TK),
        dy_RD, dweights_TK, used_R, tokens, num_rows, width,
        ACC=accumulator(dy_TD.dtype), K=top_k, K_PAD=power_of_two(top_k), BLOCK_T=block_T, BLOCK_D=block_D,
    )  # fmt: skip
    return clear_unused(dy_RD, used_R), dweights_TK
