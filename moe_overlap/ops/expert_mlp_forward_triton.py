"""Forward kernels of the expert MLP: rows through the map, up projection and activation in one; then rows x weights.

Numbers that change from step to step are not specialised on, so that no step but the first compiles anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_overlap.ops.activation_math_triton import SWIGLU, activate
from moe_overlap.ops.expert_mlp_tiles_triton import inner_length, load_rows, load_weights, place, tile_rows, walk


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["counter"])
def up_kernel(
    tiles, capacity, counter, x, row_to_token, row_scale, w_in, h, a, hidden, ffn, x_stride, w_stride_expert,
    w_stride_column,
    KIND: tl.constexpr, MAPPED: tl.constexpr, SCALED: tl.constexpr, SAVE_H: tl.constexpr, A_TMA: tl.constexpr,
    B_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """h = x[map] @ w_in[expert].T and a = act(h) * scale, tile by tile. h [R, F'] is written where SAVE_H.

    counter: see `walk`, here and below.
    """
    num_row_tiles = tl.load(tiles + 3 * capacity)
    num_columns = tl.cdiv(ffn, BLOCK_N)
    first_up = ffn if KIND == SWIGLU else 0
    h_width = first_up + ffn
    walk(up_tile, 0, num_row_tiles, num_columns, counter, (
        num_row_tiles, num_columns, first_up, h_width, tiles, capacity, x, row_to_token, row_scale, w_in, h, a,
        hidden, ffn, x_stride, w_stride_expert, w_stride_column,
        KIND, MAPPED, SCALED, SAVE_H, A_TMA, B_TMA, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    ))  # fmt: skip


@triton.jit
def up_tile(
    tile, num_row_tiles, num_columns, first_up, h_width, tiles, capacity, x, row_to_token, row_scale, w_in, h, a,
    hidden, ffn, x_stride, w_stride_expert, w_stride_column,
    KIND: tl.constexpr, MAPPED: tl.constexpr, SCALED: tl.constexpr, SAVE_H: tl.constexpr, A_TMA: tl.constexpr,
    B_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one expert, BLOCK_N columns of F; swiglu: the same of gate and up, F apart in w_in and h."""
    row_tile, column_tile = place(tile, num_row_tiles, num_columns, GROUP)
    expert, begin, row_M, live_M, used_M = tile_rows(tiles, capacity, row_tile, BLOCK_M)
    if MAPPED:
        token_M = tl.load(row_to_token + row_M, mask=used_M, other=-1).to(tl.int64)
        read_M = token_M >= 0
    else:
        token_M = row_M
        read_M = used_M
    column = column_tile * BLOCK_N
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # float32 is multiplied as float32 ("ieee"), not as tf32.
    for k in tl.range(0, inner_length(expert, hidden), BLOCK_K):
        x_MK = load_rows(x, token_M, read_M, begin, x_stride, k, hidden, BLOCK_K, A_TMA, EVEN_K)
        if KIND == SWIGLU:
            gate_KN = load_weights(
                w_in, expert, column, h_width, k, hidden, w_stride_expert, w_stride_column, 1,
                BLOCK_N, BLOCK_K, B_TMA, True, EVEN_K,
            )  # fmt: skip
            gate_MN = tl.dot(x_MK, gate_KN, gate_MN, input_precision="ieee")
        up_KN = load_weights(
            w_in, expert, first_up + column, h_width, k, hidden, w_stride_expert, w_stride_column, 1,
            BLOCK_N, BLOCK_K, B_TMA, True, EVEN_K,
        )  # fmt: skip
        up_MN = tl.dot(x_MK, up_KN, up_MN, input_precision="ieee")
    # a is made of the rounded h, as backward makes it again from the h that is saved.
    gate_MN, up_MN = gate_MN.to(a.dtype.element_ty), up_MN.to(a.dtype.element_ty)
    column_N = column + tl.arange(0, BLOCK_N)
    stored_MN = live_M[:, None] & (column_N < ffn)[None, :]
    if SAVE_H:
        h_at_MN = h + row_M[:, None] * h_width + column_N[None, :]
        tl.store(h_at_MN + first_up, up_MN, mask=stored_MN)
        if KIND == SWIGLU:
            tl.store(h_at_MN, gate_MN, mask=stored_MN)
    a_MN = activate(gate_MN.to(tl.float32), up_MN.to(tl.float32), KIND)
    if SCALED:
        a_MN *= tl.load(row_scale + row_M, mask=used_M, other=0.0)[:, None]
    tl.store(a + row_M[:, None] * ffn + column_N[None, :], a_MN.to(a.dtype.element_ty), mask=stored_MN)


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["counter"])
def rows_kernel(
    tiles, capacity, counter, a, b, out, columns, inner, a_stride, b_stride_expert, b_stride_column, b_stride_inner,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_IS_NK: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[row] = a[row] @ b[expert of the row]: the down projection (B_IS_NK) and the gradient of the rows."""
    num_row_tiles = tl.load(tiles + 3 * capacity)
    num_columns = tl.cdiv(columns, BLOCK_N)
    walk(rows_tile, 0, num_row_tiles, num_columns, counter, (
        num_row_tiles, num_columns, tiles, capacity, a, b, out, columns, inner, a_stride, b_stride_expert,
        b_stride_column, b_stride_inner, A_TMA, B_TMA, B_IS_NK, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    ))  # fmt: skip


@triton.jit
def rows_tile(
    tile, num_row_tiles, num_columns, tiles, capacity, a, b, out, columns, inner, a_stride, b_stride_expert,
    b_stride_column, b_stride_inner,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, B_IS_NK: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one expert, BLOCK_N columns."""
    row_tile, column_tile = place(tile, num_row_tiles, num_columns, GROUP)
    expert, begin, row_M, live_M, _ = tile_rows(tiles, capacity, row_tile, BLOCK_M)
    column = column_tile * BLOCK_N
    out_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, inner_length(expert, inner), BLOCK_K):
        a_MK = load_rows(a, row_M, live_M, begin, a_stride, k, inner, BLOCK_K, A_TMA, EVEN_K)
        b_KN = load_weights(
            b, expert, column, columns, k, inner, b_stride_expert, b_stride_column, b_stride_inner,
            BLOCK_N, BLOCK_K, B_TMA, B_IS_NK, EVEN_K,
        )  # fmt: skip
        out_MN = tl.dot(a_MK, b_KN, out_MN, input_precision="ieee")
    column_N = column + tl.arange(0, BLOCK_N)
    stored_MN = live_M[:, None] & (column_N < columns)[None, :]
    tl.store(out + row_M[:, None] * columns + column_N[None, :], out_MN.to(out.dtype.element_ty), mask=stored_MN)
