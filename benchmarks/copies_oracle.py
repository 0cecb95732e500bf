"""How near the decision of copies comes to the oracle, in predicted time, and how long a large one takes.

    python benchmarks/copies_oracle.py [--ffn 256,4096] [--schedules chunked] [--seconds 10] [--recorded FILE]

The settings of `moe-overlap bench balance --compute-ms 400 --tokens 1024 --slots 3`, with nominal sleeps: nothing is
measured but the time of the decision. A line for each width, workload and schedule: milliseconds of the layer as
decided, as bounded, and of the best choice that the solver found, priced as the decision is. Where a bound is not
proven, that choice says more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from moe_overlap.commands.bench.balance_cases import costs, link_of, scaled
from moe_overlap.commands.bench.balance_options import BalanceOptions
from moe_overlap.commands.bench.oracle import oracle
from moe_overlap.commands.bench.slept import Calibration
from moe_overlap.commands.bench.workloads import counts_of
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import nominal_costs
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.replication import decide, priced

WORKLOADS = ("zipf1.0", "zipf0.6", "zipf1.5", "one_hot_expert", "one_hot_node", "drifting", "balanced")
STEP = 3  # as bench balance has it
NOMINAL = Calibration(attention_forward_s=0.0, attention_backward_s=0.0, mlp_forward_s=0.0, mlp_backward_s=0.0,
                      expert_row_s=1e-6, dgrad_row_s=1e-6, wgrad_row_s=1e-6)  # fmt: skip


def compared(options: BalanceOptions, workload: str, schedule: str, seconds: float, recorded: Path | None) -> str:
    """One line."""
    counts_WE = counts_of(workload, options.sizes, seed=options.seed, step=STEP, recorded=recorded)
    homes = Placement.identity(options.experts, options.ranks).home_ranks
    spare = [options.slots] * options.ranks
    load = Load.at_home(counts_WE, homes, spare, ranks_per_node=options.ranks_per_node)
    phases = costs(options, scaled(NOMINAL, options), link_of(options), schedule)
    found = decide(load, phases, margin=0.0)
    bound = oracle(load, phases, known_s=found.predicted_s, seconds=seconds)
    best_s = found.predicted_s if bound.seats is None else min(found.predicted_s, priced(load, bound.seats, phases))
    proven, decided_s = "proven" if bound.proven else "      ", found.predicted_s
    name = f"{options.ffn:5d} {workload:15s} {schedule:9s}"
    return (f"{name} left {1e3 * found.left_s:7.1f}  decided {1e3 * decided_s:6.1f}  "
            f"bound {1e3 * bound.seconds:6.1f} {proven} {bound.seconds / decided_s:5.1%}  "
            f"of the best found {best_s / decided_s:5.1%}  copies {len(found.copies(load))}")  # fmt: skip


def time_of_a_large_one(ranks: int = 64, experts: int = 256) -> str:
    """The least of 300 decisions, Zipf 1.0, two slots on each rank."""
    rng = np.random.default_rng(0)
    popularity = rng.permutation(1.0 / np.arange(1, experts + 1))
    counts_WE = rng.multinomial(4096, popularity / popularity.sum(), size=ranks)
    homes = Placement.identity(experts, ranks).home_ranks
    load = Load.at_home(counts_WE, homes, [2] * ranks, ranks_per_node=8)
    phases = nominal_costs(hidden=2048, ffn=1024, flop_per_s=3e14, inter_bytes_per_s=5e10, intra_bytes_per_s=4e11,
                           chunks=4)  # fmt: skip
    times = []
    for _ in range(300):
        start_s = time.perf_counter()
        found = decide(load, phases)
        times.append(time.perf_counter() - start_s)
    return f"{experts} experts on {ranks} ranks: {1e3 * min(times):.3f} ms for {len(found.copies(load))} copies"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ffn", default="256,4096")
    parser.add_argument("--schedules", default="chunked")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the solver, for each line")
    parser.add_argument(
        "--recorded", type=Path, help="a routing file (moe-overlap train --save-routing): one workload more"
    )
    given = parser.parse_args()
    for ffn in map(int, given.ffn.split(",")):
        options = BalanceOptions(compute_ms=400.0, tokens=1024, ffn=ffn, slots=3)
        for workload in (*WORKLOADS, *(["recorded"] if given.recorded else [])):
            for schedule in given.schedules.split(","):
                print(compared(options, workload, schedule, given.seconds, given.recorded), flush=True)
    print(time_of_a_large_one())


if __name__ == "__main__":
    main()
