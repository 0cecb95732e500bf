"""A `Choice` from ids that something else than the fused gate has made: an assignment of many tokens at once, or top-k
by a score or a rule of groups that the gate has no word for."""

from __future__ import annotations

import torch

from moe_overlap.ops.gate import gate_topk
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.scores import sqrt_softplus


def bad_rows(logits_TE: torch.Tensor) -> torch.Tensor:
    """bool [T, 1]: rows with NaN or +inf, or with -inf everywhere, as `gate_topk` has it."""
    above = logits_TE.isnan() | (logits_TE == float("inf"))
    return (above.any(dim=1) | (logits_TE == float("-inf")).all(dim=1))[:, None]


def selection_scores(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """What `gate_topk` selects by, [T, E]: the scores, which for "topk_softmax" are the logits."""
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    if score == "sqrt_softplus":
        return sqrt_softplus(logits_TE)
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE


def choose_by_score(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, *, k: int, n_group: int, topk_group: int,
    group_score: str | None, score: str, renormalize: bool, scale: float,
) -> Choice:  # fmt: skip
    """As `choose_top_k`, of any score, and with the rule of groups apart from the bias: they are ranked by their best
    expert ("max"), by the sum of their two best ("top2_sum"), or as the gate does (None: the sum with a bias, else the
    best). Two more passes over [T, E] than the gate."""
    by_sum = bias_E is not None if group_score is None else group_score == "top2_sum"
    with torch.no_grad():
        values_TE = logits_TE  # every score rises with the logits
        if bias_E is not None or by_sum:
            values_TE = selection_scores(logits_TE, score)
            values_TE = values_TE if bias_E is None else values_TE + bias_E
            values_TE = values_TE.masked_fill(logits_TE == float("-inf"), float("-inf"))
        # The gate adds a bias to logits under this score, and sums the two best of a group where there is one.
        zero_E = values_TE.new_zeros(values_TE.shape[1]) if by_sum else None
        _, ids_TK, *_ = gate_topk(values_TE, zero_E, k=k, n_group=n_group, topk_group=topk_group, score="topk_softmax")
    return choice_of(logits_TE, ids_TK, score=score, renormalize=renormalize, scale=scale)


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
