"""What a router may not lose: a gradient at k = 1, and the choice between near ties under autocast."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.routing import LinearRouter
from tests.layers import D, E, F, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


def top1(**options):
    torch.manual_seed(3)
    router = LinearRouter(D, E, 1, dtype=torch.float64, **options)
    with torch.no_grad():
        router.weight.mul_(20)
    return router


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_router_of_a_top_1_layer_learns_from_the_output(score, ranks):
    """Unless its one weight is divided by itself. The gradient is that of a finite difference."""

    def rank(me, renormalize):
        layer = make(me.transport(), top_k=1, router=top1(score=score, renormalize=renormalize))
        x = tokens(12, seed=me.rank)
        loss = layer(x).square().sum()
        (grad,) = torch.autograd.grad(loss, [layer.router.weight])
        step = 1e-6 * torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = layer(x).square().sum()
            layer.router.weight += step
            after = layer(x).square().sum()
        return grad, (grad * step).sum(), after - before

    for grad, predicted, found in virtual_world(ranks).run(lambda me: rank(me, False)):
        assert grad.abs().max() > 1e-4
        close(predicted, found, torch.float32)
    for grad, _, _ in virtual_world(ranks).run(lambda me: rank(me, True)):
        assert grad.abs().max() < 1e-12


def near_ties():
    """float32 tokens and a router two of whose experts differ by less than bfloat16 tells apart, in favour of the one
    with the higher id (ties go to the lower)."""
    torch.manual_seed(0)
    router = LinearRouter(D, E, 1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2, 0], router.weight[5, 0] = 1.0, 1.0 + 2**-12
    x = torch.zeros(6, D)
    x[:, 0] = torch.linspace(1, 2, 6)
    assert torch.equal(router.weight[2].bfloat16(), router.weight[5].bfloat16())
    return x, router


@pytest.mark.parametrize("path", ["router", "layer", "ranks", "block"])
def test_top_k_is_taken_in_float32_under_autocast(path):
    def rank(me):
        x, router = near_ties()
        layer = MoELayer(D, F, E, 1, router=router, transport=me.transport() if path == "ranks" else None)
        seen = []
        router.register_forward_hook(lambda _module, _args, decision: seen.append(decision))
        call = {"router": router, "block": ShortcutBlock([torch.nn.Identity()], layer, tap=0, slot=0)}.get(path, layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(x)
        (decision,) = seen
        assert decision.topk_ids_TK[:, 0].tolist() == [5] * 6
        assert decision.topk_weights_TK.dtype == torch.float32

    virtual_world(2 if path == "ranks" else 1).run(rank)
