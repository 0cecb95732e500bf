"""The layer without its parameters: routed rows to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from moe_overlap.agreement.record import PHASES
from moe_overlap.auto.auto import AutoSchedule, Outgrown
from moe_overlap.auto.probes import ProbeInputs
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import NOT_TRACEABLE, WEIGHTS_AT, check_choice, check_dedup, rows_dtype
from moe_overlap.layer.assembly import Rows
from moe_overlap.layer.experts import w_in_rows
from moe_overlap.layer.one_rank import one_rank
from moe_overlap.ops.activation_kinds import check_activation
from moe_overlap.ops.checks import check_transform, inside_transform
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.checks import check_zero_experts
from moe_overlap.routing.decision import Identity, RoutingDecision
from moe_overlap.routing.masks import check_token_mask
from moe_overlap.routing.zero import part_zero_experts
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.schedule.dispatch import Dispatcher, check_routing, current_phase
from moe_overlap.schedule.nodes import Keep, routing_digest
from moe_overlap.schedule.run import Step
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.base import Transport
from moe_overlap.transport.local import LocalTransport

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
INLINE = ("serial", "auto")  # on one rank, where no order is faster


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
    dedup: str = "off",
    unused_id: int | None = None,
    zero_experts: int = 0,
    token_mask: torch.Tensor | None = None,
    weights_at: str = "output",
    transport: Transport | None = None,
) -> torch.Tensor:
    """sum_k topk_weights[t, k] * expert(topk_ids[t, k])(hidden[t]) -> [T, D]. Differentiable.

    hidden_TD: [T, D] in the dtype of the expert weights, which is the result's; under autocast any floating dtype, and
    autocast's is the result's. topk_ids_TK: integer [T, K], experts 0..E-1 of the whole group, -1 = unused.
    topk_weights_TK: floating [T, K]. gate_up_proj: [e, 2F, D] ([e, F, D] for gelu and relu), down_proj: [e, D, F], this
    rank's experts (Hugging Face's layout and argument order). schedule: as in MoELayer, "auto" too, whose figures are
    kept with the transport. dedup: as in MoELayer. unused_id: another id that means unused, below 0 or from E on
    (transformers uses E). zero_experts: so many ids from E on return the token itself, which is not sent. token_mask:
    bool [T], False = padding, all of whose ids are unused. weights_at: "input": experts read weight * token, and their
    results are summed as they are (Llama4); each choice then is a row of its own before it is sent. transport: None for
    one rank; it belongs to this shape of call and to one `weights_at`, with deduplication of K too.
    For latent experts (see MoELayer) hidden_TD are the latents and D is their width: project before the call, and its
    result after it.

    Raises ConfigError for arguments that do not fit (on every rank alike), MoeTransportError and its subclasses.
    """
    check_activation("activation", activation)
    check_dedup(dedup)
    if weights_at not in WEIGHTS_AT:
        raise ConfigError("weights_at", weights_at, f"one of {WEIGHTS_AT}")
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        raise ConfigError(
            "gate_up_proj", tuple(gate_up_proj.shape), "three dimensions, [e, 2F, D], as down_proj [e, D, F]"
        )
    check_zero_experts(zero_experts)
    call = _Call(hidden_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, activation, unused_id, zero_experts,
                 token_mask, weights_at)  # fmt: skip
    run = _forward if weights_at == "output" else _weights_at_input
    return run(call, schedule, overlap, dedup, transport)


def _forward(
    call: _Call, schedule: str | SchedulePair, overlap: bool, dedup: str, transport: Transport | None
) -> torch.Tensor:
    if (transport is None or transport.name == "local") and schedule in INLINE:
        return _inline(call)
    return _scheduled(call, schedule, overlap, dedup, transport or LocalTransport())


def _weights_at_input(
    call: _Call, schedule: str | SchedulePair, overlap: bool, dedup: str, transport: Transport | None
) -> torch.Tensor:
    """`_forward` whose rows are weight * token: one for each choice, so that each has one expert and weight 1."""
    if call.zero_experts:
        raise ConfigError("zero_experts", call.zero_experts, '0 beside weights_at="input": they return weight * token')
    given = x_TD, ids_TK, weights_TK = call.x_TD, call.ids_TK, call.weights_TK
    if not all(isinstance(one, torch.Tensor) and one.dim() == 2 for one in given) or not (
        x_TD.shape[0] == ids_TK.shape[0] and ids_TK.shape == weights_TK.shape
    ):
        return _forward(call, schedule, overlap, dedup, transport)  # refuses, on all ranks alike
    call.x_TD = (x_TD[:, None] * weights_TK[:, :, None].to(x_TD.dtype)).flatten(0, 1)
    call.ids_TK = ids_TK.reshape(-1, 1)
    call.weights_TK = torch.ones(call.x_TD.shape[0], 1, dtype=torch.float32, device=x_TD.device)
    if isinstance(call.token_mask, torch.Tensor):
        call.token_mask = call.token_mask.repeat_interleave(ids_TK.shape[1], dim=0)
    y = _forward(call, schedule, overlap, dedup, transport)
    return y.view(*ids_TK.shape, y.shape[1]).sum(dim=1)


@dataclass
class _Call:
    """The arguments of one call; `fit` casts them and says what does not fit."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    activation: str
    unused_id: int | None
    zero_experts: int
    token_mask: torch.Tensor | None
    weights_at: str
    identity: Identity | None = None

    def fit(self, num_experts: int, *, inline: bool) -> None:
        """Raises ConfigError; after this, all are of the dtypes that rows, routing and weights have. Ids stay as given:
        a cast could bring one back into the range."""
        check_transform(inline=inline)
        for name, value in (("x", self.x_TD), ("topk_ids", self.ids_TK), ("topk_weights", self.weights_TK)):
            if not isinstance(value, torch.Tensor):
                raise ConfigError(name, type(value).__name__, "a tensor")
        experts, hidden, ffn = self.w_out.shape
        first = (experts, w_in_rows(self.activation, ffn), hidden)
        if tuple(self.w_in.shape) != first:
            raise ConfigError(
                "gate_up_proj", tuple(self.w_in.shape), f"{first} beside down_proj {(*self.w_out.shape,)}"
            )
        if self.w_out.dtype != self.w_in.dtype or self.w_out.device != self.w_in.device:
            given, expected = (f"{w.dtype} on {w.device}" for w in (self.w_out, self.w_in))
            raise ConfigError("down_proj", given, expected)
        if self.x_TD.dim() != 2:
            raise ConfigError("x", tuple(self.x_TD.shape), f"a tensor [T, D] with D = {hidden}")
        dtype = rows_dtype(self.x_TD, self.w_out, hidden)
        if self.ids_TK.dtype not in ID_DTYPES:
            raise ConfigError("topk_ids", str(self.ids_TK.dtype), f"integers, one of {ID_DTYPES}")
        if not self.weights_TK.dtype.is_floating_point:
            raise ConfigError("topk_weights", str(self.weights_TK.dtype), "a floating-point dtype")
        self.weights_TK = self.weights_TK.to(torch.float64 if self.x_TD.dtype == torch.float64 else torch.float32)
        check_routing(self.ids_TK, self.weights_TK, self.x_TD, dtypes=ID_DTYPES)
        if self.unused_id is not None:
            known = num_experts + self.zero_experts
            if not isinstance(self.unused_id, int) or 0 <= self.unused_id < known:
                raise ConfigError("unused_id", self.unused_id, f"None, or an integer below 0 or from {known} on")
            self.ids_TK = self.ids_TK.to(torch.int64)  # which can hold any `unused_id`
            self.ids_TK = self.ids_TK.masked_fill(self.ids_TK == self.unused_id, -1)
        self._leave_out(num_experts)
        self.x_TD, self.w_in, self.w_out = self.x_TD.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)

    def _leave_out(self, num_experts: int) -> None:
        """Padding and zero-computation experts become unused slots; what the latter return is `identity`."""
        mask_T = check_token_mask(self.token_mask, self.x_TD)
        if mask_T is not None:
            self.ids_TK = self.ids_TK.masked_fill(~mask_T[:, None], -1)
            self.weights_TK = self.weights_TK.masked_fill(~mask_T[:, None], 0.0)
        if self.zero_experts:
            self.ids_TK, self.weights_TK, self.identity = part_zero_experts(
                self.ids_TK, self.weights_TK, self.x_TD, num_experts, self.zero_experts
            )


def _inline(call: _Call) -> torch.Tensor:
    experts = call.w_out.shape[0]
    call.fit(experts, inline=True)
    check_choice(call.ids_TK, experts)
    ids_TK = call.ids_TK.to(torch.int32)
    y_TD, slot_to_row = one_rank(call.x_TD, ids_TK, call.weights_TK, call.w_in, call.w_out, call.activation)
    y_TD = y_TD if call.identity is None else call.identity.added_to(y_TD)
    if y_TD.requires_grad and not torch.compiler.is_compiling():
        current_phase()  # refuses a reentrant checkpoint
        digest = None if inside_transform() else routing_digest(slot_to_row)
        y_TD = Keep.apply(y_TD, digest, None, y_TD.shape)
    return y_TD


@dataclass(eq=False)
class _Calls:
    """What the calls on one transport share: the count of their steps, and the figures of "auto"."""

    dispatcher: Dispatcher
    autos: dict[tuple[bool, str], AutoSchedule] = field(default_factory=dict)  # by overlap and dedup
    outgrown: Outgrown = field(default_factory=Outgrown)


_CALLS = "_moe_forward_calls"  # an attribute of the transport, with which it ends


def _top_k(call: _Call, transport: Transport) -> int:
    """How wide the metadata of deduplicated rows are, which all ranks have to agree on. Of ids that are refused later
    on, as in the call before, so that the transport is not opened for another configuration."""
    ids = call.ids_TK
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        return ids.shape[1]
    calls: _Calls | None = getattr(transport, _CALLS, None)
    return 0 if calls is None else calls.dispatcher.top_k


@torch.compiler.disable(reason=NOT_TRACEABLE)
def _scheduled(
    call: _Call, schedule: str | SchedulePair, overlap: bool, dedup: str, transport: Transport
) -> torch.Tensor:
    experts = call.w_in.shape[0] * transport.world_size
    dedup = dedup if transport.world_size > 1 else "off"
    dispatcher = Dispatcher(
        transport=transport,
        placement=Placement.identity(experts, transport.world_size),
        hidden=call.w_in.shape[2],
        ffn_hidden=call.w_out.shape[2],
        top_k=_top_k(call, transport) if dedup != "off" else 0,  # any: it may differ from call to call
        activation=call.activation,
        dtype=call.w_in.dtype,
        dedup=int(dedup != "off"),
        weights_at=call.weights_at,
    )
    calls: _Calls | None = getattr(transport, _CALLS, None)
    if calls is None or calls.dispatcher.header != dispatcher.header:
        calls = _Calls(dispatcher)
        setattr(transport, _CALLS, calls)
    dispatcher = calls.dispatcher
    known: Schedules
    if schedule == "auto":
        auto = AutoSchedule(op_verb="B", num_ops=0, overlap=overlap, dedup=dedup)
        auto = calls.autos.setdefault((overlap, dedup), auto)
        known = auto.unplanned
    else:
        rows = Rows(dedup=dedup, ranks_per_node=0, hierarchical=False)
        pair = rows.pair(layer_schedule(schedule, shared=False))
        known = pair if overlap else pair.join()
    try:
        phase = current_phase()
        call.fit(experts, inline=False)
    except BaseException as error:
        dispatcher.refuse(error, known)
    if schedule == "auto":
        known = _planned(auto, calls, call, phase)
    try:
        weights = ExpertWeights(w_in=call.w_in.detach(), w_out=call.w_out.detach(), kind=call.activation)
        step = Step(transport, weights, phase=PHASES[phase])
        x_TD, *x_identity = step.enter(call.x_TD, call.w_in, call.w_out, copies=1 + (call.identity is not None))
    except BaseException as error:
        dispatcher.refuse(error, known)
    with step.releasing_on_error():
        step.ask(known, dispatcher, dispatcher.begin(call.ids_TK, x_TD, known))
        step.give(x_TD, call.ids_TK.to(torch.int32), call.weights_TK)
    y_TD = step.run()
    if phase == 0:
        calls.outgrown.note(step)
    return y_TD if call.identity is None else replace(call.identity, x_TD=x_identity[0]).added_to(y_TD)


def _planned(auto: AutoSchedule, calls: _Calls, call: _Call, phase: int) -> Schedules:
    """What the coming step of "auto" runs; the first one calibrates, on its own tokens."""
    dispatcher = calls.dispatcher
    dispatcher.open()
    found = auto.get(dispatcher.openings, call.w_out.dtype)
    if found is not None and (phase > 0 or found not in calls.outgrown):
        return found
    status = torch.zeros(1, dtype=torch.int32, device=call.x_TD.device)
    given = RoutingDecision(topk_ids_TK=call.ids_TK.to(torch.int32), topk_weights_TK=call.weights_TK, status=status,
                            tokens_per_expert_E=status, dropped_tokens=status)  # fmt: skip
    inputs = ProbeInputs(dispatcher=dispatcher, router=lambda _: given, x_TD=call.x_TD, w_in=call.w_in,
                         w_out=call.w_out)  # fmt: skip
    return auto.calibrate(inputs, old=found, waiting=calls.outgrown.waiting)
