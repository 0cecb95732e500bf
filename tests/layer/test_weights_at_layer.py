"""MoELayer(weights_at="input"): against transformers' Llama4 block, on one rank and on two."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_overlap import ConfigError, MoELayer, PlanMismatch, ShortcutBlock
from tests.ranks import virtual_world

D, F, E, T = 12, 8, 4, 18
LAYER = {"router": "sigmoid", "shared_expert_size": F, "weights_at": "input"}


def _weights():
    generator = torch.Generator().manual_seed(3)
    shapes = {"router": (E, D), "w_in": (E, 2 * F, D), "w_out": (E, D, F), "up": (2 * F, D), "down": (D, F)}
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _x():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(4))


def _layer(rank=0, ranks=1, **options):
    layer = MoELayer(D, F, E, 1, **LAYER | options)
    given, held = _weights(), slice(rank * E // ranks, (rank + 1) * E // ranks)
    with torch.no_grad():
        layer.router.weight.copy_(given["router"])
        layer.experts.gate_up_proj.copy_(given["w_in"][held])
        layer.experts.down_proj.copy_(given["w_out"][held])
        layer.shared_expert.up.weight.copy_(given["up"])
        layer.shared_expert.down.weight.copy_(given["down"])
    return layer


def _step(layer, x):
    x.requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, layer.router.weight.grad, layer.experts.gate_up_proj.grad, layer.experts.down_proj.grad]


def _on_two(**options):
    def step(me):
        layer = _layer(me.rank, 2, transport=me.transport(), **options)
        return _step(layer, _x().tensor_split(2)[me.rank].clone())

    first, second = virtual_world(2).run(step)
    joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    joined[2] = first[2] + second[2]  # all ranks have the router
    return joined


def test_llama4():
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = SimpleNamespace(num_local_experts=E, num_experts_per_tok=1, intermediate_size=F, hidden_size=D,
                             hidden_act="silu")  # fmt: skip
    block, given = modeling.Llama4TextMoe(config), _weights()
    with torch.no_grad():
        block.router.weight.copy_(given["router"])
        block.experts.gate_up_proj.copy_(given["w_in"].transpose(1, 2))
        block.experts.down_proj.copy_(given["w_out"].transpose(1, 2))
        block.shared_expert.gate_proj.weight.copy_(given["up"][:F])
        block.shared_expert.up_proj.weight.copy_(given["up"][F:])
        block.shared_expert.down_proj.weight.copy_(given["down"])
    x = _x().requires_grad_()
    y = block(x[None])[0].view(T, D)
    y.sin().sum().backward()
    want = [y.detach(), x.grad, block.router.weight.grad, block.experts.gate_up_proj.grad.transpose(1, 2),
            block.experts.down_proj.grad.transpose(1, 2)]  # fmt: skip
    for got, wanted in zip(_step(_layer(), _x()), want, strict=True):
        assert (got - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    "options", [{"schedule": "serial"}, {"schedule": "chunked(2)"}, {"schedule": "chunked(2)", "dedup": "on"}]
)
def test_two_ranks_are_one(options):
    both = [_on_two(**options, overlap=overlap) for overlap in (True, False)]
    for got, same, want in zip(*both, _step(_layer(), _x()), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_router_alone_comes_back():
    """x needs none: the rows carry that of the weights."""

    def step(me):
        layer = _layer(me.rank, 2, transport=me.transport())
        layer(_x().tensor_split(2)[me.rank].clone()).sin().sum().backward()
        return layer.router.weight.grad

    torch.testing.assert_close(sum(virtual_world(2).run(step)), _step(_layer(), _x())[2], rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything():
    x, mask = _x(), torch.arange(T) != 5
    want = _layer()
    kept = want(x[mask])
    kept.sum().backward()
    x[5] = float("nan")
    layer = _layer()
    layer.shared_expert = None  # which reads padding too
    y = layer(x, token_mask=mask)
    y.sum().backward()
    without = kept - want.shared_expert(x[mask])
    torch.testing.assert_close(y[mask], without, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.router.weight.grad, want.router.weight.grad, rtol=1e-5, atol=1e-5)


def test_ranks_that_weigh_in_other_places_are_told_so():
    def step(me):
        layer = _layer(me.rank, 2, transport=me.transport(), weights_at=("output", "input")[me.rank])
        with pytest.raises(PlanMismatch, match="weights_at: output and input"):
            layer(_x())

    virtual_world(2).run(step)


def test_what_it_cannot_do():
    with pytest.raises(ConfigError, match="weights_at"):
        MoELayer(D, F, E, 1, weights_at="middle")
    with pytest.raises(NotImplementedError, match="top_k above 1"):
        MoELayer(D, F, E, 2, weights_at="input")
    with pytest.raises(NotImplementedError, match="router_tap"):
        ShortcutBlock([torch.nn.Linear(D, D)], MoELayer(D, F, E, 1, weights_at="input"), tap=1, router_tap=0)
