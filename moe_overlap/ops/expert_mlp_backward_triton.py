"""Backward kernels of the expert MLP: gradients of the hidden rows and of the weights, and sums of rows by token.

The gradient of the rows is `rows_kernel` of the forward file, with dh and w_in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_overlap.ops.activation_math_triton import SWIGLU, activate, differentiate
from moe_overlap.ops.expert_mlp_tiles_triton import inner_length, load_rows, load_weights, place, tile_rows, walk


@triton.jit(do_not_specialize=["capacity", "num_rows"], do_not_specialize_on_alignment=["counter"])
def hidden_gradient_kernel(
    tiles, capacity, counter, dy, row_map, w_out, h, row_scale, dh, a, dscale_parts, num_rows, hidden, ffn, dy_stride,
    w_stride_expert, w_stride_inner,
    KIND: tl.constexpr, MAPPED: tl.constexpr, SCALED: tl.constexpr, WANTS_DSCALE: tl.constexpr, A_TMA: tl.constexpr,
    B_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """da = dy[map] @ w_out[expert]; from it and the saved h: dh, a = act(h) * scale, and each tile's part of dscale.

    dscale_parts: float32 [column tiles, R], summed over the first dimension by `sum_parts_kernel`. dh may be h: a
    program reads h where it writes dh, and nowhere else. counter: see `walk`, here and below.
    """
    num_row_tiles = tl.load(tiles + 3 * capacity)
    num_columns = tl.cdiv(ffn, BLOCK_N)
    walk(hidden_gradient_tile, 0, num_row_tiles, num_columns, counter, (
        num_row_tiles, num_columns, tiles, capacity, dy, row_map, w_out, h, row_scale, dh, a, dscale_parts, num_rows,
        hidden, ffn, dy_stride, w_stride_expert, w_stride_inner,
        KIND, MAPPED, SCALED, WANTS_DSCALE, A_TMA, B_TMA, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    ))  # fmt: skip


@triton.jit
def hidden_gradient_tile(
    tile, num_row_tiles, num_columns, tiles, capacity, dy, row_map, w_out, h, row_scale, dh, a, dscale_parts, num_rows,
    hidden, ffn, dy_stride, w_stride_expert, w_stride_inner,
    KIND: tl.constexpr, MAPPED: tl.constexpr, SCALED: tl.constexpr, WANTS_DSCALE: tl.constexpr, A_TMA: tl.constexpr,
    B_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one expert, BLOCK_N columns of F."""
    row_tile, column_tile = place(tile, num_row_tiles, num_columns, GROUP)
    expert, begin, row_M, live_M, used_M = tile_rows(tiles, capacity, row_tile, BLOCK_M)
    if MAPPED:
        dy_row_M = tl.load(row_map + row_M, mask=used_M, other=-1).to(tl.int64)
        read_M = dy_row_M >= 0
    else:
        dy_row_M = row_M
        read_M = live_M
    column = column_tile * BLOCK_N
    da_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, inner_length(expert, hidden), BLOCK_K):
        dy_MK = load_rows(dy, dy_row_M, read_M, begin, dy_stride, k, hidden, BLOCK_K, A_TMA, EVEN_K)
        w_KN = load_weights(
            w_out, expert, column, ffn, k, hidden, w_stride_expert, 1, w_stride_inner,
            BLOCK_N, BLOCK_K, B_TMA, False, EVEN_K,
        )  # fmt: skip
        da_MN = tl.dot(dy_MK, w_KN, da_MN, input_precision="ieee")
    # A quarter of the columns at a time: da, h, dh and a of all of them do not fit into registers.
    left_MN, right_MN = halves(da_MN, BLOCK_M, BLOCK_N)
    part_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for half in tl.static_range(2):
        quarters = halves(left_MN if half == 0 else right_MN, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(2):
            part_M += through_activation(
                quarters[quarter], h, row_scale, dh, a, row_M, live_M, used_M,
                column + (2 * half + quarter) * (BLOCK_N // 4), ffn, KIND, SCALED, BLOCK_N // 4,
            )  # fmt: skip
    if WANTS_DSCALE:
        tl.store(dscale_parts + column_tile.to(tl.int64) * num_rows + row_M, part_M, mask=live_M)


@triton.jit
def halves(values_MN, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(values_MN, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def through_activation(
    da_MN, h, row_scale, dh, a, row_M, live_M, used_M, column, ffn,
    KIND: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes dh and a of the columns from `column` on; returns the sum of da * a over them, for dscale."""
    column_N = column + tl.arange(0, BLOCK_N)
    exists_N = column_N < ffn
    read_MN = used_M[:, None] & exists_N[None, :]
    stored_MN = live_M[:, None] & exists_N[None, :]
    first_up = ffn if KIND == SWIGLU else 0
    place_MN = row_M[:, None] * (first_up + ffn) + column_N[None, :]
    up_MN = tl.load(h + place_MN + first_up, mask=read_MN, other=0.0).to(tl.float32)
    gate_MN = up_MN
    if KIND == SWIGLU:
        gate_MN = tl.load(h + place_MN, mask=read_MN, other=0.0).to(tl.float32)
    a_MN = activate(gate_MN, up_MN, KIND)
    # Columns beyond F and rows of other experts may hold anything, NaN too.
    da_MN = tl.where(read_MN, da_MN, 0.0)
    part_M = tl.sum(da_MN * a_MN, axis=1)
    if SCALED:
        scale_M = tl.load(row_scale + row_M, mask=used_M, other=0.0)
        a_MN *= scale_M[:, None]
        da_MN *= scale_M[:, None]
    # a needs all of h that was read: where dh is h, nothing of it is overwritten before.
    tl.store(a + row_M[:, None] * ffn + column_N[None, :], a_MN.to(a.dtype.element_ty), mask=stored_MN)
    dgate_MN, dup_MN = differentiate(da_MN, gate_MN, up_MN, KIND)
    tl.store(dh + place_MN + first_up, dup_MN.to(dh.dtype.element_ty), mask=stored_MN)
    if KIND == SWIGLU:
        tl.store(dh + place_MN, dgate_MN.to(dh.dtype.element_ty), mask=stored_MN)
    return part_M


@triton.jit(do_not_specialize=["num_rows", "first_expert", "last_expert"], do_not_specialize_on_alignment=["counter"])
def weights_kernel(
    counter, left, right, left_blocks, right_blocks, row_map, out, starts, ends, first_expert, last_expert, num_rows,
    left_width, right_width, left_stride, right_stride,
    HAS_STARTS: tl.constexpr, MAP_LEFT: tl.constexpr, MAP_RIGHT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[expert] = left.T @ right over the rows of the expert: [E, left_width, right_width], zeros without rows."""
    num_left = tl.cdiv(left_width, BLOCK_M)
    num_right = tl.cdiv(right_width, BLOCK_N)
    per_expert = num_left * num_right
    walk(weights_tile, first_expert, last_expert, per_expert, counter, (
        num_left, num_right, per_expert, left, right, left_blocks, right_blocks, row_map, out, starts, ends,
        first_expert, num_rows, left_width, right_width, left_stride, right_stride,
        HAS_STARTS, MAP_LEFT, MAP_RIGHT, TMA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    ))  # fmt: skip


@triton.jit
def weights_tile(
    tile, num_left, num_right, per_expert, left, right, left_blocks, right_blocks, row_map, out, starts, ends,
    first_expert, num_rows, left_width, right_width, left_stride, right_stride,
    HAS_STARTS: tl.constexpr, MAP_LEFT: tl.constexpr, MAP_RIGHT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of one expert's weight.

    With MAP_LEFT or MAP_RIGHT the rows of that side are read through row_map, -1 giving zeros. The sum runs over the
    rows in their order, in blocks of BLOCK_K: whole ones by TMA where left_blocks and right_blocks are descriptors of
    both sides, and what is left of an expert's rows through pointers, as its end is nothing a descriptor knows.
    """
    expert = first_expert + tile // per_expert
    left_tile, right_tile = place(tile % per_expert, num_left, num_right, GROUP)
    if HAS_STARTS:
        begin = tl.load(starts + expert)
    else:
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), num_rows)
    end = tl.minimum(tl.load(ends + expert), num_rows)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        whole_end = begin + tl.maximum(end - begin, 0) // BLOCK_K * BLOCK_K
        for row in tl.range(begin, whole_end, BLOCK_K):
            left_KM = left_blocks.load([row, left_tile * BLOCK_M])
            right_KN = right_blocks.load([row, right_tile * BLOCK_N])
            acc_MN = tl.dot(left_KM.T, right_KN, acc_MN, input_precision="ieee")
        begin = whole_end
    left_M = left_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    right_N = right_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    for row in tl.range(begin, end, BLOCK_K, num_stages=1 if TMA else None):
        row_K = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
        live_K = row_K < end
        left_row_K = row_K
        right_row_K = row_K
        left_live_K = live_K
        right_live_K = live_K
        if MAP_LEFT:
            left_row_K = tl.load(row_map + row_K, mask=live_K, other=-1).to(tl.int64)
            left_live_K = left_row_K >= 0
        if MAP_RIGHT:
            right_row_K = tl.load(row_map + row_K, mask=live_K, other=-1).to(tl.int64)
            right_live_K = right_row_K >= 0
        left_MK = tl.load(
            left + left_M[:, None] + left_row_K[None, :] * left_stride,
            mask=(left_M < left_width)[:, None] & left_live_K[None, :],
            other=0.0,
        )
        right_KN = tl.load(
            right + right_row_K[:, None] * right_stride + right_N[None, :],
            mask=right_live_K[:, None] & (right_N < right_width)[None, :],
            other=0.0,
        )
        acc_MN = tl.dot(left_MK, right_KN, acc_MN, input_precision="ieee")
    out_at_MN = out + expert.to(tl.int64) * left_width * right_width
    out_at_MN += left_M.to(tl.int64)[:, None] * right_width + right_N[None, :]
    stored_MN = (left_M < left_width)[:, None] & (right_N < right_width)[None, :]
    tl.store(out_at_MN, acc_MN.to(out.dtype.element_ty), mask=stored_MN)


@triton.jit(do_not_specialize=["capacity", "num_rows"])
def sum_parts_kernel(tiles, capacity, parts, dscale, num_rows, num_parts, BLOCK_M: tl.constexpr):
    """dscale[row] = sum over the column tiles, in order, of parts [num_parts, num_rows]. One program a row tile."""
    if tl.program_id(0) < tl.load(tiles + 3 * capacity):
        _, _, row_M, live_M, _ = tile_rows(tiles, capacity, tl.program_id(0), BLOCK_M)
        sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in range(num_parts):
            sum_M += tl.load(parts + part * num_rows.to(tl.int64) + row_M, mask=live_M, other=0.0)
        tl.store(dscale + row_M, sum_M.to(dscale.dtype.element_ty), mask=live_M)


@triton.jit
def sum_rows_kernel(rows, order, bounds, out, width, BLOCK_N: tl.constexpr):
    """out[t] = sum of rows[order[i]] for i in [bounds[t], bounds[t + 1]), in that order, in float32."""
    token = tl.program_id(0)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists_N = column_N < width
    sum_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i in range(tl.load(bounds + token), tl.load(bounds + token + 1)):
        row = tl.load(order + i).to(tl.int64)
        sum_N += tl.load(rows + row * width + column_N, mask=exists_N, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * width + column_N, sum_N.to(out.dtype.element_ty), mask=exists_N)


@triton.jit
def gather_rows_kernel(rows, row_map, out, width, BLOCK_N: tl.constexpr):
    """out[r] = rows[row_map[r]], -1 giving zeros."""
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    from_row = tl.load(row_map + row).to(tl.int64)
    exists_N = column_N < width
    value_N = tl.load(rows + from_row * width + column_N, mask=exists_N & (from_row >= 0), other=0.0)
    tl.store(out + row * width + column_N, value_N, mask=exists_N)
