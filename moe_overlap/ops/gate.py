"""gate_topk: from router logits to the experts of each token and their weights.

Scores: "softmax" (softmax over all experts, then top-k), "topk_softmax" (top-k, then softmax over the winners) and
"sigmoid" (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). A bias changes the selection only, never the weights
(arXiv 2408.15664). Without one the choice is made on the logits, of which every score is a rising function: rounding
of the scores cannot tie or swap two experts, and all implementations choose alike. With groups, whole groups of experts
are ranked first (by the sum of their two best scores when there is a bias, else by their best) and only the
`topk_group` best stay. Ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, compiled, registry, workspace
from moe_overlap.ops.library import cast_under_autocast, define, differentiate, implement, refuse_derivative

SCORES = ("softmax", "topk_softmax", "sigmoid")
BAD_LOGITS = 1
"""Bit of the status word: a row of logits held NaN or +inf, or was -inf everywhere."""

_TINY = 1e-20


def gate_topk(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose k experts for each token.

    Args:
        logits_TE: [T, E] float32 or float64.
        bias_E: [E], same dtype, added to the scores for the selection only; no gradient flows to it.
        k: experts per token, 1 <= k <= E (and at most topk_group * E / n_group).
        n_group, topk_group: E is cut into n_group equal groups of neighbours, the best topk_group of which are kept.
        score: "softmax", "topk_softmax" or "sigmoid".
        renormalize: divide the weights of a token by their sum.
        scale: factor on all weights.

    Returns:
        weights_TK (dtype of the logits, best expert first, differentiable), ids_TK int32, counts_E int32 (how often
        each expert was chosen) and status int32 [1]. A row with NaN or +inf, or with nothing but -inf, sets bit 0 of
        status and gets ids -1 and weights 0.

    Raises:
        ConfigError: naming the argument, its value and what was expected.
    """
    checks.check_tensor("logits", logits_TE, (None, None), (torch.float32, torch.float64), what="[T, E]")
    num_experts = logits_TE.shape[1]
    if bias_E is not None:
        checks.check_tensor("bias", bias_E, (num_experts,), logits_TE.dtype, what="[E]", device=logits_TE.device)
    if score not in SCORES:
        raise ConfigError("score", score, " or ".join(repr(name) for name in SCORES))
    if n_group < 1 or num_experts % n_group != 0:
        raise ConfigError("n_group", n_group, f"a divisor of the number of experts, {num_experts}")
    if not 1 <= topk_group <= n_group:
        raise ConfigError("topk_group", topk_group, f"1 <= topk_group <= n_group = {n_group}")
    eligible = num_experts // n_group * topk_group
    if not 1 <= k <= eligible:
        raise ConfigError("k", k, f"1 <= k <= {eligible}, the experts that can be chosen")
    return torch.ops.moe_overlap.gate_topk.default(
        logits_TE, bias_E, k, n_group, topk_group, score, renormalize, float(scale)
    )


def _scores(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE


def _keep_best_groups(choice_TE: torch.Tensor, n_group: int, topk_group: int, best: int) -> torch.Tensor:
    """-inf for every expert outside the topk_group best groups, more for all others, even if it was -inf.

    A group counts the sum of its `best` best experts.
    """
    tokens, num_experts = choice_TE.shape
    grouped = choice_TE.view(tokens, n_group, num_experts // n_group)
    worth = grouped.topk(min(best, num_experts // n_group), dim=-1).values.sum(dim=-1)
    kept = worth.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    dropped = torch.ones(tokens, n_group, dtype=torch.bool, device=choice_TE.device).scatter_(1, kept, False)
    above = grouped.clamp(min=torch.finfo(choice_TE.dtype).min)
    return above.masked_fill(dropped[:, :, None], -torch.inf).view(tokens, num_experts)


def _bad_rows(logits_TE: torch.Tensor) -> torch.Tensor:
    # The maximum of a row is NaN if the row holds one, +inf if it holds one, -inf if it holds nothing else.
    return ~logits_TE.amax(dim=-1).isfinite()


Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""ids_TK, counts_E and status of `gate_topk`."""


def _choose(
    logits_TE: torch.Tensor, choice_TE: torch.Tensor, k: int, n_group: int, topk_group: int, summed: int
) -> Chosen:
    """The k best of `choice` in each row whose logits are good. summed: how many of its best a group counts for."""
    bad_T = _bad_rows(logits_TE)
    if topk_group < n_group:
        choice_TE = _keep_best_groups(choice_TE, n_group, topk_group, summed)
    # A stable sort, since torch.topk promises no order among equals.
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids_TK = ids_TK.masked_fill(bad_T[:, None], -1).to(torch.int32)
    counts = torch.zeros(logits_TE.shape[1] + 1, dtype=torch.int32, device=logits_TE.device)
    counts.index_add_(0, (ids_TK + 1).reshape(-1), torch.ones_like(ids_TK).reshape(-1))
    return ids_TK, counts[1:].clone(), bad_T.any().to(torch.int32).mul_(BAD_LOGITS).reshape(1)


def _choose_cpp(logits_TE: torch.Tensor, choice_TE: torch.Tensor, k: int, *groups: int) -> Chosen:
    """`_choose`, compiled."""
    tokens, num_experts = logits_TE.shape
    ids_TK, counts_E, status = (
        logits_TE.new_empty(shape, dtype=torch.int32) for shape in ((tokens, k), (num_experts,), (1,))
    )
    torch.ops.moe_overlap._gate_topk_cpp.default(
        logits_TE.contiguous(), choice_TE.contiguous(), *groups, ids_TK, counts_E, status
    )
    return ids_TK, counts_E, status


def _gate_topk(
    choose: Callable[..., Chosen],
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    k: int,
    n_group: int,
    topk_group: int,
    score: str,
    renormalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    scores_TE = _scores(logits_TE, score)
    choice_TE, summed = (logits_TE, 1) if bias_E is None else (scores_TE + bias_E, 2)
    ids_TK, counts_E, status = choose(logits_TE, choice_TE, k, n_group, topk_group, summed)
    weights_TK = _weights(scores_TE.gather(1, _index(ids_TK)), score, renormalize, scale)
    return weights_TK.masked_fill_(ids_TK[:, :1] < 0, 0), ids_TK, counts_E, status


def _weights(chosen_TK: torch.Tensor, score: str, renormalize: bool, scale: float) -> torch.Tensor:
    if score == "topk_softmax":
        return chosen_TK.softmax(dim=-1) * scale
    if renormalize:
        return chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + _TINY) * scale
    return chosen_TK * scale


def _spread(
    d_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TE: torch.Tensor | None,
    weighted_T1: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    """Gradients of all logits from those of the chosen scores: through the softmax that gave `scores`, of which
    weighted_T1 is the sum of gradients times scores; None: they are gradients of the chosen logits already."""
    dlogits_TE = torch.zeros_like(like).scatter_(1, _index(ids_TK), d_TK)
    if scores_TE is not None:
        dlogits_TE = scores_TE * (dlogits_TE - weighted_T1)
    return dlogits_TE.masked_fill_((ids_TK[:, :1] < 0), 0)


def _spread_cpp(
    d_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TE: torch.Tensor | None,
    weighted_T1: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    """`_spread`, compiled."""
    dlogits_TE = workspace.empty(like.shape, like=like, rows=False)
    scores_TE = None if scores_TE is None else scores_TE.contiguous()
    torch.ops.moe_overlap._gate_topk_backward_cpp.default(
        d_TK.contiguous(), ids_TK.contiguous(), scores_TE, weighted_T1, dlogits_TE
    )
    return dlogits_TE


def _gate_topk_backward(
    spread: Callable[..., torch.Tensor],
    dweights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    """Gradient of the logits. With chosen scores u and s = sum(u): w = scale * u / s, so
    du = scale * (dw - sum(dw * u / s)) / s; then through softmax or sigmoid."""
    scores_TE = _scores(logits_TE, score)
    chosen_TK = scores_TE.gather(1, _index(ids_TK))
    d_TK = dweights_TK * scale
    if score == "topk_softmax":
        share_TK = chosen_TK.softmax(dim=-1)
        d_TK = share_TK * (d_TK - (d_TK * share_TK).sum(dim=-1, keepdim=True))
    elif renormalize:
        total_T1 = chosen_TK.sum(dim=-1, keepdim=True) + _TINY
        d_TK = (d_TK - (d_TK * chosen_TK).sum(dim=-1, keepdim=True) / total_T1) / total_T1
    if score == "sigmoid":
        d_TK = d_TK * chosen_TK * (1 - chosen_TK)
    weighted_T1 = (d_TK * chosen_TK).sum(dim=-1, keepdim=True)
    return spread(d_TK, ids_TK, scores_TE if score == "softmax" else None, weighted_T1, logits_TE)


def _index(ids_TK: torch.Tensor) -> torch.Tensor:
    return ids_TK.long().clamp_(min=0)


def _gate_topk_fake(logits_TE: torch.Tensor, bias_E: Any, k: int, *rest: Any) -> tuple[torch.Tensor, ...]:
    tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty((tokens, k)),
        logits_TE.new_empty((tokens, k), dtype=torch.int32),
        logits_TE.new_empty((num_experts,), dtype=torch.int32),
        logits_TE.new_empty((1,), dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_TE, _, _, _, _, *ctx.how = inputs
    _, ids_TK, counts_E, status = output
    ctx.mark_non_differentiable(ids_TK, counts_E, status)
    ctx.save_for_backward(logits_TE, ids_TK)


def _backward(ctx: Any, dweights_TK: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    logits_TE, ids_TK = ctx.saved_tensors
    dlogits_TE = torch.ops.moe_overlap.gate_topk_backward.default(dweights_TK, logits_TE, ids_TK, *ctx.how)
    return (dlogits_TE, *(None,) * 7)


define(
    "gate_topk(Tensor logits, Tensor? bias, int k, int n_group, int topk_group, str score, bool renormalize, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "gate_topk_backward(Tensor dweights, Tensor logits, Tensor ids, str score, bool renormalize, float scale) -> Tensor"
)
# In the compiled part, where there is one; see csrc/bindings.
define(
    "_gate_topk_cpp(Tensor logits, Tensor choice, int n_group, int topk_group, int summed, Tensor(a!) ids, "
    "Tensor(b!) counts, Tensor(c!) status) -> ()"
)
registry.add(
    "gate_topk",
    "cpp",
    partial(_gate_topk, _choose_cpp),
    obstacle=compiled.obstacle("gate_topk"),
    merit="compiled: the k best are kept while a row is read, and nothing is sorted",
)
registry.add("gate_topk", "reference", partial(_gate_topk, _choose), merit="pure PyTorch, runs everywhere")
define("_gate_topk_backward_cpp(Tensor dchosen, Tensor ids, Tensor? scores, Tensor weighted, Tensor(a!) dlogits) -> ()")
registry.add(
    "gate_topk_backward",
    "cpp",
    partial(_gate_topk_backward, _spread_cpp),
    obstacle=compiled.obstacle("gate_topk_backward"),
    merit="compiled: gradients of the logits are written once",
)
registry.add(
    "gate_topk_backward", "reference", partial(_gate_topk_backward, _spread), merit="pure PyTorch, runs everywhere"
)
implement("gate_topk", registry.kernel("gate_topk"), _gate_topk_fake)
implement(
    "gate_topk_backward",
    registry.kernel("gate_topk_backward"),
    lambda dweights_TK, logits_TE, *rest: torch.empty_like(logits_TE),
)
differentiate("gate_topk", _backward, _setup_context)
refuse_derivative("gate_topk_backward")
cast_under_autocast("gate_topk", raise_to_float32=(0, 1))
