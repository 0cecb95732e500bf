"""The parts that a layer is assembled from: each one given by the caller and checked, or built here."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.record import DTYPES
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.auto import ONE_RANK, AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.layer.experts import Experts, check_weights, w_in_name, weights_of
from moe_overlap.layer.shared_expert import SharedExpert
from moe_overlap.ops.activation_kinds import check_activation
from moe_overlap.ops.devices import check_device
from moe_overlap.parallel.optimizers import guard_optimizers
from moe_overlap.parallel.ownership import Ownership, refuse_sharded
from moe_overlap.parallel.replicas import Replicas, check_replicas, replicas_of
from moe_overlap.placement.placement import Placement
from moe_overlap.planning.window import OpVerb
from moe_overlap.routing.checks import SCORES
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.builders import SchedulePair, deduplicate, split_own
from moe_overlap.schedule.check import check_over_gateways, layer_schedule
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.static_dispatch import StaticDispatcher
from moe_overlap.transport.base import Transport
from moe_overlap.transport.host_link import HostLink
from moe_overlap.transport.link import NodeTopology
from moe_overlap.transport.opening import open_transport

ROUTER_DEFAULTS = {"capacity_factor": None, "aux_loss_coef": 0.0, "z_loss_coef": 0.0, "balance": "micro",
                   "bad_logits": "raise"}  # fmt: skip
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
        for name, value in options.items():
            default = ROUTER_DEFAULTS.get(name)
            if value != default:
                raise ConfigError(name, value, f"{default!r} beside a router module, which has its own")
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if getattr(router, name, value) != value:
                raise ConfigError(name, value, f"the {name} of the router module, {getattr(router, name)}")
        return router
    if router is not None and not isinstance(router, str):
        raise ConfigError("router", type(router).__name__, "None, a score, or a module that returns a RoutingDecision")
    if router is not None and router not in SCORES:
        expected = f"a score ({', '.join(SCORES)}), or a module of moe_overlap.routing, such as a LocMoERouter"
        raise ConfigError("router", router, expected)
    known = signature(LinearRouter).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"MoELayer() got an unexpected keyword argument {name!r}, which LinearRouter lacks too")
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
    return None if size is None else SharedExpert(hidden_size, size, activation, **factory)


def make_transport(
    given: Transport | None,
    dispatcher: Dispatcher | None,
    group: Any,
    replicate_group: Any,
    *,
    timeout_s: float | None,
    device: Any,
    experts_device: Any,
) -> tuple[Transport, Replicas | None]:
    """The transport given, by itself or in a dispatcher, or one for `group`; and the replicas of `replicate_group`, or
    of the first dimension of a two-dimensional `group`, which reduce on the device of the experts' gradients."""
    if getattr(group, "ndim", 1) == 2:
        names = group.mesh_dim_names or ("", "")
        if names[0] in ("ep", "expert", "experts") or names[1] in ("dp", "replica", "replicas"):
            raise ConfigError("group", f"a mesh {names}", "replicas first, and experts second")
        if replicate_group is not None:
            raise ConfigError("replicate_group", replicate_group, "None beside a two-dimensional mesh, which has it")
        replicate_group, group = group.get_group(0), group.get_group(1)
    transport = _expert_transport(given, dispatcher, group, timeout_s=timeout_s, device=device)
    if replicate_group is None:
        return transport, None
    replicas = replicas_of(replicate_group, timeout_s=timeout_s, device=experts_device)
    on_host = experts_device is not None and torch.device(experts_device).type == "cpu"
    if replicas is not None and on_host and getattr(replicas.transport, "device", torch.device("cpu")).type != "cpu":
        expected = 'one that reduces on the host: with gloo ("cpu:gloo,cuda:nccl"), and for no experts on a GPU'
        raise ConfigError("replicate_group", "a group for gradients on a GPU", expected)
    if replicas is not None and transport.world_size > 1:
        check_replicas(replicas.transport, transport.global_ranks)
    return transport, replicas


def _expert_transport(
    given: Transport | None, dispatcher: Dispatcher | None, group: Any, *, timeout_s: float | None, device: Any
) -> Transport:
    if dispatcher is not None:
        if not isinstance(dispatcher, Dispatcher):
            raise ConfigError("dispatcher", type(dispatcher).__name__, "None or a Dispatcher")
        if given is not None or group is not None:
            raise ConfigError("dispatcher", dispatcher, "None beside a group or a transport: it has a transport")
        return dispatcher.transport
    if group is not None and given is not None:
        raise ConfigError("transport", given, "None beside a group: give one of the two")
    if given is not None and not isinstance(given, Transport):
        raise ConfigError("transport", type(given).__name__, "None or a Transport")
    return open_transport(group, timeout_s=timeout_s, device=device) if given is None else given


def make_placement(dispatcher: Dispatcher | None, given: Placement | None, num_experts: int, ranks: int) -> Placement:
    """The placement given, by itself or in a dispatcher, or every expert in the slot of its number."""
    if dispatcher is not None and given is not None:
        raise ConfigError("placement", given, "None beside a dispatcher, which has one")
    placement = dispatcher.placement if dispatcher is not None else given
    if placement is None:
        return Placement.identity(num_experts, ranks)
    if not isinstance(placement, Placement):
        raise ConfigError("placement", type(placement).__name__, "None or a moe_overlap.placement.Placement")
    field = "placement" if dispatcher is None else "dispatcher.placement"
    if (placement.num_experts, placement.world_size) != (num_experts, ranks):
        text = f"{placement.num_experts} experts on {placement.world_size} rank(s)"
        raise ConfigError(field, text, f"{num_experts} experts on {ranks} rank(s)")
    if ranks == 1 and placement.has_replicas:
        raise ConfigError(field, "several slots of an expert on one rank", "one of each: a copy is for another rank")
    return placement


def make_experts(
    given: nn.Module | None,
    hidden_size: int,
    ffn_hidden_size: int,
    *,
    ownership: Ownership,
    activation: str,
    factory: dict[str, Any],
) -> nn.Module:
    """The experts of this rank: the module given, checked against the layer, or new ones."""
    ids, others = ownership.expert_ids, ownership.others
    if given is not None:
        _refuse_unread(given, w_in_name(activation))
    else:
        given = Experts(hidden_size, ffn_hidden_size, ownership.num_experts, expert_ids=ids, activation=activation,
                        **factory)  # fmt: skip
    name = w_in_name(activation)
    if not isinstance(getattr(given, name, None), torch.Tensor):
        raise ConfigError("experts", type(given).__name__, f"a module with {name}, for activation {activation!r}")
    held = getattr(given, "expert_ids", None)
    if held is not None and tuple(held) != ids:
        raise ConfigError("experts.expert_ids", held, f"{ids}, the experts of this rank")
    check_weights(*weights_of(given), activation, count=len(ids), hidden=hidden_size, ffn=ffn_hidden_size)
    if isinstance(given, Experts):
        given.held_apart_from = others
    for name, weight in given.named_parameters():
        refuse_sharded(f"experts.{name}", weight, others)
    return given


def _refuse_unread(experts: nn.Module, w_in: str) -> None:
    """Raises ConfigError for weights beside the two that a layer reads, such as biases; warns of an own forward."""
    plain = set(experts._parameters)
    unread = plain - {w_in, "down_proj"}
    if {w_in, "down_proj"} <= plain and unread:  # else the two may be made of the others
        raise ConfigError("experts", f"a module with {', '.join(sorted(unread))}", f"only {w_in} and down_proj")
    if isinstance(experts, Experts) and type(experts).forward is not Experts.forward:
        text = f"{type(experts).__name__} has a forward of its own, which a MoELayer never calls"
        warnings.warn(f"{text}: it reads the weights and the activation", stacklevel=4)


def make_ownership(placement: Placement, transport: Transport, replicas: Replicas | None, group: Any) -> Ownership:
    """What the experts of this rank are to the other ranks."""
    seats = seats_of(placement)
    guard_optimizers()
    mesh = group if getattr(group, "ndim", 1) == 2 else None
    return Ownership(
        transport=transport, expert_ids=seats.homes[transport.rank], num_experts=placement.num_experts,
        in_order=seats.homes_in_order, replicas=replicas, mesh=mesh,
    )  # fmt: skip


def activation_of(experts: nn.Module | None, activation: str | None) -> str:
    """The activation of a layer: that of the experts given, where there are any, else as asked for, else "swiglu"."""
    if experts is None:
        activation = activation or DEFAULT_ACTIVATION
        check_activation("activation", activation)
        return activation
    if not isinstance(experts, nn.Module):
        raise ConfigError("experts", type(experts).__name__, "None or a module as moe_overlap.Experts")
    own: Any = getattr(experts, "activation", None)
    check_activation("experts.activation", own)
    if activation not in (None, own):
        raise ConfigError("activation", activation, f"{own!r}, that of the experts given")
    return own


def factory_of(experts: nn.Module | None, device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Device and dtype of what a layer builds: as asked for, else as the experts given have them."""
    check_device(device)
    if experts is None:
        return {"device": device, "dtype": dtype}
    weight = getattr(experts, "down_proj", None)
    if not isinstance(weight, torch.Tensor):
        raise ConfigError("experts", type(experts).__name__, "a module with down_proj [e, D, F]")
    if dtype not in (None, weight.dtype):
        raise ConfigError("dtype", dtype, f"None or {weight.dtype}, that of the experts given")
    if weight.dtype not in DTYPES:
        raise ConfigError("experts.down_proj", weight.dtype, f"one of {DTYPES}")
    if device is not None and torch.empty(0, device=device).device != weight.device:
        raise ConfigError("device", device, f"None or {weight.device}, that of the experts given")
    return {"device": weight.device, "dtype": weight.dtype}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the rows of a layer go to other ranks: `dedup` as the layer's ("off" on one rank), `ranks_per_node` (0: not
    known), and whether one row for each (token, node) crosses nodes."""

    dedup: str
    ranks_per_node: int
    hierarchical: bool

    def pair(self, pair: SchedulePair) -> SchedulePair:
        """The pair as it runs; with dedup "auto" it becomes another one in the steps in which that pays."""
        if pair.deduplicated and self.dedup == "off":
            raise ConfigError("schedule", pair.forward.text, 'one without M and O, or dedup="on" on several ranks')
        if self.dedup != "off":
            deduplicate(pair)  # refuses what no step could deduplicate
        if self.hierarchical:
            check_over_gateways(pair)
        if self.dedup != "on" or pair.deduplicated:
            return pair
        return split_own(deduplicate(pair))


def make_rows(transport: Transport, dedup: str, ranks_per_node: int | None, hierarchical: bool) -> Rows:
    """From a layer's arguments and what its transport knows of nodes. Raises ConfigError for what does not go together;
    where all ranks or none share a node, hierarchical exchanges are the direct ones."""
    known = getattr(transport, "topology", None)
    if ranks_per_node is None:
        ranks_per_node = 0 if known is None else known.ranks_per_node
    else:
        ranks_per_node = NodeTopology(world_size=transport.world_size, ranks_per_node=ranks_per_node).ranks_per_node
    if known is not None and ranks_per_node != known.ranks_per_node:
        raise ConfigError("ranks_per_node", ranks_per_node, f"None or {known.ranks_per_node}, as the transport has")
    if hierarchical not in (False, True):
        raise ConfigError("hierarchical", hierarchical, "False or True")
    if hierarchical and dedup == "off":
        raise ConfigError("hierarchical", hierarchical, 'False, or dedup="on" or "auto" beside it')
    if hierarchical and not ranks_per_node:
        raise ConfigError("ranks_per_node", None, "the ranks of a node, with hierarchical exchanges")
    several = 1 < ranks_per_node < transport.world_size
    dedup = dedup if transport.world_size > 1 else "off"
    return Rows(dedup=dedup, ranks_per_node=ranks_per_node, hierarchical=bool(hierarchical) and several)


def make_dispatcher(
    given: Dispatcher | None,
    placement: Placement,
    transport: Transport,
    bad_logits: str,
    rows: Rows,
    static: dict[str, Any],
    **options: Any,
) -> Dispatcher:
    """The dispatcher given, checked against the layer, or a new one; static: see `static_options`."""
    options["dedup"] = int(rows.dedup != "off")
    options |= {"ranks_per_node": rows.ranks_per_node, "hierarchical": rows.hierarchical}
    seats = seats_of(placement)
    if static and (seats.has_copies or not seats.are_slots):
        raise ConfigError("mode", "static", "'host' beside copies of experts, or other numbers of slots on the ranks")
    if rows.hierarchical and seats.has_copies:
        raise ConfigError("hierarchical", True, "False beside copies of experts")
    if given is None:
        made = StaticDispatcher if static else Dispatcher
        return made(transport=transport, placement=placement, bad_logits=bad_logits, caller=transport.join(),
                    **static, **options)  # fmt: skip
    if not rows.hierarchical:
        del options["ranks_per_node"]  # it may know more of that
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
    rows: Rows,
    max_in_flight_bytes: int | None,
    plans: bool,
    link: HostLink | None,
) -> AnySchedule:
    """The schedule of a layer from what the caller named or gave. Where there is nothing to plan (one rank without a
    wire, experts on the device), "auto" is serial, with the reason as its name. link: of experts in host memory."""
    verb: OpVerb = "S" if shared else "B"
    if isinstance(schedule, AutoSchedule):
        if (schedule.op_verb, schedule.num_ops) != (verb, 0):
            given = f"AutoSchedule(op_verb={schedule.op_verb!r}, num_ops={schedule.num_ops})"
            raise ConfigError("schedule", given, f"AutoSchedule(op_verb={verb!r}, num_ops=0) for this layer")
        if not 0 <= schedule.num_ahead <= shared:
            raise ConfigError("schedule.num_ahead", schedule.num_ahead, f"at most the {int(shared)} shared experts")
        if ranks == 1:
            schedule.dedup = "off"
        if schedule.dedup != rows.dedup:
            raise ConfigError("dedup", rows.dedup, f"{schedule.dedup!r} beside this AutoSchedule, which has its own")
        if schedule.overlap and not overlap:
            raise ConfigError("overlap", overlap, "True beside an AutoSchedule, which has its own")
        if schedule.taken:
            raise ConfigError("schedule", "an AutoSchedule of another layer", "one for each layer: it keeps the costs")
        schedule.taken, schedule.offload = True, link is not None
        auto = schedule
    elif schedule == "auto":
        auto = AutoSchedule(op_verb=verb, num_ops=0, overlap=overlap, dedup=rows.dedup,
                            max_in_flight_bytes=max_in_flight_bytes, offload=link is not None)  # fmt: skip
    else:
        pair = rows.pair(layer_schedule(schedule, shared=shared))
        return pair if overlap else pair.join()
    if plans:
        return auto
    pair = replace(layer_schedule("serial", shared=shared), name=ONE_RANK)
    return pair if auto.overlap else pair.join()
