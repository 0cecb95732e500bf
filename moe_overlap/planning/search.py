"""Which order of a window's actions is fastest: how the exchange is cut, in which order the chunks are taken, and where
the ops stand among their experts.

A schedule of a window has a head, for every chunk a first exchange, experts and a second exchange, a tail, and ops
(and, in backward, deferred weight gradients) that only have to lie between head and tail. What is left to choose is
small, for these reasons, each by moving or swapping actions so that nothing that counts gets later:

1. Starting every first exchange right after the head is best. They are all available then, experts wait for them, and
   a second exchange that is overtaken delays nothing but the tail, which waits for the whole wire anyway. The proof
   takes `issue_s` = 0; with it, some other order may be better by at most 2 * (chunks - 1) * issue_s.
2. One order of the chunks serves first exchanges, experts and second exchanges alike: two neighbours of the wire that
   the experts take the other way round can be swapped (as in a permutation flow shop).
3. A second exchange is best started right after its experts: whatever stands between only delays it.
4. Deferred work reads what the last experts write, so after these it and the remaining ops run in any order (but for
   Od, which deferred work reads too and which therefore comes before it).

Three rules of deduplicated steps are choices: the rows that stay (O, Od) are the first of the ops, as FasterMoE's
(PPoPP'22), though another op might fit a gap better; if one half of the experts is left for later (Or), it is deferred
work; and chunks are taken in their own order, as a row arrives with the first group of experts that needs it and leaves
with the last.

So a schedule is a cut, an order of its chunks (`chunk_order`) and, for each of them, how many ops stand before its
experts (`ops_before`). `interleavings.py` finds the best of these: exactly for equal chunks and for up to 4, by a
heuristic over the chunk orders beyond, and approximately where lanes slow each other down. Every figure that leaves
this module is an exact simulation of the very schedule it stands beside.

Where experts are in host memory, their copies stand where `schedule/offload.py` puts them, in every candidate; chunks
are taken in their own order, as the weights come up in it. The choices that are left are proposed as if a chunk's rows
came as late as its weights do, and each is simulated with its copies. This runs in Python on either core.

Bytes in flight: an exchange holds its buffers from its start to the first action that reads it. The tail alone reads
the second exchanges, so at the end of any schedule all of them are held: no order needs less than the sum over the
chunks, and rule 1 needs no more. Only joining (waiting for every exchange where it starts) makes do with one chunk's.

The compiled search (csrc/core/search.cpp) and the reference here give the same doubles. With a limit it leaves out
what bounds show to be slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.planning.interleavings import OpsBefore, Order, best_interleavings, metadata_of
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule, dependencies
from moe_overlap.schedule.check import LANES, problems
from moe_overlap.schedule.offload import half_with_host_experts
from moe_overlap.schedule.simulate import simulate

__all__ = ["Candidate", "Chunking", "Slowdown", "Window", "cut_arguments", "evaluate", "joined_form", "search",
           "search_reference", "timeline"]  # fmt: skip

# Verbs of head, first exchange, experts, second exchange and tail.
STAGES = {"forward": ("P", "D", "E", "C", "U"), "backward": ("Ut", "Ct", "Ed", "Dt", "Pt")}
# And of a deduplicated step: the rows that stay, and the ids and weights of those that travel.
DISTINCT = {"forward": ("O", "M"), "backward": ("Od", "Mt")}
# Predictions that differ by less, relative to the best, count as equal: rounding must not choose a schedule.
TIE = 1e-9
FAR = 1e18  # in units of TIE; keeps the quotient of tiny times an integer

# Predicted seconds, joined, chunk_order, ops_before.
Placement = tuple[float, bool, Order, OpsBefore]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule of a window and what it is predicted to take.

    `joined`: every exchange is waited for where it starts (overlap off). `chunk_order`: the chunks as they are taken.
    `ops_before[i]`: how many ops stand before the experts of the i-th chunk taken, never decreasing; the rest stands
    after the last. `order`: the schedule's text, for `Schedule.parse`. `in_flight_bytes`: the most that exchanges under
    way hold at once (0 where the window has no bytes). `relayed`: of a step with copies of experts, which go from rank
    to rank (`planning/copied.py`).
    """

    chunks: int
    by: ChunkBy
    joined: bool
    chunk_order: Order
    ops_before: OpsBefore
    order: str
    predicted_s: float
    in_flight_bytes: int
    relayed: bool = False


def search(
    window: Window, *, max_in_flight_bytes: int | None = None, limit: int | None = None
) -> tuple[Candidate, ...]:
    """The schedules of `window` worth knowing, best first; at most `limit` of them.

    For every cut, and with Or where the window allows it: joined (for one chunk that is "serial"), all of the first K
    ops before the experts for every K, and the best interleavings of the dynamic programme, of which the best is
    optimal where nothing slows down, `issue_s` is 0 and chunks are equal or at most 4. Where predictions tie, joined
    serial comes first, then fewer chunks, chunks in their own order, and fewer runs of ops.

    ConfigError where no schedule keeps within `max_in_flight_bytes`, or where the window has no bytes to compare.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "at least 1")
    planner = None if window.in_host_memory else native.planner()
    if planner is None:
        return search_reference(window, max_in_flight_bytes=max_in_flight_bytes, limit=limit)
    asked = _asked(window, max_in_flight_bytes)
    cuts = [(planner.Cut(*cut_arguments(one.form, one.chunking)), one.joined, one.overlapped) for one in asked]
    return _ranked(window, list(zip(asked, planner.search(cuts, limit or 0), strict=True)), limit)


def search_reference(
    window: Window, *, max_in_flight_bytes: int | None = None, limit: int | None = None
) -> tuple[Candidate, ...]:
    """`search` in plain Python: the definition the compiled one is tested against."""
    asked = _asked(window, max_in_flight_bytes)
    return _ranked(window, [(one, _placements(one)) for one in asked], limit)


def evaluate(window: Window, schedule: Schedule, *, chunks: int, by: ChunkBy, joined: bool = False) -> float:
    """Predicted seconds of any schedule of this window, from the start of its head to the end of its tail.

    An exchange, or a copy of experts from or to the host's memory, is three actions: its start (compute lane,
    `issue_s`), its transfer (a lane of its own, not before the start has ended) and the wait for it (compute lane,
    `issue_s`, right before the first action that reads it, or right after the start where `joined`). Otherwise a lane
    runs its actions one at a time, in the order of the schedule.

    ConfigError where the schedule cannot run, or has other ops or weight-gradient groups than the window.
    """
    return max(end_s for _, end_s in timeline(window, schedule, chunks=chunks, by=by, joined=joined))


def timeline(
    window: Window, schedule: Schedule, *, chunks: int, by: ChunkBy, joined: bool = False
) -> list[tuple[float, float]]:
    """(start_s, end_s) of every action of `schedule`, in its order: what `evaluate` takes the maximum of.

    An exchange's interval is its transfer; the time of starting it and of waiting for it is no action's. ConfigError as
    for `evaluate`.
    """
    window = window.form_of(schedule.text)
    chunking = window.chunking(chunks, by)
    found = problems(schedule, chunks=chunks)
    if found:
        raise ConfigError("schedule", schedule.text, f"one that can run: {found[0].message}")
    known = set(_CutWords.of(window, chunking).order(tuple(range(chunks)), (0,) * chunks).split())
    given = {action.text for action in schedule}
    if known != given:
        expected = f"the actions of the window: {' '.join(sorted(known ^ given))} not in both"
        raise ConfigError("schedule", schedule.text, expected)
    return simulated(window, chunking, schedule, joined)


def simulated(
    window: Window,
    chunking: Chunking,
    schedule: Schedule,
    joined: bool,
    more_s: Mapping[str, float] | None = None,
) -> list[tuple[float, float]]:
    """As `timeline`, of a schedule that is known to be of this window and cut. more_s: seconds of actions that no
    window has, by their text."""
    seconds = _seconds(window, chunking) | dict(more_s or {})
    lanes: list[int] = []
    durations_s: list[float] = []
    deps: list[list[int]] = []

    def add(lane: str, duration_s: float, *needs: int) -> int:
        lanes.append(LANES.index(lane))
        durations_s.append(duration_s)
        deps.append(list(needs))
        return len(lanes) - 1

    own: list[int] = []  # the number of each position's own action
    ready: list[int] = []  # and of what its readers need: of an exchange, the wait for it
    pending: set[int] = set()  # positions of exchanges that are not waited for yet
    for position, (action, needs) in enumerate(zip(schedule, dependencies(schedule), strict=True)):
        for need in needs:
            if need in pending:  # also where an exchange reads another one's result (Wf1)
                pending.remove(need)
                ready[need] = add("comp", window.issue_s, own[need])
        needed = [ready[need] for need in needs]
        if action.lane == "comp":
            own.append(add("comp", seconds[action.text], *needed))
            ready.append(own[-1])
            continue
        own.append(add(action.lane, seconds[action.text], add("comp", window.issue_s), *needed))
        ready.append(add("comp", window.issue_s, own[-1]) if joined else own[-1])
        if not joined:
            pending.add(position)
    slowdown = {LANES.index("comp"): window.slowdown.compute, LANES.index("wire"): window.slowdown.wire}
    times = simulate(lanes, durations_s, deps, slowdown)
    return [times[number] for number in own]


def joined_form(window: Window, candidate: Candidate) -> Candidate:
    """The same schedule of `window` with every exchange joined where it starts (overlap off)."""
    schedule = Schedule.parse(candidate.order)
    predicted_s = evaluate(window, schedule, chunks=candidate.chunks, by=candidate.by, joined=True)
    held = in_flight_bytes(window.chunking(candidate.chunks, candidate.by), joined=True)
    return replace(candidate, joined=True, predicted_s=predicted_s, in_flight_bytes=held)


# ---------------------------------------------------------------- schedules of a window, as text


def _op_words(window: Window) -> list[str]:
    own = [DISTINCT[window.phase][0]] if window.deduplicated else []
    count = len(window.user_ops_s)
    if window.op_verb == "S":
        return own + ["S" if window.phase == "forward" else "St"] * count
    names = [f"B{op}" if window.phase == "forward" else f"Bt{op}" for op in range(count)]
    return own + (names if window.phase == "forward" else names[::-1])


class _Asked(NamedTuple):
    """A cut of a form of a window; of its schedules the joined one, the others, or both."""

    form: Window
    chunking: Chunking
    joined: bool
    overlapped: bool


def _asked(window: Window, max_in_flight_bytes: int | None) -> list[_Asked]:
    """What is searched: all that keeps within the budget."""
    if max_in_flight_bytes is not None and not all(chunking.chunk_bytes for chunking in window.chunkings):
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, "None: a chunking has no chunk_bytes")

    def fits(chunking: Chunking, joined: bool) -> bool:
        return max_in_flight_bytes is None or in_flight_bytes(chunking, joined) <= max_in_flight_bytes

    # Joined, nothing is beside the exchanges, so nothing is left for later: the other form is the same.
    every = [
        _Asked(form, chunking, form is window and fits(chunking, True), fits(chunking, False))
        for form in window.forms
        for chunking in form.chunkings
    ]
    asked = [one for one in every if one.joined or one.overlapped]
    if not asked:
        least = min(in_flight_bytes(chunking, joined=True) for chunking in window.chunkings)
        expected = f"at least {least}, what the smallest cut holds when every exchange is joined"
        raise ConfigError("max_in_flight_bytes", max_in_flight_bytes, expected)
    return asked


@dataclass(frozen=True, kw_only=True)
class _CutWords:
    """The words of every schedule of one cut of a window."""

    window: Window
    head: list[str]
    first: list[str]
    experts: list[str]
    second: list[str]
    last: list[str]
    deferred: list[str]
    ops: list[str]

    @classmethod
    def of(cls, window: Window, chunking: Chunking) -> _CutWords:
        head, *verbs, _ = STAGES[window.phase]
        ahead, last = ([DISTINCT[window.phase][1]] * len(part) for part in metadata_of(window))
        first, experts, second = ([f"{verb}{chunk}" for chunk in range(chunking.chunks)] for verb in verbs)
        return cls(window=window, head=[head, *ahead], first=first, experts=experts, second=second, last=last,
                   deferred=_deferred_words(window, chunking), ops=_op_words(window))  # fmt: skip

    def order(self, chunk_order: Order, ops_before: OpsBefore) -> str:
        """The text of one schedule."""
        words = [*self.head, *(self.first[chunk] for chunk in chunk_order)]
        done, chunks = 0, len(chunk_order)
        for place, (chunk, before) in enumerate(zip(chunk_order, ops_before, strict=True), start=1):
            words += self.ops[done:before]
            words.append(self.experts[chunk])
            if place == chunks:
                words += self.last
            words.append(self.second[chunk])
            done = before
        if self.window.deduplicated and not done:  # deferred work reads what Od writes
            words.append(self.ops[0])
            done = 1
        text = " ".join([*words, *self.deferred, *self.ops[done:], STAGES[self.window.phase][-1]])
        if not self.window.in_host_memory:
            return text
        return half_with_host_experts(Schedule.parse(text), self.window.phase, chunks).text


def _deferred_words(window: Window, chunking: Chunking) -> list[str]:
    if window.phase == "forward":
        return ["Or"] * len(chunking.deferred_s)
    return [f"Ew{group}" for group in range(len(chunking.deferred_s))]


def _seconds(window: Window, chunking: Chunking) -> dict[str, float]:
    """Action text -> duration."""
    head, first, experts, second, tail = STAGES[window.phase]
    seconds = {head: window.head_s, tail: window.tail_s}
    if window.metadata_s is not None:
        seconds[DISTINCT[window.phase][1]] = window.metadata_s
    for verb, durations_s in (
        (first, chunking.first_s),
        (experts, chunking.experts_s),
        (second, chunking.second_s),
    ):
        seconds |= {f"{verb}{index}": duration_s for index, duration_s in enumerate(durations_s)}
    fetch = "Hf" if window.phase == "forward" else "Hb"
    seconds |= {f"{fetch}{index}": duration_s for index, duration_s in enumerate(chunking.fetch_s)}
    seconds |= {f"Hg{index}": duration_s for index, duration_s in enumerate(chunking.return_s)}
    seconds |= dict(zip(_deferred_words(window, chunking), chunking.deferred_s, strict=True))
    return seconds | dict(zip(_op_words(window), window.ops_s, strict=True))


# ---------------------------------------------------------------- the search


def cut_arguments(window: Window, chunking: Chunking) -> tuple[object, ...]:
    """The numbers of one cut, in the order in which the compiled search takes them."""
    slowdown = window.slowdown
    return (window.head_s, window.tail_s, window.issue_s, slowdown.compute, slowdown.wire, window.ops_s,
            chunking.first_s, chunking.experts_s, chunking.second_s, chunking.deferred_s,
            *(metadata_of(window) if window.deduplicated else ()))  # fmt: skip


def _placements(asked: _Asked) -> list[Placement]:
    """The candidates of one cut, simulated."""
    window, chunking = asked.form, asked.chunking
    num_ops, chunks, slowdown = len(window.ops_s), chunking.chunks, window.slowdown
    in_turn = tuple(range(chunks))
    choices = [(in_turn, (slot,) * chunks) for slot in range(num_ops + 1)]
    every = [(True, choices[0])] if asked.joined else []
    if asked.overlapped:
        choices += best_interleavings(window, chunking, Slowdown())
        if slowdown != Slowdown():
            choices += best_interleavings(window, chunking, slowdown)
        every += [(False, choice) for choice in dict.fromkeys(choices)]
    found, words = [], _CutWords.of(window, chunking)
    for joined, (chunk_order, ops_before) in every:
        schedule = Schedule.parse(words.order(chunk_order, ops_before))
        times = simulated(window, chunking, schedule, joined)
        found.append((max(end_s for _, end_s in times), joined, chunk_order, ops_before))
    return found


def _switches(ops_before: OpsBefore, num_ops: int) -> int:
    """How many runs of ops there are: between experts, and after the last."""
    return len({0, *ops_before, num_ops}) - 1  # they never decrease


def _ranked(
    window: Window, found: Sequence[tuple[_Asked, Sequence[Placement]]], limit: int | None
) -> tuple[Candidate, ...]:
    best_s = min(placement[0] for _, placements in found for placement in placements)

    def distance(predicted_s: float) -> float:
        return round(min((predicted_s - best_s) / best_s / TIE, FAR)) if best_s > 0 else predicted_s

    entries = [(distance(placement[0]), asked, placement) for asked, placements in found for placement in placements]
    if limit is not None and limit < len(entries):  # most need no more than their seconds
        last = sorted(entry[0] for entry in entries)[limit - 1]
        entries = [entry for entry in entries if entry[0] <= last]

    def rank(entry: tuple[float, _Asked, Placement]) -> tuple[object, ...]:
        far, asked, (_, joined, chunk_order, ops_before) = entry
        chunking = asked.chunking
        simplest = (not (joined and chunking.chunks == 1), chunking.chunks, list(chunk_order) != sorted(chunk_order))
        switches = _switches(ops_before, len(window.ops_s))
        return far, *simplest, asked.form is not window, switches, chunking.by, joined, ops_before

    words: dict[int, _CutWords] = {}
    candidates = []
    for _, asked, (predicted_s, joined, chunk_order, ops_before) in sorted(entries, key=rank)[:limit]:
        if id(asked) not in words:
            words[id(asked)] = _CutWords.of(asked.form, asked.chunking)
        candidates.append(
            Candidate(
                chunks=asked.chunking.chunks,
                by=asked.chunking.by,
                joined=joined,
                chunk_order=tuple(chunk_order),
                ops_before=tuple(ops_before),
                order=words[id(asked)].order(chunk_order, ops_before),
                predicted_s=predicted_s,
                in_flight_bytes=in_flight_bytes(asked.chunking, joined),
            )
        )
    return tuple(candidates)


def in_flight_bytes(chunking: Chunking, joined: bool) -> int:
    """The most that exchanges under way hold: one chunk's where every exchange is joined; else all, as the module says;
    and what is kept in either case."""
    held = max(chunking.chunk_bytes, default=0) if joined else sum(chunking.chunk_bytes)
    return held + chunking.kept_bytes
