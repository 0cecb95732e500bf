"""The arguments of a layer and the shape of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.record import DTYPES
from moe_overlap.errors import ConfigError
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.transport.base import Transport


def check_sizes(
    hidden_size: int,
    ffn_hidden_size: int,
    num_experts: int,
    top_k: int,
    shared_expert_size: int | None,
    dtype: torch.dtype | None,
) -> None:
    """Raises ConfigError for a size that is no integer in its range, or a dtype that rows cannot have."""
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size, "num_experts": num_experts}
    if shared_expert_size is not None:
        sizes["shared_expert_size"] = shared_expert_size
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(name, value, "an integer of at least 1")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ConfigError("top_k", top_k, f"an integer from 1 to num_experts ({num_experts})")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"None or one of {DTYPES}")


def make_router(
    router: str | nn.Module | None,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    options: dict[str, Any],
    factory: dict[str, Any],
) -> nn.Module:
    """The module given, checked against the layer, or a LinearRouter with the score given and the options."""
    if isinstance(router, nn.Module):
        defaults = {"capacity_factor": None, "aux_loss_coef": 0.0, "z_loss_coef": 0.0, "bad_logits": "raise"}
        for name, default in defaults.items():
            if options[name] != default:
                raise ConfigError(name, options[name], f"{default!r} beside a router module, which has its own")
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if getattr(router, name, value) != value:
                raise ConfigError(name, value, f"the {name} of the router module, {getattr(router, name)}")
        return router
    return LinearRouter(hidden_size, num_experts, top_k, score=router or "softmax", **options, **factory)


def check_budget(max_in_flight_bytes: object, schedule: object) -> None:
    """Raises ConfigError for a budget that is no integer above 0, or that nobody would keep."""
    if max_in_flight_bytes is None:
        return
    if isinstance(max_in_flight_bytes, bool) or not isinstance(max_in_flight_bytes, int) or max_in_flight_bytes < 1:
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, "None or an integer of at least 1")
    if schedule != "auto":
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, 'None, or schedule="auto", which plans within it')


def refuse_sharded(name: str, value: object, transport: Transport) -> None:
    """Raises ConfigError for an expert weight that is sharded over ranks which hold other experts.

    Every rank of the layer's group has its own experts; FSDP over these ranks would mix them, and silently.
    """
    mesh = getattr(value, "device_mesh", None)
    if mesh is None or transport.world_size == 1:
        return
    others = set(mesh.mesh.reshape(-1).tolist()) & set(transport.global_ranks) - {
        transport.global_ranks[transport.rank]
    }
    if others:
        raise ConfigError(
            name,
            f"sharded over rank(s) {sorted(others)}, which hold other experts of this layer",
            "fully_shard(..., ignored_params=set(layer.expert_weights)), or a mesh of ranks that hold the same experts",
        )


def shaped(y_TD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """y in the shape of x, and no view: a view that is changed in place loses the backward hooks of wrappers."""
    y: torch.Tensor = torch.ops.aten._unsafe_view.default(y_TD, shape)
    return y


class PlainFunction(nn.Module):
    """A function h -> h as a module; what it costs, no parameter tells."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.function(h)


def as_module(op: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """`op` itself where it is a module."""
    return op if isinstance(op, nn.Module) else PlainFunction(op)
