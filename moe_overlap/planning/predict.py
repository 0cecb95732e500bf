"""What a cost model predicts of one pair of schedules on one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_overlap.planning.cost_model import CostModel, window
from moe_overlap.planning.search import timeline
from moe_overlap.planning.shapes import StepShape
from moe_overlap.planning.window import OpVerb
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.builders import SchedulePair


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One phase: seconds of the whole timed unit, and how long compute stands still for exchanges, and for copies of
    experts in host memory, in its window."""

    whole_s: float
    waited_s: float


def predict(model: CostModel, pair: SchedulePair, shapes: Mapping[Phase, StepShape]) -> dict[Phase, Prediction]:
    """Exact simulations of the phases in `shapes`, each of which is cut as the schedule of its phase is."""
    verbs = [action.verb for action in pair.forward]
    op_verb: OpVerb = "S" if "S" in verbs else "B"
    num_ops = verbs.count("B")
    found: dict[Phase, Prediction] = {}
    for phase, shape in shapes.items():
        schedule, chunks = (pair.forward, pair.chunks) if phase == "forward" else (pair.backward, pair.backward_chunks)
        problem = window(model, [shape], phase, op_verb=op_verb, num_ops=num_ops)
        times = timeline(problem, schedule, chunks=chunks, by=shape.by, joined=pair.joined)
        end_s = max(end_s for _, end_s in times)
        busy_s = sum(end - start for action, (start, end) in zip(schedule, times, strict=True) if action.lane == "comp")
        exchanges = sum(action.lane != "comp" for action in schedule)  # and copies of experts in host memory
        waited_s = end_s - busy_s - 2 * exchanges * model.issue_s
        known = model if shape.distinct is None else model.deduplicated
        found[phase] = Prediction(whole_s=known.outside(phase, num_ops) + end_s, waited_s=waited_s)
    return found
