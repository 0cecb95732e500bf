"""Communication/compute overlap for Mixture-of-Experts in PyTorch."""

from moe_overlap import ops
from moe_overlap.auto.parallelism import ParallelismSwitch
from moe_overlap.auto.replicate import ReplicationRule
from moe_overlap.errors import (
    CapacityExceeded,
    ConfigError,
    MoeTransportError,
    PeerFailed,
    PlanMismatch,
    RemoteAbort,
    TransportClosed,
    TransportTimeout,
)
from moe_overlap.layer import functional
from moe_overlap.layer.coherent import CoherentLayer
from moe_overlap.layer.controller import PlacementController
from moe_overlap.layer.experts import Experts
from moe_overlap.layer.forward_backward import ForwardBackward
from moe_overlap.layer.functional import moe_forward
from moe_overlap.layer.hop import CoherentTokens
from moe_overlap.layer.interleaved import Interleaved, MoEBlock
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.loss_free import LossFreeBalancer
from moe_overlap.layer.model import aux_loss
from moe_overlap.layer.moving import experts_in_order, migrate, set_placement
from moe_overlap.layer.recorded import gather_events
from moe_overlap.layer.replay import RoutingRecorder, RoutingReplay
from moe_overlap.layer.routing_log import RoutingLog
from moe_overlap.layer.selective import sac_policy
from moe_overlap.layer.shared_expert import SharedExpert
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.layer.stats import LayerStats
from moe_overlap.layer.traffic import TrafficMonitor, TrafficReport
from moe_overlap.measure.assertion import OverlapTooLow, assert_overlap
from moe_overlap.measure.slow import why_slow
from moe_overlap.native.build_info import VERSION
from moe_overlap.parallel.clip import GradScaler, clip_grad_norm_, grad_norm, gradients_are_finite
from moe_overlap.parallel.optimizer_state import load_optimizer_state_dict, optimizer_state_dict
from moe_overlap.parallel.prepare import ignore_experts_for_ddp, no_sync, param_groups, prepare, reopen
from moe_overlap.parallel.sharded_files import load_safetensors, save_safetensors
from moe_overlap.parallel.state import mark_experts
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.recorder import record

__version__ = VERSION

__all__ = [
    "CapacityExceeded",
    "CoherentLayer",
    "CoherentTokens",
    "ConfigError",
    "Experts",
    "ForwardBackward",
    "GradScaler",
    "Interleaved",
    "LayerStats",
    "LinearRouter",
    "LossFreeBalancer",
    "MoEBlock",
    "MoELayer",
    "MoeTransportError",
    "OverlapTooLow",
    "ParallelismSwitch",
    "PeerFailed",
    "PlacementController",
    "PlanMismatch",
    "RemoteAbort",
    "ReplicationRule",
    "RoutingLog",
    "RoutingRecorder",
    "RoutingReplay",
    "SharedExpert",
    "ShortcutBlock",
    "TrafficMonitor",
    "TrafficReport",
    "TransportClosed",
    "TransportTimeout",
    "assert_overlap",
    "aux_loss",
    "clip_grad_norm_",
    "experts_in_order",
    "functional",
    "gather_events",
    "grad_norm",
    "gradients_are_finite",
    "ignore_experts_for_ddp",
    "load_optimizer_state_dict",
    "load_safetensors",
    "mark_experts",
    "migrate",
    "moe_forward",
    "no_sync",
    "ops",
    "optimizer_state_dict",
    "param_groups",
    "prepare",
    "record",
    "reopen",
    "sac_policy",
    "save_safetensors",
    "set_placement",
    "why_slow",
]
