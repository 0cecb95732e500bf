"""A layer of latent experts of the tests' usual sizes, what it computes with projections written out, its steps."""

from __future__ import annotations

import torch

from moe_overlap import MoELayer
from tests import oracle
from tests.layers import D, F, K, tokens
from tests.tolerances import same_bits

L, E = 6, 12  # twelve experts lie evenly on 1, 2, 3 and 4 ranks
COUNTS = (7, 0, 11, 4)  # tokens of each rank
SHARED = {"schedule": "shared_expert", "shared_expert_size": 10}


def make(transport=None, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, E, K, transport=transport, **{"dtype": torch.float64, "latent_size": L, **options})


def seed_of(y, rank):
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + rank)).to(y.dtype)


def dense(layer, x):
    """What a layer of one rank computes, with every projection written out."""
    routing = layer.router(x)
    w_in, w_out = (part.weight.double() for part in (layer.latent_in, layer.latent_out))
    weights = routing.topk_weights_TK
    y = oracle.moe(x.double() @ w_in.T, routing.topk_ids_TK, weights, *layer.expert_weights) @ w_out.T
    if layer.shared_expert is not None:
        y = y + oracle.mlp(x.double(), layer.shared_expert.up.weight, layer.shared_expert.down.weight, "swiglu")
    return y


def step(layer, rank, call=None, count=None, *, wants=True):
    """Output, input gradient and every parameter's."""
    x = tokens(COUNTS[rank] if count is None else count, rank).requires_grad_(wants)
    y = (call or layer)(x)
    y.backward(seed_of(y, rank))
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def same(got, want, check=same_bits):
    assert got.keys() == want.keys()
    for name in want:
        check(got[name], want[name])
