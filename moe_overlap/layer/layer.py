"""The layer: router -> plan -> schedule -> y. This file is the table of contents of the library.

Letters: T tokens on this rank, D hidden size, F expert hidden size, E experts, K experts per token, e experts here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.record import PHASES
from moe_overlap.auto.auto import ONE_RANK, AutoSchedule, Op, Outgrown
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import check_budget, check_sizes, make_router, refuse_sharded, shaped
from moe_overlap.layer.explain import explain
from moe_overlap.layer.stats import LastStep, LayerStats, layer_stats
from moe_overlap.layer.tickets import Ticket, Tickets
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.check import layer_schedule
from moe_overlap.schedule.dispatch import ACTIVATIONS, Dispatcher, check_routing, current_phase
from moe_overlap.schedule.nodes import Attach, SameRouting
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.rows import ExpertWeights
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport
from moe_overlap.transport.opening import open_transport


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """Backbone ops that run beside a layer's exchanges, their input, and the schedules that order both."""

    hidden: torch.Tensor
    schedule: SchedulePair | AutoSchedule
    backbone: Sequence[Op]


class SharedExpert(nn.Module):
    """The dense FFN that every token passes: gate_up_proj/up_proj [2F or F, D], down_proj [D, F]."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, activation: str, **factory: Any) -> None:
        super().__init__()
        rows = ffn_hidden_size * (2 if activation == "swiglu" else 1)
        self.activation = activation
        self.up = nn.Linear(hidden_size, rows, bias=False, **factory)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False, **factory)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(ops.activation(self.up(x_TD), kind=self.activation))


class MoELayer(Tickets, nn.Module):
    """A Mixture-of-Experts layer whose experts lie spread over the ranks of a group.

    hidden_size D; ffn_hidden_size F; num_experts E in total (not per rank), a multiple of the ranks; top_k K.
    group: None (one rank, no collective), a ProcessGroup or a one-dimensional DeviceMesh; or `transport` instead.
    schedule: "serial", "chunked(r)", "chunked(r,experts)" with r from 1 to 16, "shared_expert", a SchedulePair, or
    "auto": the first forward call measures (at most 20 s, or six steps where these take longer; kept in a cache), then
    the fastest one found runs, of those whose exchanges under way hold at most max_in_flight_bytes on a rank.
    overlap=False: the same schedule with every exchange joined right after its start; equal results, bit for bit.
    router: None or a score ("softmax", "topk_softmax", "sigmoid") for a LinearRouter, or a module with its contract.
    activation: "swiglu", "gelu" or "relu". shared_expert_size: hidden size of a shared expert, or None.
    capacity_factor, aux_loss_coef, z_loss_coef, bad_logits: see LinearRouter (refused beside a router module).
    mode: "host" (exact row counts, read by the host once a step); "static" (fixed buffers) is not there yet.

    Parameters, Hugging Face layout, this rank's experts only: gate_up_proj [e, 2F, D] (up_proj [e, F, D] without a
    gate) and down_proj [e, D, F]. forward(x [..., D]) -> one tensor of x's shape; dtype of the weights, or autocast's.

    Gradient convention: an expert's gradient is the sum over all ranks' tokens; `ignore_experts_for_ddp` divides it by
    the number of ranks, which is what DDP does to every other parameter.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        group: Any = None,
        schedule: str | SchedulePair = "serial",
        overlap: bool = True,
        max_in_flight_bytes: int | None = None,
        router: str | nn.Module | None = None,
        activation: str = "swiglu",
        shared_expert_size: int | None = None,
        capacity_factor: float | None = None,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        bad_logits: str = "raise",
        transport: Transport | None = None,
        mode: str = "host",
        timeout_s: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, ffn_hidden_size, num_experts, top_k, shared_expert_size, dtype)
        if activation not in ACTIVATIONS:
            raise ConfigError("activation", activation, f"one of {ACTIVATIONS}")
        if mode == "static":
            raise NotImplementedError('mode="static": exchanges of fixed capacity, which the host does not read')
        if mode != "host":
            raise ConfigError("mode", mode, "'host' (or 'static', once it exists)")
        check_budget(max_in_flight_bytes, schedule)
        if group is not None and transport is not None:
            raise ConfigError("transport", transport, "None beside a group: give one of the two")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {
            "capacity_factor": capacity_factor,
            "aux_loss_coef": aux_loss_coef,
            "z_loss_coef": z_loss_coef,
            "bad_logits": bad_logits,
        }
        self.router = make_router(router, hidden_size, num_experts, top_k, options, factory)
        self.shared_expert: nn.Module | None = None
        if shared_expert_size is not None:
            self.shared_expert = SharedExpert(hidden_size, shared_expert_size, activation, **factory)
        if transport is None:
            transport = open_transport(group, timeout_s=timeout_s, device=device)
        self.transport = transport
        shared = shared_expert_size is not None
        self.schedule: SchedulePair | AutoSchedule
        if schedule == "auto" and transport.world_size > 1:
            self.schedule = AutoSchedule(op_verb="S" if shared else "B", num_ops=0, overlap=overlap,
                                         max_in_flight_bytes=max_in_flight_bytes)  # fmt: skip
        else:
            pair = layer_schedule("serial" if schedule == "auto" else schedule, shared=shared)
            pair = replace(pair, name=ONE_RANK) if schedule == "auto" else pair
            self.schedule = pair if overlap else pair.join()
        self.dispatcher = Dispatcher(
            transport=transport,
            placement=Placement.identity(num_experts, transport.world_size),
            hidden=hidden_size,
            ffn_hidden=ffn_hidden_size,
            top_k=top_k,
            activation=activation,
            dtype=dtype or torch.get_default_dtype(),
            bad_logits=bad_logits,
        )
        self.expert_grad_scale = 1.0
        self._make_experts(factory)
        self._last_step: LastStep | None = None
        self._aux_loss: torch.Tensor | None = None
        self._tail: torch.Tensor | None = None
        self._ticket: weakref.ref[Ticket] | None = None
        self._outgrown = Outgrown()

    # ---------------------------------------------------------------- the layer as a sentence

    def forward(self, x: torch.Tensor, beside: Beside | None = None) -> Any:
        """x: [..., D] of this rank's tokens (any number, zero included) -> y of the same shape.

        With `beside`, which is ShortcutBlock's, backbone ops run beside the exchanges: (their result, y).
        Raises ConfigError (bad argument, bad logits; on every rank alike), MoeTransportError and its subclasses.
        """
        if beside is not None:
            return self._forward_beside(x, beside)
        return self._forward_one_rank(x) if self._runs_inline else self._forward_scheduled(x)

    @torch.compiler.disable(reason="exchanges and the order of backward are not traceable: one graph break")
    def _forward_scheduled(self, x: torch.Tensor) -> torch.Tensor:
        """The sentence: route and agree, run the schedule, add the shared expert."""
        step, routing, x_shared = self._begin(x, self._schedules(self.schedule, x))
        y_TD = step.run(shared=lambda: self._shared(x_shared))
        self._end(step, routing, y_TD)
        shared_TD = step.take_shared()
        return shaped(y_TD if shared_TD is None else y_TD + shared_TD, x.shape)

    @torch.compiler.disable(reason="exchanges and the order of backward are not traceable: one graph break")
    def _forward_beside(self, x: torch.Tensor, beside: Beside) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with backbone ops: part of the layer's own call, so that hooks and wrappers of the layer see it."""
        step, routing, _ = self._begin(x, self._schedules(beside.schedule, x, beside.backbone, beside.hidden))
        step.hidden = beside.hidden
        y_TD = step.run(backbone=beside.backbone)
        self._end(step, routing, y_TD)
        return step.take_hidden(), shaped(y_TD, x.shape)

    def _schedules(
        self,
        schedule: SchedulePair | AutoSchedule,
        x: torch.Tensor,
        backbone: Sequence[Op] = (),
        h: torch.Tensor | None = None,
    ) -> Schedules:
        """What the coming step runs. The first step of "auto" calibrates, on its own tokens and with its own ops."""
        if not isinstance(schedule, AutoSchedule):
            return schedule
        self.dispatcher.open()
        try:
            phase = current_phase()  # refuses a checkpoint that would calibrate in backward
            x_TD, dtype = self._checked(x)
        except Exception as error:
            self.dispatcher.refuse(error, schedule.unplanned)
        found = schedule.get(self.dispatcher.openings, dtype)
        if found is not None and (phase > 0 or found not in self._outgrown):
            return found
        if found is not None and torch.is_grad_enabled():
            self._tail = None  # the last call's, which this one follows: without it that call may be seen to be over
        return schedule.calibrate(self, x_TD, dtype, backbone, h, old=found, waiting=self._outgrown.waiting)

    def _begin(self, x: torch.Tensor, schedule: Schedules) -> tuple[Step, RoutingDecision, torch.Tensor]:
        """Route and agree: up to the point where the schedule can run."""
        try:
            x_TD, dtype = self._checked(x)
            w_in, w_out = (w.to(dtype) for w in self.expert_weights)
            step = Step(
                self.transport,
                ExpertWeights(
                    w_in=w_in.detach(),
                    w_out=w_out.detach(),
                    kind=self.dispatcher.activation,
                    grad_scale=self.expert_grad_scale,
                ),
                phase=PHASES[current_phase()],
            )
            x_router, x_rows, x_shared = step.enter(x_TD, w_in, w_out, copies=3)
            routing = self.router(x_router)
            check_routing(routing.topk_ids_TK, routing.topk_weights_TK, x_TD)
            slots_TK = self.dispatcher.placement.to_physical(routing.topk_ids_TK)
            rows_TD = x_rows.to(dtype)
        except Exception as error:
            self.dispatcher.refuse(error, schedule)
        start = step.lanes.now()
        exchange = self.dispatcher.plan(slots_TK, rows_TD, schedule, status=routing.status)
        step.bind(schedule, exchange, rows_TD, slots_TK, routing.topk_weights_TK)
        step.lanes.note("N", "wire", start, step.lanes.now())
        return step, routing, x_shared

    def _forward_one_rank(self, x: torch.Tensor) -> torch.Tensor:
        """One rank and nothing to overlap: the ops in a row, which torch.compile can see through."""
        x_TD, dtype = self._checked(x)
        routing = self.router(x_TD)
        _raise_bad_logits(routing.status)
        num_experts = self.dispatcher.placement.num_experts
        ids_TK = self.dispatcher.placement.to_physical(routing.topk_ids_TK)
        _, offs, slot_to_row, _ = ops.row_map(ids_TK, num_experts=num_experts)
        x_RD = ops.permute(x_TD.to(dtype), slot_to_row, offs, num_rows=ids_TK.numel())
        w_in, w_out = (w.to(dtype) for w in self.expert_weights)
        y_RD = ops.expert_mlp(x_RD, w_in, w_out, offs, kind=self.dispatcher.activation)
        y_TD = ops.combine(y_RD, slot_to_row, routing.topk_weights_TK)
        if y_TD.requires_grad and not torch.compiler.is_compiling():
            y_TD = SameRouting.apply(y_TD, slot_to_row)
        if self.shared_expert is not None:
            y_TD = y_TD + self._shared(x_TD)
        if not torch.compiler.is_compiling() and current_phase() == 0:
            assert isinstance(self.schedule, SchedulePair)
            self._remember(LastStep(routing=routing, plan=None, payload_bytes=0, schedule=self.schedule,
                                    pair=self.schedule, lanes=None))  # fmt: skip
        return y_TD.reshape(x.shape)

    # ---------------------------------------------------------------- what it says about itself

    def stats(self) -> LayerStats:
        """The last forward call. Raises RuntimeError before the first one."""
        if self._last_step is None:
            raise RuntimeError("no forward call yet")
        return layer_stats(self._last_step, self.dispatcher.placement, self._computes())

    def explain(self) -> str:
        """The schedules drawn as lanes, simulated from the last measured durations, and what computes, with reasons."""
        last = self._last_step
        if last is not None:
            return explain(last.pair, last.events, self.transport, computes=self._computes(), last=last)
        if isinstance(self.schedule, AutoSchedule):
            return 'schedule "auto": the first forward call calibrates, then chooses'
        return explain(self.schedule, [], self.transport, computes=self._computes())

    def _computes(self) -> list[str]:
        """What runs on the device and in the dtype of the experts, one line per op, with reasons."""
        return ops.registry.explain(self.down_proj.device, self.down_proj.dtype)

    @property
    def last_events(self) -> list[TimelineEvent]:
        """The executed actions of the last forward call, and of its backward once that has run. On CUDA only steps
        inside `record()` are timed: without it there are none."""
        return [] if self._last_step is None else self._last_step.events

    @property
    def last_exchange(self) -> ExchangePlan:
        """The counts that the ranks agreed on in the last forward call. Raises RuntimeError where there are none."""
        if self._last_step is None or self._last_step.plan is None:
            raise RuntimeError("no forward call yet that exchanged rows")
        return self._last_step.plan.exchange

    def attach(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, made to reach this layer's last call with a zero gradient.

        For a rank whose loss does not depend on this layer: its experts computed other ranks' rows, so it has to take
        part in their backward.
        """
        if self._tail is None:
            return loss
        attached: torch.Tensor = Attach.apply(loss, self._tail)
        return attached

    def take_aux_loss(self) -> torch.Tensor | None:
        """The auxiliary loss of the last forward call, once: reading clears it."""
        loss, self._aux_loss = self._aux_loss, None
        return loss

    @property
    def expert_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up_proj or up_proj, down_proj)."""
        name = "gate_up_proj" if self.dispatcher.activation == "swiglu" else "up_proj"
        return getattr(self, name), self.down_proj

    def extra_repr(self) -> str:
        d = self.dispatcher
        return (
            f"hidden={d.hidden}, ffn={d.ffn_hidden}, experts={d.placement.num_experts}, top_k={d.top_k}, "
            f"activation={d.activation}, schedule={self.schedule.name}, transport={self.transport.name}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The layer without what its last call left behind."""
        forgotten: dict[str, Any] = {
            "_last_step": None,
            "_aux_loss": None,
            "_tail": None,
            "_ticket": None,
        }
        return self.__dict__ | forgotten

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        """Parameters of its own, the same transport: a copy of a model (an average of weights, say) on every rank."""
        memo[id(self.transport)] = self.transport
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # ---------------------------------------------------------------- details

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("gate_up_proj", "up_proj", "down_proj"):
            refuse_sharded(name, value, self.transport)
        super().__setattr__(name, value)

    @property
    def _runs_inline(self) -> bool:
        return self.transport.name == "local" and isinstance(self.schedule, SchedulePair) and self.schedule.chunks == 1

    def _make_experts(self, factory: dict[str, Any]) -> None:
        """Draws every expert of the layer in turn and keeps this rank's, so that any number of ranks starts alike."""
        d = self.dispatcher
        mine = d.placement.slots_of_rank(self.transport.rank)
        rows = d.ffn_hidden * (2 if d.activation == "swiglu" else 1)
        w_in = nn.Parameter(torch.empty(len(mine), rows, d.hidden, **factory))
        w_out = nn.Parameter(torch.empty(len(mine), d.hidden, d.ffn_hidden, **factory))
        with torch.no_grad():
            for slot in range(d.placement.num_slots):
                for weight, fan_in in ((w_in, d.hidden), (w_out, d.ffn_hidden)):
                    drawn = torch.empty(weight.shape[1:], **factory).normal_(std=fan_in**-0.5)
                    if slot in mine:
                        weight[slot - mine.start].copy_(drawn)
        self.register_parameter("gate_up_proj" if d.activation == "swiglu" else "up_proj", w_in)
        self.down_proj = w_out

    def _checked(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """(x as [T, D], dtype of the rows): the weights' dtype, or autocast's."""
        weight = self.down_proj
        if not isinstance(x, torch.Tensor):
            raise ConfigError("x", type(x).__name__, f"a tensor [..., {self.dispatcher.hidden}]")
        if x.dim() < 1 or x.shape[-1] != self.dispatcher.hidden:
            raise ConfigError("x.shape[-1]", x.shape[-1] if x.dim() else 0, f"hidden_size = {self.dispatcher.hidden}")
        if x.device != weight.device:
            raise ConfigError("x.device", x.device, f"the device of the expert weights, {weight.device}")
        # Autocast leaves float64 alone, here as everywhere in torch.
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
            return x.reshape(-1, x.shape[-1]), torch.get_autocast_dtype(x.device.type)
        if x.dtype != weight.dtype:
            raise ConfigError("x.dtype", x.dtype, f"the dtype of the expert weights, {weight.dtype}, or autocast")
        return x.reshape(-1, x.shape[-1]), weight.dtype

    def _shared(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self.shared_expert is not None
        shared: torch.Tensor = self.shared_expert(x_TD)
        return shared

    def _end(self, step: Step, routing: RoutingDecision, y_TD: torch.Tensor) -> None:
        """What outlives the call: numbers for stats() and explain(), and the tail for attach(). Not in a recompute."""
        if step.phase != "forward":
            return
        self._outgrown.note(step)
        sent = sum(sum(counts) - counts[step.plan.rank] for counts in step.plan.send_counts)
        returned = sum(sum(counts) - counts[step.plan.rank] for counts in step.plan.recv_counts)
        payload_bytes = (sent + returned) * step.layout.row_bytes
        self._remember(LastStep(routing=routing, plan=step.plan, payload_bytes=payload_bytes, schedule=step.schedule,
                                pair=step.pair, lanes=step.lanes))  # fmt: skip
        if step.grad and self.transport.world_size > 1:
            self._tail = y_TD.reshape(-1)[:0]

    def _remember(self, last: LastStep) -> None:
        self._last_step = last
        self._aux_loss = last.routing.aux_loss


def _raise_bad_logits(status: torch.Tensor) -> None:
    """One rank's form of the agreement's refusal."""
    if torch.compiler.is_compiling():
        torch._assert_async((status == 0).all(), "logits: a row with NaN or +inf, or with -inf everywhere")
    elif int(status):
        raise ConfigError(
            "logits", int(status), "no row with NaN or +inf, none that is all -inf (or bad_logits='drop')"
        )
