"""schedule="auto" in `bench balance`: a planned schedule from the slept prices, after some steps of the workload.

Nothing is measured for it: the cost model has the figures that experts sleep and the link waits. Before its row is
timed it has chosen for STEPS steps of the workload, on all ranks alike, so that the row says how many of these it
searched for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.seats import Seats, StepRule, seats_of, seats_of_step
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.commands.bench.balance_options import BalanceOptions
from moe_overlap.commands.bench.slept import Calibration
from moe_overlap.commands.bench.workloads import counts_of
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import GRADIENT_BYTES
from moe_overlap.planning.cost_model import AlphaBeta, CostModel
from moe_overlap.transport.link import LinkSpec

STEPS = 100
SEARCH_S = 3e-3  # what a search is taken to cost, on all ranks alike: the median of `benchmarks/planner_steps.py`
MATRICES = 3  # of a SwiGLU expert, each D x F


def auto_schedule(options: BalanceOptions, sleep: Calibration, link: LinkSpec) -> PlannedSchedule:
    """A planned schedule of the layer alone, whose dense op runs before it; ranks of a node talk for nothing."""
    free = AlphaBeta(alpha_s=0.0, beta_s=0.0)
    size = options.torch_dtype.itemsize
    expert = MATRICES * options.hidden * options.ffn
    model = CostModel(
        exchange={"inter": AlphaBeta(alpha_s=link.latency_s, beta_s=1 / link.bytes_per_s), "intra": free},
        experts=AlphaBeta(alpha_s=0.0, beta_s=sleep.expert_row_s),
        experts_dgrad=AlphaBeta(alpha_s=0.0, beta_s=sleep.dgrad_row_s),
        experts_wgrad=AlphaBeta(alpha_s=0.0, beta_s=sleep.wgrad_row_s),
        permute=free, unpermute=free, unpermute_backward=free, permute_backward=free, source="slept prices",
    )  # fmt: skip
    nodes = tuple(rank // options.ranks_per_node for rank in range(options.ranks))
    return PlannedSchedule(model=model, num_ops=0, row_bytes=options.hidden * size, nodes=nodes,
                           expert_bytes=(expert * size, expert * GRADIENT_BYTES), search_s=SEARCH_S)  # fmt: skip


def replay(schedule: PlannedSchedule, options: BalanceOptions, workload: str, rule: StepRule | None,
           kept: Placement | None) -> None:  # fmt: skip
    """Choose for the first STEPS steps of a workload; nothing runs."""
    base = seats_of(kept or Placement.identity(options.experts, options.ranks))
    path = Path(options.recorded) if options.recorded else None
    for step in range(STEPS):
        counts_WE = counts_of(workload, options.sizes, seed=options.seed, step=step, recorded=path)
        exchange = agreed(counts_WE, base, rule, options, step=step - STEPS)
        schedule.pair_for(exchange)
        schedule.begins_backward(exchange)


def agreed(
    counts_WE: np.ndarray, base: Seats, rule: StepRule | None, options: BalanceOptions, *, step: int
) -> ExchangePlan:
    """A training step with these counts, as the ranks would agree on it; rows are spread evenly over the blocks."""
    each, more = np.divmod(counts_WE[:, None, :], BLOCKS)
    counts_WBE = each + (np.arange(BLOCKS)[None, :, None] < more)
    seats, relayed = (base, False) if rule is None else seats_of_step(rule, counts_WBE, base)
    return ExchangePlan(
        rank=0, world_size=options.ranks, step=step, phase="forward", grad_enabled=True, x_requires_grad=True,
        counts=Counts.of(seats.counts(counts_WBE, range(options.ranks)), 0), ranks_per_node=options.ranks_per_node,
        seats=seats, copies_kept=seats is base, copies_relayed=relayed, weights_require_grad=True,
    )  # fmt: skip
