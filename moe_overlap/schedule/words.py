"""A schedule as a line of Python, and back: so that what a planner found can be run, kept and shared as text.

`python_of` gives the shortest argument of MoELayer or ShortcutBlock that means a pair, `imports_of` the imports that
such a line needs, `from_text` a pair from its two texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.schedule.actions import SIGNS, VERBS, Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked, serial, shared_expert, window
from moe_overlap.schedule.check import check, makespan_s
from moe_overlap.schedule.offload import without_host_experts

IMPORTS = {
    "from_text(": "from moe_overlap.schedule.words import from_text",
    "replace(": "from dataclasses import replace",
}


def from_text(
    forward: str, backward: str, *, by: ChunkBy = "tokens", backward_by: ChunkBy | None = None, name: str = "written"
) -> SchedulePair:
    """The checked pair of two schedules written out, such as "P D0 E0 C0 U" and "Ut Ct0 Ed0 Dt0 Ew0 Pt".

    by, backward_by: how their exchanges are cut ("tokens", "experts" or "peers"), backward by default as forward.
    Raises ConfigError for a text that is no schedule that can run.
    """
    there, back = Schedule.parse(forward), Schedule.parse(backward)
    pair = SchedulePair(name=name, forward=there, backward=back, chunks=there.count("D"), by=by,
                        backward_chunks=back.count("Ct"), backward_by=backward_by or by)  # fmt: skip
    check(pair)
    return pair


def python_of(pair: SchedulePair) -> str:
    """The call that runs this pair at every step, whatever was planned: a ShortcutBlock's where it has backbone ops."""
    host = ', expert_offload="host"' if pair.forward.count("Hf") else ""
    relayed = pair.relayed_copies if pair.forward.count("Wf") else None
    pair = without_host_experts(_without_copies(pair))
    off = ", overlap=False" if pair.joined and pair.name != "serial" else ""
    rows = ', dedup="on"' if pair.deduplicated else host
    written = _written(pair) if relayed is None else f"replace({_written(pair)}, relayed_copies={relayed})"
    if pair.num_ops:
        words = _block_words(pair) if relayed is None else f"schedule={written}"
        return f"ShortcutBlock(..., {words}{off})" + (f" of a MoELayer(...{rows})" if rows else "")
    for word, other in _named(pair.has_shared) if relayed is None else ():
        if _same(pair, other):
            return f'MoELayer(..., schedule="{word}"{host}{"" if word == "serial" else off})'
    off = ", overlap=False" if pair.joined else ""
    return f"MoELayer(..., schedule={written}{rows}{off})"


def imports_of(line: str) -> list[str]:
    """What a line of `python_of` needs beside MoELayer and ShortcutBlock: one line that says its imports, or none."""
    needed = [text for name, text in IMPORTS.items() if name in line]
    return [f"  after: {'; '.join(needed)}"] if needed else []


def _without_copies(pair: SchedulePair) -> SchedulePair:
    """The pair that a user gives: copies of experts are added to it in the steps that have some."""
    forward, backward = (
        Schedule(tuple(action for action in schedule if action.verb not in ("Wf", "Wd", "Wg", "Wa")))
        for schedule in (pair.forward, pair.backward)
    )
    return replace(pair, forward=forward, backward=backward, relayed_copies=None)


def overlaps(pair: SchedulePair, phase: str) -> bool:
    """Whether anything stands beside an exchange in this phase: the order leaves time for it, and nothing is joined."""
    schedule = pair.forward if phase == "forward" else pair.backward
    return not pair.joined and makespan_s(schedule, 1.0) < makespan_s(schedule, 1.0, joined=True)


def legend(pair: SchedulePair, phases: Sequence[str] = ("forward", "backward")) -> list[str]:
    """What the letters of this pair's schedules mean, one line for each phase and one for the signs beside them."""
    lines = []
    for phase in phases:
        schedule = pair.forward if phase == "forward" else pair.backward
        used = dict.fromkeys(action.verb for action in schedule)
        lines.append(f"  {phase}: " + "; ".join(f"{verb} {VERBS[verb].meaning}" for verb in used))
    host = "; copy is the link to the host's memory" if pair.forward.count("Hf") else ""
    return ["letters:", *lines, f"  {SIGNS}{host}"]


def _named(shared: bool) -> Iterator[tuple[str, SchedulePair]]:
    """The words for a layer's schedule, each with what it means."""
    yield "serial", serial(shared=shared)
    for chunks in range(1, 17):
        yield f"chunked({chunks})", chunked(chunks, shared=shared)
        yield f"chunked({chunks},experts)", chunked(chunks, "experts", shared=shared)
        yield f"chunked({chunks},peers)", chunked(chunks, "peers", shared=shared)
    if shared:
        yield "shared_expert", shared_expert()
        yield "shared_expert(0)", shared_expert(0)


def _same(one: SchedulePair, other: SchedulePair) -> bool:
    """The same actions of the same chunks; joined as the word has it, where that is part of the word (serial)."""
    if other.name == "serial" and one.joined != other.joined:
        return False
    return one.digest == other.digest


def _block_words(pair: SchedulePair) -> str:
    for slot in range(pair.num_ops + 1):
        for back in range(pair.num_ops + 1):
            words = {"slot": slot, "chunks": pair.chunks, "backward_slot": back,
                     "backward_chunks": pair.backward_chunks}  # fmt: skip
            other = window(pair.num_ops, slot, chunks=pair.chunks, by=pair.by, backward_slot=back,
                           backward_chunks=pair.backward_chunks)  # fmt: skip
            if _same(pair, other):
                text = ", ".join(f"{word}={value}" for word, value in words.items())
                return text if pair.by == "tokens" else f'{text}, by="{pair.by}"'
    return f"schedule={_written(pair)}"


def _written(pair: SchedulePair) -> str:
    by = "" if pair.by == "tokens" else f', by="{pair.by}"'
    back = "" if pair.backward_by == pair.by else f', backward_by="{pair.backward_by}"'
    return f'from_text("{pair.forward.text}", "{pair.backward.text}"{by}{back})'
