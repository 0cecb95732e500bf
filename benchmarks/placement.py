"""How long the planners take: 58 layers, 256 experts on 64 ranks with 5 slots each, one core, without a placement
before and with that of loads that differ by 5 %. Prints JSON lines.

OMP_NUM_THREADS=1 python benchmarks/placement.py
"""

from __future__ import annotations

import itertools
import json
import statistics
import time

import numpy as np

from moe_overlap.placement.demand import balance_ratio, checked_traffic, rank_load
from moe_overlap.placement.planners import Eplb, Proportional
from moe_overlap.placement.topology import Topology

LAYERS, EXPERTS, RANKS, SLOTS, REPEATS = 58, 256, 64, 5, 20


def main() -> None:
    rng = np.random.default_rng(0)
    loads = list(rng.poisson(128 * rng.lognormal(0, 1.1, (LAYERS, EXPERTS))))
    topology = Topology(world_size=RANKS, ranks_per_node=8)
    noisy = [np.maximum(0, np.round(load * rng.normal(1, 0.05, EXPERTS))).astype(np.int64) for load in loads]
    planners = (("eplb", Eplb()), ("eplb 32 groups", Eplb(groups=32)), ("proportional", Proportional()))
    for (name, planner), keeps in itertools.product(planners, (False, True)):
        current = planner.layers(noisy, topology, slots=SLOTS) if keeps else None
        times = []
        for _ in range(REPEATS):
            begin = time.process_time()
            found = planner.layers(loads, topology, slots=SLOTS, current=current)
            times.append(1e3 * (time.process_time() - begin))
        ratios = [balance_ratio(rank_load(one, checked_traffic(load, topology)))
                  for one, load in zip(found, loads, strict=True)]  # fmt: skip
        print(json.dumps({"planner": name, "layers": LAYERS, "experts": EXPERTS, "ranks": RANKS, "slots": SLOTS,
                          "current": keeps, "cpu_ms_median": round(statistics.median(times), 2),
                          "cpu_ms_max": round(max(times), 2), "max_over_mean": round(max(ratios), 3)}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
