"""Capacity: which (token, k) slots an expert keeps when more want it than it takes."""

from __future__ import annotations

from fractions import Fraction

import torch

FACTOR_DENOMINATOR = 1_000_000


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Slots per expert and rank: ceil(factor * T * K / E). Example: factor 1.25, T 8, K 2, E 4 -> 5.

    In integers, the factor as the simplest fraction that it stands for: no rounding of floats beside a whole number,
    and a number of tokens that is a symbol (torch.export) stays one that can be saved.
    """
    factor = Fraction(capacity_factor).limit_denominator(FACTOR_DENOMINATOR)
    return -(-factor.numerator * num_tokens * top_k // (factor.denominator * num_experts))


def drop_over_capacity(
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    *,
    num_experts: int,
    capacity: int | torch.Tensor,
    rank_by_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each expert keeps its `capacity` slots of highest weight; equal weights: the earlier token wins.

    capacity: an integer, or an int64 scalar on the device. rank_by_TK: float [T, K], what decides in the place of the
    weights.

    Returns (ids, weights, dropped): dropped slots get id -1 and weight 0, the other weights are not rescaled, and
    `dropped` is their number, an int64 scalar tensor. Slots that were -1 before stay so and are not counted. No
    sync, shapes depend on T and K only. Gradients flow through the weights that are kept.

    Example, capacity 1:  ids [[0], [0], [1]], weights [[.6], [.9], [.5]]  ->  ids [[-1], [0], [1]], dropped 1.
    """
    ids_S = topk_ids_TK.flatten().long()
    num_slots = ids_S.shape[0]
    # Two stable sorts: by weight downwards, then by expert. Inside one expert this leaves the slots in order of
    # weight, and equal weights in token order. Unused slots (-1) form a group of their own at the end.
    group_S = torch.where(ids_S < 0, num_experts, ids_S)
    ranks_TK = topk_weights_TK if rank_by_TK is None else rank_by_TK
    by_weight_S = ranks_TK.detach().flatten().argsort(descending=True, stable=True)
    order_S = by_weight_S[group_S[by_weight_S].argsort(stable=True)]
    sorted_group_S = group_S[order_S]
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_S.device)
    counts_E = counts_E.scatter_add(0, group_S, torch.ones_like(group_S))
    first_E = counts_E.cumsum(0) - counts_E
    place_S = torch.arange(num_slots, device=ids_S.device) - first_E[sorted_group_S]
    keep_S = torch.empty_like(group_S, dtype=torch.bool).scatter(
        0, order_S, (place_S < capacity) & (sorted_group_S < num_experts)
    )
    keep_TK = keep_S.view_as(topk_ids_TK)
    dropped = (counts_E[:num_experts] - capacity).clamp_min(0).sum()
    return topk_ids_TK.masked_fill(~keep_TK, -1), topk_weights_TK.masked_fill(~keep_TK, 0.0), dropped
