"""What a router hands to the rest of the layer: one frozen record of tensors of this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.balance import GlobalBalance

STATUS_OK = 0
STATUS_BAD_LOGITS = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Identity:
    """What the zero-computation experts of a call return, before it is computed.

    weights_T1: [T, 1], differentiable, the sum of a token's weights for them. used_T1: bool, whether it has any
    (padding has none, and its x may hold NaN). x_TD: [T, D], the tokens.
    """

    weights_T1: torch.Tensor
    used_T1: torch.Tensor
    x_TD: torch.Tensor

    def added_to(self, y_TD: torch.Tensor) -> torch.Tensor:
        """y + weights * x: the product in the dtype of the weights (float32, float64), rounded once to y's."""
        x_TD = self.x_TD.to(self.weights_T1.dtype).masked_fill(~self.used_T1, 0.0)
        return y_TD + (self.weights_T1 * x_TD).to(y_TD.dtype)


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """Which experts each of this rank's T tokens wants.

    topk_ids_TK: int32 [T, K], *logical* expert ids; -1 = unused (dropped slot, refused token, padding, or a slot that
    the token does not take). In order of score. From E on: zero-computation experts.
    topk_weights_TK: float32 [T, K] (float64 for float64 input), differentiable; 0 where the id is -1.
    tokens_per_expert_E: int64 [E] (with zero-computation experts [E + Z]), what the router chose, before capacity
    dropped anything.
    dropped_tokens: int64 scalar tensor, number of (token, k) slots that were dropped.
    status: int32 [1]; 0 = fine, 1 = bad logits seen (NaN, +inf, or a row of -inf) and the policy is to raise.
    aux_loss: differentiable scalar, already multiplied by its coefficients, or None when no coefficient is set.
    zero_experts: Z, how many ids from E on return the token itself (see `zero.py`). identity: what these are to add,
    where a layer has taken them out of the ids already.
    state: [T, R], differentiable: what the router hands to that of the next layer, or None (see `recurrent.py`).
    global_balance: the part of the auxiliary loss that waits for the counts of all ranks; the layer finishes it.
    chosen_ids_TK: int32 [T, K], the ids before capacity dropped some; None where there was no limit.
    agreed: a number that all ranks must have in common, which goes into the step's record (0: nothing).
    logits_TE: [T, E] (E + Z), differentiable: what the router scored, or None where it has no such thing. Padding and
    masked experts have -inf.
    """

    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    tokens_per_expert_E: torch.Tensor
    dropped_tokens: torch.Tensor
    status: torch.Tensor
    aux_loss: torch.Tensor | None = None
    global_balance: GlobalBalance | None = None
    zero_experts: int = 0
    identity: Identity | None = None
    state: torch.Tensor | None = None
    chosen_ids_TK: torch.Tensor | None = None
    agreed: int = 0
    logits_TE: torch.Tensor | None = None


def as_decision(value: object) -> RoutingDecision:
    """What a router returned. Raises ConfigError where it is no decision."""
    if not isinstance(value, RoutingDecision):
        raise ConfigError("router", f"one that returns a {type(value).__name__}", "one that returns a RoutingDecision")
    return value
