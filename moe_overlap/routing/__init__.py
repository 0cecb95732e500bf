"""Which expert a token wants: tensors of one rank, no process group.

A router is scores -> selection -> capacity: `scores.py`, `choice.py`, `select.py`. `linear.py` puts them together,
`decision.py` is what comes out, `balance.py` and `locality.py` have the losses, `nodes.py` says where experts are.
Others: `locmoe.py`, `smile.py`, and `baselines.py` with Switch and Hash.
Left out: experts and tokens (`masks.py`), some of the K (`variable_k.py`), the work (`zero.py`). `recurrent.py`: a
state from layer to layer. `replayed.py`: decisions of earlier, given again. `given.py`: decisions of
other code.
"""

from moe_overlap.routing.balance import (
    GlobalBalance,
    load_balancing_loss,
    pooled_balancing_loss,
    router_probabilities,
    sequence_balancing_loss,
    z_loss,
)
from moe_overlap.routing.base_assignment import BaseRouter
from moe_overlap.routing.baselines import HashRouter, SwitchRouter
from moe_overlap.routing.capacity_floor import cap_probability, capacity_bound
from moe_overlap.routing.decision import STATUS_BAD_LOGITS, STATUS_OK, Identity, RoutingDecision
from moe_overlap.routing.expert_choice import ExpertChoiceRouter
from moe_overlap.routing.given import GivenRouter
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.locality import Locality, LocalityBias, locality_loss
from moe_overlap.routing.locmoe import LocMoEPlusRouter, LocMoERouter, grap_rows
from moe_overlap.routing.loss_free import max_violation, update_bias_
from moe_overlap.routing.nodes import Nodes
from moe_overlap.routing.quantile import QuantileRouter
from moe_overlap.routing.recurrent import RecurrentRouter
from moe_overlap.routing.replayed import Recorded
from moe_overlap.routing.select import drop_over_capacity, expert_capacity
from moe_overlap.routing.sinkhorn import SinkhornRouter
from moe_overlap.routing.smile import SmileRouter
from moe_overlap.routing.variable_k import VariableK
from moe_overlap.routing.zero import part_zero_experts

__all__ = [
    "STATUS_BAD_LOGITS",
    "STATUS_OK",
    "BaseRouter",
    "ExpertChoiceRouter",
    "GivenRouter",
    "GlobalBalance",
    "HashRouter",
    "Identity",
    "LinearRouter",
    "LocMoEPlusRouter",
    "LocMoERouter",
    "Locality",
    "LocalityBias",
    "Nodes",
    "QuantileRouter",
    "Recorded",
    "RecurrentRouter",
    "RoutingDecision",
    "SinkhornRouter",
    "SmileRouter",
    "SwitchRouter",
    "VariableK",
    "cap_probability",
    "capacity_bound",
    "drop_over_capacity",
    "expert_capacity",
    "grap_rows",
    "load_balancing_loss",
    "locality_loss",
    "max_violation",
    "part_zero_experts",
    "pooled_balancing_loss",
    "router_probabilities",
    "sequence_balancing_loss",
    "update_bias_",
    "z_loss",
]
