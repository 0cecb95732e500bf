"""activation (swiglu, gelu, relu) and its backward in Triton: float32 inside (float64 for float64), rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops.activation import width as width_of
from moe_overlap.ops.activation_math_triton import KIND_NUMBERS, SWIGLU, activate, differentiate
from moe_overlap.ops.launch_triton import accumulator, blocks, contiguous, launch, tile


@triton.jit
def _live_rows(offs_ptr, num_rows, num_groups):
    """How many leading rows count: offs[-1], or all of them where there is no offs."""
    live = num_rows
    if offs_ptr is not None:
        live = tl.minimum(tl.load(offs_ptr + num_groups - 1), num_rows)
    return live


@triton.jit(do_not_specialize=["num_rows"])
def activation_kernel(
    h_ptr, scale_ptr, offs_ptr, a_ptr, num_rows, width, num_groups,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live_R = row_R < _live_rows(offs_ptr, num_rows, num_groups)
    live_RF = live_R[:, None] & (col_F < width)[None, :]
    here_RF = (row_R < num_rows)[:, None] & (col_F < width)[None, :]
    wide_R = row_R.to(tl.int64)
    place_RF = wide_R[:, None] * width + col_F[None, :]
    if KIND == SWIGLU:
        h_RF = h_ptr + wide_R[:, None] * (2 * width) + col_F[None, :]
        gate_RF = tl.load(h_RF, mask=live_RF, other=0.0).to(ACC)
        up_RF = tl.load(h_RF + width, mask=live_RF, other=0.0).to(ACC)
    else:
        up_RF = tl.load(h_ptr + place_RF, mask=live_RF, other=0.0).to(ACC)
        gate_RF = up_RF
    a_RF = activate(gate_RF, up_RF, KIND)
    if scale_ptr is not None:
        a_RF = a_RF * tl.load(scale_ptr + row_R, mask=live_R, other=0.0).to(ACC)[:, None]
    tl.store(a_ptr + place_RF, a_RF.to(a_ptr.dtype.element_ty), mask=here_RF)


@triton.jit(do_not_specialize=["num_rows"])
def activation_backward_kernel(
    da_ptr, h_ptr, scale_ptr, offs_ptr, dh_ptr, dscale_ptr, num_rows, width, num_groups,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program goes through whole rows where there is a row_scale, so that the sums of dscale have one order."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live_R = row_R < _live_rows(offs_ptr, num_rows, num_groups)
    here_R = row_R < num_rows
    wide_R = row_R.to(tl.int64)
    dot_R = tl.zeros((BLOCK_R,), dtype=ACC)
    for start in range(tl.program_id(1) * BLOCK_F, width, tl.num_programs(1) * BLOCK_F):
        col_F = start + tl.arange(0, BLOCK_F)
        live_RF = live_R[:, None] & (col_F < width)[None, :]
        here_RF = here_R[:, None] & (col_F < width)[None, :]
        place_RF = wide_R[:, None] * width + col_F[None, :]
        da_RF = tl.load(da_ptr + place_RF, mask=live_RF, other=0.0).to(ACC)
        if KIND == SWIGLU:
            gate_place_RF = wide_R[:, None] * (2 * width) + col_F[None, :]
            gate_RF = tl.load(h_ptr + gate_place_RF, mask=live_RF, other=0.0).to(ACC)
            up_RF = tl.load(h_ptr + gate_place_RF + width, mask=live_RF, other=0.0).to(ACC)
        else:
            gate_place_RF = place_RF
            up_RF = tl.load(h_ptr + place_RF, mask=live_RF, other=0.0).to(ACC)
            gate_RF = up_RF
        if scale_ptr is not None:
            dot_R += tl.sum(da_RF * activate(gate_RF, up_RF, KIND), 1)
            da_RF = da_RF * tl.load(scale_ptr + row_R, mask=live_R, other=0.0).to(ACC)[:, None]
        dgate_RF, dup_RF = differentiate(da_RF, gate_RF, up_RF, KIND)
        tl.store(dh_ptr + gate_place_RF, dgate_RF.to(dh_ptr.dtype.element_ty), mask=here_RF)
        if KIND == SWIGLU:
            tl.store(dh_ptr + gate_place_RF + width, dup_RF.to(dh_ptr.dtype.element_ty), mask=here_RF)
    if scale_ptr is not None:
        tl.store(dscale_ptr + row_R, dot_R.to(dscale_ptr.dtype.element_ty), mask=here_R)


def activation(
    h_RF: torch.Tensor, kind: str, row_scale: torch.Tensor | None, offs: torch.Tensor | None
) -> torch.Tensor:
    """a_RF: see ops/activation.py. Reads h, writes a."""
    num_rows, width, groups = h_RF.shape[0], width_of(h_RF.shape[1], kind), 0 if offs is None else offs.numel()
    a_RF = torch.empty((num_rows, width), dtype=h_RF.dtype, device=h_RF.device)
    if offs is not None and offs.numel() == 0:
        return a_RF.zero_()
    block_R, block_F = tile(width, elements=2048, widest=1024)
    launch(
        activation_kernel,
        (blocks(num_rows, block_R), blocks(width, block_F)),
        h_RF.contiguous(), contiguous(row_scale), contiguous(offs), a_RF, num_rows, width, groups,
        KIND=KIND_NUMBERS[kind], ACC=accumulator(h_RF.dtype), BLOCK_R=block_R, BLOCK_F=block_F,
    )  # fmt: skip
    return a_RF


def activation_backward(
    da_RF: torch.Tensor, h_RF: torch.Tensor, kind: str, row_scale: torch.Tensor | None, offs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dh, dscale): see ops/activation.py. Reads da and h, writes dh."""
    (num_rows, width), groups = da_RF.shape, 0 if offs is None else offs.numel()
    dh_RF = torch.empty(h_RF.shape, dtype=h_RF.dtype, device=h_RF.device)
    dscale = (
        da_RF.new_empty((0,))
        if row_scale is None
        else torch.zeros_like(row_scale, memory_format=torch.contiguous_format)
    )
    if offs is not None and offs.numel() == 0:
        return dh_RF.zero_(), dscale
    block_R, block_F = tile(width, elements=1024, widest=512)
    launch(
        activation_backward_kernel,
        (blocks(num_rows, block_R), blocks(width, block_F) if row_scale is None else 1),
        da_RF.contiguous(), h_RF.contiguous(), contiguous(row_scale), contiguous(offs), dh_RF, dscale,
        num_rows, width, groups,
        KIND=KIND_NUMBERS[kind], ACC=accumulator(h_RF.dtype), BLOCK_R=block_R, BLOCK_F=block_F,
    )  # fmt: skip
    return dh_RF, dscale
