"""Which expert a token wants: tensors of one rank, no process group.

A router is scores -> selection -> capacity: `scores.py`, `choice.py`, `select.py`. `linear.py` puts them together,
`decision.py` is what comes out, `balance.py` has the losses.
"""

from moe_overlap.routing.balance import (
    GlobalBalance,
    load_balancing_loss,
    router_probabilities,
    sequence_balancing_loss,
    z_loss,
)
from moe_overlap.routing.base_assignment import BaseRouter
from moe_overlap.routing.decision import STATUS_BAD_LOGITS, STATUS_OK, RoutingDecision
from moe_overlap.routing.expert_choice import ExpertChoiceRouter
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.loss_free import max_violation, update_bias_
from moe_overlap.routing.quantile import QuantileRouter
from moe_overlap.routing.select import drop_over_capacity, expert_capacity
from moe_overlap.routing.sinkhorn import SinkhornRouter

__all__ = [
    "STATUS_BAD_LOGITS",
    "STATUS_OK",
    "BaseRouter",
    "ExpertChoiceRouter",
    "GlobalBalance",
    "LinearRouter",
    "QuantileRouter",
    "RoutingDecision",
    "SinkhornRouter",
    "drop_over_capacity",
    "expert_capacity",
    "load_balancing_loss",
    "max_violation",
    "router_probabilities",
    "sequence_balancing_loss",
    "update_bias_",
    "z_loss",
]
