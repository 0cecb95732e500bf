"""What schedules take in a step that has copies of experts: an exact simulation of each with the copies' actions in it.

Weights (Wf) go ahead of all rows. Their gradients (Wd, Wg) follow the last rows home, and the rows that stay (Od), and
are added there (Wa), as `schedule.builders.with_copies` has them. Weights that can go from rank to rank are looked at
in both forms: one group, all from their homes, and two, of which the second begins when the first has been waited for.
Wd and Wa count as nothing: the rows of copies are in the figures of Ew, and what is added is small beside what was
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_overlap.native import native
from moe_overlap.planning.search import FAR, TIE, Candidate, cut_arguments, simulated
from moe_overlap.planning.window import Window
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.fetching import fetching

CONSIDERED = 16  # of a search's candidates: what copies change is which of the best is the best


def with_copies_priced(
    window: Window, candidates: Sequence[Candidate], wires_s: Sequence[Sequence[float]]
) -> tuple[Candidate, ...]:
    """The first of a search's candidates with what copies add to them, best first; those that tie stay in their order,
    with one group before two.

    wires_s: for each form of the copies, the seconds of its groups: of Wf in forward, of the one Wg in backward.
    """
    considered = candidates[:CONSIDERED]
    found = [
        replace(one, predicted_s=seconds, relayed=len(groups_s) > 1)
        for groups_s in wires_s
        for one, seconds in zip(considered, _all_priced_s(window, considered, groups_s), strict=True)
    ]
    best_s = min(one.predicted_s for one in found)

    def distance(one: Candidate) -> int:
        return round(min((one.predicted_s - best_s) / best_s / TIE, FAR)) if best_s > 0 else 0

    return tuple(sorted(found, key=distance))


def priced_s(window: Window, candidate: Candidate, groups_s: Sequence[float] = ()) -> float:
    """Seconds of a candidate's schedule in `window`, which may be another one than it was found for but has its cut and
    its form. groups_s: of the copies' exchanges, as one of `wires_s` above; nothing where there are none."""
    return _all_priced_s(window, [candidate], groups_s)[0]


def _all_priced_s(window: Window, candidates: Sequence[Candidate], groups_s: Sequence[float]) -> list[float]:
    """`priced_s` of each."""
    planner = None if window.in_host_memory else native.planner()
    if planner is None:
        return [priced_s_reference(window, one, groups_s) for one in candidates]
    copies = {"fetch_s" if window.phase == "forward" else "return_s": groups_s}
    cuts: dict[tuple[object, ...], object] = {}
    seconds = []
    for one in candidates:
        form = window.form_of(one.order)
        cut = one.chunks, one.by, form is window
        if cut not in cuts:
            cuts[cut] = planner.Cut(*cut_arguments(form, form.chunking(one.chunks, one.by)), **copies)
        seconds.append(planner.makespan_s(cuts[cut], one.chunk_order, one.ops_before, one.joined))
    return seconds


def priced_s_reference(window: Window, candidate: Candidate, groups_s: Sequence[float] = ()) -> float:
    """`priced_s` in plain Python: the definition the compiled one is tested against."""
    schedule, more_s = Schedule.parse(candidate.order), dict[str, float]()
    if groups_s and window.phase == "forward":
        schedule = fetching(schedule, len(groups_s))
        more_s = {f"Wf{group}": seconds for group, seconds in enumerate(groups_s)}
    elif groups_s:
        words, (wire_s,) = candidate.order.split(), groups_s
        last = max(place for place, word in enumerate(words) if word.startswith("Dt") or word == "Od")
        words[last + 1 : last + 1] = ["Wd", "Wg"]
        words.append("Wa")
        schedule, more_s = Schedule.parse(" ".join(words)), {"Wd": 0.0, "Wg": wire_s, "Wa": 0.0}
    form = window.form_of(candidate.order)
    chunking = form.chunking(candidate.chunks, candidate.by)
    return max(end_s for _, end_s in simulated(form, chunking, schedule, candidate.joined, more_s))
