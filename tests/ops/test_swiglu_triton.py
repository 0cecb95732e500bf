"""The activations in Triton and their backward, against torch in float64."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ops
from tests import tolerances
from tests.ops.cases import KINDS, randn
from tests.ops.interpreted import DTYPES, far_programs, needs_triton, on_triton, reference, triton
from tests.ops.test_activation import offs_of, python_activation

needs_triton(interpreter=True)
pytestmark = pytest.mark.usefixtures("poison")

ACTIVATION = ("activation", "activation_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("offs", [None, offs_of(2, 2, 5), offs_of(0, 0), offs_of(7), offs_of()])
def test_triton_swiglu_values_gradients_and_tail(dtype, kind, scaled, offs) -> None:
    rows, live = 7, 7 if offs is None else int(offs[-1]) if offs.numel() else 0
    h = randn(rows, 10, dtype=dtype)
    h[live:] = torch.nan
    h.requires_grad_()
    scale = randn(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1, grad=True)
    inputs = (h, scale) if scaled else (h,)
    with on_triton(*ACTIVATION):
        got = ops.activation(h, kind=kind, row_scale=scale if scaled else None, offs=offs)
        push = randn(*got.shape, dtype=dtype, seed=2)
        push[live:] = torch.nan
        gradients = torch.autograd.grad(got, inputs, push)
    h64, scale64 = h.detach()[:live].double().requires_grad_(), scale.detach()[:live].double().requires_grad_()
    want = python_activation(h64, kind) * (scale64[:, None] if scaled else 1.0)
    assert got.dtype == dtype and not got[live:].any()
    tolerances.close(got[:live], want, dtype)
    wanted = torch.autograd.grad(want, (h64, scale64) if scaled else (h64,), push[:live].double())
    for value, have, should in zip(inputs, gradients, wanted, strict=True):
        assert have.dtype == value.dtype and not have[live:].any()
        tolerances.close(have[:live], should, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, width", [(0, 4), (3, 1), (5, 1025), (70, 64)])
def test_triton_swiglu_on_odd_sizes_and_strides(kind, rows, width) -> None:
    h = randn(2 * width if kind == "swiglu" else width, rows, dtype=torch.float32).t()
    scale, offs = randn(2 * rows, dtype=torch.float32, seed=1)[::2], offs_of(0, rows)
    got, want = (run("activation", h, kind, scale, offs)[0] for run in (triton, reference))
    tolerances.close(got, want)
    push = torch.tensor(0.7).expand(rows, width)
    for given in (scale, None):
        got, want = (run("activation_backward", push, h, kind, given, offs) for run in (triton, reference))
        for have, should in zip(got, want, strict=True):
            tolerances.close(have, should)


@pytest.mark.parametrize("kind", KINDS)
def test_triton_swiglu_keeps_nan_and_stays_finite_at_the_ends(kind) -> None:
    h = torch.tensor([[torch.nan, -200.0, 200.0, -0.0, 1.0, 2.0, 1.0, 3.0]])
    got, want = (run("activation", h, kind, None, None)[0] for run in (triton, reference))
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 1
    tolerances.close(got.nan_to_num(), want.nan_to_num())
    push = torch.ones_like(got)
    got, want = (run("activation_backward", push, h, kind, None, None)[0] for run in (triton, reference))
    assert torch.equal(got.isnan(), want.isnan())
    tolerances.close(got.nan_to_num(), want.nan_to_num())


def test_triton_swiglu_reaches_rows_beyond_2_to_the_31() -> None:
    from moe_overlap.ops import swiglu_triton as swiglu

    width = 2048
    rows = 2**31 // width + 2
    shape = {"KIND": 0, "ACC": swiglu.tl.float32, "BLOCK_R": 1, "BLOCK_F": 1024}
    with far_programs(rows - 1) as lazy:
        h, dh = (lazy(rows, 2 * width, dtype=torch.float16) for _ in range(2))
        a, da = (lazy(rows, width, dtype=torch.float16) for _ in range(2))
        h[-1], da[-1] = randn(2 * width, dtype=torch.float16), randn(width, dtype=torch.float16, seed=1)
        offs, scale, dscale = offs_of(rows), torch.full((rows,), 2.0), torch.zeros(rows)
        swiglu.launch(swiglu.activation_kernel, (1, 2), h, scale, offs, a, rows, width, 1, **shape)
        swiglu.launch(
            swiglu.activation_backward_kernel, (1, 1), da, h, scale, offs, dh, dscale, rows, width, 1, **shape
        )
        last = h[-1:].double().requires_grad_()
        want = 2 * python_activation(last, "swiglu")
        tolerances.close(a[-1:], want)
        (wanted,) = torch.autograd.grad(want, last, da[-1:].double())
        tolerances.close(dh[-1:], wanted)
        tolerances.close(dscale[-1:], (want * da[-1:].double()).sum(1) / 2, torch.float16)
