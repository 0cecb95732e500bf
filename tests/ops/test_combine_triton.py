"""combine in Triton and its backward, against the oracle of their contract in test_permute_combine.py and the
reference."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from tests import tolerances
from tests.ops.cases import hard_ids, randn, routed
from tests.ops.interpreted import DTYPES, far_programs, needs_triton, on_triton, reference, triton
from tests.ops.test_permute_combine import python_combine
from tests.strategies import ROUTINGS, make_routing

needs_triton(interpreter=True)
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_ids())
@pytest.mark.parametrize("weighted, residual", [(False, False), (True, False), (False, True), (True, True)])
def test_triton_combine_and_its_backward(dtype, name, weighted, residual) -> None:
    maps = routed(hard_ids()[name], 4)
    tokens, k = maps.ids_TK.shape
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    y = randn(maps.num_rows, 6, dtype=dtype, seed=1, grad=True)
    w = randn(tokens, k, dtype=router_dtype, seed=2, grad=True) if weighted else None
    r = randn(tokens, 6, dtype=dtype, seed=3, grad=True) if residual else None
    push = randn(tokens, 6, dtype=dtype, seed=4)
    inputs = [value for value in (y, w, r) if value is not None]
    want = python_combine(y, maps.slot_to_row, w, r)
    with on_triton("combine", "combine_backward"):
        got = ops.combine(y, maps.slot_to_row, w, r)
        gradients = torch.autograd.grad(got, inputs, push)
    assert got.dtype == dtype
    tolerances.close(got, want)
    wanted = torch.autograd.grad(want, inputs, push.double(), allow_unused=True, materialize_grads=True)
    for value, have, should in zip(inputs, gradients, wanted, strict=True):
        tolerances.close(have, should, dtype)
        assert have.dtype == value.dtype


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("width", [1, 64, 1025])
def test_triton_combine_on_random_routings(kind, width) -> None:
    ids, w = make_routing(kind, 37, 7, 3, dtype=torch.float64)
    maps = routed(ids, 7, align=8, capacity=9)
    y, dy = randn(maps.num_rows, width, dtype=torch.float32), randn(width, 37, dtype=torch.float32, seed=1).t()
    got, want = (run("combine", y, maps.slot_to_row, w, None) for run in (triton, reference))
    tolerances.close(got[0], want[0])
    got, want = (run("combine_backward", dy, y, maps.slot_to_row, w, maps.num_rows) for run in (triton, reference))
    tolerances.same_bits(got[0], want[0])  # one product, rounded once
    tolerances.close(got[1], want[1], torch.float32)


def test_triton_combine_ignores_what_a_slot_without_a_row_holds() -> None:
    slot_to_row = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    y = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]], requires_grad=True)
    weights = torch.tensor([[2.0, torch.nan], [torch.inf, 1.0]], requires_grad=True)
    with on_triton("combine", "combine_backward"):
        got = ops.combine(y, slot_to_row, weights)
        push = torch.tensor([[1.0, 1.0], [torch.nan, torch.inf]])
        dy, dweights = torch.autograd.grad(got, (y, weights), push)
    assert got.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert dy.tolist() == [[2.0, 2.0], [0.0, 0.0]] and dweights.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_triton_combine_sums_in_float32_in_the_order_of_k() -> None:
    rows = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    for values, dtype, want in (((2048.0, 1.0, -2048.0), torch.float16, 1.0), ((1e8, 1.0, -1e8), torch.float32, 0.0)):
        y = torch.zeros(3, 1, dtype=dtype)
        y[rows[0].long(), 0] = torch.tensor(values, dtype=dtype)
        assert triton("combine", y, rows, None, None)[0].item() == want  # float16 sums or another order: not these


def test_triton_combine_backward_takes_expanded_and_strided_gradients() -> None:
    maps = routed(hard_ids()["mixed, unused"], 4)
    y, w = randn(maps.num_rows, 4, seed=1), randn(6, 2, seed=2)
    base = torch.tensor(0.7, dtype=torch.float64)
    for given in (base.expand(6, 4), randn(4, 6).t(), randn(6, 8)[:, ::2]):
        got = triton("combine_backward", given, y, maps.slot_to_row, w, maps.num_rows)
        want = triton("combine_backward", given.clone(memory_format=torch.contiguous_format), y, maps.slot_to_row, w,
                      maps.num_rows)  # fmt: skip
        for have, should in zip(got, want, strict=True):
            tolerances.same_bits(have, should)
    alone = triton("combine_backward", y[:6], None, maps.slot_to_row, w, maps.num_rows)
    want = reference("combine_backward", y[:6], None, maps.slot_to_row, w, maps.num_rows)
    tolerances.same_bits(alone[0], want[0])
    assert alone[1].shape == want[1].shape == (0,)


def test_triton_combine_reaches_rows_and_tokens_beyond_2_to_the_31() -> None:
    from moe_overlap.ops import combine_triton

    width = 4096
    rows = 2**31 // width + 2
    shape = {"ACC": combine_triton.tl.float32, "K": 1, "BLOCK_T": 1, "BLOCK_D": 2048}
    slots = torch.full((rows, 1), rows - 1, dtype=torch.int32)
    with far_programs(rows - 1) as lazy:
        y, out, drows = (lazy(rows, width, dtype=torch.float16) for _ in range(3))
        w, dw = (lazy(rows, 1, dtype=torch.float32) for _ in range(2))
        y[-1], w[-1] = torch.arange(width) % 100, 2.0
        combine_triton.launch(combine_triton.combine_kernel, (1, 2), y, slots, w, y, out, rows, rows, width, **shape)
        tolerances.same_bits(out[-1], 3 * y[-1])
        used = torch.zeros(rows, dtype=torch.int8)
        combine_triton.launch(
            combine_triton.combine_backward_kernel, (1, 1), out, y, slots, w, drows, dw, used, rows, rows, width,
            K_PAD=1, **shape,
        )  # fmt: skip
        tolerances.same_bits(drows[-1], 6 * y[-1])
        tolerances.close(dw[-1], (3 * y[-1].double() ** 2).sum()[None], torch.float32)
        assert used.nonzero().tolist() == [[rows - 1]]
