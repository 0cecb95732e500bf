"""Scores: what every expert is worth to a token. The first of a router's parts."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.ops.linear_float32 import linear_float32


def routing_dtype(x_TD: torch.Tensor) -> torch.dtype:
    """The dtype that a router computes in: float32, float64 for float64 tokens."""
    return torch.float64 if x_TD.dtype == torch.float64 else torch.float32


def linear_logits(x_TD: torch.Tensor, weight_ED: torch.Tensor, *, drop_bad: bool = False) -> torch.Tensor:
    """W x in `routing_dtype`, [T, E]. drop_bad: a token with NaN or an infinity gets NaN logits and no gradient."""
    if not drop_bad:
        return _linear(x_TD, weight_ED)
    # Zero gradient times a NaN activation is still NaN in the weight's gradient: bad rows leave before the
    # product, and their logits are marked after it.
    bad_T1 = ~x_TD.isfinite().all(dim=-1, keepdim=True)
    return _linear(x_TD.masked_fill(bad_T1, 0.0), weight_ED).masked_fill(bad_T1, float("nan"))


def _linear(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    if routing_dtype(x_TD) == torch.float32:
        return linear_float32(x_TD, weight_ED)
    return nn.functional.linear(x_TD, weight_ED.to(torch.float64))
