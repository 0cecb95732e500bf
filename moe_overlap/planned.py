"""schedule="auto": from a cost model and the counts of a step to the schedules that run.

`PlannedSchedule` is a pure function of data that all ranks have alike: the model (fitted to gathered measurements) and
the agreed counts. To keep it one, and cheap, a step is reduced to a few rounded integers first: the rows and bytes of
the busiest rank, in equal chunks of tokens, and in each expert group. The same integers give the same schedules, in a
recompute too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from moe_overlap.measure.calibrate import Nodes, step_shape
from moe_overlap.plan import BLOCKS, ChunkBy, ExchangePlan, digest
from moe_overlap.planning.cost_model import CostModel, StepShape, window
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
    """The fastest schedules by `model`, for each step (the `Schedules` of `dispatch.py`).

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
    _found: dict[tuple[object, ...], Planned] = field(default_factory=dict, init=False, repr=False)
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

        def reduced(chunks: int, by: ChunkBy) -> StepShape:
            shape = step_shape(exchange.chunked(chunks, by), row_bytes=self.row_bytes, nodes=self.nodes)
            return replace(
                shape,
                rows=tuple(map(rounded, shape.rows)),
                bytes_by_lane={lane: tuple(map(rounded, counts)) for lane, counts in shape.bytes_by_lane.items()},
                slots_rows=rounded(shape.slots_rows),
            )

        local = exchange.num_slots // exchange.world_size
        whole = reduced(1, "tokens")
        shapes = [even_shape(whole, chunks) for chunks in CUTS]
        shapes += [reduced(groups, "experts") for groups in GROUPS if groups <= local]
        key = tuple((s.rows, s.slots_rows, *s.bytes_by_lane.values()) for s in shapes[len(CUTS) - 1 :])
        found = self._found.get((exchange.grad_enabled, key))
        if found is None:
            if len(self._found) >= REMEMBERED:
                self._found.pop(next(iter(self._found)))
            found = self._found[exchange.grad_enabled, key] = _plan(self, shapes, exchange.grad_enabled)
        return found


def rounded(count: int) -> int:
    """`count` to its DIGITS leading binary digits.

    >>> rounded(1023), rounded(33), rounded(7)
    (1024, 34, 7)
    """
    unit = 1 << max(0, count.bit_length() - DIGITS)
    return (count + unit // 2) // unit * unit


def even_shape(whole: StepShape, chunks: int) -> StepShape:
    """The step of one chunk, cut into equal chunks of tokens."""
    return replace(
        whole,
        chunks=chunks,
        rows=_even(whole.rows[0], chunks),
        experts=whole.experts * chunks,
        bytes_by_lane={lane: _even(counts[0], chunks) for lane, counts in whole.bytes_by_lane.items()},
    )


def _even(count: int, chunks: int) -> tuple[int, ...]:
    return tuple(count * (c + 1) // chunks - count * c // chunks for c in range(chunks))


def _plan(schedule: PlannedSchedule, shapes: Sequence[StepShape], grad: bool) -> Planned:
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
