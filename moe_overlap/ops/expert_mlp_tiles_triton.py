"""What the Triton kernels of the expert MLP have in common: the list of row tiles, their order, and the inner product.

The rows of expert i are [begin, end). They are cut into tiles of BLOCK_M rows that never cross an expert, listed on the
device by `list_tiles_kernel`, so that no size of a group is ever read by the host. Example: experts with rows [0, 5),
[5, 5), [5, 7) and BLOCK_M 4 give the tiles (expert, begin, end) = (0, 0, 5), (0, 4, 5), (2, 5, 7). A tile of expert -1
holds rows beyond the last expert; kernels multiply nothing there and so write zeros.

The other kernels are persistent: a fixed number of programs (the SM budget) walks over row tiles x column tiles, in
groups of GROUP row tiles that share the columns of a weight while these are in L2. Every element is one program's sum
in one order, so neither the budget nor the order of programs changes a bit, nor how `walk` hands tiles out.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPLIT_TILES = 64
"""Tiles that one program of `list_tiles_kernel` writes at a time."""

COUNTERS = 8
"""Words behind a list that deal tiles out, where these are dealt: one for each launch over the list."""


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def list_tiles_kernel(
    starts, ends, tiles, num_experts, num_rows, capacity,
    HAS_STARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, SPLIT: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """tiles int32 [3, capacity] + [1]: expert, begin and end of each tile, then their number, then COUNTERS zeros.

    One program an expert, and one more for the rows beyond the last where those are wanted. starts: int32 [E] or None
    for adjacent groups. Ranges are clamped to the rows there are.
    """
    expert = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    known_E = expert_E < num_experts
    end_E = tl.load(ends + expert_E, mask=known_E, other=0)
    if HAS_STARTS:
        begin_E = tl.load(starts + expert_E, mask=known_E, other=0)
    else:
        begin_E = tl.load(ends + expert_E - 1, mask=known_E & (expert_E > 0), other=0)
    begin_E = tl.minimum(tl.maximum(begin_E, 0), num_rows)
    end_E = tl.where(known_E, tl.minimum(tl.maximum(end_E, begin_E), num_rows), 0)
    tiles_E = tl.where(known_E, (end_E - begin_E + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.sum(tl.where(expert_E < expert, tiles_E, 0))
    if expert < num_experts:
        begin = tl.sum(tl.where(expert_E == expert, begin_E, 0))
        end = tl.sum(tl.where(expert_E == expert, end_E, 0))
        name = expert
    else:
        begin = tl.max(end_E)
        end = num_rows
        name = -1
    count = (end - begin + BLOCK_M - 1) // BLOCK_M
    for first in range(0, count, SPLIT):
        tile = first + tl.arange(0, SPLIT)
        at = before + tile
        # Overlapping ranges would need more tiles than there is room for.
        fits = (tile < count) & (at < capacity)
        tl.store(tiles + at, name + tl.zeros_like(at), mask=fits)
        tl.store(tiles + capacity + at, begin + tile * BLOCK_M, mask=fits)
        tl.store(tiles + 2 * capacity + at, end + tl.zeros_like(at), mask=fits)
    if expert == tl.num_programs(0) - 1:
        tl.store(tiles + 3 * capacity, tl.minimum(before + count, capacity))
        if COUNTERS > 0:
            tl.store(tiles + 3 * capacity + 1 + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), dtype=tl.int32))


@triton.jit
def walk(body: tl.constexpr, first, last, columns, counter, work):
    """body(tile, *work) for all (last - first) * columns tiles, counted from 0, by all programs together.

    counter None: program p of P takes the tiles p, p + P, p + 2P and so on. Else an int32 word that is zero when the
    kernel begins: each program takes the next tile that nobody has, so that one which is late, as something else has
    its multiprocessor, is not waited for.
    """
    if counter is None:
        for tile in tl.range(tl.program_id(0), (last - first) * columns, tl.num_programs(0)):
            body(tile, *work)
    else:
        # Relaxed: a number is all that programs learn of each other.
        tile = tl.atomic_add(counter, 1, sem="relaxed")
        while tile < (last - first) * columns:
            body(tile, *work)
            tile = tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def place(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """(row tile, column tile) of the program's `tile`: GROUP row tiles by all columns, column by column."""
    per_group = GROUP * num_columns
    first = tile // per_group * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def tile_rows(tiles, capacity, row_tile, BLOCK_M: tl.constexpr):
    """(expert int64, first row int32, rows int64 [BLOCK_M], which exist, which have an expert) of a row tile."""
    expert = tl.load(tiles + row_tile).to(tl.int64)
    begin = tl.load(tiles + capacity + row_tile)
    end = tl.load(tiles + 2 * capacity + row_tile)
    row_M = begin + tl.arange(0, BLOCK_M)
    return expert, begin, row_M.to(tl.int64), row_M < end, row_M < tl.where(expert < 0, begin, end)


@triton.jit
def load_rows(
    a, row_M, live_M, begin, stride, k, inner,
    BLOCK_K: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """a[row, k .. k + BLOCK_K) as [M, K], zeros for rows not `live` and from `inner` on.

    a: a pointer, or with TMA a descriptor of [R, inner]: then rows `begin` and following are read, and those that are
    not this expert's reach only elements that are not stored.
    """
    if TMA:
        a_MK = a.load([begin, k])
    else:
        k_K = k + tl.arange(0, BLOCK_K)
        at_MK = a + row_M[:, None] * stride + k_K[None, :]
        if EVEN_K:
            a_MK = tl.load(at_MK, mask=live_M[:, None], other=0.0)
        else:
            a_MK = tl.load(at_MK, mask=live_M[:, None] & (k_K < inner)[None, :], other=0.0)
    return a_MK


@triton.jit
def load_weights(
    b, expert, column, columns, k, inner, stride_expert, stride_column, stride_inner,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, IS_NK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """b[expert, column .. column + BLOCK_N, k .. k + BLOCK_K) as [K, N], zeros from `columns` and from `inner` on.

    b: a pointer with three strides, or with TMA a descriptor of [E, N, K] (IS_NK) or [E, K, N].
    """
    if TMA:
        if IS_NK:
            b_KN = tl.reshape(b.load([expert.to(tl.int32), column, k]), (BLOCK_N, BLOCK_K)).T
        else:
            b_KN = tl.reshape(b.load([expert.to(tl.int32), k, column]), (BLOCK_K, BLOCK_N))
    else:
        k_K = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        column_N = (column + tl.arange(0, BLOCK_N)).to(tl.int64)
        at_KN = b + expert * stride_expert + column_N[None, :] * stride_column + k_K[:, None] * stride_inner
        if EVEN_K:
            b_KN = tl.load(at_KN, mask=(column_N < columns)[None, :], other=0.0)
        else:
            b_KN = tl.load(at_KN, mask=(column_N < columns)[None, :] & (k_K < inner)[:, None], other=0.0)
    return b_KN


@triton.jit
def inner_length(expert, inner):
    """How much there is to multiply: nothing for the rows beyond the last expert."""
    return tl.where(expert < 0, 0, inner)
