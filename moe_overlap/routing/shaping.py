"""What some families' routers do to logits before the gate, and to weights behind it."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_overlap.routing.choice import Choice


def shaped_logits(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """c * tanh((logits + bias) / c); without a cap logits + bias. Logits that are not finite stay, so that they are
    seen as such."""
    if bias_E is not None:
        logits_TE = logits_TE + bias_E.to(logits_TE.dtype)
    if softcap is None:
        return logits_TE
    finite_TE = logits_TE.isfinite()
    # The slope of tanh at NaN is NaN, and so is zero times it: what is not finite leaves before.
    capped_TE = softcap * torch.tanh(logits_TE.masked_fill(~finite_TE, 0.0) / softcap)
    return torch.where(finite_TE, capped_TE, logits_TE)


def weighed(
    choice: Choice, *, norm: tuple[float, float] | None, scale: float, expert_scale_E: torch.Tensor | None
) -> Choice:
    """norm: (p, eps), weights * scale / (their p-norm + eps); p = 1 is their sum. Then, with expert scales, times that
    of each slot's expert."""
    weights_TK = choice.weights_TK
    if norm is not None:
        p, eps = norm
        # What has no expert has weights 0, and a norm of 0 to be divided by.
        total_T1 = _norm(weights_TK, p) + eps
        weights_TK = weights_TK * (scale / total_T1.clamp_min(torch.finfo(weights_TK.dtype).tiny))
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E.to(weights_TK.dtype)[choice.ids_TK.clamp_min(0).long()]
    return choice if weights_TK is choice.weights_TK else replace(choice, weights_TK=weights_TK)


def _norm(weights_TK: torch.Tensor, p: float) -> torch.Tensor:
    """[T, 1]: the p-norm of each token's weights."""
    if p == 1:
        return torch.linalg.vector_norm(weights_TK, ord=1, dim=1, keepdim=True)
    # A weight of 1e-2 is 0 to the power of 30: the largest is taken out, and is a constant where its factor goes back.
    most_T1 = weights_TK.detach().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
    return most_T1 * torch.linalg.vector_norm(weights_TK / most_T1, ord=p, dim=1, keepdim=True)
