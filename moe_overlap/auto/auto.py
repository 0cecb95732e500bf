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
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from weakref import WeakSet

import torch

from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import digest
from moe_overlap.auto.beside import why_not_kept
from moe_overlap.auto.calibrate import calibrate, gathered
from moe_overlap.auto.cost_cache import cache_file, cache_key, hosts_of, load, store
from moe_overlap.auto.planned import PlannedSchedule, Settled
from moe_overlap.auto.probes import ProbeInputs, Probes, probe_pair
from moe_overlap.errors import ConfigError
from moe_overlap.measure.machine import hardware
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.builders import SchedulePair, Schedules, agree_ahead, deduplicate
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error
from moe_overlap.transport.link import nodes_of

logger = logging.getLogger(__name__)

GROWTH = 4  # a step of more than so many times the measured rows is beyond its model
MOST_MISFIT = 0.25  # of a probe's time: a model that is further off is used, and not kept for other processes
ONE_RANK = "auto (one rank exchanges nothing, so no order is faster)"  # the name of the pair that runs there


@dataclass(frozen=True, kw_only=True)
class Unplanned(Settled):
    """What a step says it runs while "auto" has not chosen (`Schedules`): no fixed schedule has
    its digest, so a rank with one beside a rank that calibrates is refused before anything is sent."""

    op_verb: OpVerb
    num_ops: int
    overlap: bool
    max_in_flight_bytes: int | None
    dedup: str = "off"
    num_ahead: int = 0
    offload: bool = False
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @property
    def digest(self) -> int:
        settings = (self.op_verb, self.num_ops, self.overlap, self.max_in_flight_bytes, self.dedup, self.num_ahead)
        return digest("auto calibrates", *settings, self.offload)

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """Joined: a step without rows runs so, as it tells nothing."""
        pair = agree_ahead(probe_pair(self.op_verb, self.num_ops, 1, "tokens").join(), self.num_ahead)
        return deduplicate(pair) if self.dedup == "on" else pair


def busiest_rows(exchange: ExchangePlan) -> int:
    """T * K of the rank with most tokens: agreed, so alike on all ranks."""
    return exchange.counts.most_sent


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
class AutoSchedule(Settled):
    """The word "auto" of one layer or block: its planned schedules, by (opening, gradients enabled, dtype of the rows).
    num_ahead: so many of the ops beside the exchanges run while ranks agree.

    What was found before the transport was opened again does not count: the failure between may have come when only
    some of the ranks had it.
    """

    op_verb: OpVerb
    num_ops: int
    overlap: bool = True
    max_in_flight_bytes: int | None = None
    dedup: str = "off"  # as the layer's: with "auto" plain schedules and deduplicated ones are compared
    num_ahead: int = 0  # fixed, since what follows is chosen from what was agreed
    offload: bool = False  # experts are in host memory; a layer says so of the one that it was given
    found: dict[tuple[int, bool, torch.dtype], PlannedSchedule] = field(default_factory=dict)
    kept_in: Path | None = None  # the file of the last cost model, on rank 0
    not_kept: str | None = None  # why there is none
    taken: bool = False  # by a layer: what was found for one is not for another
    name = "auto"

    @property
    def unplanned(self) -> Unplanned:
        """What a step says before there is a choice."""
        return Unplanned(op_verb=self.op_verb, num_ops=self.num_ops, overlap=self.overlap,
                         max_in_flight_bytes=self.max_in_flight_bytes, dedup=self.dedup,
                         num_ahead=self.num_ahead, offload=self.offload)  # fmt: skip

    def get(self, opening: int, dtype: torch.dtype) -> PlannedSchedule | None:
        """The schedules for the coming step, or None before the calibration."""
        return self.found.get((opening, torch.is_grad_enabled(), dtype))

    def calibrate(self, inputs: ProbeInputs, *, old: PlannedSchedule | None = None, waiting: bool = False) -> Schedules:
        """The schedules of the coming steps, from probes on the tokens of this one. Collective. Errors as in a step.

        A step in which no rank has a row tells nothing: it runs joined, and the next one calibrates. `old`: the
        schedules to replace, which stay where this step is within their model too, or where on any rank one of their
        steps is `waiting` for its backward.
        """
        dispatcher, device = inputs.dispatcher, inputs.x_TD.device
        with inputs.undisturbed():
            try:
                probes, status = inputs.routed()
            except Exception as error:
                dispatcher.refuse(error, self.unplanned)
            # Agree first: a rank that cannot take part says so here, and no probe waits for it; nor for a rank that
            # does not calibrate, having another schedule.
            exchange = dispatcher.plan(probes.ids_TK, probes.x_TD, self.unplanned, status=status, common=inputs.common)
            if old is not None:
                if not beyond(old.model, exchange) or _any(dispatcher.transport, waiting, device):
                    return old
                logger.info("calibrating again: this step has %d rows on the busiest rank, the cost model was measured "
                            "with %d", busiest_rows(exchange), old.model.measured_rows)  # fmt: skip
            if not exchange.counts.totals.any():
                return self.unplanned
            with closing_on_error(dispatcher.transport, "calibrate"):
                return self.prepare(probes, exchange)

    def prepare(self, probes: Probes, exchange: ExchangePlan) -> PlannedSchedule:
        """Load or measure the cost model of the coming steps, the first of which is agreed. Collective."""
        transport, device, dtype = probes.transport, probes.x_TD.device, probes.x_TD.dtype
        nodes = nodes_of(transport)
        key = cache_key(probes.key, transport=transport, device=device, dtype=dtype, nodes=nodes,
                        hosts=hosts_of(transport, device))  # fmt: skip
        first = transport.rank == 0
        self.not_kept = why_not_kept(probes.inputs.ops)
        cached = load(key) if first and self.not_kept is None else None
        if cached is not None and beyond(cached, exchange):
            logger.info("measuring again: %s was measured with %d rows on the busiest rank, this step has %d",
                        cache_file(key), cached.measured_rows, busiest_rows(exchange))  # fmt: skip
            cached = None
        metadata = None if self.dedup == "off" else probes.metadata
        link = probes.inputs.host_link
        limit = None if link is None else link.device_limit_bytes
        model = shared_model(transport, cached, device)
        self.kept_in = cache_file(key) if model is not None and first else None
        if model is None:
            source = f"measured on {hardware()}, {date.today()}, with {busiest_rows(exchange)} rows on the busiest rank"
            model = calibrate(
                probes.run,
                probes.pair,
                transport,
                groups=exchange.num_slots // exchange.world_size,
                row_bytes=probes.row_bytes,
                nodes=nodes,
                metadata=metadata,
                expert_bytes=probes.expert_bytes[0] if self.offload else 0,
                device_limit_bytes=limit,
                device=device,
                source=source,
            )
            # All ranks have fitted the same figures, but `source` is another text on another machine.
            model = shared_model(transport, model, device)
            assert model is not None
            if self.not_kept is None and model.misfit > MOST_MISFIT:
                wrong = f"{model.misfit:.0%} wrong, over {MOST_MISFIT:.0%}"
                self.not_kept = f"it predicts one of its own probes {wrong}: was the machine busy?"
            if first and self.not_kept is None:
                self.kept_in, self.not_kept = store(key, model)
            elif first:
                logger.info("the cost model is not kept: %s", self.not_kept)
        found = PlannedSchedule(model=model, num_ops=self.num_ops, op_verb=self.op_verb, row_bytes=probes.row_bytes,
                                nodes=nodes, overlap=self.overlap, dedup=self.dedup, metadata=metadata,
                                max_in_flight_bytes=self.max_in_flight_bytes,
                                num_ahead=self.num_ahead, expert_bytes=probes.expert_bytes,
                                offload=self.offload, device_limit_bytes=limit)  # fmt: skip
        # What a search costs decides when there is one, so it has to be one number on all ranks: the slowest one's.
        search_s = torch.tensor([found.measure_search(exchange)], dtype=torch.float64, device=device)
        schedule = replace(found, search_s=float(gathered(transport, search_s).max()))
        self.found[probes.dispatcher.openings, torch.is_grad_enabled(), dtype] = schedule
        return schedule


def _any(transport: Transport, flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank. Collective."""
    return bool(gathered(transport, torch.tensor([float(flag)], dtype=torch.float64, device=device)).any())


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
