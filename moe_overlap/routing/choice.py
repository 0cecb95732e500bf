"""Selection: from scores to the experts of each token, and from there, with losses and capacity, to a decision.

A router is scores -> selection -> capacity. Whoever writes one makes a `Choice` of its logits in any way and leaves the
rest to `decide`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_overlap.ops.gate import gate_topk
from moe_overlap.routing.balance import GlobalBalance
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.select import drop_over_capacity

Losses = tuple[torch.Tensor | None, GlobalBalance | None]
"""What one rank can compute, coefficients included, and what waits for the counts of all ranks."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a selection says, before capacity: as `RoutingDecision`, but counts of any integer dtype.

    ids_TK: int32 [T, K], best first, -1 = none. weights_TK: [T, K], differentiable. counts_E: [E]. status: int32 [1].
    dropped: int64 scalar, slots refused so far. valid_T1: bool [T, 1], which tokens count in losses, or None: all.
    """

    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    counts_E: torch.Tensor
    status: torch.Tensor
    dropped: torch.Tensor
    valid_T1: torch.Tensor | None = None


def choose_top_k(logits_TE: torch.Tensor, bias_E: torch.Tensor | None = None, **how: Any) -> Choice:
    """The K best experts of each token. `how`: k, n_group, topk_group, score, renormalize, scale, as `gate_topk`."""
    weights_TK, ids_TK, counts_E, status = gate_topk(logits_TE, bias_E, **how)
    return Choice(weights_TK=weights_TK, ids_TK=ids_TK, counts_E=counts_E, status=status,
                  dropped=counts_E.new_zeros((), dtype=torch.int64))  # fmt: skip


def count_choices(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [E]: how often each expert is chosen; -1 counts nowhere. The host reads nothing."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids_TK.device)
    ones_S = torch.ones(ids_TK.numel(), dtype=torch.int32, device=ids_TK.device)
    return counts.index_add(0, (ids_TK + 1).reshape(-1), ones_S)[1:]


def drop_bad_tokens(choice: Choice) -> Choice:
    """Tokens with bad logits take no expert and count in no loss, instead of raising."""
    # A refused token has no id at all, so its first id tells.
    return replace(choice, valid_T1=choice.ids_TK[:, :1] >= 0, dropped=(choice.ids_TK < 0).sum(),
                   status=torch.zeros_like(choice.status))  # fmt: skip


def decide(
    choice: Choice,
    *,
    losses: Losses = (None, None),
    capacity: int | torch.Tensor | None = None,
    rank_by_TK: torch.Tensor | None = None,
    zero_experts: int = 0,
    logits_TE: torch.Tensor | None = None,
) -> RoutingDecision:
    """The decision: each expert keeps at most `capacity` of this rank's slots (None: all), those of highest
    `rank_by_TK`, else of highest weight. zero_experts: so many of the last experts return their input and keep all."""
    ids_TK, weights_TK, dropped = choice.ids_TK, choice.weights_TK, choice.dropped
    num_experts = choice.counts_E.shape[0] - zero_experts
    if capacity is not None:
        zero_TK = ids_TK >= num_experts
        ids_TK, weights_TK, over_capacity = drop_over_capacity(
            ids_TK.masked_fill(zero_TK, -1), weights_TK, num_experts=num_experts, capacity=capacity,
            rank_by_TK=rank_by_TK,
        )  # fmt: skip
        ids_TK = torch.where(zero_TK, choice.ids_TK, ids_TK)
        weights_TK = torch.where(zero_TK, choice.weights_TK, weights_TK)
        dropped = dropped + over_capacity
    return RoutingDecision(
        topk_ids_TK=ids_TK,
        topk_weights_TK=weights_TK,
        tokens_per_expert_E=choice.counts_E.to(torch.int64),
        dropped_tokens=dropped,
        status=choice.status,
        aux_loss=losses[0],
        global_balance=losses[1],
        zero_experts=zero_experts,
        chosen_ids_TK=None if capacity is None else choice.ids_TK,
        logits_TE=logits_TE,
    )
