"""Zero-computation experts: experts that return their input (LongCat-Flash, arXiv 2509.01322, section 2.1).

A router with E experts and Z of these has E + Z logits. An id from E on means the token itself: it is never sent, and
weight * x is added to the combined result where the token is. So a token that takes such experts costs less: how many
of its K go to real experts is the router's choice.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_overlap.routing.decision import Identity, RoutingDecision


def part_zero_experts(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, x_TD: torch.Tensor, num_experts: int, zero_experts: int
) -> tuple[torch.Tensor, torch.Tensor, Identity]:
    """(ids, weights, identity): slots of zero-computation experts, ids from `num_experts` to num_experts +
    zero_experts - 1, become unused (-1, weight 0), and their weights are summed over k, in order."""
    zero_TK = (ids_TK >= num_experts) & (ids_TK < num_experts + zero_experts)
    weights_T1 = weights_TK.masked_fill(~zero_TK, 0.0).sum(dim=1, keepdim=True)
    identity = Identity(weights_T1=weights_T1, used_T1=zero_TK.any(dim=1, keepdim=True), x_TD=x_TD)
    return ids_TK.masked_fill(zero_TK, -1), weights_TK.masked_fill(zero_TK, 0.0), identity


def part_decision(decision: RoutingDecision, x_TD: torch.Tensor, num_experts: int) -> RoutingDecision:
    """The decision as ranks see it: without zero-computation experts, which are in its `identity` then. x_TD: the
    tokens as these return them."""
    if not decision.zero_experts:
        return decision
    ids_TK, weights_TK, identity = part_zero_experts(
        decision.topk_ids_TK, decision.topk_weights_TK, x_TD, num_experts, decision.zero_experts
    )
    return replace(decision, topk_ids_TK=ids_TK, topk_weights_TK=weights_TK, zero_experts=0, identity=identity)
