"""Scores: what every expert is worth to a token. The first of a router's parts."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.ops.linear_float32 import linear_float32


def routing_dtype(x_TD: torch.Tensor) -> torch.dtype:
    """The dtype that a router computes in: float32, float64 for float64 tokens."""
    return torch.float64 if x_TD.dtype == torch.float64 else torch.float32


def linear_logits(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, *, drop_bad: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W x in `routing_dtype`, [T, E]. drop_bad: a token with NaN or an infinity gets NaN logits and no gradient.
    dtype: what the product is computed in and rounded to before that, None: `routing_dtype`."""
    if not drop_bad:
        return _linear(x_TD, weight_ED, dtype)
    # Zero gradient times a NaN activation is still NaN in the weight's gradient: bad rows leave before the
    # product, and their logits are marked after it.
    bad_T1 = ~x_TD.isfinite().all(dim=-1, keepdim=True)
    return _linear(x_TD.masked_fill(bad_T1, 0.0), weight_ED, dtype).masked_fill(bad_T1, float("nan"))


def sqrt_softplus(logits_TE: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + exp(logits))): DeepSeek-V4's score. Far below 0 the logits are taken as -80 (float64: -700), where
    the score is next to 0, its square can still be held and the gradient is no 0 * inf."""
    floor = -700.0 if logits_TE.dtype == torch.float64 else -80.0
    return nn.functional.softplus(logits_TE.clamp_min(floor)).sqrt()


def _linear(x_TD: torch.Tensor, weight_ED: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None:
        return nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype)).to(routing_dtype(x_TD))
    if routing_dtype(x_TD) == torch.float32:
        return linear_float32(x_TD, weight_ED)
    return nn.functional.linear(x_TD, weight_ED.to(torch.float64))
