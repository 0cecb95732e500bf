"""What schedules take in a step that has copies of experts: an exact simulation of each with the copies' actions in it.

Weights (Wf) go ahead of all rows. Their gradients (Wd, Wg) follow the last rows home, and the rows that stay (Od), and
are added there (Wa), as `schedule.builders.with_copies` has them. Wd and Wa count as nothing: the rows of copies are in
the figures of Ew, and what is added is small beside what was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_overlap.planning.search import FAR, TIE, Candidate, simulated
from moe_overlap.planning.window import Window
from moe_overlap.schedule.actions import Schedule

CONSIDERED = 16  # of a search's candidates: what copies change is which of the best is the best


def with_copies_priced(window: Window, candidates: Sequence[Candidate], wire_s: float) -> tuple[Candidate, ...]:
    """The first of a search's candidates with what copies add to them, best first; those that tie stay in their order.

    wire_s: of Wf in forward, of Wg in backward.
    """
    found = [replace(one, predicted_s=_whole_s(window, one, wire_s)) for one in candidates[:CONSIDERED]]
    best_s = min(one.predicted_s for one in found)

    def distance(one: Candidate) -> int:
        return round(min((one.predicted_s - best_s) / best_s / TIE, FAR)) if best_s > 0 else 0

    return tuple(sorted(found, key=distance))


def _whole_s(window: Window, candidate: Candidate, wire_s: float) -> float:
    words, more_s = candidate.order.split(), {"Wf0": wire_s}
    if window.phase == "forward":
        words.insert(0, "Wf0")
    else:
        last = max(place for place, word in enumerate(words) if word.startswith("Dt") or word == "Od")
        words[last + 1 : last + 1] = ["Wd", "Wg"]
        words.append("Wa")
        more_s = {"Wd": 0.0, "Wg": wire_s, "Wa": 0.0}
    form = window.form_of(candidate.order)
    chunking = form.chunking(candidate.chunks, candidate.by)
    times = simulated(form, chunking, Schedule.parse(" ".join(words)), candidate.joined, more_s)
    return max(end_s for _, end_s in times)
