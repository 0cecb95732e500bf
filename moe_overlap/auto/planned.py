"""schedule="auto": from a cost model and the counts of a step to the schedules that run.

What `PlannedSchedule` chooses follows from data that all ranks have alike: the model (fitted to gathered
measurements), what a search costs (the slowest rank's), and the agreed counts of this step and of the steps before it.
A step is reduced to a few rounded integers first (`kinds.py`), and steps of a kind get the same schedules. A kind that
is new gets those of a step before it, the fastest there of the last few, simulated exactly, and keeps them until what a
search could have gained in its steps, added up, is more than a search costs: then it is searched for. So a search is
paid for by what it can gain, as skis are bought that have been hired often enough.

A recompute gets what its forward ran: every forward with gradients is remembered by its kind and counts, and as long as
one of them waits for its last backward, steps with equal counts run the same.

Where rows may be deduplicated a step has two kinds, plain and deduplicated, and the faster of both plans runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

from moe_overlap.agreement.loads import Nodes
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import PHASES, digest
from moe_overlap.auto.copied import ExpertBytes
from moe_overlap.auto.kinds import StepKind, distinct_kind, step_kind
from moe_overlap.errors import ConfigError
from moe_overlap.planning.copied import CONSIDERED, priced_s, with_copies_priced
from moe_overlap.planning.cost_model import CostModel, window
from moe_overlap.planning.explain import bound_s, wire_of
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import TIE, Candidate, in_flight_bytes, search
from moe_overlap.planning.shapes import MetadataBytes, StepShape
from moe_overlap.planning.window import OpVerb, Window
from moe_overlap.schedule.actions import Action, Phase
from moe_overlap.schedule.builders import SchedulePair, first_ops
from moe_overlap.schedule.check import check
from moe_overlap.schedule.offload import held_in_turns

REMEMBERED = 256  # kinds of steps whose schedules are kept
RECENT = 4  # different schedules, the last that ran, which a new kind is tried with
FORWARDS = 1024  # the last ones with gradients whose schedules a recompute finds

Candidates = dict[Phase, tuple[Candidate, ...]]
Kinds = tuple[StepKind, ...]
Key = tuple[Kinds, bytes]  # of steps that a recompute cannot tell apart


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was chosen for one kind of step, and from what: by phase the window and its first candidates, best first,
    and what lies outside of it. `copied`: in a step with copies of experts these candidates with copies, best first.
    `other`: where both were looked at, what is not taken of the plain and the deduplicated plan. `could_gain_s`: where
    nothing was searched for and this is what another kind of step ran, which a search could beat by so much at most."""

    pair: SchedulePair
    windows: dict[Phase, Window]
    candidates: Candidates
    outside_s: dict[Phase, float]
    copied: Candidates = field(default_factory=dict)
    other: Planned | None = None
    could_gain_s: float | None = None

    def best(self, phase: Phase) -> Candidate:
        """What runs, with its seconds in this step."""
        return (self.copied.get(phase) or self.candidates[phase])[0]

    @property
    def predicted_s(self) -> float:
        """Seconds of the phases that were planned, overlapped, with what lies outside of their windows."""
        return sum(self.best(phase).predicted_s + self.outside_s[phase] for phase in self.candidates)


class Settled:
    """What is settled about the schedule of a step before it is chosen: the ops that run while ranks agree, and whether
    every exchange is waited for at once."""

    op_verb: OpVerb
    num_ahead: int
    overlap: bool
    dedup: str

    def begins_backward(self, exchange: ExchangePlan) -> None:
        """As `Schedules.begins_backward`."""

    @property
    def ahead(self) -> tuple[Action, ...]:
        return first_ops(self.op_verb, self.num_ahead)

    @property
    def joined(self) -> bool:
        return not self.overlap


@dataclass(eq=False)
class _Known:
    """A kind of step: its plan, and what a search could have gained in its steps so far."""

    kinds: Kinds
    planned: Planned
    owed_s: float = 0.0


@dataclass(eq=False)
class _Ran:
    """What forwards with gradients ran, and how many of these wait for their last backward."""

    planned: Planned
    waiting: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSchedule(Settled):
    """The fastest schedules by `model`, for each step (`Schedules`).

    op_verb "B": `num_ops` backbone ops beside the exchanges; "S": the shared expert; num_ops 0: nothing.
    `overlap=False` joins every exchange of what was chosen. max_in_flight_bytes: the most that exchanges under way may
    hold in buffers on one rank; ConfigError in a step of which no schedule keeps within it. dedup: "on": one row for
    each (token, rank) travels in every step; "auto": where that is predicted to be faster; both need `metadata`, the
    bytes of what goes beside such a row, and a model of deduplicated steps. num_ahead: the first so many of the ops run
    while ranks agree, in no window of forward. expert_bytes: by which copies of experts are priced. offload: experts
    are in host memory, so that cuts are by experts alone, and their copies are in the windows; device_limit_bytes: the
    most bytes of them on the device at a time, ConfigError where no number of groups keeps within it. search_s: seconds
    of a search, equal on all ranks; 0: every new kind of step is searched for, so that what runs follows from its
    counts alone. Above 0 it follows from those of the steps before it too: one object for each layer and for each
    opening of its transport (`AutoSchedule` makes it so).
    """

    model: CostModel
    num_ops: int
    op_verb: OpVerb = "B"
    row_bytes: int
    nodes: Nodes | None = None
    overlap: bool = True
    max_in_flight_bytes: int | None = None
    dedup: str = "off"
    metadata: MetadataBytes | None = None
    num_ahead: int = 0
    expert_bytes: ExpertBytes = (0, 0)
    offload: bool = False
    device_limit_bytes: int | None = None
    search_s: float = 0.0
    _found: dict[Kinds, _Known] = field(default_factory=dict, init=False, repr=False)
    _ran: dict[Key, _Ran] = field(default_factory=dict, init=False, repr=False)
    _waiting: dict[int, _Ran] = field(default_factory=dict, init=False, repr=False)  # by number of the step
    _recent: list[Planned] = field(default_factory=list, init=False, repr=False)
    # "steps", those "searched" for, those of a new kind "taken over", and "search_us", what searches took this rank
    tally: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @cached_property
    def digest(self) -> int:
        settings = (self.num_ops, self.op_verb, self.row_bytes, self.nodes, self.overlap, self.max_in_flight_bytes)
        more = (self.dedup, self.metadata, self.num_ahead, self.expert_bytes, self.offload, self.device_limit_bytes,
                self.search_s)  # fmt: skip
        return digest("auto", self.model.to_json(), *settings, *more)

    @property
    def hit_rate(self) -> float | None:
        """The share of the steps so far, without recomputes, that nothing was searched for; None before the first."""
        return max(0.0, 1 - self.tally["searched"] / self.tally["steps"]) if self.tally["steps"] else None

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """The schedules of one step, which is now remembered: every rank calls this once for each step, in their order.
        ConfigError for a recompute whose forward is more than FORWARDS calls ago."""
        key, ran = self._remembered(exchange)
        if exchange.phase != PHASES[0]:
            if ran is None and self.search_s:
                expected = f"at most {FORWARDS} forward calls of a layer between one of them and its recompute"
                raise ConfigError("checkpoint", "a forward that is not remembered", expected)
            return (self._chosen(key[0]) if ran is None else ran.planned).pair
        self.tally["steps"] += 1
        planned = ran.planned if ran is not None and ran.waiting else self._chosen(key[0])
        if exchange.grad_enabled and self.search_s:
            self._remember(exchange.step, key, planned)
        return planned.pair

    def begins_backward(self, exchange: ExchangePlan) -> None:
        """As `Schedules.begins_backward`: this step waits no longer."""
        if (ran := self._waiting.pop(exchange.step, None)) is not None:
            ran.waiting -= 1

    def planned(self, exchange: ExchangePlan) -> Planned:
        """What a step runs, or ran, and what it was chosen from. Who asks changes no choice."""
        (kinds, _), ran = self._remembered(exchange)
        if ran is not None:
            return ran.planned
        if not self.search_s:
            return self._chosen(kinds)
        return self._found[kinds].planned if kinds in self._found else _faster(_plans(self, kinds))

    def measure_search(self, exchange: ExchangePlan) -> float:
        """Seconds that a search for one step takes this rank. It leaves nothing behind."""
        kinds = self._kinds(exchange)
        for _ in range(2):  # the first one is to warm up
            start_s = time.perf_counter()
            with suppress(ConfigError):  # no schedule keeps within the budget: the step says so
                _plans(self, kinds)
        return time.perf_counter() - start_s

    def _remember(self, step: int, key: Key, planned: Planned) -> None:
        """What the forward of a step runs, for its recompute."""
        ran = self._ran.pop(key, None) or _Ran(planned)
        ran.planned, ran.waiting = planned, ran.waiting + 1
        known = self._found.get(key[0])
        self._ran[key if known is None else (known.kinds, key[1])] = ran  # one object for equal kinds
        self._waiting[step] = ran
        _drop_first(self._ran, FORWARDS)
        if len(self._waiting) > FORWARDS:  # a forward whose backward never came
            self._waiting.pop(next(iter(self._waiting))).waiting -= 1

    def _remembered(self, exchange: ExchangePlan) -> tuple[Key, _Ran | None]:
        key = self._kinds(exchange), blake2b(exchange.counts.totals.tobytes(), digest_size=16).digest()
        return key, self._ran.get(key)

    def _chosen(self, kinds: Kinds) -> Planned:
        """The plan of the coming step of these kinds."""
        if (known := self._found.get(kinds)) is None:
            _drop_first(self._found, REMEMBERED - 1)
            found = _taken_over(self, kinds, self._recent) if self.search_s else None
            self.tally["taken over"] += found is not None
            known = self._found[kinds] = _Known(kinds, self._searched(kinds) if found is None else found)
        known.owed_s += known.planned.could_gain_s or 0.0
        if known.owed_s > self.search_s and known.planned.could_gain_s is not None:
            known.planned = self._searched(kinds)
        planned = known.planned
        if self.search_s and (not self._recent or self._recent[0] is not planned):
            others = [one for one in self._recent if one.pair != planned.pair]
            self._recent[:] = [planned, *others][:RECENT]
        return planned

    def _searched(self, kinds: Kinds) -> Planned:
        start_s = time.perf_counter()
        found = _faster(_plans(self, kinds))
        self.tally["searched"] += 1
        self.tally["search_us"] += round(1e6 * (time.perf_counter() - start_s))
        return found

    def _kinds(self, exchange: ExchangePlan) -> Kinds:
        """The kinds of one step that may run, plain first."""
        kind = step_kind(exchange, row_bytes=self.row_bytes, nodes=self.nodes,
                         host_bytes=self.expert_bytes[0] if self.offload else 0)  # fmt: skip
        if self.metadata is None:
            return (kind,)
        distinct = distinct_kind(kind, exchange, nodes=self.nodes, metadata=self.metadata)
        return (distinct,) if self.dedup == "on" else (kind, distinct)


def _drop_first(remembered: dict[Any, Any], most: int) -> None:
    """What has been in there longest goes where there is more than that."""
    if len(remembered) > most:
        del remembered[next(iter(remembered))]


def _plans(schedule: PlannedSchedule, kinds: Sequence[StepKind]) -> list[Planned]:
    """The plans of those kinds of which a schedule keeps within the budget; ConfigError where there is none."""
    found, errors = [], []
    for kind in kinds:
        try:
            found.append(_plan(schedule, kind))
        except ConfigError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _within(shapes: Sequence[StepShape], kind: StepKind, limit: int | None) -> list[StepShape]:
    """Those of which no more than `limit` bytes of experts are on the device at a time."""
    held = {shape.chunks: held_in_turns(kind.local_experts, shape.chunks) * kind.host_bytes for shape in shapes}
    if limit is not None and limit < min(held.values()):
        raise ConfigError("device_limit_bytes", limit, f"at least {min(held.values())}, what the smallest groups take")
    return [shape for shape in shapes if limit is None or held[shape.chunks] <= limit]


def _plan(schedule: PlannedSchedule, kind: StepKind) -> Planned:
    windows, budget = _windows(schedule, kind), schedule.max_in_flight_bytes
    candidates = {phase: search(one, max_in_flight_bytes=budget, limit=CONSIDERED) for phase, one in windows.items()}
    return _planned(schedule, kind, windows, candidates, _with_copies(schedule, kind, windows, candidates))


def _windows(schedule: PlannedSchedule, kind: StepKind) -> dict[Phase, Window]:
    shapes = _within(kind.shapes(), kind, schedule.device_limit_bytes)
    windows: dict[Phase, Window] = {}
    phases: tuple[Phase, ...] = ("forward", "backward") if kind.grad else ("forward",)
    for phase in phases:
        verb, num_ops = schedule.op_verb, schedule.num_ops
        if phase == "forward" and schedule.num_ahead:  # a shared expert is the one op that there is
            verb, num_ops = "B", num_ops - schedule.num_ahead if verb == "B" else 0
        windows[phase] = window(schedule.model, shapes, phase, op_verb=verb, num_ops=num_ops)
    return windows


def _with_copies(
    schedule: PlannedSchedule, kind: StepKind, windows: Mapping[Phase, Window], candidates: Candidates
) -> Candidates:
    """The candidates of those phases that have copies of experts, with these, best first."""
    wires_s = {phase: _copies_s(schedule, kind, phase) for phase in windows}
    return {
        phase: with_copies_priced(windows[phase], candidates[phase], forms) for phase, forms in wires_s.items() if forms
    }


def _planned(
    schedule: PlannedSchedule, kind: StepKind, windows: dict[Phase, Window], candidates: Candidates,
    copied: Candidates,
) -> Planned:  # fmt: skip
    """The plan of the first of these candidates, or of those with copies of experts."""
    chosen = candidates | copied
    pair = pair_of(
        chosen["forward"][0],
        chosen["backward"][0] if kind.grad else None,
        num_ops=schedule.num_ops,
        op_verb=schedule.op_verb,
        num_ahead=schedule.num_ahead,
    )
    check(pair)
    pair = pair if schedule.overlap else pair.join()
    if kind.copies is not None:
        pair = replace(pair, relayed_copies=chosen["forward"][0].relayed)
    outside_s = {phase: _outside_s(schedule, kind, phase) for phase in windows}
    return Planned(pair=pair, windows=windows, candidates=candidates, outside_s=outside_s, copied=copied)


def _copies_s(schedule: PlannedSchedule, kind: StepKind, phase: Phase) -> list[list[float]]:
    """Seconds of the exchanges of copies, in each form of them; nothing where there are none."""
    return [] if kind.copies is None else kind.copies.wires_s(schedule.model, phase, schedule.expert_bytes)


def _outside_s(schedule: PlannedSchedule, kind: StepKind, phase: Phase) -> float:
    model = schedule.model if kind.distinct is None else schedule.model.deduplicated
    return model.outside(phase, schedule.num_ops, op_verb=schedule.op_verb, num_ahead=schedule.num_ahead)


def _taken_over(schedule: PlannedSchedule, kinds: Kinds, plans: Sequence[Planned]) -> Planned | None:
    """The fastest of these plans in a step of other kinds, and what a search could gain there at most; None where none
    of them can run there."""
    found, least_s = list[tuple[float, StepKind, dict[Phase, Window], Candidates, Candidates]](), list[float]()
    for kind in kinds:
        try:
            windows = _windows(schedule, kind)
        except ConfigError:  # such a step cannot be planned: `_plans`
            continue
        least_s.append(sum(_least_s(schedule, kind, one) for one in windows.values()))
        outside_s = sum(_outside_s(schedule, kind, phase) for phase in windows)
        for plan in plans:
            if plan.pair.deduplicated == (kind.distinct is not None):
                if (candidates := _repriced(windows, plan, schedule.max_in_flight_bytes)) is not None:
                    copied = _with_copies(schedule, kind, windows, candidates)
                    seconds = outside_s + sum(one[0].predicted_s for one in (candidates | copied).values())
                    found.append((seconds, kind, windows, candidates, copied))
    if not found:
        return None
    seconds, kind, windows, candidates, copied = min(found, key=lambda one: one[0])
    best = _planned(schedule, kind, windows, candidates, copied)
    return replace(best, could_gain_s=max(0.0, seconds - min(least_s)))


def _repriced(windows: Mapping[Phase, Window], plan: Planned, budget: int | None) -> Candidates | None:
    """What a plan runs, as the one candidate of each of these windows, with its seconds there; None where a window
    lacks its cut, or the second half of the rows that stay, or the plan a phase, and where it holds too much."""
    candidates: Candidates = {}
    for phase, one in windows.items():
        if phase not in plan.candidates:
            return None
        best = plan.best(phase)
        cut = next((cut for cut in one.chunkings if (cut.chunks, cut.by) == (best.chunks, best.by)), None)
        if cut is None or ("Or" in best.order.split() and one.halves_s is None):
            return None
        held = in_flight_bytes(cut, best.joined)
        if budget is not None and held > budget:
            return None
        candidates[phase] = (replace(best, predicted_s=priced_s(one, best), in_flight_bytes=held, relayed=False),)
    return candidates


def _least_s(schedule: PlannedSchedule, kind: StepKind, one: Window) -> float:
    """Seconds that no schedule of a phase can beat, in any cut, with what lies outside."""
    copies_s = min((sum(groups_s) for groups_s in _copies_s(schedule, kind, one.phase)), default=0.0)
    beside_s = one.tail_s if one.phase == "forward" else one.head_s  # weights go ahead of the head, gradients come last
    inside_s = min(max(bound_s(one, cut), wire_of(one, cut) + copies_s + beside_s) for cut in one.chunkings)
    return inside_s + _outside_s(schedule, kind, one.phase)


def _faster(plans: list[Planned]) -> Planned:
    """The one plan, or the faster one of a plain and a deduplicated plan, with the other beside it; where they tie, the
    plain one. By their overlapped times, so that overlap on and off run the same rows."""
    if len(plans) == 1:
        return plans[0]
    plain, distinct = plans
    if distinct.predicted_s < plain.predicted_s * (1 - TIE):
        return replace(distinct, other=plain)
    return replace(plain, other=distinct)
