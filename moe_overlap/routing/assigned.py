"""A `Choice` from ids that something else than top-k of a row has made: an assignment of many tokens at once."""

from __future__ import annotations

import torch

from moe_overlap.routing.choice import Choice


def bad_rows(logits_TE: torch.Tensor) -> torch.Tensor:
    """bool [T, 1]: rows with NaN or +inf, or with -inf everywhere, as `gate_topk` has it."""
    above = logits_TE.isnan() | (logits_TE == float("inf"))
    return (above.any(dim=1) | (logits_TE == float("-inf")).all(dim=1))[:, None]


def selection_scores(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """What `gate_topk` selects by, [T, E]: the scores, which for "topk_softmax" are the logits."""
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE


def choice_of(logits_TE: torch.Tensor, ids_TK: torch.Tensor, *, score: str, renormalize: bool, scale: float) -> Choice:
    """ids_TK: integer [T, K], -1 = none. Weights are those that `gate_topk` gives to these experts; tokens with bad
    logits have none, and the status says so."""
    bad_T1 = bad_rows(logits_TE)
    ids_TK = torch.where(bad_T1, -1, ids_TK.to(torch.int32))
    unused_TK, at_TK = ids_TK < 0, ids_TK.clamp_min(0).long()
    chosen_TK = selection_scores(logits_TE.masked_fill(bad_T1, 0.0), score).gather(1, at_TK)
    if score == "topk_softmax":
        # A row without any expert would be NaN, and its gradient too.
        hidden_TK = unused_TK & ~unused_TK.all(dim=1, keepdim=True)
        chosen_TK = chosen_TK.masked_fill(hidden_TK, float("-inf")).softmax(dim=-1)
    weights_TK = chosen_TK.masked_fill(unused_TK, 0.0)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits_TE.dtype).tiny)
    experts = logits_TE.shape[1]
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids_TK.device)
    group_S = torch.where(unused_TK, experts, at_TK).flatten()
    return Choice(weights_TK=weights_TK * scale, ids_TK=ids_TK,
                  counts_E=counts.scatter_add(0, group_S, torch.ones_like(group_S))[:experts],
                  status=bad_T1.any().to(torch.int32).reshape(1),
                  dropped=torch.zeros((), dtype=torch.int64, device=ids_TK.device))  # fmt: skip
