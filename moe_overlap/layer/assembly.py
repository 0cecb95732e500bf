"""The parts that a layer is assembled from: each one given by the caller and checked, or built here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_overlap.auto.auto import ONE_RANK, AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import AnySchedule, check_positive
from moe_overlap.layer.experts import Experts, refuse_sharded, w_in_name, w_in_rows, weights_of
from moe_overlap.layer.shared_expert import SharedExpert
from moe_overlap.placement.placement import Placement
from moe_overlap.planning.window import OpVerb
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.schedule.dispatch import ACTIVATIONS, Dispatcher
from moe_overlap.transport.base import Transport
from moe_overlap.transport.opening import open_transport

ROUTER_DEFAULTS = {"capacity_factor": None, "aux_loss_coef": 0.0, "z_loss_coef": 0.0, "bad_logits": "raise"}
DEFAULT_ACTIVATION = "swiglu"


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
        for name, default in ROUTER_DEFAULTS.items():
            if options[name] != default:
                raise ConfigError(name, options[name], f"{default!r} beside a router module, which has its own")
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if getattr(router, name, value) != value:
                raise ConfigError(name, value, f"the {name} of the router module, {getattr(router, name)}")
        return router
    return LinearRouter(hidden_size, num_experts, top_k, score=router or "softmax", **options, **factory)


def make_shared_expert(
    given: nn.Module | None, hidden_size: int, size: int | None, activation: str, factory: dict[str, Any]
) -> nn.Module | None:
    """The module given, or a SharedExpert of this hidden size, or None without either."""
    if given is not None:
        if not isinstance(given, nn.Module):
            raise ConfigError("shared_expert", type(given).__name__, "a module, [T, D] -> [T, D], or None")
        if size is not None:
            raise ConfigError("shared_expert_size", size, "None beside a shared expert that is given")
        return given
    if size is not None:
        check_positive(shared_expert_size=size)
    return None if size is None else SharedExpert(hidden_size, size, activation, **factory)


def make_transport(
    given: Transport | None, dispatcher: Dispatcher | None, group: Any, *, timeout_s: float | None, device: Any
) -> Transport:
    """The transport given, by itself or in a dispatcher, or one for `group`."""
    if dispatcher is not None:
        if given is not None or group is not None:
            raise ConfigError("dispatcher", dispatcher, "None beside a group or a transport: it has a transport")
        return dispatcher.transport
    if group is not None and given is not None:
        raise ConfigError("transport", given, "None beside a group: give one of the two")
    return open_transport(group, timeout_s=timeout_s, device=device) if given is None else given


def make_placement(dispatcher: Dispatcher | None, num_experts: int, ranks: int) -> Placement:
    """The placement of the dispatcher given, or every expert in the slot of its number."""
    if dispatcher is None:
        return Placement.identity(num_experts, ranks)
    placement = dispatcher.placement
    if (placement.num_experts, placement.world_size) != (num_experts, ranks):
        given = f"{placement.num_experts} experts on {placement.world_size} rank(s)"
        raise ConfigError("dispatcher.placement", given, f"{num_experts} experts on {ranks} rank(s)")
    return placement


def make_experts(
    given: nn.Module | None,
    hidden_size: int,
    ffn_hidden_size: int,
    *,
    placement: Placement,
    transport: Transport,
    activation: str,
    factory: dict[str, Any],
) -> nn.Module:
    """The experts of this rank: the module given, checked against the layer, or new ones."""
    slots = placement.slots_of_rank(transport.rank)
    ids = tuple(placement.slot_to_expert[slot] for slot in slots)
    others = frozenset(transport.global_ranks) - {transport.global_ranks[transport.rank]}
    if given is None:
        given = Experts(hidden_size, ffn_hidden_size, placement.num_experts, expert_ids=ids, activation=activation,
                        **factory)  # fmt: skip
    _check_experts(given, (len(ids), hidden_size, ffn_hidden_size), ids)
    if isinstance(given, Experts):
        given.held_apart_from = others
    for name, weight in given.named_parameters():
        refuse_sharded(f"experts.{name}", weight, others)
    return given


def activation_of(experts: nn.Module | None, activation: str) -> str:
    """The activation of a layer: that of the experts given, where there are any."""
    if experts is None:
        if activation not in ACTIVATIONS:
            raise ConfigError("activation", activation, f"one of {ACTIVATIONS}")
        return activation
    if not isinstance(experts, nn.Module):
        raise ConfigError("experts", type(experts).__name__, "None or a module as moe_overlap.Experts")
    own = getattr(experts, "activation", None)
    if own not in ACTIVATIONS:
        raise ConfigError("experts.activation", own, f"one of {ACTIVATIONS}")
    if activation not in (DEFAULT_ACTIVATION, own):
        raise ConfigError("activation", activation, f"{own!r}, that of the experts given")
    return own


def factory_of(experts: nn.Module | None, device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Device and dtype of what a layer builds: as asked for, else as the experts given have them."""
    if experts is None:
        return {"device": device, "dtype": dtype}
    weight = getattr(experts, "down_proj", None)
    if not isinstance(weight, torch.Tensor):
        raise ConfigError("experts", type(experts).__name__, "a module with down_proj [e, D, F]")
    if dtype not in (None, weight.dtype):
        raise ConfigError("dtype", dtype, f"None or {weight.dtype}, that of the experts given")
    return {"device": weight.device if device is None else device, "dtype": weight.dtype}


def _check_experts(experts: nn.Module, sizes: tuple[int, int, int], ids: tuple[int, ...]) -> None:
    """Raises ConfigError for experts that are not those of this rank, or whose weights have other shapes."""
    count, hidden, ffn = sizes
    activation: str = experts.activation  # type: ignore[assignment]
    name = w_in_name(activation)
    if not isinstance(getattr(experts, name, None), torch.Tensor):
        raise ConfigError("experts", type(experts).__name__, f"a module with {name}, for activation {activation!r}")
    held = getattr(experts, "expert_ids", ids)
    if tuple(held) != ids:
        raise ConfigError("experts.expert_ids", held, f"{ids}, the experts of this rank")
    w_in, w_out = weights_of(experts)
    first = (count, w_in_rows(activation, ffn), hidden)
    for field, weight, shape in ((name, w_in, first), ("down_proj", w_out, (count, hidden, ffn))):
        if tuple(weight.shape) != shape:
            raise ConfigError(f"experts.{field}", tuple(weight.shape), str(shape))
    if (w_in.dtype, w_in.device) != (w_out.dtype, w_out.device):
        raise ConfigError("experts.down_proj", f"{w_out.dtype} on {w_out.device}", f"{w_in.dtype} on {w_in.device}")


def make_dispatcher(given: Dispatcher | None, placement: Placement, transport: Transport, **options: Any) -> Dispatcher:
    """The dispatcher given, checked against the layer, or a new one."""
    if given is None:
        return Dispatcher(transport=transport, placement=placement, **options)
    for name, value in options.items():
        if getattr(given, name) != value:
            raise ConfigError(f"dispatcher.{name}", getattr(given, name), f"{value}, as the layer has")
    return given


def make_schedule(
    schedule: str | AnySchedule,
    *,
    shared: bool,
    ranks: int,
    overlap: bool,
    max_in_flight_bytes: int | None,
) -> AnySchedule:
    """The schedule of a layer from what the caller named or gave. On one rank "auto" is serial, with the reason as its
    name."""
    verb: OpVerb = "S" if shared else "B"
    if isinstance(schedule, AutoSchedule):
        if (schedule.op_verb, schedule.num_ops) != (verb, 0):
            given = f"AutoSchedule(op_verb={schedule.op_verb!r}, num_ops={schedule.num_ops})"
            raise ConfigError("schedule", given, f"AutoSchedule(op_verb={verb!r}, num_ops=0) for this layer")
        if schedule.overlap and not overlap:
            raise ConfigError("overlap", overlap, "True beside an AutoSchedule, which has its own")
        auto = schedule
    elif schedule == "auto":
        auto = AutoSchedule(op_verb=verb, num_ops=0, overlap=overlap, max_in_flight_bytes=max_in_flight_bytes)
    else:
        pair = layer_schedule(schedule, shared=shared)
        return pair if overlap else pair.join()
    if ranks > 1:
        return auto
    pair = replace(layer_schedule("serial", shared=shared), name=ONE_RANK)
    return pair if auto.overlap else pair.join()
