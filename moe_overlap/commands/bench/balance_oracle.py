"""The columns of `bench balance` that say how far a row is from the best that copies could do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_overlap.commands.bench.balance_cases import costs
from moe_overlap.commands.bench.balance_options import BalanceOptions
from moe_overlap.commands.bench.oracle import Bound, has_solver, oracle
from moe_overlap.commands.bench.slept import Calibration
from moe_overlap.commands.bench.workloads import counts_of
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.replication import decide
from moe_overlap.transport.link import LinkSpec


def with_oracle(
    options: BalanceOptions, rows: Sequence[dict[str, Any]], sleep: Calibration, link: LinkSpec, *, step: int,
    ideal: str,
) -> None:  # fmt: skip
    """Fill in `oracle_ms`, `oracle_proven` and `of_oracle` of the skewed rows, all but those of the planner `ideal`:
    the bound of what is decided about (homes, --slots, this schedule's prices), with what the price leaves out as in
    `predicted_ms`. Once for each workload and schedule, for --oracle-s seconds at most; with 0 they stay None, and
    without scipy too, which is said."""
    if not options.oracle_s or options.live_steps:
        return
    if not has_solver():
        print("no oracle_ms: scipy is not installed (pip install scipy)", file=sys.stderr, flush=True)
        return
    dense_s, found = sleep.mlp_forward_s + sleep.mlp_backward_s, dict[tuple[str, str], Bound]()
    for row in rows:
        if row["planner"] == ideal:
            continue
        key = row["workload"], row["schedule"]
        if key not in found:
            found[key] = _bound(options, sleep, link, *key, step=step)
        outside_ms = row["outside_ms"] + (0.0 if key[1].startswith("shortcut") else 1e3 * dense_s)
        row["oracle_ms"] = float(f"{1e3 * found[key].seconds + outside_ms:.5g}")
        row["oracle_proven"] = found[key].proven
        row["of_oracle"] = float(f"{row['oracle_ms'] / row['time_ms_median']:.5g}")


def _bound(
    options: BalanceOptions, sleep: Calibration, link: LinkSpec, workload: str, schedule: str, *, step: int
) -> Bound:
    path = Path(options.recorded) if options.recorded else None
    counts_WE: np.ndarray = counts_of(workload, options.sizes, seed=options.seed, step=step, recorded=path)
    homes = Placement.identity(options.experts, options.ranks).home_ranks
    spare = [options.slots] * options.ranks
    load = Load.at_home(counts_WE, homes, spare, ranks_per_node=options.ranks_per_node)
    phases = costs(options, sleep, link, schedule)
    return oracle(load, phases, known_s=decide(load, phases, margin=0.0).predicted_s, seconds=options.oracle_s)
