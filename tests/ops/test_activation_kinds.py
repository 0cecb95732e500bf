"""Activations by name: formulas against PyTorch's autograd, refusals, the reasons of kernels, layers on ranks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_overlap import ConfigError, MoELayer, MoeTransportError, ops
from moe_overlap.ops import cuda_kernels, triton_kernels  # noqa: F401
from moe_overlap.ops.activation_kinds import (
    is_activation,
    is_gated,
    not_built_in,
    register_activation,
    registered,
    swiglu_kind,
)
from moe_overlap.transport.local import LocalTransport
from tests.ranks import virtual_world

D, F, E, K, T = 12, 8, 4, 2, 21


def gpt_oss(h):
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def halves(f):
    def gated(h):
        gate, up = h.chunk(2, dim=-1)
        return f(gate, up)

    return gated


FORMULAS = {
    "geglu": halves(lambda gate, up: functional.gelu(gate) * up),
    "geglu_tanh": halves(lambda gate, up: functional.gelu(gate, approximate="tanh") * up),
    "relu2": lambda h: functional.relu(h) ** 2,
    swiglu_kind(limit=1.5): halves(lambda gate, up: functional.silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5)),
    swiglu_kind(limit=7.0, alpha=1.702, offset=1.0, interleaved=True): gpt_oss,
    swiglu_kind(interleaved=True): lambda h: functional.silu(h[..., ::2]) * h[..., 1::2],
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("scaled", [False, True])
def test_activation_and_its_gradients_are_those_of_the_formula(kind, scaled):
    torch.manual_seed(0)
    h = 3 * torch.randn(9, 6 * (1 + is_gated(kind)), dtype=torch.float64)
    scale = torch.rand(9, dtype=torch.float64) if scaled else None
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    scales = [None, None] if scale is None else [scale.clone().requires_grad_() for _ in range(2)]
    a = ops.activation(ours, kind=kind, row_scale=scales[0])
    want = FORMULAS[kind](theirs)
    want = want if scale is None else want * scales[1][:, None]
    da = torch.randn_like(a)
    a.backward(da)
    want.backward(da)
    torch.testing.assert_close(a, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-13)
    if scale is not None:
        torch.testing.assert_close(scales[0].grad, scales[1].grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["relu2", "geglu_tanh"])
def test_bfloat16_is_computed_in_float32_and_rounded_once(kind):
    h = torch.randn(5, 8).bfloat16()
    want = FORMULAS[kind](h.float()).bfloat16()
    assert torch.equal(ops.activation(h, kind=kind), want)


def test_the_default_form_of_swiglu_is_the_built_in_one():
    assert swiglu_kind() == "swiglu"
    assert registered("swiglu") is None
    assert swiglu_kind(limit=2) == swiglu_kind(limit=2.0)


def test_a_function_without_a_derivative_gets_that_of_autograd():
    register_activation("tanh of test", torch.tanh)
    h = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    ops.activation(h, kind="tanh of test").sum().backward()
    torch.testing.assert_close(h.grad, 1 - torch.tanh(h.detach()) ** 2)


@pytest.mark.parametrize(
    ("field", "f", "df", "gated"),
    [
        ("f", lambda h: h[:, :3], None, False),
        ("f", lambda h: h.float(), None, False),
        ("f", lambda h: h - h.mean(dim=0), None, False),
        ("df", lambda h: h * h, lambda da, h: da * h, False),
        ("df", lambda h: h.chunk(2, dim=-1)[0] * 2, lambda da, h: 2 * da, True),
    ],
)
def test_functions_that_do_not_fit_are_refused_and_not_kept(field, f, df, gated):
    with pytest.raises(ConfigError) as error:
        register_activation("wrong one of test", f, df, gated=gated)
    assert error.value.field == field
    assert not is_activation("wrong one of test")


@pytest.mark.parametrize("name", ["swiglu", "relu2", "", 3])
def test_a_name_is_taken_once(name):
    with pytest.raises(ConfigError) as error:
        register_activation(name, torch.tanh)
    assert error.value.field == "name"


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_limit_is_above_zero(limit):
    with pytest.raises(ConfigError):
        swiglu_kind(limit=limit)


def test_kernels_give_a_reason():
    h = torch.randn(3, 4)
    reason = ops.registry.choose("activation_rows", device="cpu", dtype=h.dtype, arguments=(h, "relu2", h, None)).reason
    assert "relu2" in reason or "cpp cannot run" in reason
    assert not_built_in("gelu") is None
    assert "swiglu, gelu, relu" in not_built_in("relu2")


def _step(transport, kind, schedule):
    torch.manual_seed(1)
    layer = MoELayer(D, F, E, K, activation=kind, schedule=schedule, transport=transport)
    tokens = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    size, rank = transport.world_size, transport.rank
    x = tokens.tensor_split(size)[rank].clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.experts.down_proj.grad, getattr(
        layer.experts, "gate_up_proj" if is_gated(kind) else "up_proj"
    ).grad, layer.router.weight.grad  # fmt: skip


@pytest.mark.parametrize("kind", ["relu2", swiglu_kind(limit=0.5, alpha=1.702, offset=1.0, interleaved=True)])
@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_ranks_compute_what_one_does(kind, schedule):
    alone = _step(LocalTransport(), kind, schedule)
    ranks = virtual_world(2).run(lambda me: _step(me.transport(), kind, schedule))
    parts = list(zip(*ranks, strict=True))
    got = [torch.cat(list(parts[at])) for at in range(4)] + [sum(parts[4])]
    for one, other in zip(got, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_ranks_with_other_activations_are_told():
    def build(me):
        kind = "relu2" if me.rank else "relu"
        layer = MoELayer(D, F, E, K, activation=kind, transport=me.transport())
        with pytest.raises(MoeTransportError) as error:
            layer(torch.randn(3, D))
        return type(error.value).__name__

    assert set(virtual_world(2).run(build)) == {"PlanMismatch"}
