"""Masks, variable k, zero-computation experts and a router's state under torch.compile: one graph on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import MoELayer
from moe_overlap.routing import LinearRouter, RecurrentRouter, VariableK
from tests.layers import D, E, F, K, tokens
from tests.tolerances import close


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def linear(**options):
    router = LinearRouter(D, E, K, dtype=torch.float64, zero_experts=2, **options)
    nn.init.normal_(router.weight)
    router.mask_experts([1])
    return router


ROUTERS = {
    "threshold": lambda: linear(variable_k=VariableK(threshold=0.4)),
    "allocator": lambda: linear(variable_k=VariableK(allocator=lambda x_TD: (x_TD[:, 0] > 0).long() + 1)),
    "capacity": lambda: linear(capacity_factor=1.0),
    "recurrent": lambda: RecurrentRouter(D, E, K, router_size=5, dtype=torch.float64),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ROUTERS)
def test_one_graph_gives_eagers_results_and_gradients(name, backend):
    torch.manual_seed(0)
    layer = MoELayer(D, F, E, K, router=ROUTERS[name](), dtype=torch.float64)

    def call(x, mask):
        result = layer(x, token_mask=mask)
        y, state = result if isinstance(result, tuple) else (result, x.new_zeros(()))
        return y.square().sum() + state.square().sum()

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for count in (9, 14, 20):
        x = tokens(count, seed=count)
        mask = torch.arange(count) % 4 > 0
        x = x.masked_fill(~mask[:, None], float("nan") if name == "recurrent" else 3.0).requires_grad_()
        wanted = [x, *layer.parameters()]
        got, want = (torch.autograd.grad(one(x, mask), wanted) for one in (compiled, call))
        for ours, theirs in zip(got, want, strict=True):
            close(ours, theirs)
