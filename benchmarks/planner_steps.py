"""What schedule="auto" costs in every step: how often a step is planned anew, and how long that takes.

    python benchmarks/planner_steps.py

Steps of 1024 tokens a rank, two experts a token, drawn anew in every step from probabilities that drift slowly: equal
ones, as with a balancing loss, and uneven ones. A step of a kind that was planned before only has to find that plan.
Train steps: forward and backward are planned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.measure.machine import hardware
from moe_overlap.measure.report import append_jsonl
from moe_overlap.planning.cost_model import AlphaBeta, CostModel
from moe_overlap.planning.window import Slowdown

TOKENS, TOP_K, DRIFT = 1024, 2, 0.005
SETTINGS = ((2, 8, False), (2, 8, True), (8, 64, False), (8, 64, True), (64, 256, True))
"""(ranks, experts, uneven)"""


def cost_model() -> CostModel:
    """About the balance of a step of ten milliseconds; three ops beside the exchanges."""
    row = AlphaBeta(alpha_s=0.0, beta_s=2e-8)
    experts = AlphaBeta(alpha_s=5e-5, beta_s=1e-6)
    return CostModel(
        exchange={"inter": AlphaBeta(alpha_s=2e-5, beta_s=1e-9)},
        experts=experts,
        experts_dgrad=experts,
        experts_wgrad=experts,
        permute=row,
        unpermute=row,
        unpermute_backward=row,
        permute_backward=row,
        backbone_s=(1e-3, 2e-3, 1e-3),
        backbone_backward_s=(2e-3, 4e-3, 2e-3),
        issue_s=2e-5,
        slowdown=Slowdown(compute=1.1),
        source="assumed",
    )


def row_of(ranks: int, experts: int, uneven: bool, steps: int) -> dict[str, object]:
    """One setting, timed."""
    draw = np.random.default_rng(0)
    spread = np.full(experts, 5.0 if uneven else 1e9)
    chances = draw.dirichlet(spread, size=ranks)
    schedule = PlannedSchedule(model=cost_model(), num_ops=3, row_bytes=2048)
    new_s: list[float] = []
    known_s: list[float] = []
    plans: set[int] = set()
    for step in range(steps):
        counts = np.stack([draw.multinomial(TOP_K * TOKENS // BLOCKS, p, size=BLOCKS) for p in chances])
        exchange = ExchangePlan(rank=0, world_size=ranks, step=step, phase="forward", grad_enabled=True,
                                x_requires_grad=True, counts=Counts.of(counts, 0))  # fmt: skip
        start_s = time.perf_counter()
        plan = schedule.planned(exchange)
        seconds = time.perf_counter() - start_s
        (known_s if id(plan) in plans else new_s).append(seconds)
        plans.add(id(plan))
        chances = (1 - DRIFT) * chances + DRIFT * draw.dirichlet(spread, size=ranks)
    return {
        "ranks": ranks,
        "experts": experts,
        "uneven": uneven,
        "steps": steps,
        "planned_anew": len(new_s),
        "new_ms_median": 1e3 * statistics.median(new_s),
        "known_ms_median": 1e3 * statistics.median(known_s) if known_s else None,
        "hardware": hardware(),
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    options = parser.parse_args()
    rows = [row_of(*setting, options.steps) for setting in SETTINGS]
    for row in rows:
        known = "-" if row["known_ms_median"] is None else f"{row['known_ms_median']:.2f} ms"
        print(f"{row['ranks']:3d} ranks, {row['experts']:3d} experts, {'uneven' if row['uneven'] else 'even  '}: "
              f"{row['planned_anew']:3d} of {row['steps']} steps planned anew, {row['new_ms_median']:.2f} ms each; "
              f"the others {known}")  # fmt: skip
    if options.out is not None:
        append_jsonl(options.out, rows)


if __name__ == "__main__":
    main()
