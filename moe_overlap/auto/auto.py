"""schedule="auto" in a layer: calibrate at the first step, then choose by `planned.py`.

The first forward call of a layer (for training, for inference, for each dtype of the rows) looks for a cost model in
the cache and measures one where there is none: real steps on this call's tokens and routing, on the same transport. So
does a later one whose rows, and those of a step before it, are more than GROWTH times as many as were measured.
Parameters, their gradients, buffers, torch's random numbers and recorders are as they were before. The ops beside the
exchanges are called some 20 to 40 times, forward and backward, so hooks on these modules run, and what an op keeps
elsewhere changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import PHASES, digest
from moe_overlap.auto.calibrate import MAX_GROUPS, Nodes, StepTimes, calibrate, gathered
from moe_overlap.auto.cost_cache import Op, cache_file, cache_key, hosts_of, load, store, why_not_kept
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.measure.machine import hardware
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.builders import SchedulePair, Schedules, chunked, window
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.dispatch import Dispatcher, check_routing
from moe_overlap.schedule.recorder import record
from moe_overlap.schedule.rows import ExpertWeights
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error

if TYPE_CHECKING:
    from moe_overlap.layer.layer import MoELayer

logger = logging.getLogger(__name__)

GROWTH = 4  # a step of more than so many times the measured rows is beyond its model
ONE_RANK = "auto (one rank exchanges nothing, so no order is faster)"  # the name of the pair that runs there


@dataclass(frozen=True, kw_only=True)
class Unplanned:
    """What a step says it runs while "auto" has not chosen (the `Schedules` of `dispatch.py`): no fixed schedule has
    its digest, so a rank with one beside a rank that calibrates is refused before anything is sent."""

    op_verb: OpVerb
    num_ops: int
    overlap: bool
    max_in_flight_bytes: int | None
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @property
    def digest(self) -> int:
        return digest("auto calibrates", self.op_verb, self.num_ops, self.overlap, self.max_in_flight_bytes)

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """Joined: a step without rows runs so, as it tells nothing."""
        return probe_pair(self.op_verb, self.num_ops, 1, "tokens").join()


def probe_pair(op_verb: OpVerb, num_ops: int, chunks: int, by: ChunkBy) -> SchedulePair:
    """The schedules of a probe: half of the backbone ops, or the shared expert, before the experts."""
    if num_ops:
        return window(num_ops, num_ops // 2, chunks=chunks, by=by)
    return chunked(chunks, by, shared=op_verb == "S")


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what it was made from: it requires a gradient if that is wanted now."""
    return tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeInputs:
    """What the probes of a layer run on: this rank's tokens, routing and weights, all of them leaves, which require a
    gradient where the step's own do.

    dispatcher: the layer's. backbone: the ops beside the exchanges and their input h; shared: the shared expert.
    """

    dispatcher: Dispatcher
    x_TD: torch.Tensor
    slots_TK: torch.Tensor
    weights_TK: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    h: torch.Tensor | None = None
    backbone: Sequence[Op] = ()
    shared: Op | None = None

    @property
    def ops(self) -> list[Op]:
        return [*self.backbone] if self.shared is None else [*self.backbone, self.shared]

    @property
    def modules(self) -> list[nn.Module]:
        return [op for op in self.ops if isinstance(op, nn.Module)]

    @property
    def transport(self) -> Transport:
        return self.dispatcher.transport

    def pair(self, chunks: int, by: ChunkBy) -> SchedulePair:
        return probe_pair("B" if self.shared is None else "S", len(self.backbone), chunks, by)

    def run(self, pair: SchedulePair) -> StepTimes:
        """One step, forward and (where gradients are enabled) backward."""
        grad = torch.is_grad_enabled()

        x_TD, w_in, w_out, weights_TK = map(leaf, (self.x_TD, self.w_in, self.w_out, self.weights_TK))
        h = None if self.h is None else leaf(self.h.clone())  # in inference an op may change it in place
        clock = clock_for(self.x_TD.device)
        assert clock is not None, "probes are recorded"
        start = clock.now()
        weights = ExpertWeights(w_in=w_in.detach(), w_out=w_out.detach(), kind=self.dispatcher.activation)
        step = Step(self.transport, weights, phase=PHASES[0], probe=True)
        x_rows, x_shared = step.enter(x_TD, w_in, w_out, copies=2)
        leaves = [step.anchor, x_TD, w_in, w_out, weights_TK, *([] if h is None else [h])]
        exchange = self.dispatcher.plan(self.slots_TK, x_rows, pair)
        step.bind(pair, exchange, x_rows, self.slots_TK, weights_TK)
        step.hidden = h
        shared = self.shared
        y_TD = step.run(self.backbone, None if shared is None else lambda: shared(x_shared))
        outputs = [y_TD] if h is None else [y_TD, step.take_hidden()]
        outputs += [one for one in [step.take_shared()] if one is not None]
        middle = clock.now()
        if grad:
            # Tensor hooks would run on these gradients, which are no one's.
            parameters = [p for module in self.modules for p in module.parameters()
                          if p.requires_grad and not p._backward_hooks]  # fmt: skip
            leaves = [one for one in (*leaves, *parameters) if one.requires_grad]
            reached = [one for one in outputs if one.requires_grad]
            torch.autograd.grad(reached, leaves, [torch.ones_like(one) for one in reached], allow_unused=True)
        start_s, middle_s, end_s = (clock.seconds(stamp) for stamp in (start, middle, clock.now()))
        return StepTimes(events=step.events, forward_s=middle_s - start_s,
                         backward_s=end_s - middle_s if grad else 0.0, exchange=exchange)  # fmt: skip


def busiest_rows(exchange: ExchangePlan) -> int:
    """T * K of the rank with most tokens: agreed, so alike on all ranks."""
    return int(exchange.counts.sum(axis=(1, 2)).max())


def beyond(model: CostModel, exchange: ExchangePlan) -> bool:
    """Whether a step has many more rows than `model` was measured with (0: made from figures, for any number)."""
    return 0 < GROWTH * model.measured_rows < busiest_rows(exchange)


class Outgrown:
    """Which schedules of a layer had a step that was beyond their model, and which steps still wait for their backward:
    a recompute in there takes the schedules of its forward, so these cannot be replaced yet."""

    def __init__(self) -> None:
        self._schedules: WeakSet[PlannedSchedule] = WeakSet()
        self._steps: WeakSet[Step] = WeakSet()

    def __reduce__(self) -> tuple[type[Outgrown], tuple[()]]:
        """A copy begins anew, as does the layer that it belongs to."""
        return Outgrown, ()

    def note(self, step: Step) -> None:
        """At the end of a forward call."""
        self._steps.add(step)
        if isinstance(step.schedule, PlannedSchedule) and beyond(step.schedule.model, step.plan.exchange):
            self._schedules.add(step.schedule)

    def __contains__(self, schedule: PlannedSchedule) -> bool:
        return schedule in self._schedules

    @property
    def waiting(self) -> bool:
        """Whether a step still waits for its backward on this rank."""
        return any(step.awaits_backward for step in self._steps)


@dataclass(eq=False, kw_only=True)
class AutoSchedule:
    """The word "auto" of one layer or block: its planned schedules, by (opening, gradients enabled, dtype of the rows).

    What was found before the transport was opened again does not count: the failure between may have come when only
    some of the ranks had it.
    """

    op_verb: OpVerb
    num_ops: int
    overlap: bool = True
    max_in_flight_bytes: int | None = None
    found: dict[tuple[int, bool, torch.dtype], PlannedSchedule] = field(default_factory=dict)
    kept_in: Path | None = None  # the file of the last cost model, on rank 0
    not_kept: str | None = None  # why there is none
    name = "auto"

    @property
    def unplanned(self) -> Unplanned:
        """What a step says before there is a choice."""
        return Unplanned(op_verb=self.op_verb, num_ops=self.num_ops, overlap=self.overlap,
                         max_in_flight_bytes=self.max_in_flight_bytes)  # fmt: skip

    def get(self, opening: int, dtype: torch.dtype) -> PlannedSchedule | None:
        """The schedules for the coming step, or None before the calibration."""
        return self.found.get((opening, torch.is_grad_enabled(), dtype))

    def calibrate(
        self,
        layer: MoELayer,
        x_TD: torch.Tensor,
        dtype: torch.dtype,
        backbone: Sequence[Op],
        h: torch.Tensor | None,
        *,
        old: PlannedSchedule | None = None,
        waiting: bool = False,
    ) -> Schedules:
        """The schedules of the coming steps, from probes on the tokens of this one. Collective. Errors as in a step.

        A step in which no rank has a row tells nothing: it runs joined, and the next one calibrates. `old`: the
        schedules to replace, which stay where this step is within their model too, or where on any rank one of their
        steps is `waiting` for its backward.
        """
        dispatcher, shared = layer.dispatcher, layer.shared_expert
        modules = [op for op in (layer.router, *backbone, shared) if isinstance(op, nn.Module)]
        with undisturbed(modules, x_TD.device):
            try:
                refuse_units([*backbone, shared])
                routing = layer.router(x_TD.detach())
                check_routing(routing.topk_ids_TK, routing.topk_weights_TK, x_TD)
                slots_TK = dispatcher.placement.to_physical(routing.topk_ids_TK)
                rows_TD, w_in, w_out = (leaf(one.to(dtype)) for one in (x_TD, *layer.expert_weights))
            except Exception as error:
                dispatcher.refuse(error, self.unplanned)
            # Agree first: a rank that cannot take part says so here, and no probe waits for it; nor for a rank that
            # does not calibrate, having another schedule.
            exchange = dispatcher.plan(slots_TK, rows_TD, self.unplanned, status=routing.status)
            if old is not None:
                if not beyond(old.model, exchange) or _any(dispatcher.transport, waiting, x_TD.device):
                    return old
                logger.info("calibrating again: this step has %d rows on the busiest rank, the cost model was measured "
                            "with %d", busiest_rows(exchange), old.model.measured_rows)  # fmt: skip
            if not exchange.counts.any():
                return self.unplanned
            inputs = ProbeInputs(dispatcher=dispatcher, x_TD=rows_TD, slots_TK=slots_TK,
                                 weights_TK=leaf(routing.topk_weights_TK), w_in=w_in, w_out=w_out,
                                 h=None if h is None else leaf(h), backbone=backbone, shared=shared)  # fmt: skip
            with closing_on_error(dispatcher.transport, "calibrate"):
                return self.prepare(inputs, exchange)

    def prepare(self, inputs: ProbeInputs, exchange: ExchangePlan) -> PlannedSchedule:
        """Load or measure the cost model of the coming steps, the first of which is agreed. Collective."""
        dtype = inputs.x_TD.dtype
        row_bytes = inputs.x_TD.shape[1] * dtype.itemsize
        nodes = topology(inputs.transport)
        key = cache_key(inputs, nodes=nodes, hosts=hosts_of(inputs.transport, inputs.x_TD.device))
        first = inputs.transport.rank == 0
        self.not_kept = why_not_kept(inputs.ops)
        cached = load(key) if first and self.not_kept is None else None
        if cached is not None and beyond(cached, exchange):
            logger.info("measuring again: %s was measured with %d rows on the busiest rank, this step has %d",
                        cache_file(key), cached.measured_rows, busiest_rows(exchange))  # fmt: skip
            cached = None
        model = shared_model(inputs.transport, cached, inputs.x_TD.device)
        self.kept_in = cache_file(key) if model is not None and first else None
        if model is None:
            source = f"measured on {hardware()}, {date.today()}, with {busiest_rows(exchange)} rows on the busiest rank"
            model = calibrate(
                inputs.run,
                inputs.pair,
                inputs.transport,
                groups=min(MAX_GROUPS, inputs.w_in.shape[0]),
                row_bytes=row_bytes,
                nodes=nodes,
                device=inputs.x_TD.device,
                source=source,
            )
            # All ranks have fitted the same figures, but `source` is another text on another machine.
            model = shared_model(inputs.transport, model, inputs.x_TD.device)
            assert model is not None
            if first and self.not_kept is None:
                self.kept_in, self.not_kept = store(key, model)
            elif first:
                logger.info("the cost model is not kept: %s", self.not_kept)
        schedule = PlannedSchedule(model=model, num_ops=self.num_ops, op_verb=self.op_verb, row_bytes=row_bytes,
                                   nodes=nodes, overlap=self.overlap,
                                   max_in_flight_bytes=self.max_in_flight_bytes)  # fmt: skip
        self.found[inputs.dispatcher.openings, torch.is_grad_enabled(), dtype] = schedule
        return schedule


def _any(transport: Transport, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. Collective."""
    return bool(gathered(transport, torch.tensor([float(flag)], dtype=torch.float64, device=device)).any())


def refuse_units(ops: Sequence[Op | None]) -> None:
    """Raises ConfigError for an FSDP2 unit among `ops`: at the end of a probe's backward FSDP would shard the weights
    of every unit again, those of the step under way too."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for op in ops if isinstance(op, nn.Module) for module in op.modules()]
    if torch.is_grad_enabled() and any(isinstance(module, FSDPModule) for module in modules):
        expected = (
            "a fixed schedule, where ops beside the exchanges are FSDP2 units of their own (or fully_shard the block"
        )
        raise ConfigError("schedule", "auto", f"{expected} around them)")


def topology(transport: Transport) -> Nodes | None:
    """The node of each rank, where the transport knows."""
    known = getattr(transport, "topology", None)
    return None if known is None else tuple(known.node_of(rank) for rank in range(transport.world_size))


@contextmanager
def undisturbed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Random numbers and the buffers of `modules` are restored at the end. Neither recorders nor a checkpoint around
    the caller, selective ones included, see what is computed and saved inside."""
    owners = [owner for module in modules for owner in module.modules()]
    buffers = [(o, name, b, b.clone()) for o in owners for name, b in o._buffers.items() if b is not None]
    devices = [device] if device.type == "cuda" else []
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


TEXT_LIMIT = 1 << 16


def shared_model(transport: Transport, model: CostModel | None, device: torch.device) -> CostModel | None:
    """Rank 0's model, or its None, on every rank: caches may differ between machines. Collective."""
    data = b"" if model is None or transport.rank else json.dumps(model.to_json()).encode()
    if len(data) > TEXT_LIMIT:
        raise ConfigError("cost model", f"{len(data)} bytes", f"at most {TEXT_LIMIT}")
    length = int(gathered(transport, torch.tensor([float(len(data))], dtype=torch.float64, device=device))[0])
    if not length:
        return None
    padded = torch.zeros(length, dtype=torch.float64, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.float64, device=device)
    text = bytes(int(value) for value in gathered(transport, padded)[0].tolist())
    return CostModel.from_json(json.loads(text))
