"""schedule="auto": from a cost model and the counts of a step to the schedules that run.

`PlannedSchedule` is a pure function of data that all ranks have alike: the model (fitted to gathered measurements) and
the agreed counts. To keep it one, and cheap, a step is reduced to a few rounded integers first (`StepKind`): the rows
and bytes of the busiest rank, and how its expert groups share them. Steps of the same kind get the same schedules, a
recompute too; routing that only fluctuates hardly leaves its kind, so most steps are not planned anew.

Where rows may be deduplicated a step has two kinds, plain and deduplicated, and the faster of both plans runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts, Nodes
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import digest
from moe_overlap.auto.calibrate import distinct_shape, gateways_keep, step_shape, travelling
from moe_overlap.auto.copied import CopiesKind, ExpertBytes, copies_kind
from moe_overlap.errors import ConfigError
from moe_overlap.planning.copied import with_copies_priced
from moe_overlap.planning.cost_model import CostModel, window
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import TIE, Candidate, search
from moe_overlap.planning.shapes import MetadataBytes, StepShape, experts_per_chunk, without_own
from moe_overlap.planning.window import OpVerb, Window
from moe_overlap.schedule.actions import Action, Phase
from moe_overlap.schedule.builders import SchedulePair, first_ops
from moe_overlap.schedule.check import check
from moe_overlap.schedule.offload import held_experts, sensible_groups

CUTS = (1, 2, 4, 8, BLOCKS)
GROUPS = (2, 4, 8)
REMEMBERED = 256  # kinds of steps whose schedules are kept
DIGITS = 5  # leading binary digits that rounding keeps: 3 % at most
SHARE_UNITS = 4  # an expert group's share of the rows is rounded to this part of an equal share


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was chosen for one kind of step, and from what: by phase the window and its candidates, best first, and what
    lies outside of it. `copied`: in a step with copies of experts the first candidates with these, best first. `other`:
    where both were looked at, what is not taken of the plain and the deduplicated plan."""

    pair: SchedulePair
    windows: dict[Phase, Window]
    candidates: dict[Phase, tuple[Candidate, ...]]
    outside_s: dict[Phase, float]
    copied: dict[Phase, tuple[Candidate, ...]] = field(default_factory=dict)
    other: Planned | None = None

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

    @property
    def ahead(self) -> tuple[Action, ...]:
        return first_ops(self.op_verb, self.num_ahead)

    @property
    def joined(self) -> bool:
        return not self.overlap


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
    most bytes of them on the device at a time, ConfigError where no number of groups keeps within it.
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
    _found: dict[tuple[StepKind, ...], Planned] = field(default_factory=dict, init=False, repr=False)
    tally: Counter[str] = field(default_factory=Counter, init=False, repr=False)  # "steps", and those "searched" for
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @cached_property
    def digest(self) -> int:
        settings = (self.num_ops, self.op_verb, self.row_bytes, self.nodes, self.overlap, self.max_in_flight_bytes)
        more = (self.dedup, self.metadata, self.num_ahead, self.expert_bytes, self.offload, self.device_limit_bytes)
        return digest("auto", self.model.to_json(), *settings, *more)

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """The schedules of one step: a pure function of the agreed counts."""
        self.tally["steps"] += 1
        return self.planned(exchange).pair

    def planned(self, exchange: ExchangePlan) -> Planned:
        """The schedules of one step, and what they were chosen from."""
        kinds = self._kinds(exchange)
        found = self._found.get(kinds)
        if found is None:
            self.tally["searched"] += 1
            if len(self._found) >= REMEMBERED:
                self._found.pop(next(iter(self._found)))
            found = self._found[kinds] = _faster(_plans(self, kinds))
        return found

    def _kinds(self, exchange: ExchangePlan) -> tuple[StepKind, ...]:
        """The kinds of one step that may run, plain first."""
        kind = step_kind(exchange, row_bytes=self.row_bytes, nodes=self.nodes,
                         host_bytes=self.expert_bytes[0] if self.offload else 0)  # fmt: skip
        if self.metadata is None:
            return (kind,)
        distinct = distinct_kind(kind, exchange, nodes=self.nodes, metadata=self.metadata)
        return (distinct,) if self.dedup == "on" else (kind, distinct)


Shares = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DistinctKind:
    """What a deduplicated step is known by besides. `own_rows`: of the busiest rank's experts, those that stay.
    `out_shares` and `back_shares`: as `StepKind.shares`, of the rows that travel with each group, and come back with
    it.
    """

    own_rows: int
    out_shares: tuple[Shares, ...]
    back_shares: tuple[Shares, ...]
    metadata: MetadataBytes
    inside: InsideKind | None = None


@dataclass(frozen=True, kw_only=True)
class InsideKind:
    """Of the rows that are passed on inside nodes: bytes of the busiest rank, and `out_shares` and `back_shares` as
    those of `DistinctKind`. `kept`: bytes that gateways keep from chunk to chunk, where there are several."""

    bytes: int
    kept: int
    out_shares: tuple[Shares, ...]
    back_shares: tuple[Shares, ...]


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What is planned from: all that a step's schedules depend on, rounded.

    `rows`: of the busiest rank's experts. `slots_rows`: T * K of the rank with most tokens. `bytes_by_lane`: what
    leaves or enters the busiest rank on each wire. `local_experts`: of a rank. `shares`: for every number of expert
    groups, the rows of each group over all ranks, in SHARE_UNITS-ths of an equal share. `distinct`: where the step is
    deduplicated; `rows` are then those of others, and the bytes those of distinct rows. `copies`: of experts.
    `host_bytes`: of an expert's weights, where they are in host memory; 0: they are on the device.
    """

    grad: bool
    rows: int
    slots_rows: int
    bytes_by_lane: tuple[tuple[str, int], ...]
    local_experts: int
    shares: tuple[tuple[int, ...], ...]
    row_bytes: int
    distinct: DistinctKind | None = None
    copies: CopiesKind | None = None
    host_bytes: int = 0

    def shapes(self) -> list[StepShape]:
        """The step, cut in every way that is considered: tokens into equal chunks, experts into groups. Where experts
        are in host memory tokens are not cut: each chunk would fetch all of them."""
        equal = [(1,) * chunks for chunks in (CUTS[:1] if self.host_bytes else CUTS)]
        travels = [self.shares] * 4
        if self.distinct is not None:
            both = (self.distinct, self.distinct.inside or self.distinct)
            travels = [shares for one in both for shares in (one.out_shares, one.back_shares)]
        by_tokens = [self._cut(shares, (shares,) * 4, "tokens") for shares in equal]
        return by_tokens + [
            self._cut(own, others, "experts") for own, *others in zip(self.shares, *travels, strict=True)
        ]

    def _cut(self, shares: Shares, travels: Sequence[Shares], by: ChunkBy) -> StepShape:
        """travels: shares of the rows that go and that come back, across and inside the nodes."""
        out, back, *inside = travels
        shape = StepShape(
            chunks=len(shares),
            by=by,
            rows=_parts(self.rows, shares),
            experts=experts_per_chunk(self.local_experts, len(shares), by),
            bytes_by_lane={lane: _parts(count, out) for lane, count in self.bytes_by_lane},
            slots_rows=self.slots_rows,
            row_bytes=self.row_bytes,
            expert_bytes=self.host_bytes,
        )
        if self.distinct is None:
            return shape
        passed_on = self.distinct.inside
        return without_own(
            shape,
            own_rows=self.distinct.own_rows,
            rows=shape.rows,
            out_by_lane=shape.bytes_by_lane,
            back_by_lane={lane: _parts(count, back) for lane, count in self.bytes_by_lane},
            metadata=self.distinct.metadata,
            inside=None
            if passed_on is None
            else (_parts(passed_on.bytes, inside[0]), _parts(passed_on.bytes, inside[1])),
            kept=0 if passed_on is None else passed_on.kept,
        )


def _parts(count: int, shares: Shares) -> tuple[int, ...]:
    """`count` in parts of these shares."""
    ends = list(accumulate(shares))
    cuts = [count * end // ends[-1] for end in ends]
    return tuple(after - before for before, after in pairwise([0, *cuts]))


def step_kind(exchange: ExchangePlan, *, row_bytes: int, nodes: Nodes | None, host_bytes: int = 0) -> StepKind:
    """The kind of a step: a pure function of the agreed counts. host_bytes: see `StepKind`."""
    whole = step_shape(exchange.chunked(1, "tokens"), row_bytes=row_bytes, nodes=nodes)
    local = exchange.num_slots // exchange.world_size
    return StepKind(
        grad=exchange.grad_enabled,
        rows=rounded(whole.rows[0]),
        slots_rows=rounded(whole.slots_rows),
        bytes_by_lane=tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items()),
        local_experts=local,
        shares=_all_shares(exchange.counts, exchange.world_size,
                           sensible_groups(local, BLOCKS)[1:] if host_bytes else GROUPS),
        row_bytes=row_bytes,
        copies=copies_kind(exchange, nodes),
        host_bytes=host_bytes,
    )  # fmt: skip


def distinct_kind(plain: StepKind, exchange: ExchangePlan, *, nodes: Nodes | None, metadata: MetadataBytes) -> StepKind:
    """The kind of a step that is deduplicated, from that of the plain one."""
    plan = exchange.chunked(1, "tokens")
    whole = distinct_shape(plan, row_bytes=plain.row_bytes, nodes=nodes, metadata=metadata)
    assert whole.distinct is not None
    inside, world, (first, last) = whole.distinct.inside, exchange.world_size, travelling(exchange)
    passed_on = None
    if inside is not None and exchange.node_rows is not None:
        out, back = (_all_shares(counts, world) for counts in exchange.node_rows.inside)
        kept = gateways_keep(exchange, whole.bytes_by_lane["inter"][0], plain.row_bytes)
        passed_on = InsideKind(bytes=rounded(sum(inside.out)), kept=rounded(kept), out_shares=out, back_shares=back)
    return replace(
        plain,
        rows=rounded(whole.rows[0]),
        bytes_by_lane=tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items()),
        distinct=DistinctKind(
            own_rows=rounded(whole.distinct.own_rows),
            out_shares=_all_shares(first, world),
            back_shares=_all_shares(last, world),
            metadata=metadata,
            inside=passed_on,
        ),
    )


def _all_shares(counts: Counts, world_size: int, cuts: Sequence[int] = GROUPS) -> tuple[Shares, ...]:
    """For every number of expert groups, the rows of each."""
    rows_of = counts.totals.reshape(world_size, -1).sum(axis=0)
    return tuple(_shares(rows_of, groups) for groups in cuts if groups <= len(rows_of))


def _shares(rows_of: np.ndarray, groups: int) -> Shares:
    """The rows of each group of a rank's experts; rows_of: int64 [e], of each expert over all ranks."""
    ends = np.cumsum(rows_of)[len(rows_of) * np.arange(1, groups + 1) // groups - 1]
    rows, total = np.diff(ends, prepend=0), int(rows_of.sum())
    shares = (2 * SHARE_UNITS * groups * rows + total) // max(1, 2 * total)
    return tuple(int(share) for share in shares) if shares.any() else (1,) * groups


def rounded(count: int) -> int:
    """`count` to its DIGITS leading binary digits.

    >>> rounded(1023), rounded(33), rounded(7)
    (1024, 34, 7)
    """
    unit = 1 << max(0, count.bit_length() - DIGITS)
    return (count + unit // 2) // unit * unit


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
    held = {shape.chunks: held_experts(kind.local_experts, shape.chunks) * kind.host_bytes for shape in shapes}
    if limit is not None and limit < min(held.values()):
        raise ConfigError("device_limit_bytes", limit, f"at least {min(held.values())}, what the smallest groups take")
    return [shape for shape in shapes if limit is None or held[shape.chunks] <= limit]


def _plan(schedule: PlannedSchedule, kind: StepKind) -> Planned:
    grad, shapes = kind.grad, _within(kind.shapes(), kind, schedule.device_limit_bytes)
    phases: tuple[Phase, ...] = ("forward", "backward") if grad else ("forward",)
    windows: dict[Phase, Window] = {}
    for phase in phases:
        verb, num_ops = schedule.op_verb, schedule.num_ops
        if phase == "forward" and schedule.num_ahead:  # a shared expert is the one op that there is
            verb, num_ops = "B", num_ops - schedule.num_ahead if verb == "B" else 0
        windows[phase] = window(schedule.model, shapes, phase, op_verb=verb, num_ops=num_ops)
    budget = schedule.max_in_flight_bytes
    candidates = {phase: search(found, max_in_flight_bytes=budget) for phase, found in windows.items()}
    copied: dict[Phase, tuple[Candidate, ...]] = {}
    for phase in phases:
        wires_s = [] if kind.copies is None else kind.copies.wires_s(schedule.model, phase, schedule.expert_bytes)
        if wires_s:
            copied[phase] = with_copies_priced(windows[phase], candidates[phase], wires_s)
    chosen = candidates | copied
    pair = pair_of(
        chosen["forward"][0],
        chosen["backward"][0] if grad else None,
        num_ops=schedule.num_ops,
        op_verb=schedule.op_verb,
        num_ahead=schedule.num_ahead,
    )
    check(pair)
    model = schedule.model if kind.distinct is None else schedule.model.deduplicated
    outside_s = {
        phase: model.outside(phase, schedule.num_ops, op_verb=schedule.op_verb, num_ahead=schedule.num_ahead)
        for phase in phases
    }
    pair = pair if schedule.overlap else pair.join()
    if kind.copies is not None:
        pair = replace(pair, relayed_copies=chosen["forward"][0].relayed)
    return Planned(pair=pair, windows=windows, candidates=candidates, outside_s=outside_s, copied=copied)


def _faster(plans: list[Planned]) -> Planned:
    """The one plan, or the faster one of a plain and a deduplicated plan, with the other beside it; where they tie, the
    plain one. By their overlapped times, so that overlap on and off run the same rows."""
    if len(plans) == 1:
        return plans[0]
    plain, distinct = plans
    if distinct.predicted_s < plain.predicted_s * (1 - TIE):
        return replace(distinct, other=plain)
    return replace(plain, other=distinct)
