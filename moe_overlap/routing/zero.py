"""Zero-computation experts: experts that return their input (LongCat-Flash, arXiv 2509.01322, section 2.1).

A router with E experts and Z of these has E + Z logits. An id from E on means the token itself: it is never sent, and
weight * x is added to the combined result where the token is. So a token that takes such experts costs less: how many
of its K go to real experts is the router's choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_overlap.routing.decision import RoutingDecision


@dataclass(frozen=True, eq=False)
class Identity:
    """What a call's zero-computation experts return, before it is computed. weights_T1: [T, 1], differentiable, the sum
    of a token's weights for them; used_T1: bool, whether it has any (padding has none, and may hold NaN)."""

    weights_T1: torch.Tensor
    used_T1: torch.Tensor

    def added_to(self, y_TD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """y + weights * x: the product in the dtype of the weights (float32, float64), rounded once to y's."""
        x_TD = x_TD.to(self.weights_T1.dtype).masked_fill(~self.used_T1, 0.0)
        return y_TD + (self.weights_T1 * x_TD).to(y_TD.dtype)


def part_zero_experts(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int, zero_experts: int
) -> tuple[torch.Tensor, torch.Tensor, Identity]:
    """(ids, weights, identity): slots of zero-computation experts, ids from `num_experts` to num_experts +
    zero_experts - 1, become unused (-1, weight 0), and their weights are summed over k, in order."""
    zero_TK = (ids_TK >= num_experts) & (ids_TK < num_experts + zero_experts)
    ours_TK = weights_TK.masked_fill(~zero_TK, 0.0)
    identity = Identity(ours_TK.sum(dim=1, keepdim=True), zero_TK.any(dim=1, keepdim=True))
    return ids_TK.masked_fill(zero_TK, -1), weights_TK.masked_fill(zero_TK, 0.0), identity


def part_decision(decision: RoutingDecision, num_experts: int) -> tuple[RoutingDecision, Identity | None]:
    """The decision as ranks see it, without zero-computation experts, and what these return; None: there are none."""
    if not decision.zero_experts:
        return decision, None
    ids_TK, weights_TK, identity = part_zero_experts(
        decision.topk_ids_TK, decision.topk_weights_TK, num_experts, decision.zero_experts
    )
    return replace(decision, topk_ids_TK=ids_TK, topk_weights_TK=weights_TK, zero_experts=0), identity
