"""Losses that keep a router balanced and its logits small. Tensors of one rank; reductions arrive as `reduce=`."""

from __future__ import annotations

from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def router_probabilities(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """Probabilities over all experts, rows sum to 1: softmax, or for sigmoid scores s_i / sum_j s_j (DeepSeek-V3)."""
    if score == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits_TE.dtype).tiny)
    return logits_TE.softmax(dim=-1)


def load_balancing_loss(
    probs_TE: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    *,
    valid_T1: torch.Tensor | None = None,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """Switch/GShard auxiliary loss without its coefficient (Switch Transformer, arXiv 2101.03961, eq. 4-6).

        loss = E * sum_i f_i * P_i
        f_i  = fraction of the (token, k) slots that went to expert i, over all K choices; carries no gradient
        P_i  = mean over tokens of the router's probability of expert i

    It is 1 for a perfectly balanced router and E when every token is sent to one expert with probability 1.

    probs_TE: [T, E] float32 or float64. tokens_per_expert_E: [E] counts of this rank, before any drop.
    valid_T1: bool [T, 1]; tokens that are False count in neither mean. Returns a scalar of probs_TE's dtype.
    reduce: maps f [E] of this rank to its mean over ranks (a collective the caller owns): the loss then balances
    the global batch. Without it each rank balances its own tokens.
    """
    counts_E = tokens_per_expert_E.to(probs_TE.dtype)
    f_E = (counts_E / counts_E.sum().clamp_min(1)).detach()
    if reduce is not None:
        f_E = reduce(f_E)
    p_E = _mean_over_tokens(probs_TE, valid_T1)
    return probs_TE.shape[-1] * (f_E * p_E).sum()


def z_loss(logits_TE: torch.Tensor, *, valid_T1: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2, without its coefficient (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean_over_tokens(logits_TE.logsumexp(dim=-1, keepdim=True).square(), valid_T1).sum()


def _mean_over_tokens(values_TX: torch.Tensor, valid_T1: torch.Tensor | None) -> torch.Tensor:
    """Mean over dim 0; 0 for no tokens (a rank may hold none)."""
    if valid_T1 is None:
        return values_TX.sum(dim=0) / max(values_TX.shape[0], 1)
    return (values_TX * valid_T1).sum(dim=0) / valid_T1.sum().clamp_min(1)
