"""The part of a router's auxiliary loss that no rank knows alone: over the tokens of all ranks (`balance="global"`).

The counts are those on which the ranks have agreed anyway, so expert parallelism pays nothing for it. Two things cost
a small sum over ranks in each call (int64 [E + 1]): experts that lie on several groups of ranks (expert parallel in
data parallel), over the replicas; and choices that are counted but not dispatched (capacity, refused tokens), over the
ranks of the layer. Neither happens in a recompute, nor where nothing needs a gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from moe_overlap.agreement.record import digest
from moe_overlap.agreement.static_plan import StaticExchange
from moe_overlap.parallel.ownership import Ownership
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.balance import GlobalBalance
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.run import Step
from moe_overlap.transport.closing import closing_on_error


def sums_over_replicas(router: nn.Module, ownership: Ownership) -> bool:
    """Whether the loss of every call is summed over ranks, so that one rank's ops in a row are not all of it."""
    return ownership.replicas is not None and getattr(router, "balance", None) == "global"


def with_sum_said(routing: RoutingDecision, *, static: bool) -> RoutingDecision:
    """The decision with the sum over ranks that its loss will need said in the step's record, so that a rank which
    needs none (no token_mask, a frozen router) is a PlanMismatch on all of them and no sum that waits for it.
    static: fixed shapes, where every rank sums."""
    rest = routing.global_balance
    if static or rest is None or rest.agreed or not rest.probs_E.requires_grad:
        return routing
    return replace(routing, agreed=digest("balance over ranks", routing.agreed))


def loss_alone(routing: RoutingDecision) -> torch.Tensor | None:
    """The auxiliary loss of a call of one rank."""
    rest = routing.global_balance
    return routing.aux_loss if rest is None else _added(routing.aux_loss, rest.alone())


def loss_of_ranks(routing: RoutingDecision, step: Step, placement: Placement, owner: Ownership) -> torch.Tensor | None:
    """The auxiliary loss of a call whose ranks have agreed on `step`. Collective where the module says so.

    The mean of the ranks' losses is the loss of one process with all tokens. Raises MoeTransportError.
    """
    rest = routing.global_balance
    if rest is None or step.phase != "forward" or not rest.probs_E.requires_grad:
        return routing.aux_loss
    with closing_on_error(step.transport, "balance"), torch.no_grad():
        said = _sums(rest, routing.topk_ids_TK.shape[1], step, placement)
        if owner.replicas is not None:
            said = owner.replicas.transport.all_reduce(said, action="balance").wait()
        slope_E = rest.slope(said[:-1], said[-1], owner.ranks_reached).to(rest.probs_E.dtype)
    return _added(routing.aux_loss, Sloped.apply(rest.probs_E, slope_E))


def _sums(rest: GlobalBalance, top_k: int, step: Step, placement: Placement) -> torch.Tensor:
    """int64 [E + 1] on the device of the loss: counts, then tokens, of the ranks that share out the layer's experts."""
    device = rest.probs_E.device
    known = rest.agreed and not isinstance(step.plan.exchange, StaticExchange)
    if known and rest.counts_E.shape[0] == placement.num_experts:
        counts_E = step.plan.exchange.tokens_per_expert
        return torch.cat([counts_E, counts_E.sum(dim=0, keepdim=True) // top_k]).to(device)
    said = torch.cat([rest.counts_E, rest.tokens.reshape(1)])
    return step.transport.all_reduce(said, action="balance").wait()


def _added(first: torch.Tensor | None, second: torch.Tensor) -> torch.Tensor:
    return second if first is None else first + second


class Sloped(torch.autograd.Function):
    """(slope * p).sum(), whose slope is kept on the node: a recompute, which has no part in the sum over ranks, then
    has nothing to compute for it again."""

    @staticmethod
    def forward(ctx: Any, p_E: torch.Tensor, slope_E: torch.Tensor) -> torch.Tensor:
        ctx.slope_E = slope_E
        return (slope_E * p_E).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.slope_E, None
