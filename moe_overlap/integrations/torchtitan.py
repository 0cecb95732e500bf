"""torchtitan's MoE layer (0.3.0) with its routed experts here: rows travel and are computed by our schedules.

Such a layer is router, `routed_experts` and shared experts, and `routed_experts` is a token dispatcher (`reorderer` in
earlier releases) around `GroupedExperts`. What is replaced is `routed_experts` as a whole, not the dispatcher inside
it: that hands over all rows before the first expert runs and takes all of them back after the last one, so whoever
implements it has nothing to put beside an exchange. Router, shared experts, the bias that balances and its counts stay
torchtitan's, and so do the parameters and their names. Nothing here imports torchtitan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import check_dedup
from moe_overlap.layer.functional import moe_forward
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.transport.base import Transport
from moe_overlap.transport.opening import open_transport

WEIGHTS = ("w1_EFD", "w2_EDF", "w3_EFD")


class RoutedExperts(nn.Module):
    """In the place of torchtitan's module of this name, with its `inner_experts`, whose weights are read and whose
    forward is not called.

    group: the ranks that the experts are spread over, in order: None (one rank), a ProcessGroup or a one-dimensional
    DeviceMesh; or a transport. Each rank has its E / ranks experts, as plain weights or as DTensors sharded by experts.
    schedule, overlap, dedup: as in `moe_forward`.

    Computed in the dtype of the weights, which x has too (or autocast's), where torchtitan takes bfloat16 always. Each
    call copies w1 and w3 into one weight. An expert's gradient is that of the sum of the ranks' losses.
    """

    def __init__(
        self,
        inner_experts: nn.Module,
        *,
        group: Any = None,
        transport: Transport | None = None,
        schedule: str | SchedulePair = "auto",
        overlap: bool = True,
        dedup: str = "off",
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        _check(inner_experts)
        check_dedup(dedup)
        if schedule != "auto":
            layer_schedule(schedule, shared=False)
        if group is not None and transport is not None:
            raise ConfigError("transport", transport, "None beside a group: give one of the two")
        self.inner_experts = inner_experts
        self.options: dict[str, Any] = {"schedule": schedule, "overlap": overlap, "dedup": dedup}
        self.transport = open_transport(group, timeout_s=timeout_s) if transport is None else transport

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """[B, L, D] of this rank's tokens, their scores and expert ids (of the whole group) [B, L, K] -> [B, L, D]. The
        counts are not read: the ranks agree on them. Raises ConfigError, MoeTransportError."""
        w1, w2, w3 = (_local(getattr(self.inner_experts, name)) for name in WEIGHTS)
        y_TD = moe_forward(x_BLD.flatten(0, 1), topk_expert_ids_BLK.flatten(0, 1), topk_scores_BLK.flatten(0, 1),
                           torch.cat([w1, w3], dim=1), w2, transport=self.transport, **self.options)  # fmt: skip
        return y_TD.view_as(x_BLD)


def use(model: nn.Module, **options: Any) -> nn.Module:
    """Put `RoutedExperts` into every MoE layer of a model of torchtitan's, and return the model. options: as there. On
    several ranks: after the model's experts were sharded. All layers are looked at first; raises ConfigError for one
    that cannot be run here, and for a model without any; the model is not touched then."""
    found: list[Any] = [module for module in model.modules() if hasattr(module, "routed_experts")]
    made = [RoutedExperts(module.routed_experts.inner_experts, **options) for module in found]
    if not found:
        raise ConfigError("model", type(model).__name__, "a model with MoE layers of torchtitan (routed_experts)")
    for module, experts in zip(found, made, strict=True):
        module.routed_experts = experts
    return model


def _check(experts: nn.Module) -> None:
    """Raises ConfigError for experts that compute something else than SwiGLU of three plain weights."""
    name = type(experts).__name__
    if name != "GroupedExperts" or {key for key, _ in experts.named_parameters()} != set(WEIGHTS):
        raise ConfigError("inner_experts", name, f"torchtitan's GroupedExperts, with {', '.join(WEIGHTS)} alone")


def _local(weight: Any) -> torch.Tensor:
    local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local
