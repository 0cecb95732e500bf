"""A layer of the tests' usual sizes, and tokens for it."""

from __future__ import annotations

import torch

from moe_overlap import MoELayer

D, F, E, K = 16, 24, 8, 2


def make(transport=None, **options):
    torch.manual_seed(3)
    options = {"dtype": torch.float64, "top_k": K, **options}
    return MoELayer(D, F, E, transport=transport, **options)


def tokens(count, seed=0, dtype=torch.float64):
    return torch.randn(count, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))
