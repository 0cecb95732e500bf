"""Which order of a window's actions is fastest: how the exchange is cut, and where the ops stand among the experts.

A schedule of a window has a head, `chunks` first exchanges, experts and second exchanges, a tail, and ops (and, in
backward, deferred weight gradients) that only have to lie between head and tail. Chunks are handled in order. What is
left to choose is small, for these reasons, each by moving one action and never making anything later:

1. Starting every first exchange right after the head is best. They are all available then, experts wait for them, and
   a second exchange that is overtaken delays nothing but the tail, which waits for the whole wire anyway. The proof
   takes `issue_s` = 0; with it, the optimum over all orders is at most (chunks - 1) * issue_s better.
2. A second exchange is best started right after its experts: whatever stands between only delays it.
3. Deferred work reads what the last experts write, so after these it and the remaining ops run in any order.

So a schedule is a cut and, for each chunk, how many ops stand before its experts (`ops_before`). A dynamic programme
over (chunks done, ops done) keeps every pair (compute time, wire time) that no other beats in both, which is exact:
both times only grow with what they started from. With a slowdown its figures are approximate (it runs at full and at
slowed speed). Every figure that leaves this module is an exact event simulation of the very schedule it stands beside.

Bytes in flight: an exchange holds its buffers from its start to the first action that reads it. The tail alone reads
the second exchanges, so at the end of any schedule all of them are held: no order needs less than the sum over the
chunks, and rule 1 needs no more. Only joining (waiting for every exchange where it starts) makes do with one chunk's.

"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from moe_overlap.errors import ConfigError
from moe_overlap.plan import ChunkBy
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule, dependencies
from moe_overlap.schedule.check import LANES, problems
from moe_overlap.schedule.simulate import simulate

__all__ = ["Candidate", "Chunking", "Slowdown", "Window", "evaluate", "search", "search_reference"]

# Verbs of head, first exchange, experts, second exchange and tail.
STAGES = {"forward": ("P", "D", "E", "C", "U"), "backward": ("Ut", "Ct", "Ed", "Dt", "Pt")}
# How many of the best interleavings of the dynamic programme are simulated.
SIMULATED = 4
# Predictions that differ by less, relative to the best, count as equal: rounding must not choose a schedule.
TIE = 1e-9

OpsBefore = tuple[int, ...]
# Predicted seconds, joined, ops_before.
Placement = tuple[float, bool, OpsBefore]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule of a window and what it is predicted to take.

    `joined`: every exchange is waited for where it starts (overlap off). `ops_before[c]`: how many ops stand before the
    experts of chunk c, never decreasing; the rest stands after the last. `order`: the schedule's text, for
    `Schedule.parse`. `in_flight_bytes`: the most that exchanges under way hold at once (0 where the window has no
    bytes).
    """

    chunks: int
    by: ChunkBy
    joined: bool
    ops_before: OpsBefore
    order: str
    predicted_s: float
    in_flight_bytes: int


def search(
    window: Window, *, max_in_flight_bytes: int | None = None, limit: int | None = None
) -> tuple[Candidate, ...]:
    """The schedules of `window` worth knowing, best first; at most `limit` of them.

    For every cut: joined (for one chunk that is "serial"), all of the first K ops before the experts for every K, and
    the best interleavings of the dynamic programme, of which the first is optimal where nothing slows down. Where
    predictions tie, joined serial comes first, then fewer chunks, then fewer runs of ops.

    ConfigError where no schedule keeps within `max_in_flight_bytes`, or where the window has no bytes to compare.
    """
    return search_reference(window, max_in_flight_bytes=max_in_flight_bytes, limit=limit)


def search_reference(
    window: Window, *, max_in_flight_bytes: int | None = None, limit: int | None = None
) -> tuple[Candidate, ...]:
    """`search` in plain Python: the definition the compiled one is tested against."""
    found = [(chunking, _placements(window, chunking)) for chunking in window.chunkings]
    return _ranked(window, found, max_in_flight_bytes, limit)


def evaluate(window: Window, schedule: Schedule, *, chunks: int, by: ChunkBy, joined: bool = False) -> float:
    """Predicted seconds of any schedule of this window, from the start of its head to the end of its tail.

    An exchange is three actions: its start (compute lane, `issue_s`), its transfer (wire, not before the start has
    ended) and the wait for it (compute lane, `issue_s`, right before the first action that reads it, or right after
    the start where `joined`). Otherwise a lane runs its actions one at a time, in the order of the schedule.

    ConfigError where the schedule cannot run, or has other ops or weight-gradient groups than the window.
    """
    chunking = window.chunking(chunks, by)
    found = problems(schedule, chunks=chunks)
    if found:
        raise ConfigError("schedule", schedule.text, f"one that can run: {found[0].message}")
    known, given = set(_order(window, chunking, (0,) * chunks).split()), {action.text for action in schedule}
    if known != given:
        expected = f"the actions of the window: {' '.join(sorted(known ^ given))} not in both"
        raise ConfigError("schedule", schedule.text, expected)
    return _makespan_s(window, chunking, schedule, joined)


def _makespan_s(window: Window, chunking: Chunking, schedule: Schedule, joined: bool) -> float:
    seconds = _seconds(window, chunking)
    lanes: list[int] = []
    durations_s: list[float] = []
    deps: list[list[int]] = []

    def add(lane: str, duration_s: float, *needs: int) -> int:
        lanes.append(LANES.index(lane))
        durations_s.append(duration_s)
        deps.append(list(needs))
        return len(lanes) - 1

    transfers: dict[int, int] = {}  # position of an exchange not yet waited for -> its number
    numbers: list[int] = []  # of what each position's readers need
    for position, (action, needs) in enumerate(zip(schedule, dependencies(schedule), strict=True)):
        for need in needs:
            if need in transfers and action.lane == "comp":
                numbers[need] = add("comp", window.issue_s, transfers.pop(need))
        needed = [numbers[need] for need in needs]
        if action.lane == "comp":
            numbers.append(add("comp", seconds[action.text], *needed))
            continue
        numbers.append(add(action.lane, seconds[action.text], add("comp", window.issue_s), *needed))
        if joined:
            numbers[position] = add("comp", window.issue_s, numbers[position])
        else:
            transfers[position] = numbers[position]
    slowdown = {LANES.index("comp"): window.slowdown.compute, LANES.index("wire"): window.slowdown.wire}
    return max(end_s for _, end_s in simulate(lanes, durations_s, deps, slowdown))


# ---------------------------------------------------------------- schedules of a window, as text


def _op_words(window: Window) -> list[str]:
    if window.op_verb == "S":
        return ["S" if window.phase == "forward" else "St"] * len(window.ops_s)
    names = [f"B{op}" if window.phase == "forward" else f"Bt{op}" for op in range(len(window.ops_s))]
    return names if window.phase == "forward" else names[::-1]


def _order(window: Window, chunking: Chunking, ops_before: OpsBefore) -> str:
    head, first, experts, second, tail = STAGES[window.phase]
    ops = _op_words(window)
    words = [head, *(f"{first}{c}" for c in range(chunking.chunks))]
    done = 0
    for c, before in enumerate(ops_before):
        words += [*ops[done:before], f"{experts}{c}", f"{second}{c}"]
        done = before
    return " ".join([*words, *(f"Ew{group}" for group in range(len(chunking.deferred_s))), *ops[done:], tail])


def _seconds(window: Window, chunking: Chunking) -> dict[str, float]:
    """Action text -> duration."""
    head, first, experts, second, tail = STAGES[window.phase]
    seconds = {head: window.head_s, tail: window.tail_s}
    for verb, durations_s in (
        (first, chunking.first_s),
        (experts, chunking.experts_s),
        (second, chunking.second_s),
        ("Ew", chunking.deferred_s),
    ):
        seconds |= {f"{verb}{index}": duration_s for index, duration_s in enumerate(durations_s)}
    return seconds | dict(zip(_op_words(window), window.ops_s, strict=True))


# ---------------------------------------------------------------- the search


def _placements(window: Window, chunking: Chunking) -> list[Placement]:
    """The candidates of one cut, simulated."""
    num_ops, chunks, slowdown = len(window.ops_s), chunking.chunks, window.slowdown
    orders = [(slot,) * chunks for slot in range(num_ops + 1)]
    orders += _best_interleavings(window, chunking, Slowdown())
    if slowdown != Slowdown():
        orders += _best_interleavings(window, chunking, slowdown)
    choices = [((0,) * chunks, True), *((order, False) for order in dict.fromkeys(orders))]
    return [
        (_makespan_s(window, chunking, Schedule.parse(_order(window, chunking, order)), joined), joined, order)
        for order, joined in choices
    ]


# Compute-lane time, wire time, runs of ops so far, ops_before of the chunks done.
Label = tuple[float, float, int, OpsBefore]


def _best_interleavings(window: Window, chunking: Chunking, factor: Slowdown) -> list[OpsBefore]:
    """The best `ops_before` when every duration of a lane is multiplied by its factor."""
    issue_s, num_ops = window.issue_s * factor.compute, len(window.ops_s)
    comp_s = wire_s = 0.0
    arrived_s = []
    for first_s in chunking.first_s:
        comp_s += issue_s
        wire_s = max(wire_s, comp_s) + first_s * factor.wire
        arrived_s.append(wire_s)
    labels: list[list[Label]] = [[] for _ in range(num_ops + 1)]  # by ops done
    labels[0] = [(comp_s, wire_s, 0, ())]
    for c, arrival_s in enumerate(arrived_s):
        for op, op_s in enumerate(window.ops_s):
            later = [(comp_s + op_s * factor.compute, *rest) for comp_s, *rest in labels[op]]
            labels[op + 1] = _unbeaten([*labels[op + 1], *later])  # type: ignore[list-item]
        experts_s, second_s = chunking.experts_s[c] * factor.compute, chunking.second_s[c] * factor.wire
        for done in range(num_ops + 1):
            after: list[Label] = []
            for comp_s, wire_s, switches, before in labels[done]:
                end_s = max(comp_s, arrival_s) + issue_s + experts_s + issue_s
                switched = switches + (done > (before[-1] if before else 0))
                after.append((end_s, max(wire_s, end_s) + second_s, switched, (*before, done)))
            labels[done] = _unbeaten(after)
    ends: list[tuple[float, int, OpsBefore]] = []
    for done in range(num_ops + 1):
        for comp_s, wire_s, switches, before in labels[done]:
            for left_s in (*window.ops_s[done:], *chunking.deferred_s):
                comp_s += left_s * factor.compute
            ends.append((max(comp_s, wire_s), switches + (done < num_ops), before))
    return [before for _, _, before in sorted(ends)[:SIMULATED]]


def _unbeaten(labels: list[Label]) -> list[Label]:
    """Those for which no other is as early or earlier on both lanes."""
    kept: list[Label] = []
    for label in sorted(labels):
        if not kept or label[1] < kept[-1][1]:
            kept.append(label)
    return kept


def _switches(ops_before: OpsBefore, num_ops: int) -> int:
    """How many runs of ops there are: between experts, and after the last."""
    return sum(after > before for before, after in pairwise((0, *ops_before, num_ops)))


def _ranked(
    window: Window,
    found: Iterable[tuple[Chunking, list[Placement]]],
    max_in_flight_bytes: int | None,
    limit: int | None,
) -> tuple[Candidate, ...]:
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "at least 1")
    entries = [
        (chunking, placement, _in_flight_bytes(chunking, placement[1]))
        for chunking, placements in found
        for placement in placements
    ]
    if max_in_flight_bytes is not None:
        if not all(chunking.chunk_bytes for chunking in window.chunkings):
            raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, "None: a chunking has no chunk_bytes")
        least = min(held for _, _, held in entries)
        entries = [entry for entry in entries if entry[2] <= max_in_flight_bytes]
        if not entries:
            expected = f"at least {least}, what the smallest cut holds when every exchange is joined"
            raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, expected)
    best_s = min(placement[0] for _, placement, _ in entries)

    def rank(entry: tuple[Chunking, Placement, int]) -> tuple[object, ...]:
        chunking, (predicted_s, joined, ops_before), _ = entry
        ratio = round((predicted_s - best_s) / best_s / TIE) if best_s > 0 else predicted_s
        switches = _switches(ops_before, len(window.ops_s))
        return ratio, not (joined and chunking.chunks == 1), chunking.chunks, switches, chunking.by, joined, ops_before

    return tuple(
        Candidate(
            chunks=chunking.chunks,
            by=chunking.by,
            joined=joined,
            ops_before=tuple(ops_before),
            order=_order(window, chunking, ops_before),
            predicted_s=predicted_s,
            in_flight_bytes=held,
        )
        for chunking, (predicted_s, joined, ops_before), held in sorted(entries, key=rank)[:limit]
    )


def _in_flight_bytes(chunking: Chunking, joined: bool) -> int:
    """One chunk's where every exchange is joined; else all, as the module says."""
    return max(chunking.chunk_bytes, default=0) if joined else sum(chunking.chunk_bytes)
