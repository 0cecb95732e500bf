"""The planner in a benchmark: a cost model of a case, the rows it asks for, and what it predicts for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import torch

from moe_overlap.agreement.loads import Agreed
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.auto.calibrate import StepTimes, calibrate, distinct_shape, step_shape
from moe_overlap.auto.planned import Planned, PlannedSchedule
from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.rows import RowPlan
from moe_overlap.commands.bench.timing import Runner, Samples, Variant
from moe_overlap.commands.bench.wires import metadata_layouts
from moe_overlap.measure.machine import hardware
from moe_overlap.planning.predict import predict
from moe_overlap.planning.shapes import MetadataBytes, StepShape
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.builders import SchedulePair, chunked
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import nodes_of

DRIFT = 0.1  # of the calibration's serial step: beyond that, predictions are of another machine


@dataclass(frozen=True, kw_only=True)
class AsItIs(SchedulePair):
    """A pair that every step runs as it is: a plain probe stays plain, though it would pay to deduplicate the step."""

    @classmethod
    def of(cls, pair: SchedulePair) -> AsItIs:
        """With all that `pair` has."""
        return cls(**{field.name: getattr(pair, field.name) for field in fields(pair)})

    def pair_for(self, exchange: Agreed) -> SchedulePair:
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class CasePlan:
    """The planner's knowledge of one case: its model, the counts of its step, and what the serial step took then (None:
    there was no time for it)."""

    schedule: PlannedSchedule
    exchange: ExchangePlan
    serial_s: float | None

    @property
    def planned(self) -> Planned:
        return self.schedule.planned(self.exchange)

    def drifted(self, serial_s: float) -> bool:
        """Whether the machine has another speed than in the calibration: the same serial step took other seconds."""
        return self.serial_s is not None and abs(serial_s / self.serial_s - 1) > DRIFT

    def predicted_s(self, pair: SchedulePair) -> float:
        """Seconds of the whole timed unit under `pair`: its windows, exactly simulated, and what lies outside."""
        s = self.schedule
        cuts: dict[Phase, tuple[int, ChunkBy]] = {"forward": (pair.chunks, pair.by)}
        if self.exchange.grad_enabled:
            cuts["backward"] = (pair.backward_chunks, pair.backward_by)

        def shape(cut: tuple[int, ChunkBy]) -> StepShape:
            plan = self.exchange.chunked(*cut)
            if s.metadata is None or not pair.deduplicated:
                return step_shape(plan, row_bytes=s.row_bytes, nodes=s.nodes)
            return distinct_shape(plan, row_bytes=s.row_bytes, nodes=s.nodes, metadata=s.metadata)

        shapes = {phase: shape(cut) for phase, cut in cuts.items()}
        return sum(found.whole_s for found in predict(s.model, pair, shapes).values())


def plan_case(runner: Runner, model: BlockPair, transport: Transport) -> CasePlan:
    """Calibrate one case on one transport. Collective."""
    num_ops = len(model.op_names) if model.position else 0
    op_verb: OpVerb = "S" if model.case == "shared1" else "B"
    row_bytes = model.sizes.hidden * model.dtype.itemsize
    nodes = nodes_of(transport)
    metadata = None
    if model.dedup != "off":
        words = metadata_layouts(model, "train")
        metadata = MetadataBytes(out=words["M"].row_bytes, back=words["Mt"].row_bytes)

    def pair_of(chunks: int, by: ChunkBy) -> SchedulePair:
        if model.position:
            return model.window_pair(num_ops // 2, chunks=chunks, by=by)
        return chunked(chunks, by, shared=op_verb == "S")

    serial_s: list[float] = []

    def run(pair: SchedulePair) -> StepTimes:
        samples = Samples()
        runner.once(Variant(name="probe", model=model, pair=AsItIs.of(pair), transport=transport), samples)
        forward_s, whole_s = samples.forward_s[0], samples.own_s[0]
        if pair.joined and (pair.chunks, pair.by) == (1, "tokens") and model.as_asked(pair) == pair:
            serial_s.append(whole_s)
        backward_s = whole_s - forward_s if runner.phase == "train" else 0.0
        return StepTimes(events=samples.events[0], forward_s=forward_s, backward_s=backward_s,
                         exchange=model.moe.last_exchange)  # fmt: skip

    found = calibrate(
        run,
        pair_of,
        transport,
        groups=model.moe.expert_weights[1].shape[0],
        row_bytes=row_bytes,
        nodes=nodes,
        metadata=metadata,
        device=torch.device("cpu"),
        source=f"measured on {hardware()}",
    )
    schedule = PlannedSchedule(model=found, num_ops=num_ops, op_verb=op_verb, row_bytes=row_bytes, nodes=nodes,
                               dedup="on" if metadata else "off", metadata=metadata)  # fmt: skip
    timed_s = sorted(runner.maximum(serial_s)[1:])  # the first run was to warm up
    quicker = timed_s[: -(-len(timed_s) // 2)]
    return CasePlan(schedule=schedule, exchange=model.moe.last_exchange, serial_s=median(quicker) if quicker else None)


def auto_rows(model: BlockPair, plan: CasePlan, phase: str) -> list[RowPlan]:
    """The planner's choice, and in training the same forward schedule with its mirror as backward."""
    pair = plan.planned.pair
    rows = [RowPlan(model=model, schedule="auto", pair=pair)]
    if phase == "train" and not pair.joined:
        mirror = mirrored(model, plan)
        if mirror.backward != pair.backward:
            rows.append(RowPlan(model=model, schedule="mirrored", pair=mirror))
    return rows


def mirrored(model: BlockPair, plan: CasePlan) -> SchedulePair:
    """The planner's forward schedule with the backward that follows from it: as many chunks, the ops the other way
    round (where ops stand between the chunks, all of those before the middle one before all)."""
    forward = plan.planned.candidates["forward"][0]
    pair = plan.planned.pair
    if model.position:
        slot = max(0, forward.ops_before[len(forward.ops_before) // 2] - pair.deduplicated)  # the first op is O then
        return pair.with_backward(model.as_asked(model.window_pair(slot, chunks=pair.chunks, by=pair.by)))
    return pair.with_backward(model.as_asked(chunked(pair.chunks, pair.by, shared=model.case == "shared1")))


def predictions(plans: Sequence[RowPlan], cases: dict[str, CasePlan]) -> list[float | None]:
    """Predicted seconds of every row whose case was calibrated."""
    return [cases[plan.case].predicted_s(plan.pair) if plan.case in cases else None for plan in plans]
