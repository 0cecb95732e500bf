"""What schedule="auto" costs in every step: how often a step is searched for, how long that takes, and what is lost.

    python benchmarks/planner_steps.py

Train steps of 1024 tokens a rank, two experts a token, drawn anew in every step from probabilities that are equal, as
with a balancing loss, or uneven: drifting slowly, drifting, or permuted in every step. Each is planned twice: with a
search for every new kind of step, and with one where what it can gain is more than it costs (--search-ms). "lost" is
how much longer the steps are predicted to take than with a search for each. Milliseconds are of this thread's CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import product
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

TOKENS, TOP_K = 1024, 2
LOADS = {"even": (1e9, 0.0, False), "uneven": (5.0, 0.005, False), "drifting": (1.0, 0.05, False),
         "flipping": (1.0, 0.0, True)}  # fmt: skip
"""(evenness of the probabilities, drift a step, permuted in every step)"""
SIZES = ((2, 8), (8, 64), (64, 256))
"""(ranks, experts)"""


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


def row_of(ranks: int, experts: int, load: str, steps: int, search_s: float) -> dict[str, object]:
    """One setting, timed."""
    draw = np.random.default_rng(0)
    spread, drift, flips = LOADS[load]
    chances = draw.dirichlet(np.full(experts, spread), size=ranks)
    schedule = PlannedSchedule(model=cost_model(), num_ops=3, row_bytes=2048, search_s=search_s)
    always = PlannedSchedule(model=cost_model(), num_ops=3, row_bytes=2048)
    seconds, ran_s, best_s = [], 0.0, 0.0
    for step in range(steps):
        counts = np.stack([draw.multinomial(TOP_K * TOKENS // BLOCKS, p, size=BLOCKS) for p in chances])
        exchange = ExchangePlan(rank=0, world_size=ranks, step=step, phase="forward", grad_enabled=True,
                                x_requires_grad=True, counts=Counts.of(counts, 0))  # fmt: skip
        start_s = time.thread_time()
        schedule.pair_for(exchange)
        schedule.begins_backward(exchange)
        seconds.append(time.thread_time() - start_s)
        ran_s += schedule.planned(exchange).predicted_s
        best_s += always.planned(exchange).predicted_s
        chances = (1 - drift) * chances + drift * draw.dirichlet(np.full(experts, spread), size=ranks)
        chances = chances[:, draw.permutation(experts)] if flips else chances
    return {
        "ranks": ranks,
        "experts": experts,
        "load": load,
        "steps": steps,
        "search_s": search_s,
        "hit_rate": schedule.hit_rate,
        "searched": schedule.tally["searched"],
        "taken_over": schedule.tally["taken over"],
        "lost": ran_s / best_s - 1,
        "predicted_ms": 1e3 * best_s / steps,
        "host_ms_mean": 1e3 * statistics.mean(seconds),
        "host_ms_median": 1e3 * statistics.median(seconds),
        "host_ms_most": 1e3 * max(seconds),
        "hardware": hardware(),
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--search-ms", type=float, default=3.0, help="what a search is taken to cost")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    options = parser.parse_args()
    settings = product(SIZES, LOADS, (0.0, 1e-3 * options.search_ms))
    for (ranks, experts), load, search_s in settings:
        row = row_of(ranks, experts, load, options.steps, search_s)
        size = f"{row['ranks']:3d} ranks, {row['experts']:3d} experts, {row['load']:8s}"
        found = f"{row['searched']:3d} of {row['steps']} searched for, {row['taken_over']:3d} taken over"
        cost = f"{row['lost']:.2%} lost of {row['predicted_ms']:.1f} ms; host {row['host_ms_mean']:.2f} ms a step"
        print(f"{size}, search {1e3 * row['search_s']:g} ms: {found}, {row['hit_rate']:.0%} hits, {cost}",
              flush=True)  # fmt: skip
        if options.out is not None:
            append_jsonl(options.out, [row])


if __name__ == "__main__":
    main()
