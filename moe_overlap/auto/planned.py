"""schedule="auto": from a cost model and the counts of a step to the schedules that run.

`PlannedSchedule` is a pure function of data that all ranks have alike: the model (fitted to gathered measurements) and
the agreed counts. To keep it one, and cheap, a step is reduced to a few rounded integers first (`StepKind`): the rows
and bytes of the busiest rank, and how its expert groups share them. Steps of the same kind get the same schedules, a
recompute too; routing that only fluctuates hardly leaves its kind, so most steps are not planned anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.record import digest
from moe_overlap.auto.calibrate import Nodes, step_shape
from moe_overlap.planning.cost_model import CostModel, StepShape, experts_per_chunk, window
from moe_overlap.planning.search import Candidate, search
from moe_overlap.planning.window import OpVerb, Window
from moe_overlap.schedule.actions import Phase, Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked
from moe_overlap.schedule.builders import window as shortcut_window
from moe_overlap.schedule.check import check

CUTS = (1, 2, 4, 8, BLOCKS)
GROUPS = (2, 4, 8)
REMEMBERED = 256  # kinds of steps whose schedules are kept
DIGITS = 5  # leading binary digits that rounding keeps: 3 % at most
SHARE_UNITS = 4  # an expert group's share of the rows is rounded to this part of an equal share


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was chosen for one kind of step, and from what: by phase the window and its candidates, best first."""

    pair: SchedulePair
    windows: dict[Phase, Window]
    candidates: dict[Phase, tuple[Candidate, ...]]

    @property
    def predicted_s(self) -> float:
        """Seconds of the windows of the phases that were planned."""
        return sum(found[0].predicted_s for found in self.candidates.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSchedule:
    """The fastest schedules by `model`, for each step (`Schedules`).

    op_verb "B": `num_ops` backbone ops beside the exchanges; "S": the shared expert; num_ops 0: nothing.
    `overlap=False` joins every exchange of what was chosen. max_in_flight_bytes: the most that exchanges under way may
    hold in buffers on one rank; ConfigError in a step of which no schedule keeps within it.
    """

    model: CostModel
    num_ops: int
    op_verb: OpVerb = "B"
    row_bytes: int
    nodes: Nodes | None = None
    overlap: bool = True
    max_in_flight_bytes: int | None = None
    _found: dict[StepKind, Planned] = field(default_factory=dict, init=False, repr=False)
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @cached_property
    def digest(self) -> int:
        settings = (self.num_ops, self.op_verb, self.row_bytes, self.nodes, self.overlap, self.max_in_flight_bytes)
        return digest("auto", self.model.to_json(), *settings)

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """The schedules of one step: a pure function of the agreed counts."""
        return self.planned(exchange).pair

    def planned(self, exchange: ExchangePlan) -> Planned:
        """The schedules of one step, and what they were chosen from."""
        kind = step_kind(exchange, row_bytes=self.row_bytes, nodes=self.nodes)
        found = self._found.get(kind)
        if found is None:
            if len(self._found) >= REMEMBERED:
                self._found.pop(next(iter(self._found)))
            found = self._found[kind] = _plan(self, kind)
        return found


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What is planned from: all that a step's schedules depend on, rounded.

    `rows`: of the busiest rank's experts. `slots_rows`: T * K of the rank with most tokens. `bytes_by_lane`: what
    leaves or enters the busiest rank on each wire. `local_experts`: of a rank. `shares`: for every number of expert
    groups, the rows of each group over all ranks, in SHARE_UNITS-ths of an equal share.
    """

    grad: bool
    rows: int
    slots_rows: int
    bytes_by_lane: tuple[tuple[str, int], ...]
    local_experts: int
    shares: tuple[tuple[int, ...], ...]
    row_bytes: int

    def shapes(self) -> list[StepShape]:
        """The step, cut in every way that is considered: tokens into equal chunks, experts into groups."""
        by_tokens = [self._cut((1,) * chunks, "tokens") for chunks in CUTS]
        return by_tokens + [self._cut(shares, "experts") for shares in self.shares]

    def _cut(self, shares: tuple[int, ...], by: ChunkBy) -> StepShape:
        ends = list(accumulate(shares))

        def parts(count: int) -> tuple[int, ...]:
            cuts = [count * end // ends[-1] for end in ends]
            return tuple(after - before for before, after in pairwise([0, *cuts]))

        return StepShape(
            chunks=len(shares),
            by=by,
            rows=parts(self.rows),
            experts=experts_per_chunk(self.local_experts, len(shares), by),
            bytes_by_lane={lane: parts(count) for lane, count in self.bytes_by_lane},
            slots_rows=self.slots_rows,
            row_bytes=self.row_bytes,
        )


def step_kind(exchange: ExchangePlan, *, row_bytes: int, nodes: Nodes | None) -> StepKind:
    """The kind of a step: a pure function of the agreed counts."""
    whole = step_shape(exchange.chunked(1, "tokens"), row_bytes=row_bytes, nodes=nodes)
    local = exchange.num_slots // exchange.world_size
    rows_of = exchange.counts.totals.reshape(exchange.world_size, local).sum(axis=0)
    return StepKind(
        grad=exchange.grad_enabled,
        rows=rounded(whole.rows[0]),
        slots_rows=rounded(whole.slots_rows),
        bytes_by_lane=tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items()),
        local_experts=local,
        shares=tuple(_shares(rows_of, groups) for groups in GROUPS if groups <= local),
        row_bytes=row_bytes,
    )


def _shares(rows_of: np.ndarray, groups: int) -> tuple[int, ...]:
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


def _plan(schedule: PlannedSchedule, kind: StepKind) -> Planned:
    grad, shapes = kind.grad, kind.shapes()
    phases: tuple[Phase, ...] = ("forward", "backward") if grad else ("forward",)
    windows: dict[Phase, Window] = {}
    for phase in phases:
        windows[phase] = window(schedule.model, shapes, phase, op_verb=schedule.op_verb, num_ops=schedule.num_ops)
    budget = schedule.max_in_flight_bytes
    candidates = {phase: search(found, max_in_flight_bytes=budget) for phase, found in windows.items()}
    pair = pair_of(
        candidates["forward"][0],
        candidates["backward"][0] if grad else None,
        num_ops=schedule.num_ops,
        op_verb=schedule.op_verb,
    )
    check(pair)
    return Planned(pair=pair if schedule.overlap else pair.join(), windows=windows, candidates=candidates)


def pair_of(forward: Candidate, backward: Candidate | None, *, num_ops: int, op_verb: OpVerb) -> SchedulePair:
    """The pair that runs two candidates; without one for backward, the mirror with the same chunks."""
    joined = forward.joined and (backward is None or backward.joined)
    if op_verb == "S":
        mirror = chunked(forward.chunks, forward.by, shared=True)
    elif num_ops:
        mirror = shortcut_window(num_ops, num_ops // 2, chunks=forward.chunks, by=forward.by)
    else:
        mirror = chunked(forward.chunks, forward.by)
    return SchedulePair(
        name="auto",
        forward=_schedule(forward, joined, "C", "U"),
        backward=mirror.backward if backward is None else _schedule(backward, joined, "Dt", "Pt"),
        chunks=forward.chunks,
        by=forward.by,
        backward_chunks=forward.chunks if backward is None else backward.chunks,
        backward_by=forward.by if backward is None else backward.by,
        joined=joined,
    )


def _schedule(candidate: Candidate, joined: bool, last: str, tail: str) -> Schedule:
    """The candidate's schedule. Where it is joined and the other phase's is not, its tail moves to right behind the
    last exchange: then nothing stands beside the exchanges, which is the same."""
    words = candidate.order.split()
    if candidate.joined and not joined:
        words.remove(tail)
        behind = max(position for position, word in enumerate(words) if word.rstrip("0123456789") == last)
        words.insert(behind + 1, tail)
    return Schedule.parse(" ".join(words))
