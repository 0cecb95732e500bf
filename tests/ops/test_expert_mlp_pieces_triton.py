"""The raw pieces of the expert MLP on Triton, under the interpreter: ranges, buffers, groups of experts, far rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from tests import tolerances
from tests.ops.cases import randn, weights
from tests.ops.interpreted import far_programs, needs_triton, on_triton

needs_triton(interpreter=True)

from triton.runtime.errors import OutOfResources  # noqa: E402

from moe_overlap.ops import expert_mlp_triton as mlp  # noqa: E402
from moe_overlap.ops.expert_mlp_blocks_triton import STAGES, block_shape, candidates  # noqa: E402
from moe_overlap.ops.expert_mlp_tune_triton import tune, use  # noqa: E402

F32 = torch.float32
PIECES = ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
ROWS, HIDDEN, FFN, EXPERTS, MARK = 40, 22, 21, 3, 7.0
STARTS, ENDS = [22, 0, 20], [40, 19, 20]
RANGES = tuple(zip(STARTS, ENDS, strict=True))


def everything(
    x: Tensor, dy: Tensor, w_in: Tensor, w_out: Tensor, *, experts=None, bounds=(STARTS, ENDS)
) -> list[Tensor]:
    """y, h, dx, dh, a into marked buffers, then dw_in and dw_out."""
    starts, ends = bounds
    widths = (HIDDEN, w_in.shape[1], HIDDEN, w_in.shape[1], FFN)
    y, h, dx, dh, a = (torch.full((ROWS, width), MARK, dtype=x.dtype) for width in widths)
    got = ops.expert_mlp_forward(x, w_in, w_out, ends, starts=starts, kind="swiglu", y=y, h=h)
    assert got[0] is y and got[1] is h
    got = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, starts=starts, kind="swiglu", dx=dx, dh=dh, a=a)
    assert got[0] is dx and got[1] is dh and got[2] is a
    dw_in, dw_out = torch.full_like(w_in, MARK), torch.full_like(w_out, MARK)
    ops.expert_mlp_wgrad(x, dy, dh, a, ends, starts=starts, dw_in=dw_in, dw_out=dw_out, experts=experts)
    return [y, h, dx, dh, a, dw_in, dw_out]


def inputs(dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    w_in, w_out = weights(EXPERTS, HIDDEN, FFN, "swiglu", dtype)
    return randn(ROWS, HIDDEN, dtype=dtype), randn(ROWS, HIDDEN, dtype=dtype, seed=5), w_in, w_out


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_equal_the_references_in_the_ranges_and_write_nothing_else(dtype) -> None:
    values = inputs(dtype)
    want = everything(*(value.double() for value in values))
    with on_triton(*PIECES):
        got = everything(*values)
    outside = [row for row in range(ROWS) if not any(begin <= row < end for begin, end in RANGES)]
    assert outside
    for have, should in zip(got, want, strict=True):
        tolerances.close(have, should, dtype)
    for have in got[:5]:
        assert (have[outside] == MARK).all()


def test_bounds_as_tensors_and_as_lists_are_the_same() -> None:
    tensors = tuple(torch.tensor(bounds, dtype=torch.int32) for bounds in (STARTS, ENDS))
    with on_triton(*PIECES):
        for have, should in zip(everything(*inputs(), bounds=tensors), everything(*inputs()), strict=True):
            tolerances.same_bits(have, should)


def test_a_group_of_experts_leaves_the_others_alone() -> None:
    with on_triton(*PIECES):
        *_, dw_in, dw_out = everything(*inputs(), experts=(1, 3))
        *_, all_in, all_out = everything(*inputs())
    for some, whole in ((dw_in, all_in), (dw_out, all_out)):
        assert (some[0] == MARK).all() and not some[2].any()
        tolerances.same_bits(some[1:], whole[1:])


def test_new_buffers_are_zero_outside_the_ranges(poison) -> None:
    x, dy, w_in, w_out = inputs()
    with on_triton(*PIECES):
        y, h = ops.expert_mlp_forward(x, w_in, w_out, ENDS, starts=STARTS, kind="swiglu")
        dx, dh, a, _ = ops.expert_mlp_dgrad(dy, h, w_in, w_out, ENDS, starts=STARTS, kind="swiglu")
    for value in (y, h, dx, dh, a):
        assert value.isfinite().all() and not value[19:22].any() and value[18].any() and value[22].any()


def test_chunks_make_the_same_rows_as_the_whole() -> None:
    """Rows computed chunk by chunk are those of one call, and the weight gradient is made once, of all of them."""
    x, dy, w_in, w_out = inputs()
    whole, parts = (torch.zeros(ROWS, HIDDEN) for _ in range(2))
    h = torch.zeros(ROWS, 2 * FFN)
    with on_triton(*PIECES):
        ops.expert_mlp_forward(x, w_in, w_out, [20, 20, 40], kind="swiglu", y=whole, h=h)
        for starts, ends in (([0, 20, 20], [9, 20, 31]), ([9, 20, 31], [20, 20, 40])):
            ops.expert_mlp_forward(x, w_in, w_out, ends, starts=starts, kind="swiglu", y=parts, h=torch.empty_like(h))
    tolerances.close(parts, whole)


@pytest.mark.parametrize("name", ["y", "h"])
def test_buffers_must_be_contiguous(name) -> None:
    x, _, w_in, w_out = inputs()
    buffer = torch.empty((HIDDEN if name == "y" else 2 * FFN), ROWS).t()
    with on_triton(*PIECES), pytest.raises(ConfigError, match=f"{name} = .*contiguous"):
        ops.expert_mlp_forward(x, w_in, w_out, ENDS, starts=STARTS, kind="swiglu", **{name: buffer})


def test_ranges_that_do_not_exist_are_refused() -> None:
    x, _, w_in, w_out = inputs()
    with on_triton(*PIECES), pytest.raises(ConfigError, match="starts, ends"):
        ops.expert_mlp_forward(x, w_in, w_out, [10, 20, ROWS + 1], kind="swiglu")


def test_rows_and_experts_beyond_2_to_the_31_elements() -> None:
    """The last rows of buffers of more than 2^31 elements, and an expert whose weights begin beyond that."""
    hidden, ffn, rows, far = 64, 64, (1 << 25) + 40, 1 << 31
    starts, ends = [0, rows - 19], [3, rows]
    used = torch.tensor([0, 1, 2, *range(rows - 19, rows)])
    dense_in, dense_out = weights(2, hidden, ffn, "swiglu", torch.float16)
    with far_programs(0) as lazy, on_triton(*PIECES):
        w_in, w_out = (
            torch.as_strided(
                lazy(far + 2 * dense[0].numel(), dtype=torch.float16), dense.shape, (far, dense.shape[2], 1)
            )
            for dense in (dense_in, dense_out)
        )
        x, dy, y, dx = (lazy(rows, hidden, dtype=torch.float16) for _ in range(4))
        h, dh, a = (
            lazy(rows, 2 * ffn, dtype=torch.float16),
            lazy(rows, 2 * ffn, dtype=torch.float16),
            lazy(rows, ffn, dtype=torch.float16),
        )
        w_in.copy_(dense_in), w_out.copy_(dense_out)
        x[used], dy[used] = (randn(22, hidden, dtype=torch.float16, seed=seed) for seed in (3, 4))
        ops.expert_mlp_forward(x, w_in, w_out, ends, starts=starts, kind="swiglu", y=y, h=h)
        ops.expert_mlp_dgrad(dy, h, w_in, w_out, ends, starts=starts, kind="swiglu", dx=dx, dh=dh, a=a)
        dw_in, dw_out = torch.empty_like(dense_in), torch.empty_like(dense_out)
        ops.expert_mlp_wgrad(x, dy, dh, a, ends, starts=starts, dw_in=dw_in, dw_out=dw_out)
        got = [y[used], h[used], dx[used], dh[used], a[used], dw_in, dw_out]
    near, offs = [value[used].double() for value in (x, dy)], [3, 22]
    weights_64 = dense_in.double(), dense_out.double()
    want_y, want_h = ops.expert_mlp_forward(near[0], *weights_64, offs, kind="swiglu")
    want = ops.expert_mlp_dgrad(near[1], want_h, *weights_64, offs, kind="swiglu")
    want_in, want_out = (torch.empty_like(value) for value in weights_64)
    ops.expert_mlp_wgrad(near[0], near[1], want[1], want[2], offs, dw_in=want_in, dw_out=want_out)
    for have, should in zip(got, [want_y, want_h, *want[:3], want_in, want_out], strict=True):
        tolerances.close(have, should, torch.float16)


def test_the_pieces_have_no_use_for_the_operators_map() -> None:
    """They read rows as they lie; the operator reads through the map. Both make the same rows, bit for bit."""
    x, _, w_in, w_out = inputs()
    row_to_token = torch.tensor([39 - row for row in range(ROWS)], dtype=torch.int32)
    offs = torch.tensor([11, 30, 40], dtype=torch.int32)
    with on_triton("expert_mlp", *PIECES):
        y = ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu", row_to_token=row_to_token)
        rows, _ = ops.expert_mlp_forward(x.flip(0), w_in, w_out, offs, kind="swiglu")
    tolerances.same_bits(y, rows)
    assert mlp.target(x.device).arch == "interpreter"


def test_tuning_takes_the_fastest_of_what_can_be_launched() -> None:
    """With a clock that knows which block shape is in force, and one that cannot be launched."""
    x, _, w_in, w_out = inputs()
    offs = torch.tensor([11, 30, 40], dtype=torch.int32)
    problem, asked = mlp.problem_of(x, w_out, ROWS), []

    def clock(body) -> float:
        shapes = [block_shape(stage, problem) for stage in STAGES]
        asked.append(shapes)
        if shapes[0].group == 4:
            raise OutOfResources(1, 0, "shared memory")
        return 1.0 / sum(shape.group for shape in shapes)

    before = [block_shape(stage, problem) for stage in STAGES]
    found = tune(x, w_in, w_out, offs, kind="swiglu", seconds_of=clock)
    assert [found[stage, problem].group for stage in STAGES] == [16] * 4 and len(asked) == 3 * 4
    assert [block_shape(stage, problem) for stage in STAGES] == before
    with on_triton("expert_mlp"):
        want = ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu")
        with use(found):
            assert block_shape("up", replace(problem, rows=problem.rows + 1)).group == 16
            tolerances.same_bits(ops.expert_mlp(x, w_in, w_out, offs, kind="swiglu"), want)


def test_tuning_runs_what_it_measures() -> None:
    (w_in, w_out), x = weights(1, 4, 5, "swiglu", F32), randn(3, 4, dtype=F32)
    offs = torch.tensor([3], dtype=torch.int32)

    def once(body) -> float:
        body()
        return 1.0

    found = tune(x, w_in, w_out, offs, kind="swiglu", row_to_token=torch.tensor([2, 0, 2]).int(), seconds_of=once)
    assert list(found.values()) == [candidates(stage, mlp.problem_of(x, w_out, 3))[0] for stage in STAGES]
    with pytest.raises(ConfigError, match="can be launched"):
        tune(x, w_in, w_out, offs, kind="swiglu", seconds_of=_no_room)


def _no_room(body) -> float:
    raise OutOfResources(1, 0, "shared memory")
