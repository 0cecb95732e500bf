"""What a layer tells its router beside the tokens: only what that router asks for, so that any other one goes on
working.

A router with a true attribute `needs_nodes` is called with `local_experts=`, a `routing.Nodes`; one whose `balance` is
"sequence" with `sequence_length=`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.layer.assembly import Rows
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision, as_decision
from moe_overlap.routing.nodes import Nodes
from moe_overlap.schedule.dispatch import Dispatcher


class Routes:
    """The half of MoELayer that calls its router; the layer has the attributes that stand here."""

    router: nn.Module
    dispatcher: Dispatcher
    rows: Rows

    def _route(self, x_TD: torch.Tensor, shape: torch.Size) -> RoutingDecision:
        """The decision for x_TD, the tokens of an x of `shape` [..., S, D]. Raises ConfigError."""
        return as_decision(self.router(x_TD, **self._told(x_TD, shape)))

    def _told(self, x_TD: torch.Tensor, shape: torch.Size) -> dict[str, Any]:
        """The arguments by name with which the router is called."""
        arguments: dict[str, Any] = {}
        if getattr(self.router, "balance", None) == "sequence" and x_TD.shape[0] and len(shape) > 1:
            arguments["sequence_length"] = shape[-2]
        if getattr(self.router, "needs_nodes", False):
            arguments["local_experts"] = nodes_of_rank(self.dispatcher, self.rows)
        return arguments

    def _check_router(self) -> None:
        """Raises ConfigError where a router needs to know its node and the layer does not know the nodes."""
        if getattr(self.router, "needs_nodes", False):
            nodes_of_rank(self.dispatcher, self.rows)


def nodes_of_rank(dispatcher: Dispatcher, rows: Rows) -> Nodes:
    """Where this rank and all experts are, as the placement has them now. One rank is one node."""
    ranks = dispatcher.placement.world_size
    per_node = rows.ranks_per_node or dispatcher.ranks_per_node or (1 if ranks == 1 else 0)
    if not per_node:
        raise ConfigError("ranks_per_node", None, "the ranks of a node, beside a router that favours its own node")
    return _nodes(dispatcher.placement, per_node, dispatcher.transport.rank)


@lru_cache(maxsize=64)
def _nodes(placement: Placement, per_node: int, rank: int) -> Nodes:
    """From the slots, whose experts are any."""
    of_expert = [0] * placement.num_experts
    for slot, expert in enumerate(placement.slot_to_expert):
        of_expert[expert] = placement.rank_of_slot(slot) // per_node
    return Nodes(of_expert=tuple(of_expert), num_nodes=placement.world_size // per_node, own=rank // per_node)
