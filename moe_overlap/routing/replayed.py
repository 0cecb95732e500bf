"""Decisions that were made before: what a record of one is, and a router's answer when it is given one.

Ids are those of the record, always. Weights are the router's own, of these experts and of the logits that it has now:
so gradients flow to it, as reinforcement learning needs that replays the routing of its rollouts ("Rollout Routing
Replay", R3, arXiv 2510.11370; R2 is the same with decisions of the trainer's own earlier forward).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.assigned import bad_rows, choice_of
from moe_overlap.routing.choice import Choice, count_choices
from moe_overlap.routing.decision import STATUS_OK, RoutingDecision
from moe_overlap.routing.scores import routing_dtype


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorded:
    """The decision of one call for T tokens, without a graph.

    ids_TK: int32 [T, K], as in a RoutingDecision, zero-computation experts included. weights_TK: [T, K], floating.
    chosen_TK: int32 [T, K], the ids before capacity dropped some, by which weights are normalised; None: ids_TK.

    Memory: 4 bytes for each id and weight (float32), so 8 * T * K; 12 * T * K where there is a `chosen_TK`.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    chosen_TK: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.ids_TK.shape)
        if self.ids_TK.dim() != 2 or self.ids_TK.dtype != torch.int32:
            raise ConfigError("replay.ids", f"{self.ids_TK.dtype} {shape}", "torch.int32 [tokens, K]")
        if tuple(self.weights_TK.shape) != shape or not self.weights_TK.is_floating_point():
            given = f"{self.weights_TK.dtype} {tuple(self.weights_TK.shape)}"
            raise ConfigError("replay.weights", given, f"floats {shape}, as the ids")
        chosen_TK = self.chosen_TK
        if chosen_TK is not None and (tuple(chosen_TK.shape) != shape or chosen_TK.dtype != torch.int32):
            raise ConfigError("replay.chosen", f"{chosen_TK.dtype} {tuple(chosen_TK.shape)}", f"torch.int32 {shape}")

    @classmethod
    def of(cls, decision: RoutingDecision, device: torch.device | str | None = None) -> Recorded:
        """A copy of what a router decided, on `device` (None: where it is)."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(device, copy=True)

        chosen_TK = decision.chosen_ids_TK
        return cls(ids_TK=kept(decision.topk_ids_TK), weights_TK=kept(decision.topk_weights_TK),
                   chosen_TK=None if chosen_TK is None else kept(chosen_TK))  # fmt: skip

    def to(self, device: torch.device) -> Recorded:
        chosen_TK = None if self.chosen_TK is None else self.chosen_TK.to(device)
        return Recorded(ids_TK=self.ids_TK.to(device), weights_TK=self.weights_TK.to(device), chosen_TK=chosen_TK)

    @property
    def wanted_TK(self) -> torch.Tensor:
        """The ids before capacity."""
        return self.ids_TK if self.chosen_TK is None else self.chosen_TK

    @property
    def tokens(self) -> int:
        return self.ids_TK.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids_TK.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in (self.ids_TK, self.weights_TK, self.chosen_TK) if t is not None)

    def rows(self, begin: int, end: int) -> Recorded:
        """The tokens from `begin` to before `end`."""
        chosen_TK = None if self.chosen_TK is None else self.chosen_TK[begin:end]
        return Recorded(ids_TK=self.ids_TK[begin:end], weights_TK=self.weights_TK[begin:end], chosen_TK=chosen_TK)


def replayed_choice(
    logits_TE: torch.Tensor,
    recorded: Recorded,
    token_mask: torch.Tensor | None,
    *,
    score: str,
    renormalize: bool,
    scale: float,
    drop_bad: bool,
) -> Choice:
    """The choice that was recorded, before capacity, with the weights that these logits give to it.

    Weights are those of `gate_topk` for the same experts, up to rounding, normalised over the experts that a token
    chose (by `variable_k` and LocMoE+'s `share`: over those that it kept). Padding takes none, whatever was recorded.
    Tokens with bad logits: as in LinearRouter, by drop_bad.
    """
    bad_T1 = bad_rows(logits_TE)
    choice = choice_of(logits_TE, recorded.wanted_TK, score=score, renormalize=renormalize, scale=scale)
    if token_mask is not None:  # whose logits are bad by being marked
        bad_T1 = bad_T1 & token_mask[:, None]
    status = torch.zeros_like(choice.status) if drop_bad else bad_T1.any().to(torch.int32).reshape(1)
    valid_T1 = None if token_mask is None else token_mask[:, None]
    if drop_bad:
        valid_T1 = ~bad_T1 if valid_T1 is None else valid_T1 & ~bad_T1
    return replace(choice, status=status, valid_T1=valid_T1)


def with_recorded_drops(decision: RoutingDecision, recorded: Recorded) -> RoutingDecision:
    """The decision on a `replayed_choice`, without the slots that capacity dropped when it was recorded."""
    gone_TK = (recorded.ids_TK < 0) & (decision.topk_ids_TK >= 0)
    if recorded.chosen_TK is None:
        return decision
    return replace(decision, topk_ids_TK=decision.topk_ids_TK.masked_fill(gone_TK, -1),
                   topk_weights_TK=decision.topk_weights_TK.masked_fill(gone_TK, 0.0),
                   chosen_ids_TK=decision.topk_ids_TK, dropped_tokens=gone_TK.sum())  # fmt: skip


def recorded_decision(
    recorded: Recorded, x_TD: torch.Tensor, token_mask: torch.Tensor | None, *, num_logits: int, zero_experts: int
) -> RoutingDecision:
    """What was recorded, weights too, as constants: no router is asked, none gets a gradient, and there is no loss."""
    ids_TK, wanted_TK = recorded.ids_TK, recorded.wanted_TK
    weights_TK = recorded.weights_TK.to(routing_dtype(x_TD))
    if token_mask is not None:
        padding_T1 = ~token_mask[:, None]
        ids_TK, wanted_TK = ids_TK.masked_fill(padding_T1, -1), wanted_TK.masked_fill(padding_T1, -1)
        weights_TK = weights_TK.masked_fill(padding_T1, 0.0)
    return RoutingDecision(
        topk_ids_TK=ids_TK,
        topk_weights_TK=weights_TK,
        tokens_per_expert_E=count_choices(wanted_TK, num_logits).to(torch.int64),
        dropped_tokens=((wanted_TK >= 0) & (ids_TK < 0)).sum(),
        status=torch.full((1,), STATUS_OK, dtype=torch.int32, device=ids_TK.device),
        zero_experts=zero_experts,
        chosen_ids_TK=None if recorded.chosen_TK is None else wanted_TK,
    )
