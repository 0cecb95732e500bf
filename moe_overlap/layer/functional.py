"""The layer without its parameters: routed rows to their experts and back."""

from __future__ import annotations

import torch

from moe_overlap.agreement.record import PHASES
from moe_overlap.errors import ConfigError
from moe_overlap.layer.experts import w_in_rows
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.schedule.dispatch import ACTIVATIONS, Dispatcher, check_routing, current_phase
from moe_overlap.schedule.rows import ExpertWeights
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport
from moe_overlap.transport.local import LocalTransport

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)


def moe_forward(
    hidden_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    activation: str = "swiglu",
    schedule: str | SchedulePair = "serial",
    overlap: bool = True,
    transport: Transport | None = None,
) -> torch.Tensor:
    """sum_k topk_weights[t, k] * expert(topk_ids[t, k])(hidden[t]) -> [T, D], in hidden's dtype. Differentiable.

    hidden_TD: [T, D]. topk_ids_TK: integer [T, K], experts 0..E-1 of the whole group, -1 = unused. topk_weights_TK:
    floating [T, K]. gate_up_proj: [e, 2F, D] ([e, F, D] for gelu and relu), down_proj: [e, D, F], this rank's experts
    (Hugging Face's layout and argument order). transport: None for one rank; it belongs to this shape of call.

    Raises ConfigError for arguments that do not fit (on every rank alike), MoeTransportError and its subclasses.
    """
    transport = transport or LocalTransport()
    pair = layer_schedule(schedule, shared=False)
    pair = pair if overlap else pair.join()
    if activation not in ACTIVATIONS:
        raise ConfigError("activation", activation, f"one of {ACTIVATIONS}")
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        raise ConfigError(
            "gate_up_proj", tuple(gate_up_proj.shape), "three dimensions, [e, 2F, D], as down_proj [e, D, F]"
        )
    dispatcher = Dispatcher(
        transport=transport,
        placement=Placement.identity(gate_up_proj.shape[0] * transport.world_size, transport.world_size),
        hidden=gate_up_proj.shape[2],
        ffn_hidden=down_proj.shape[2],
        top_k=0,  # any: it may differ from call to call
        activation=activation,
        dtype=gate_up_proj.dtype,
        steps=transport.stats.agreements,
    )
    try:
        _check(hidden_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, activation)
        weights = ExpertWeights(w_in=gate_up_proj.detach(), w_out=down_proj.detach(), kind=activation)
        step = Step(transport, weights, phase=PHASES[current_phase()])
        (x_TD,) = step.enter(hidden_TD, gate_up_proj, down_proj, copies=1)
    except BaseException as error:
        dispatcher.refuse(error, pair)
    exchange = dispatcher.plan(topk_ids_TK, x_TD, pair)  # the ids as given: a cast could bring one back into the range
    slots_TK = topk_ids_TK.to(torch.int32)
    accumulate = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    step.bind(pair, exchange, x_TD, slots_TK, topk_weights_TK.to(accumulate))
    return step.run()


def _check(
    hidden_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    activation: str,
) -> None:
    for name, value in (("x", hidden_TD), ("topk_ids", topk_ids_TK), ("topk_weights", topk_weights_TK)):
        if not isinstance(value, torch.Tensor):
            raise ConfigError(name, type(value).__name__, "a tensor")
    experts, hidden, ffn = w_out.shape
    first = (experts, w_in_rows(activation, ffn), hidden)
    if tuple(w_in.shape) != first:
        raise ConfigError("gate_up_proj", tuple(w_in.shape), f"{first} beside down_proj {tuple(w_out.shape)}")
    if w_out.dtype != w_in.dtype or w_out.device != w_in.device:
        raise ConfigError("down_proj", f"{w_out.dtype} on {w_out.device}", f"{w_in.dtype} on {w_in.device}")
    if hidden_TD.dim() != 2:
        raise ConfigError("x", tuple(hidden_TD.shape), f"a tensor [T, D] with D = {hidden}")
    if hidden_TD.shape[1] != hidden:
        raise ConfigError("x.shape[-1]", hidden_TD.shape[-1], f"a tensor [T, D] with D = {hidden}")
    if hidden_TD.dtype != w_in.dtype:
        raise ConfigError("x.dtype", hidden_TD.dtype, f"the dtype of the expert weights, {w_in.dtype}")
    if hidden_TD.device != w_in.device:
        raise ConfigError("x.device", hidden_TD.device, f"the device of the expert weights, {w_in.device}")
    if topk_ids_TK.dtype not in ID_DTYPES:
        raise ConfigError("topk_ids", str(topk_ids_TK.dtype), f"integers, one of {ID_DTYPES}")
    if not topk_weights_TK.dtype.is_floating_point:
        raise ConfigError("topk_weights", str(topk_weights_TK.dtype), "a floating-point dtype")
    accumulate = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    check_routing(topk_ids_TK.to(torch.int32), topk_weights_TK.to(accumulate), hidden_TD)
