"""Communication/compute overlap for Mixture-of-Experts in PyTorch."""

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
from moe_overlap.layer import MoELayer
from moe_overlap.model import aux_loss, ignore_experts_for_ddp
from moe_overlap.selective import sac_policy
from moe_overlap.shortcut import ShortcutBlock
from moe_overlap.stats import LayerStats

__version__ = "0.1.0"

__all__ = [
    "CapacityExceeded",
    "ConfigError",
    "LayerStats",
    "MoELayer",
    "MoeTransportError",
    "PeerFailed",
    "PlanMismatch",
    "RemoteAbort",
    "ShortcutBlock",
    "TransportClosed",
    "TransportTimeout",
    "aux_loss",
    "ignore_experts_for_ddp",
    "sac_policy",
]
