"""Communication/compute overlap for Mixture-of-Experts in PyTorch.

Names are imported where they live when they are first asked for, so that what needs no torch, `moe-overlap plan` above
all, starts without it. `__init__.pyi` has the same names for type checkers; a test holds the two together.
"""

from importlib import import_module
from typing import Any

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
from moe_overlap.native.build_info import VERSION

__version__ = VERSION

# Module -> its names here.
_HOMES = {
    "moe_overlap.auto.parallelism": "ParallelismSwitch",
    "moe_overlap.auto.replicate": "ReplicationRule",
    "moe_overlap.layer.coherent": "CoherentLayer",
    "moe_overlap.layer.controller": "PlacementController",
    "moe_overlap.layer.experts": "Experts",
    "moe_overlap.layer.forward_backward": "ForwardBackward",
    "moe_overlap.layer.functional": "moe_forward",
    "moe_overlap.layer.hop": "CoherentTokens",
    "moe_overlap.layer.interleaved": "Interleaved MoEBlock",
    "moe_overlap.layer.layer": "MoELayer",
    "moe_overlap.layer.loss_free": "LossFreeBalancer",
    "moe_overlap.layer.model": "aux_loss",
    "moe_overlap.layer.moving": "experts_in_order migrate set_placement",
    "moe_overlap.layer.recorded": "gather_events",
    "moe_overlap.layer.replay": "RoutingRecorder RoutingReplay",
    "moe_overlap.layer.routing_log": "RoutingLog",
    "moe_overlap.layer.selective": "sac_policy",
    "moe_overlap.layer.shared_expert": "SharedExpert",
    "moe_overlap.layer.shortcut": "ShortcutBlock",
    "moe_overlap.layer.stats": "LayerStats",
    "moe_overlap.layer.traffic": "TrafficMonitor TrafficReport",
    "moe_overlap.measure.assertion": "OverlapTooLow assert_overlap",
    "moe_overlap.measure.slow": "why_slow",
    "moe_overlap.parallel.clip": "GradScaler clip_grad_norm_ grad_norm gradients_are_finite",
    "moe_overlap.parallel.optimizer_state": "load_optimizer_state_dict optimizer_state_dict",
    "moe_overlap.parallel.prepare": "ignore_experts_for_ddp no_sync param_groups prepare reopen",
    "moe_overlap.parallel.sharded_files": "load_safetensors save_safetensors",
    "moe_overlap.parallel.state": "mark_experts",
    "moe_overlap.routing.linear": "LinearRouter",
    "moe_overlap.schedule.recorder": "record",
}
# Modules that are names here, and rooms that were loaded as soon as any name of a layer is.
_MODULES = {
    "functional": "moe_overlap.layer.functional",
    "ops": "moe_overlap.ops",
    "layer": "moe_overlap.layer",
    "parallel": "moe_overlap.parallel",
    "routing": "moe_overlap.routing",
    "transport": "moe_overlap.transport",
    "schedule": "moe_overlap.schedule",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

_ERRORS = (CapacityExceeded, ConfigError, MoeTransportError, PeerFailed, PlanMismatch, RemoteAbort, TransportClosed,
           TransportTimeout)  # fmt: skip

__all__ = sorted([error.__name__ for error in _ERRORS] + list(_HOME_OF) + ["functional", "ops"])


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        found = getattr(import_module(_HOME_OF[name]), name)
    elif name in _MODULES:
        found = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'moe_overlap' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
