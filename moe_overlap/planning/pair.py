"""From what the search found to what runs: the pair of schedules of two candidates."""

from __future__ import annotations

from moe_overlap.planning.search import DISTINCT, STAGES, Candidate
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.actions import Action, Phase, Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked, deduplicate, first_ops
from moe_overlap.schedule.builders import window as shortcut_window
from moe_overlap.schedule.offload import without_host_experts


def pair_of(
    forward: Candidate, backward: Candidate | None, *, num_ops: int, op_verb: OpVerb, num_ahead: int = 0
) -> SchedulePair:
    """The pair that runs two candidates; without one for backward, the mirror with the same chunks. num_ahead: ops that
    the one for forward does not have, as they run before it. Copies of experts in host memory are left out: a step puts
    them where the candidates have them (`schedule/offload.py`)."""
    joined = forward.joined and (backward is None or backward.joined)
    begin = first_ops(op_verb, num_ahead)
    rest = _schedule(forward, joined, "forward")
    if begin:
        later = (Action("B", a.index + num_ahead) if a.verb == "B" and a.index is not None else a for a in rest)
        rest = Schedule((Action("N"), *begin, *later))
    pair = SchedulePair(
        name="auto",
        forward=rest,
        backward=_mirror(forward, num_ops, op_verb) if backward is None else _schedule(backward, joined, "backward"),
        chunks=forward.chunks,
        by=forward.by,
        backward_chunks=forward.chunks if backward is None else backward.chunks,
        backward_by=forward.by if backward is None else backward.by,
        joined=joined,
    )
    return without_host_experts(pair)


def _mirror(forward: Candidate, num_ops: int, op_verb: OpVerb) -> Schedule:
    """A backward with the chunks of a forward."""
    if op_verb == "S":
        pair = chunked(forward.chunks, forward.by, shared=True)
    elif num_ops:
        pair = shortcut_window(num_ops, num_ops // 2, chunks=forward.chunks, by=forward.by)
    else:
        pair = chunked(forward.chunks, forward.by)
    return (deduplicate(pair) if "M" in forward.order.split() else pair).backward


def _schedule(candidate: Candidate, joined: bool, phase: Phase) -> Schedule:
    """The candidate's schedule. Where it is joined and the other phase's is not, its tail moves to right behind the
    last exchange, and the rows that stay to before the first: then nothing stands beside the exchanges, which is the
    same."""
    words = candidate.order.split()
    _, _, _, last, tail = STAGES[phase]
    own, _ = DISTINCT[phase]
    if candidate.joined and not joined:
        if own in words:
            words.remove(own)
            words.insert(1, own)
        words.remove(tail)
        behind = max(position for position, word in enumerate(words) if word.rstrip("0123456789") == last)
        words.insert(behind + 1, tail)
    return Schedule.parse(" ".join(words))
