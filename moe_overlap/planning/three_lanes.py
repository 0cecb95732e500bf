"""What it would take if rows were passed on inside their nodes beside compute: three lanes, as FSMoE (ASPLOS'25) has.

Where rows cross nodes once, an exchange is two, one across nodes and one inside them. The executor waits for the
second at once, so it stands on the compute lane of every schedule that runs here. This is the exact simulation of an
order that does not wait: across nodes, inside them and compute are a lane each.

    across     D0  D1  ..                     C0  C1  ..
    inside         d0  d1  c0  d2  c1  ..     d: on to the ranks, c: back to the gateway
    compute    ops     E0  E1  ..  Ew  ops

By chunks of tokens in their order, with the best number of ops, of the rows that stay too, ahead of the experts. Both
wires slow compute down, and are slowed by it and by each other, by the factors that the window has for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import CostModel, Hops, window
from moe_overlap.planning.shapes import StepShape
from moe_overlap.planning.window import OpVerb, Window
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.simulate import simulate

COMP, ACROSS, INSIDE = 0, 1, 2


def three_lanes_s(model: CostModel, shape: StepShape, phase: Phase, *, op_verb: OpVerb = "B") -> float:
    """Seconds of one phase's window. shape: deduplicated, its rows cross nodes once, by chunks of tokens; else
    ConfigError. What gateways read and add up stays on the compute lane, with the experts."""
    inside = None if shape.distinct is None else shape.distinct.inside
    if inside is None or shape.by != "tokens":
        raise ConfigError("shape", shape.by, "a step whose rows cross nodes once, by chunks of tokens")
    problem = window(model, [shape], phase, op_verb=op_verb)
    hops = model.hops_s(shape, phase)
    return min(_simulated_s(problem, hops, before) for before in range(len(problem.ops_s) + 1))


@dataclass(frozen=True)
class _Step:
    """Actions in the order in which they are issued: lane, seconds, and what each waits for."""

    lanes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    needs: list[list[int]] = field(default_factory=list)

    def add(self, lane: int, seconds: float, *needs: int) -> int:
        self.lanes.append(lane)
        self.seconds.append(seconds)
        self.needs.append(list(needs))
        return len(self.lanes) - 1


def _simulated_s(problem: Window, hops: Hops, before: int) -> float:
    """before: so many ops stand before the first experts. The second of two exchanges starts when the first one ends:
    compute starts and waits for both together."""
    (cut,), step = problem.chunkings, _Step()
    first_s, second_s = list(cut.first_s), list(cut.second_s)
    with_metadata, place = (first_s, 0) if problem.phase == "forward" else (second_s, -1)
    with_metadata[place] += problem.metadata_s or 0.0
    step.add(COMP, problem.head_s)
    out = [step.add(ACROSS, seconds, step.add(COMP, problem.issue_s)) for seconds in first_s]
    for seconds in problem.ops_s[:before]:
        step.add(COMP, seconds)
    arrived = [step.add(INSIDE, hops.out[0], out[0])]
    back = []
    for c, experts_s in enumerate(cut.experts_s):
        if c + 1 < cut.chunks:  # ahead of what goes back, which would hold up the next experts
            arrived.append(step.add(INSIDE, hops.out[c + 1], out[c + 1]))
        waited = step.add(COMP, problem.issue_s, arrived[c])
        experts = step.add(COMP, max(0.0, experts_s - hops.out[c] - hops.back[c]), waited)
        back.append(step.add(INSIDE, hops.back[c], step.add(COMP, problem.issue_s, experts)))
    for seconds in (*cut.deferred_s, *problem.ops_s[before:]):
        step.add(COMP, seconds)
    home = [step.add(ACROSS, seconds, need) for seconds, need in zip(second_s, back, strict=True)]
    for need in home:
        step.add(COMP, problem.issue_s, need)
    step.add(COMP, problem.tail_s)
    slowdown = {COMP: problem.slowdown.compute, ACROSS: problem.slowdown.wire, INSIDE: problem.slowdown.wire}
    return max(end_s for _, end_s in simulate(step.lanes, step.seconds, step.needs, slowdown))
