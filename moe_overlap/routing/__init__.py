"""Which expert a token wants: tensors of one rank, no process group.

A router is scores -> selection -> capacity: `scores.py`, `choice.py`, `select.py`. `linear.py` puts them together,
`decision.py` is what comes out, `balance.py` has the losses. `masks.py`, `variable_k.py`, `zero.py`: experts and tokens
that are left out, fewer than K experts, experts that compute nothing. `recurrent.py`: a state from layer to layer.
"""

from moe_overlap.routing.balance import (
    GlobalBalance,
    load_balancing_loss,
    router_probabilities,
    sequence_balancing_loss,
    z_loss,
)
from moe_overlap.routing.decision import STATUS_BAD_LOGITS, STATUS_OK, RoutingDecision
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.loss_free import max_violation, update_bias_
from moe_overlap.routing.recurrent import RecurrentRouter
from moe_overlap.routing.select import drop_over_capacity, expert_capacity
from moe_overlap.routing.variable_k import VariableK
from moe_overlap.routing.zero import Identity, part_zero_experts

__all__ = [
    "STATUS_BAD_LOGITS",
    "STATUS_OK",
    "GlobalBalance",
    "Identity",
    "LinearRouter",
    "RecurrentRouter",
    "RoutingDecision",
    "VariableK",
    "drop_over_capacity",
    "expert_capacity",
    "load_balancing_loss",
    "max_violation",
    "part_zero_experts",
    "router_probabilities",
    "sequence_balancing_loss",
    "update_bias_",
    "z_loss",
]
