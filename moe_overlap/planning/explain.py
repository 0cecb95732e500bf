"""Why this schedule: what was found for one phase, in words that a person can check.

The chosen order drawn as lanes, its predicted time beside those of every other candidate, where the time goes and why,
the bound of the window, and what would help: each change is a search of its own, not a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from moe_overlap.planning.search import Candidate, search, timeline
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.actions import Schedule, dependencies
from moe_overlap.schedule.check import LANES, draw

COLUMNS = 96  # width of the drawing to scale
ROWS_PER_CUT = 2  # candidates of one way of cutting the exchange that get a line of their own
NOTABLE = 0.02  # of the predicted time: shorter waits are not worth a sentence


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that could be different, and the window it gives. `outside_s`: None where that stays as it is."""

    label: str
    window: Window
    outside_s: float | None = None


def explain(
    window: Window,
    candidates: Sequence[Candidate],
    *,
    chosen: Candidate | None = None,
    outside_s: float = 0.0,
    measured_s: float | None = None,
    max_in_flight_bytes: int | None = None,
    changes: Sequence[Change] = (),
) -> str:
    """A page of text about one phase.

    `candidates`: what `search(window)` found, best first; `chosen`: the one that runs (default: the first).
    `outside_s`: seconds of the timed unit in no window, `measured_s`: the median of what the unit took, once known.
    `max_in_flight_bytes`: the budget of the search that found `candidates`; changes are searched with it too.
    `changes`: what else could be done, beside what follows from the window itself (`usual_changes`).
    """
    chosen = candidates[0] if chosen is None else chosen
    if chosen not in candidates:
        candidates = [*candidates, chosen]
    sections = [
        _drawn(window, chosen, outside_s, max_in_flight_bytes),
        _table(window, candidates, chosen),
        _why(window, candidates, chosen),
        _bounds(window, chosen),
        _help(window, candidates, chosen, (*changes, *usual_changes(window)), outside_s, max_in_flight_bytes),
        _measured(outside_s + chosen.predicted_s, measured_s),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def name_of(candidate: Candidate, window: Window) -> str:
    """A candidate in a few words: "serial", "chunked(4)", "chunked(2,experts), 1 of 3 ops first", or, where ops stand
    between the chunks, "chunked(4), ops before the chunks: 0 1x2 3 of 3" (none, then one, one and all three)."""
    if candidate.joined:
        return "serial" if candidate.chunks == 1 else f"{_cut(candidate)}, joined"
    words = [_cut(candidate)] if candidate.chunks > 1 else []
    before, num_ops = candidate.ops_before, len(window.user_ops_s)
    if window.deduplicated:
        own = sum(not count for count in before)  # chunks whose experts come before the rows that stay
        if own:
            words.append(f"own rows after {own} of {_count(candidate.chunks)}")
        if "Or" in candidate.order.split():
            words.append("half of the own rows last")
        before = tuple(max(0, count - 1) for count in before)
    if num_ops and window.op_verb == "S":
        chunk = sum(not count for count in before)  # whose experts come before the shared expert
        place = {0: "first", candidate.chunks: "last"}.get(chunk, f"after {chunk} of {candidate.chunks} chunks")
        words.append(f"shared expert {place}")
    elif num_ops and len(set(before)) == 1:
        words.append(f"{before[0]} of {num_ops} ops first")
    elif num_ops:
        runs = [(count, len(list(group))) for count, group in groupby(before)]
        counts = " ".join(f"{count}" if times == 1 else f"{count}x{times}" for count, times in runs)
        words.append(f"ops before the chunks: {counts} of {num_ops}")
    if candidate.chunk_order != tuple(range(candidate.chunks)):
        words.append(f"chunks taken {' '.join(map(str, candidate.chunk_order))}")
    return ", ".join(words) or "one chunk, not joined"


def in_ms(seconds: float) -> str:
    """Three digits: "0.0123 ms", "12.3 ms", "1234 ms"; rounding errors are zero."""
    ms = 1e3 * seconds
    return "0 ms" if ms < 1e-6 else f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms"


def in_mb(count: int) -> str:
    """Bytes in MB of 10^6, three digits."""
    return f"{count / 1e6:.3g} MB"


def _cut(candidate: Candidate) -> str:
    return f"chunked({candidate.chunks}{',experts' if candidate.by == 'experts' else ''})"


def wire_of(window: Window, chunking: Chunking) -> float:
    """Seconds of all exchanges, of ids and weights too."""
    return sum(chunking.first_s) + sum(chunking.second_s) + (window.metadata_s or 0.0)


def copies_of(chunking: Chunking) -> float:
    """Seconds of all copies of experts from and to the host's memory."""
    return sum(chunking.fetch_s) + sum(chunking.return_s)


def bound_s(window: Window, chunking: Chunking) -> float:
    """Seconds that no order of these actions can beat, with the rows that stay in one part or in two.

    Compute has all of its work to do, and the wire all of its own between head and tail. With one chunk nothing of its
    own exchanges can run beside the experts, which gives ScMoE's T_exp + max(sum S, T_disp + T_comb); S are the ops and
    what is deferred. The link to the host's memory has all weights to bring before the last experts, and in backward
    begins with the gradients when the experts are over.
    """
    cut = chunking.chunks, chunking.by
    return min(_bound_s(form, chunking if form is window else form.chunking(*cut)) for form in window.forms)


def _bound_s(window: Window, chunking: Chunking) -> float:
    wire_s = wire_of(window, chunking)
    free_s = sum(window.ops_s) + sum(chunking.deferred_s)
    experts_s = sum(chunking.experts_s)
    if chunking.chunks == 1:
        inner_s = experts_s + max(free_s, wire_s)
    else:
        chain_s = min(chunking.first_s) + experts_s + min(chunking.second_s) + (window.metadata_s or 0.0)
        inner_s = max(experts_s + free_s, wire_s, chain_s)
    return max(window.head_s + inner_s + window.tail_s, _copies_bound_s(window, chunking))


def _copies_bound_s(window: Window, chunking: Chunking) -> float:
    """What no order beats where experts are in host memory: chunks are taken in their own order there."""
    if not window.in_host_memory:
        return 0.0
    up_s, last_s = sum(chunking.fetch_s), chunking.experts_s[-1]
    if window.phase == "forward":
        return up_s + last_s + chunking.second_s[-1] + window.tail_s
    experts_end_s = window.head_s + max(up_s + last_s, chunking.fetch_s[0] + sum(chunking.experts_s))
    return experts_end_s + max(chunking.deferred_s[0] + sum(chunking.return_s),
                               sum(chunking.deferred_s) + chunking.return_s[-1])  # fmt: skip


def usual_changes(window: Window) -> list[Change]:
    """What one can ask about any window: a faster link, and ops with a cut point inside."""
    found = []
    if any(wire_of(window, chunking) for chunking in window.chunkings):
        found.append(Change(label="a link twice as fast", window=_with_wire(window, 0.5)))
        found.append(Change(label="a link that takes no time", window=_with_wire(window, 0.0)))
    if any(copies_of(chunking) for chunking in window.chunkings):
        found.append(Change(label="a link to the host twice as fast", window=_with_host_link(window, 0.5)))
        found.append(Change(label="experts on the device", window=_with_host_link(window, 0.0)))
    if window.op_verb == "B" and window.user_ops_s:
        own_s = window.ops_s[: len(window.ops_s) - len(window.user_ops_s)]
        halves = tuple(seconds / 2 for seconds in window.user_ops_s for _ in range(2))
        found.append(
            Change(label="a cut point in the middle of every op", window=replace(window, ops_s=own_s + halves))
        )
    return found


def _with_wire(window: Window, factor: float) -> Window:
    def scaled(seconds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(factor * one for one in seconds)

    chunkings = tuple(
        replace(one, first_s=scaled(one.first_s), second_s=scaled(one.second_s)) for one in window.chunkings
    )
    metadata_s = None if window.metadata_s is None else factor * window.metadata_s
    return replace(window, chunkings=chunkings, metadata_s=metadata_s)


def _with_host_link(window: Window, factor: float) -> Window:
    def scaled(seconds: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(factor * one for one in seconds)

    chunkings = tuple(replace(one, fetch_s=scaled(one.fetch_s), return_s=scaled(one.return_s))
                      for one in window.chunkings)  # fmt: skip
    return replace(window, chunkings=chunkings)


def draw_to_scale(window: Window, candidate: Candidate, *, columns: int = COLUMNS) -> str:
    """The lanes on a time axis of `columns` characters. An action begins with its name; a dot is an idle lane."""
    schedule = Schedule.parse(candidate.order)
    lanes = {lane: ["."] * columns for lane in LANES if lane != "copy" or any(one.lane == lane for one in schedule)}
    spans = _spans(window, candidate)
    per_s = columns / max(candidate.predicted_s, 1e-300)
    for action, (start_s, end_s) in zip(schedule, spans, strict=True):
        begin, end = (min(columns, round(at_s * per_s)) for at_s in (start_s, end_s))
        lanes[action.lane][begin:end] = action.text.ljust(end - begin, "-")[: end - begin]
    return "\n".join(f"{lane} | {''.join(cells)}" for lane, cells in lanes.items())


def _spans(window: Window, candidate: Candidate) -> list[tuple[float, float]]:
    schedule = Schedule.parse(candidate.order)
    return timeline(window, schedule, chunks=candidate.chunks, by=candidate.by, joined=candidate.joined)


def _drawn(window: Window, chosen: Candidate, outside_s: float, max_in_flight_bytes: int | None) -> list[str]:
    outside = f", {in_ms(outside_s)} outside its window included" if outside_s else ""
    budget = []
    if max_in_flight_bytes is not None:
        budget = [f"  at most {in_mb(max_in_flight_bytes)} in flight (max_in_flight_bytes); "
                  f"this holds {in_mb(chosen.in_flight_bytes)}"]  # fmt: skip
    return [
        f"{window.phase}: {name_of(chosen, window)}, predicted {in_ms(outside_s + chosen.predicted_s)}{outside}",
        *budget,
        f"  order: {chosen.order}",
        *("  " + line for line in draw(Schedule.parse(chosen.order), joined=chosen.joined).splitlines()),
        f"to scale, one column is {in_ms(chosen.predicted_s / COLUMNS)}:",
        *("  " + line for line in draw_to_scale(window, chosen).splitlines()),
    ]


def _table(window: Window, candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """The best few of every cut, and in one line how the rest of it did."""
    rows = [("candidate", "ms", "", "in flight")]

    def add(candidate: Candidate) -> None:
        mark = "<- runs" if candidate == chosen else _percent(candidate.predicted_s, chosen.predicted_s)
        held = in_mb(candidate.in_flight_bytes)
        rows.append((name_of(candidate, window), f"{1e3 * candidate.predicted_s:.3f}", mark, held))

    best_of_cut: dict[tuple[object, ...], float] = {}
    for one in candidates:
        best_of_cut[_cut_of(one)] = min(best_of_cut.get(_cut_of(one), one.predicted_s), one.predicted_s)
    ordered = sorted(candidates, key=lambda one: (best_of_cut[_cut_of(one)], str(_cut_of(one)), one.predicted_s))
    for _, group in groupby(ordered, key=_cut_of):
        members = list(group)
        shown = len(members) if len(members) <= ROWS_PER_CUT + 1 else ROWS_PER_CUT
        top = [one for position, one in enumerate(members) if position < shown or one == chosen]
        rest = [one for one in members if one not in top]
        for one in top:
            add(one)
        if rest:
            fastest, slowest = (1e3 * one.predicted_s for one in (rest[0], rest[-1]))
            upto = f"to {slowest:.3f}" if slowest > fastest else ""
            rows.append((f"  {len(rest)} more like it", f"{fastest:.3f}", upto, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  " + f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
    ]


def _cut_of(candidate: Candidate) -> tuple[object, ...]:
    """Candidates of one cut differ in the order alone. Those joined without being serial are there for their bytes."""
    if candidate.joined and candidate.chunks > 1:
        return ("joined",)
    return candidate.chunks, candidate.by, candidate.joined


def _why(window: Window, candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """Where the time goes, and why overlap is used or not."""
    window = window.form_of(chosen.order)
    chunking = window.chunking(chosen.chunks, chosen.by)
    wire_s, copies_s = wire_of(window, chunking), copies_of(chunking)
    if not wire_s and not copies_s:
        return ["Nothing leaves a rank, so there is nothing to hide."]
    backward, deferred_s = window.phase == "backward", sum(chunking.deferred_s)
    parts = {
        "experts": sum(chunking.experts_s),
        "the experts on rows that stay": sum(window.ops_s) - sum(window.user_ops_s) + (0 if backward else deferred_s),
        "the shared expert" if window.op_verb == "S" else "backbone ops": sum(window.user_ops_s),
        "weight gradients": deferred_s if backward else 0,
    }
    beside = ", ".join(f"{in_ms(seconds)} of {name}" for name, seconds in parts.items() if seconds) or "nothing"
    moved = [f"exchanges take {in_ms(wire_s)}"] if wire_s else []
    moved += [f"copies of experts from and to the host take {in_ms(copies_s)}"] if copies_s else []
    said = [f"The {', the '.join(moved)}; to put beside them there is {beside}."]
    if chosen.joined:
        return said + _why_not(window, candidates, chosen)
    waits = _waits(window, chosen)
    waited_s = sum(seconds for seconds, _ in waits)
    hidden = min(1.0, max(0.0, 1 - waited_s / (wire_s + copies_s)))
    notable_s = NOTABLE * chosen.predicted_s
    longest = [f"{in_ms(seconds)} {words}" for seconds, words in sorted(waits, reverse=True)[:3] if seconds > notable_s]
    said.append(f"{100 * hidden:.0f} % of that is hidden: compute stands still for {in_ms(waited_s)}"
                f"{', of that ' + ', '.join(longest) if longest else ''}.")  # fmt: skip
    slower_s = chosen.predicted_s - window.head_s - window.tail_s - sum(parts.values()) - waited_s
    if slower_s > notable_s:
        said.append(f"Compute itself takes {in_ms(slower_s)} longer: starting, waiting, working beside an exchange.")
    if wire_s + window.head_s + window.tail_s >= chosen.predicted_s - notable_s:
        said.append("The wire is busy all the time: only fewer bytes or a faster link can help.")
    elif copies_s + window.head_s + window.tail_s >= chosen.predicted_s - notable_s:
        said.append("The link to the host is busy all the time: only more rows an expert or a faster link can help.")
    elif waited_s <= notable_s:
        said.append("Compute is busy all the time: there is next to nothing left to hide.")
    return said


def _why_not(window: Window, candidates: Sequence[Candidate], chosen: Candidate) -> list[str]:
    beside = bool(window.ops_s) or window.phase == "backward"  # one chunk alone has nothing beside its exchanges
    overlapped = [one for one in candidates if not one.joined and (one.chunks > 1 or beside)]
    if not overlapped:
        return ["Overlap is not used: no order that overlaps anything was there to choose from."]
    best = min(overlapped, key=lambda one: one.predicted_s)
    words = f"{name_of(best, window)}: {in_ms(best.predicted_s)}, {_percent(best.predicted_s, chosen.predicted_s)}"
    said = [f"Overlap is not used. The best that overlaps is {words}."]
    one, cut = window.chunking(chosen.chunks, chosen.by), window.chunking(best.chunks, best.by)
    costs = []
    for name, before_s, after_s in (
        ("exchanges", sum(one.first_s) + sum(one.second_s), sum(cut.first_s) + sum(cut.second_s)),
        ("experts", sum(one.experts_s), sum(cut.experts_s)),
        ("starting and waiting", _issues_s(window, one), _issues_s(window, cut)),
    ):
        if after_s > before_s:
            costs.append(f"{name} {in_ms(after_s)} instead of {in_ms(before_s)}")
    if costs:
        said.append(f"Cutting into {best.chunks} has its price: {', '.join(costs)}.")
    return said


def _issues_s(window: Window, chunking: Chunking) -> float:
    """Of both exchanges of each chunk, and of its copies."""
    return 2 * window.issue_s * (2 * chunking.chunks + len(chunking.fetch_s) + len(chunking.return_s))


def _waits(window: Window, chosen: Candidate) -> list[tuple[float, str]]:
    """(seconds, before what and for what) of every wait of the compute lane, beyond the cost of waiting as such."""
    schedule = Schedule.parse(chosen.order)
    spans = _spans(window, chosen)
    found: list[tuple[float, str]] = []
    last_end_s, issues = 0.0, 0
    pending: set[int] = set()
    for position, (action, needs) in enumerate(zip(schedule, dependencies(schedule), strict=True)):
        if action.lane != "comp":
            pending.add(position)
            issues += 1
            continue
        start_s, end_s = spans[position]
        late = [need for need in needs if need in pending]
        pending.difference_update(late)
        stood_s = start_s - last_end_s - (issues + len(late)) * window.issue_s
        if late and stood_s > 0:
            latest = max(late, key=lambda need: spans[need][1])
            found.append((stood_s, f"before {action} for {schedule.actions[latest]}"))
        last_end_s, issues = end_s, 0
    return found


def _bounds(window: Window, chosen: Candidate) -> list[str]:
    own_s = bound_s(window, window.chunking(chosen.chunks, chosen.by))
    least = min(window.chunkings, key=lambda one: bound_s(window, one))
    least_s = bound_s(window, least)
    above = chosen.predicted_s / own_s - 1 if own_s else 0.0
    said = f"Bound of the window: no order with {_count(chosen.chunks)} takes less than {in_ms(own_s)}; this one "
    said += f"is {100 * above:.1f} % above." if above > 5e-4 else "reaches it."
    if least_s < own_s * (1 - NOTABLE / 4):
        said += f" With {_count(least.chunks)} the bound is {in_ms(least_s)}, the smallest of any cut."
    return [said]


def _count(chunks: int) -> str:
    return f"{chunks} chunk{'s' if chunks > 1 else ''}"


def _help(
    window: Window,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    changes: Sequence[Change],
    outside_s: float,
    max_in_flight_bytes: int | None,
) -> list[str]:
    total_s = outside_s + chosen.predicted_s
    rows: list[tuple[str, float]] = []
    for change in changes:
        best = search(change.window, max_in_flight_bytes=max_in_flight_bytes, limit=1)[0]
        rows.append((change.label, best.predicted_s + (outside_s if change.outside_s is None else change.outside_s)))
    if max_in_flight_bytes is not None:
        rows.append(("no limit on bytes in flight", outside_s + search(window, limit=1)[0].predicted_s))
    more = [one for one in candidates if one.chunks > chosen.chunks]
    if chosen != candidates[0] and candidates[0].predicted_s < chosen.predicted_s:
        rows.append((f"the fastest found: {name_of(candidates[0], window)}", outside_s + candidates[0].predicted_s))
    same = [] if chosen.joined else [one for one in candidates if _cut_of(one) == _cut_of(chosen)]
    later = [one for one in same if sum(one.ops_before) > sum(chosen.ops_before)]
    earlier = [one for one in same if sum(one.ops_before) < sum(chosen.ops_before)]
    for label, others in (("more chunks", more), ("a later slot", later), ("an earlier slot", earlier)):
        if others:
            best = min(others, key=lambda one: one.predicted_s)
            rows.append((f"{label}: {name_of(best, window)}", outside_s + best.predicted_s))
    if not rows:
        return []
    rows.sort(key=lambda row: row[1])
    width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{width}}  {in_ms(seconds)}  {_percent(seconds, total_s)}" for label, seconds in rows]
    # Where overlap was switched off, the search is not: the rows would else seem to be the gain of the change alone.
    how = "searched anew" + (", with overlap" if chosen.joined and not candidates[0].joined else "")
    return [f"What would change the {in_ms(total_s)}, each {how}:", *lines]


def _measured(predicted_s: float, measured_s: float | None) -> list[str]:
    if measured_s is None:
        return []
    error = predicted_s / measured_s - 1 if measured_s > 0 else float("inf")
    return [f"Measured {in_ms(measured_s)}, predicted {in_ms(predicted_s)}: the prediction is {100 * abs(error):.1f} % "
            f"{'high' if error > 0 else 'low'}."]  # fmt: skip


def _percent(seconds: float, reference_s: float) -> str:
    """How much longer than the reference."""
    if reference_s <= 0:
        return ""
    percent = 100 * (seconds / reference_s - 1)
    return "equal" if abs(percent) < 0.05 else f"{percent:+.1f} %"
