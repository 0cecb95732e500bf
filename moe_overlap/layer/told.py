"""What a layer tells its router beside the tokens: only what that router asks for, so that any other one goes on
working.

A router with a true attribute `needs_nodes` is called with `local_experts=`, a `routing.Nodes`; one whose `balance` is
"sequence" with `sequence_length=`. What the caller of the layer gives by name goes to the router: `token_mask` (which
tokens are no padding), `state` (what the router of the layer before handed on), or what another router takes.

Ranks compare what each of them has whole (`agreement/common.py`), but for a part with a true `differs_by_rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.layer.assembly import Rows
from moe_overlap.layer.balance import with_sum_said
from moe_overlap.layer.tape import Tape
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision, as_decision
from moe_overlap.routing.nodes import Nodes
from moe_overlap.routing.zero import part_decision
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.static_dispatch import StaticDispatcher


class Routes:
    """The half of MoELayer that calls its router; the layer has the attributes that stand here."""

    router: nn.Module
    shared_expert: nn.Module | None
    latent_in: nn.Module | None
    latent_out: nn.Module | None
    dispatcher: Dispatcher
    rows: Rows
    weights_at: str
    _tape: Tape

    def _route(self, x_TD: torch.Tensor, x_shared: torch.Tensor, told: dict[str, Any]) -> RoutingDecision:
        """The decision for x_TD, the tokens of the call. x_shared: the tokens as zero-computation experts return them.
        Raises ConfigError."""
        tape = self._tape
        routing = tape.decide(self.router, x_TD, told) if tape.runs else as_decision(self.router(x_TD, **told))
        routing = with_sum_said(routing, static=isinstance(self.dispatcher, StaticDispatcher))
        return part_decision(routing, x_shared, self.dispatcher.placement.num_experts)

    def _common(self) -> list[nn.Parameter]:
        """The weights that every rank has whole, and alike: those of parts that do not say otherwise."""
        parts = (self.router, self.shared_expert, self.latent_in, self.latent_out)
        alike = [part for part in parts if part is not None and not getattr(part, "differs_by_rank", False)]
        return [parameter for part in alike for parameter in part.parameters()]

    def _weigh(self, rows_TD: torch.Tensor, routing: RoutingDecision) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the experts read [T, D], what their results are multiplied by [T, K]). weights_at "input": the tokens
        times their weights, and ones. What is not sent, padding with NaN too, gives no gradient."""
        weights_TK = routing.topk_weights_TK
        if self.weights_at == "output":
            return rows_TD, weights_TK
        sent_T1 = routing.topk_ids_TK >= 0
        rows_TD = rows_TD.masked_fill(~sent_T1, 0.0) * weights_TK.to(rows_TD.dtype)
        return rows_TD, torch.ones_like(weights_TK)

    def _told(self, x: torch.Tensor, given: Mapping[str, object]) -> dict[str, Any]:
        """The arguments by name with which the router is called for x [..., S, D]; given: those of the layer's caller.
        Raises ConfigError."""
        arguments = {name: rows_of(name, value, x) for name, value in given.items() if value is not None}
        if not torch.compiler.is_compiling():  # which looks at no signature; there the call itself is a TypeError
            check_taken(self.router, arguments)
        if getattr(self.router, "balance", None) == "sequence" and x.numel() and x.dim() > 1:
            arguments["sequence_length"] = x.shape[-2]
        if getattr(self.router, "needs_nodes", False):
            arguments["local_experts"] = nodes_of_rank(self.dispatcher, self.rows)
        return arguments

    def _check_router(self) -> None:
        """Raises ConfigError where a router needs to know its node and the layer does not know the nodes."""
        if getattr(self.router, "needs_nodes", False):
            nodes_of_rank(self.dispatcher, self.rows)


def rows_of(name: str, value: object, x: torch.Tensor) -> Any:
    """`value`, one entry for each token of x [..., D], as [T, ...]. Raises ConfigError."""
    lead, tokens = x.shape[:-1], x.shape[:-1].numel()
    if not isinstance(value, torch.Tensor):
        raise ConfigError(name, type(value).__name__, "a tensor with an entry for each token, or None")
    if value.shape[: len(lead)] == lead:
        return value.reshape(tokens, *value.shape[len(lead) :])
    if value.dim() < 1 or value.shape[0] != tokens:
        raise ConfigError(name, tuple(value.shape), f"a shape that begins with {tuple(lead)} or ({tokens},), as x has")
    return value


def check_taken(router: nn.Module, arguments: Mapping[str, object]) -> None:
    """Raises ConfigError for an argument that the router does not take."""
    if not arguments:
        return
    parameters = signature(router.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise ConfigError(name, "given", f"None: the forward of {type(router).__name__} does not take it")


def hand_on(y: torch.Tensor, state_TR: torch.Tensor | None) -> Any:
    """What a call returns: y [..., D], or (y, state [..., R]) where the router has a state for the next layer."""
    return y if state_TR is None else (y, state_TR.reshape(*y.shape[:-1], state_TR.shape[-1]))


def nodes_of_rank(dispatcher: Dispatcher, rows: Rows) -> Nodes:
    """Where this rank and all experts are, as the placement has them now. One rank is one node."""
    ranks = dispatcher.placement.world_size
    per_node = rows.ranks_per_node or dispatcher.ranks_per_node or (1 if ranks == 1 else 0)
    if not per_node:
        raise ConfigError("ranks_per_node", None, "the ranks of a node, beside a router that favours its own node")
    return _nodes(dispatcher.placement, per_node, dispatcher.transport.rank)


@lru_cache(maxsize=64)
def _nodes(placement: Placement, per_node: int, rank: int) -> Nodes:
    """From the home slots."""
    of_expert = [placement.rank_of_slot(slot) // per_node for slot in placement.home_slots]
    return Nodes(of_expert=tuple(of_expert), num_nodes=placement.world_size // per_node, own=rank // per_node)
