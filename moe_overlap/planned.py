"""schedule="auto": from a cost model and the counts of a step to the schedules that run.

`PlannedSchedule` is a pure function of data that all ranks have alike: the model (fitted to gathered measurements) and
the agreed counts. To keep it one, and cheap, a step is reduced to a few rounded integers first: the rows and bytes of
the busiest rank, in equal chunks. The same integers give the same schedules, in a recompute too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from moe_overlap.measure.calibrate import NodeOf, step_shape
from moe_overlap.plan import BLOCKS, ChunkBy, ExchangePlan, digest
from moe_overlap.planning.cost_model import CostModel, StepShape, window
from moe_overlap.planning.search import Candidate, search
from moe_overlap.planning.window import OpVerb, Window
from moe_overlap.schedule.actions import Phase, Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked
from moe_overlap.schedule.builders import window as shortcut_window
from moe_overlap.schedule.check import check

CUTS = (1, 2, 4, 8, BLOCKS)
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
    `overlap=False` joins every exchange of what was chosen.
    """

    model: CostModel
    num_ops: int
    op_verb: OpVerb = "B"
    row_bytes: int
    node_of: NodeOf | None = None
    overlap: bool = True
    chunks: int = field(default=0, init=False)
    by: ChunkBy = field(default="tokens", init=False)

    @cached_property
    def digest(self) -> int:
        return digest("auto", self.model.to_json(), self.num_ops, self.op_verb, self.row_bytes, self.overlap)

    def pair_for(self, exchange: ExchangePlan) -> SchedulePair:
        """The schedules of one step: a pure function of the agreed counts."""
        return self.planned(exchange).pair

    def planned(self, exchange: ExchangePlan) -> Planned:
        """The schedules of one step, and what they were chosen from."""
        whole = step_shape(exchange.chunked(1), row_bytes=self.row_bytes, node_of=self.node_of)
        lanes = tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items())
        return _plan(self, rounded(whole.rows[0]), lanes, rounded(whole.slots_rows), exchange.grad_enabled)


def rounded(count: int) -> int:
    """`count` to its DIGITS leading binary digits.

    >>> rounded(1023), rounded(33), rounded(7)
    (1024, 34, 7)
    """
    unit = 1 << max(0, count.bit_length() - DIGITS)
    return (count + unit // 2) // unit * unit


def even_shape(
    chunks: int, rows: int, lanes: tuple[tuple[str, int], ...], slots_rows: int, row_bytes: int
) -> StepShape:
    """A step of so many rows and bytes on the busiest rank, in equal chunks of tokens."""
    return StepShape(
        chunks=chunks,
        by="tokens",
        rows=_even(rows, chunks),
        bytes_by_lane={lane: _even(count, chunks) for lane, count in lanes},
        slots_rows=slots_rows,
        row_bytes=row_bytes,
    )


def _even(count: int, chunks: int) -> tuple[int, ...]:
    return tuple(count * (c + 1) // chunks - count * c // chunks for c in range(chunks))


@lru_cache(maxsize=256)
def _plan(
    schedule: PlannedSchedule, rows: int, lanes: tuple[tuple[str, int], ...], slots_rows: int, grad: bool
) -> Planned:
    shapes = [even_shape(chunks, rows, lanes, slots_rows, schedule.row_bytes) for chunks in CUTS]
    phases: tuple[Phase, ...] = ("forward", "backward") if grad else ("forward",)
    windows: dict[Phase, Window] = {}
    for phase in phases:
        ops = 0 if schedule.op_verb == "S" else schedule.num_ops
        windows[phase] = window(schedule.model, shapes, phase, op_verb=schedule.op_verb, num_ops=ops)
    candidates = {phase: search(found) for phase, found in windows.items()}
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
