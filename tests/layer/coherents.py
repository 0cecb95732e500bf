"""Models of layers with one expert a token, run in the ordinary way and context-coherent."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moe_overlap import CoherentLayer
from moe_overlap.routing.linear import LinearRouter
from tests.layers import D, E, make, tokens

COUNTS = (13, 0, 7, 30)  # tokens of each rank


class Picky(nn.Module):
    """A router that gives no expert to a token whose first entry is above a limit."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.top_k = inner, 1

    def forward(self, x):
        decision = self.inner(x)
        refused = x[:, :1] > 0.3
        return replace(decision, topk_ids_TK=decision.topk_ids_TK.masked_fill(refused, -1),
                       topk_weights_TK=decision.topk_weights_TK.masked_fill(refused, 0.0))  # fmt: skip


def change(module, seed):
    """Other weights than those that every layer of the tests starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(drawn.to(parameter.dtype), alpha=0.3)


def model(transports, rank, *, picky=False, zero_experts=0, **options):
    """[(layer, norm)]: the same router and norm on all ranks, experts of their own."""
    found = []
    for number, transport in enumerate(transports):
        options.setdefault("dtype", torch.float64)
        if zero_experts:
            options["router"] = LinearRouter(D, E, 1, zero_experts=zero_experts, dtype=options["dtype"])
        elif picky:
            options["router"] = Picky(LinearRouter(D, E, 1, dtype=options["dtype"]))
        layer = make(transport, **{"top_k": 1, **options})
        norm = nn.LayerNorm(D, dtype=options["dtype"])
        for part in (layer.router, layer.shared_expert, layer.latent_in, layer.latent_out, norm):
            if part is not None:
                change(part, number)
        change(layer.experts, 100 * number + rank)
        found.append((layer, norm))
    return found


def in_a_row(layers, x):
    """The ordinary way: every row comes home in each layer."""
    for layer, norm in layers:
        x = x + layer(norm(x))
    return x


def coherent(layers, x):
    """The same with one exchange a layer."""
    steps = [CoherentLayer(layer, norm=norm) for layer, norm in layers]
    here = steps[0].begin(x)
    for step in steps:
        here = step(here)
    return steps[-1].home(here), here


def brought(rank, dtype=torch.float64):
    return tokens(COUNTS[rank], seed=rank).to(dtype)
