"""What a calibration runs on: a layer's own tokens, routing, weights and ops, in real steps on its own transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import PHASES
from moe_overlap.auto.beside import Op, refuse_units, signature
from moe_overlap.auto.calibrate import StepTimes
from moe_overlap.ops.checks import accumulation_dtype
from moe_overlap.planning.shapes import MetadataBytes
from moe_overlap.routing.decision import as_decision
from moe_overlap.routing.zero import part_decision
from moe_overlap.schedule.actions import Action
from moe_overlap.schedule.builders import SchedulePair, chunked, window
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.dispatch import Dispatcher, Weights, check_routing
from moe_overlap.schedule.distinct_rows import gradient_layout, metadata_layout, weights_dtype
from moe_overlap.schedule.lanes import payload_of
from moe_overlap.schedule.recorder import record
from moe_overlap.schedule.run import Step
from moe_overlap.schedule.weights import ExpertWeights, row_width
from moe_overlap.transport.base import Transport
from moe_overlap.transport.host_link import HostLink


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeInputs:
    """What a layer gives to a calibration, as it stands before a step.

    x_TD: this rank's tokens; latents: [T, L], what their rows hold where that is not x. w_in, w_out: the experts'
    weights in the dtype of the rows, which is the probes'. router: tokens -> their experts (a `RoutingDecision`); told:
    its arguments by name. backbone: the ops beside the exchanges and their input h; shared: the shared expert.
    router_input: what the router reads instead of x. host_link: what the weights come up by, where they are in the
    host's memory. common: gives the weights that every rank has whole.
    """

    dispatcher: Dispatcher
    router: Callable[..., Any]
    x_TD: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    told: Mapping[str, Any] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    h: torch.Tensor | None = None
    backbone: Sequence[Op] = ()
    shared: Op | None = None
    router_input: torch.Tensor | None = None
    host_link: HostLink | None = None
    common: Weights | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.w_out.dtype

    @property
    def ops(self) -> list[Op]:
        """All that runs beside the exchanges."""
        return [*self.backbone] if self.shared is None else [*self.backbone, self.shared]

    def routed(self) -> tuple[Probes, torch.Tensor]:
        """The probes on this routing, and the router's status. Raises ConfigError for what cannot be probed."""
        refuse_units(self.ops)
        read_TD = self.x_TD if self.router_input is None else self.router_input
        routing = as_decision(self.router(read_TD.detach(), **self.told))
        routing = part_decision(routing, self.x_TD, self.dispatcher.placement.num_experts)
        check_routing(routing.topk_ids_TK, routing.topk_weights_TK, self.x_TD)
        probes = Probes(
            inputs=self,
            x_TD=leaf((self.x_TD if self.latents is None else self.latents).to(self.dtype)),
            ids_TK=routing.topk_ids_TK,
            weights_TK=leaf(routing.topk_weights_TK),
            w_in=leaf(self.w_in),
            w_out=leaf(self.w_out),
            h=None if self.h is None else leaf(self.h),
            shared_TD=None if self.latents is None or self.shared is None else leaf(self.x_TD),
        )
        return probes, routing.status

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Random numbers and the buffers of all modules are restored at the end. Neither recorders nor a checkpoint
        around the caller, selective ones included, see what is computed and saved inside."""
        modules = [op for op in (self.router, *self.ops) if isinstance(op, nn.Module)]
        owners = [owner for module in modules for owner in module.modules()]
        buffers = [(o, name, b, b.clone()) for o in owners for name, b in o._buffers.items() if b is not None]
        devices = [self.x_TD.device] if self.x_TD.device.type == "cuda" else []
        # The innermost hooks win: a probe's backward must not make an activation checkpoint recompute the caller.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        try:
            with torch.random.fork_rng(devices=devices), hooks, _disable_current_modes(), record():
                yield
        finally:
            with torch.no_grad():
                for owner, name, buffer, before in buffers:
                    owner._buffers[name] = buffer
                    if not torch.equal(buffer, before):  # writing would tell autograd that it changed
                        buffer.copy_(before)


@dataclass(frozen=True, eq=False, kw_only=True)
class Probes:
    """Steps on a layer's inputs, all of them leaves, which require a gradient where the step's own do. x_TD: what rows
    hold; shared_TD: what the shared expert reads, where that is something else."""

    inputs: ProbeInputs
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    h: torch.Tensor | None
    shared_TD: torch.Tensor | None

    @property
    def dispatcher(self) -> Dispatcher:
        return self.inputs.dispatcher

    @property
    def transport(self) -> Transport:
        return self.dispatcher.transport

    @property
    def row_bytes(self) -> int:
        return self.x_TD.shape[1] * payload_of(self.x_TD.dtype, self.dispatcher.payload_dtype).itemsize

    @property
    def expert_bytes(self) -> tuple[int, int]:
        """Of one expert: its weights, and their gradients on the way home from a copy."""
        width = row_width(self.w_in, self.w_out)
        return width * self.w_in.element_size(), width * accumulation_dtype(self.w_in.dtype).itemsize

    @property
    def metadata(self) -> MetadataBytes:
        """What goes beside a row where a step is deduplicated, and what comes back for it."""
        top_k, dtype = self.ids_TK.shape[1], weights_dtype(self.x_TD.dtype)
        return MetadataBytes(out=metadata_layout(top_k, dtype).row_bytes, back=gradient_layout(top_k, dtype).row_bytes)

    @property
    def key(self) -> dict[str, Any]:
        """What the times depend on, of all that is the layer's: its part of a `cost_cache.cache_key`."""
        inputs, d, h = self.inputs, self.dispatcher, self.h
        return {
            "tokens": self.x_TD.shape[0],
            "row_bytes": self.row_bytes,
            "h": None if h is None else list(h.shape),
            "hidden": d.hidden,
            "ffn_hidden": d.ffn_hidden,
            "experts": d.placement.num_experts,
            "top_k": self.ids_TK.shape[1],
            "activation": d.activation,
            "expert_offload": None if inputs.host_link is None else inputs.host_link.text,
            "dedup": d.dedup,
            "hierarchical": d.ranks_per_node if d.hierarchical else 0,
            "dtype": str(self.x_TD.dtype),
            "grad": torch.is_grad_enabled(),
            "gradients": [
                one is not None and one.requires_grad for one in (self.x_TD, self.w_in, self.w_out, self.weights_TK, h)
            ],
            "ops": [signature(op) for op in inputs.backbone],
            "shared": None if inputs.shared is None else signature(inputs.shared),
        }

    def pair(self, chunks: int, by: ChunkBy) -> SchedulePair:
        """The schedules of a probe."""
        return probe_pair("B" if self.inputs.shared is None else "S", len(self.inputs.backbone), chunks, by)

    def run(self, pair: SchedulePair) -> StepTimes:
        """One step, forward and (where gradients are enabled) backward."""
        grad = torch.is_grad_enabled()

        x_TD, w_in, w_out, weights_TK = map(leaf, (self.x_TD, self.w_in, self.w_out, self.weights_TK))
        h = None if self.h is None else leaf(self.h.clone())  # in inference an op may change it in place
        clock = clock_for(self.x_TD.device)
        assert clock is not None, "probes are recorded"
        start = clock.now()
        weights = ExpertWeights(w_in=w_in.detach(), w_out=w_out.detach(), kind=self.dispatcher.activation)
        step = Step(self.transport, weights, phase=PHASES[0], probe=True, caller=self.dispatcher.caller,
                    payload_dtype=self.dispatcher.payload_dtype, host_link=self.inputs.host_link)  # fmt: skip
        x_rows, x_shared = step.enter(x_TD, w_in, w_out, copies=2)
        leaves = [step.anchor, x_TD, w_in, w_out, weights_TK, *([] if h is None else [h])]
        if self.shared_TD is not None:
            x_shared = leaf(self.shared_TD)
            leaves.append(x_shared)
        schedule = AsGiven(pair)
        step.ask(schedule, self.dispatcher, self.dispatcher.begin(self.ids_TK, x_rows, schedule))
        step.give(x_rows, self.ids_TK, weights_TK)
        step.hidden = h
        shared = self.inputs.shared
        y_TD = step.run(self.inputs.backbone, None if shared is None else lambda: shared(x_shared))
        outputs = [y_TD] if h is None else [y_TD, step.take_hidden()]
        outputs += [one for one in [step.take_shared()] if one is not None]
        middle = clock.now()
        if grad:
            # Tensor hooks would run on these gradients, which are no one's.
            parameters = [p for op in self.inputs.ops if isinstance(op, nn.Module) for p in op.parameters()
                          if p.requires_grad and not p._backward_hooks]  # fmt: skip
            leaves = [one for one in (*leaves, *parameters) if one.requires_grad]
            reached = [one for one in outputs if one.requires_grad]
            torch.autograd.grad(reached, leaves, [torch.ones_like(one) for one in reached], allow_unused=True)
        start_s, middle_s, end_s = (clock.seconds(stamp) for stamp in (start, middle, clock.now()))
        return StepTimes(events=step.events, forward_s=middle_s - start_s,
                         backward_s=end_s - middle_s if grad else 0.0, exchange=step.plan.exchange)  # fmt: skip


@dataclass(frozen=True)
class AsGiven:
    """One pair for all steps (`Schedules`), whatever pays."""

    pair: SchedulePair

    @property
    def digest(self) -> int:
        return self.pair.digest

    @property
    def chunks(self) -> int:
        return self.pair.chunks

    @property
    def by(self) -> ChunkBy:
        return self.pair.by

    @property
    def ahead(self) -> tuple[Action, ...]:
        return self.pair.ahead

    @property
    def joined(self) -> bool:
        return self.pair.joined

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        return self.pair

    def begins_backward(self, exchange: ExchangePlan) -> None:
        """As `Schedules.begins_backward`."""


def probe_pair(op_verb: str, num_ops: int, chunks: int, by: ChunkBy) -> SchedulePair:
    """The schedules of a probe: half of the backbone ops, or the shared expert, before the experts."""
    if num_ops:
        return window(num_ops, num_ops // 2, chunks=chunks, by=by)
    return chunked(chunks, by, shared=op_verb == "S")


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what it was made from: it requires a gradient if that is wanted now."""
    return tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())
