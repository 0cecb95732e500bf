"""Scores: what every expert is worth to a token. The first of a router's parts."""

from __future__ import annotations

import torch
from torch import nn


def routing_dtype(x_TD: torch.Tensor) -> torch.dtype:
    """The dtype that a router computes in: float32, float64 for float64 tokens."""
    return torch.float64 if x_TD.dtype == torch.float64 else torch.float32


def linear_logits(x_TD: torch.Tensor, weight_ED: torch.Tensor, *, drop_bad: bool = False) -> torch.Tensor:
    """W x in `routing_dtype`, [T, E]. drop_bad: a token with NaN or an infinity gets NaN logits and no gradient."""
    dtype = routing_dtype(x_TD)
    weight_ED = weight_ED.to(dtype)
    if not drop_bad:
        return nn.functional.linear(x_TD.to(dtype), weight_ED)
    # Zero gradient times a NaN activation is still NaN in the weight's gradient: bad rows leave before the
    # product, and their logits are marked after it.
    bad_T1 = ~x_TD.isfinite().all(dim=-1, keepdim=True)
    logits_TE = nn.functional.linear(x_TD.to(dtype).masked_fill(bad_T1, 0.0), weight_ED)
    return logits_TE.masked_fill(bad_T1, float("nan"))
