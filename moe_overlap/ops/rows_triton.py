"""What permute and the backward of combine share: rows that no slot points to are zeroed in a pass of their own.

The copying kernel goes through the tokens, so that each row of x is read once, and marks the rows it writes. Padding
between experts and the tail are the rows without a mark; a buffer is never zeroed as a whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops.launch_triton import blocks, launch, tile


@triton.jit(do_not_specialize=["num_rows"])
def clear_rows_kernel(out_ptr, used_ptr, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    unused_R = tl.load(used_ptr + row_R, mask=row_R < num_rows, other=1) == 0
    if tl.max(unused_R.to(tl.int32), 0) > 0:
        row_ptr_R = out_ptr + row_R.to(tl.int64) * width
        for start in range(0, width, BLOCK_D):
            col_D = start + tl.arange(0, BLOCK_D)
            zero_RD = tl.zeros((BLOCK_R, BLOCK_D), dtype=out_ptr.dtype.element_ty)
            tl.store(row_ptr_R[:, None] + col_D[None, :], zero_RD, mask=unused_R[:, None] & (col_D < width)[None, :])


def marks(out_RD: torch.Tensor) -> torch.Tensor:
    """One byte for each row, 0: not written."""
    return torch.zeros(out_RD.shape[0], dtype=torch.int8, device=out_RD.device)


def clear_unused(out_RD: torch.Tensor, used_R: torch.Tensor) -> torch.Tensor:
    """Zero the rows without a mark, in place."""
    num_rows, width = out_RD.shape
    block_R, block_D = tile(width, elements=8192, widest=1024)
    block_R = min(block_R, 16)
    launch(
        clear_rows_kernel,
        (blocks(num_rows, block_R),),
        out_RD, used_R, num_rows, width,
        BLOCK_R=block_R, BLOCK_D=block_D,
    )  # fmt: skip
    return out_RD
