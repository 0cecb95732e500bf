"""How sure a forecast is: its assumptions drawn anew, many times, and what becomes of the gain and of the choice."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from moe_overlap.commands.plan.machine import op_verb, shapes
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import PhasePlan, Prediction, predict
from moe_overlap.planning.cost_model import window
from moe_overlap.planning.search import evaluate
from moe_overlap.planning.window import Window
from moe_overlap.schedule.actions import Schedule

# By what factor each assumption may be off either way, about what held-out rows are off by (docs/validation.md).
SPREAD = {"flops": 1.25, "memory_bandwidth": 1.25, "bandwidth": 1.25, "intra_bandwidth": 1.25, "launch": 2.0,
          "latency": 2.0}  # fmt: skip
SLOWDOWNS = ("compute_slowdown", "wire_slowdown")  # from 1 to twice as far above 1 as assumed
AS_GOOD = 1.01  # the choice stays best where nothing is faster by more


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """Of the gain over serial: quantiles. `stays`: the share of draws in which no other schedule is over 1 % faster
    than the chosen one."""

    p10: float
    p50: float
    p90: float
    stays: float
    draws: int


def certainty(options: PlanOptions, point: Prediction, *, draws: int, seed: int = 0) -> Certainty:
    """The same draws for the same seed. draws: at least 1."""
    chance = random.Random(seed)
    gains, stayed = [], 0
    for _ in range(draws):
        other = _drawn(options, chance)
        best = predict(other, point.kind, ranks=point.ranks, bytes_per_s=other.bandwidth)
        chosen_s = _chosen_s(other, point, best)
        gains.append(best.serial_s / chosen_s)
        stayed += chosen_s <= best.time_s * AS_GOOD
    gains.sort()
    p10, p50, p90 = (gains[min(draws - 1, int(share * draws))] for share in (0.1, 0.5, 0.9))
    return Certainty(p10=p10, p50=p50, p90=p90, stays=stayed / draws, draws=draws)


def _drawn(options: PlanOptions, chance: random.Random) -> PlanOptions:
    changes: dict[str, float] = {}
    for name, factor in SPREAD.items():
        changes[name] = getattr(options, name) * math.exp(chance.uniform(-1, 1) * math.log(factor))
    for name in SLOWDOWNS:
        changes[name] = 1 + (getattr(options, name) - 1) * chance.uniform(0, 2)
    return replace(options, **changes)  # type: ignore[arg-type]


def _chosen_s(options: PlanOptions, point: Prediction, other: Prediction) -> float:
    """Seconds of the schedules of `point` under other assumptions."""
    model = other.model
    known = model.deduplicated if point.deduplicated else model
    cuts = shapes(options, point.kind, other.at, distinct=point.deduplicated)
    seconds = 0.0
    for phase in point.phases:
        problem = window(model, cuts, phase.phase, op_verb=op_verb(point.kind, model))
        seconds += known.outside(phase.phase) + _of(phase, problem)
    return seconds


def _of(phase: PhasePlan, problem: Window) -> float:
    best = phase.best
    return evaluate(problem, Schedule.parse(best.order), chunks=best.chunks, by=best.by, joined=best.joined)


def certainty_line(found: Certainty) -> str:
    return (f"How sure: {found.p10:.2f}x to {found.p90:.2f}x serial (p10 to p90 of {found.draws} draws of the "
            f"assumptions, half of them above {found.p50:.2f}x); this schedule stays within 1 % of the best in "
            f"{100 * found.stays:.0f} % of them")  # fmt: skip
