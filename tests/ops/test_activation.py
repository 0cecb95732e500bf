import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.ops import registry
from moe_overlap.ops.activation import backward_into, forward_into
from tests import tolerances
from tests.ops.cases import DTYPES, KINDS, cpu_implementations, randn

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=cpu_implementations("activation_rows"), autouse=True)
def implementation(request):
    """The references, or what runs by default where there is a compiled part."""
    with contextlib.ExitStack() as forced:
        if request.param == "reference":
            forced.enter_context(registry.force("activation_rows", "reference"))
            forced.enter_context(registry.force("activation_rows_backward", "reference"))
        yield


def python_activation(h: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        gate, up = h.tensor_split(2, dim=1)
        return functional.silu(gate) * up
    return functional.gelu(h) if kind == "gelu" else functional.relu(h)


def offs_of(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("offs", [None, offs_of(2, 2, 5), offs_of(0, 0), offs_of(7)])
def test_values_gradients_and_tail(dtype, kind, scaled, offs) -> None:
    rows, live = 7, 7 if offs is None else int(offs[-1])
    h = randn(rows, 8, dtype=dtype)
    h[live:] = torch.nan
    h.requires_grad_()
    scale = randn(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1, grad=True)
    got = ops.activation(h, kind=kind, row_scale=scale if scaled else None, offs=offs)
    h64, scale64 = h.detach()[:live].double().requires_grad_(), scale.detach()[:live].double().requires_grad_()
    want = python_activation(h64, kind) * (scale64[:, None] if scaled else 1.0)
    assert got.dtype == dtype and not got[live:].any()
    tolerances.close(got[:live], want, dtype)
    push = randn(*got.shape, dtype=dtype, seed=2)
    inputs, inputs64 = ((h, scale), (h64, scale64)) if scaled else ((h,), (h64,))
    gradients = torch.autograd.grad(got, inputs, push)
    wanted = torch.autograd.grad(want, inputs64, push[:live].double())
    for have, should in zip(gradients, wanted, strict=True):
        tolerances.close(have[:live], should, dtype)
        assert not have[live:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 4])
def test_gradcheck(kind, rows) -> None:
    inputs = (randn(rows, 6, grad=True), randn(rows, seed=1, grad=True))
    offs = offs_of(0, rows // 2)
    assert torch.autograd.gradcheck(lambda h, s: ops.activation(h, kind=kind, row_scale=s, offs=offs), inputs)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_backward_may_write_where_da_was(kind) -> None:
    da, h = randn(5, 6), randn(5, 6, seed=1)
    apart, together, a = torch.empty(5, 6).double(), da.clone(), torch.empty(5, 6).double()
    backward_into(da, h, kind, apart, a)
    backward_into(together, h, kind, together, a)
    tolerances.same_bits(together, apart)
    again = torch.empty_like(a)
    forward_into(h, kind, again)
    tolerances.same_bits(a, again)


def test_an_expanded_gradient_is_not_written_to() -> None:
    h = randn(3, 4, grad=True)
    for kind in KINDS:
        push = torch.ones((), dtype=torch.float64)
        out = ops.activation(h, kind=kind)
        (got,) = torch.autograd.grad(out, h, push.expand(out.shape))
        (want,) = torch.autograd.grad(ops.activation(h, kind=kind), h, torch.ones_like(out))
        tolerances.same_bits(got, want)
        assert push.item() == 1.0


@pytest.mark.parametrize(
    "field, call",
    [
        ("kind", lambda h: ops.activation(h, kind="silu")),
        ("h", lambda h: ops.activation(h[:, :5], kind="swiglu")),
        ("h", lambda h: ops.activation(h.long(), kind="relu")),
        ("row_scale", lambda h: ops.activation(h, kind="relu", row_scale=torch.ones(4))),
        ("offs", lambda h: ops.activation(h, kind="relu", offs=torch.tensor([3]))),
    ],
)
def test_bad_arguments(field, call) -> None:
    with pytest.raises(ConfigError) as caught:
        call(torch.zeros(3, 6))
    assert caught.value.field == field
