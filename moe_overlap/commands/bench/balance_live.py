"""`bench balance --live-steps N`: kept placements that follow a load over N training steps, moves included.

Two units take turns, step by step, on the same tokens: one whose experts stay, and one whose `PlacementController`
plans anew from what it has seen. Steps of the latter are timed with what its controller does after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from moe_overlap.commands.bench.balance_cases import (
    Planned,
    Times,
    Unit,
    costs,
    max_rel_err,
    pair_of,
    time_step,
    topology_of,
)
from moe_overlap.commands.bench.balance_options import LIVE_SCHEDULE as SCHEDULE
from moe_overlap.commands.bench.balance_options import BalanceOptions
from moe_overlap.commands.bench.slept import Calibration, slept_experts
from moe_overlap.commands.bench.timing import quiet_collector
from moe_overlap.launch.launch import World
from moe_overlap.layer.controller import PlacementController, Progress
from moe_overlap.placement import Placement
from moe_overlap.placement.planners import Flex
from moe_overlap.placement.topology import Topology
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import LinkSpec

INTERVAL = 5  # steps from plan to plan


@dataclass
class Live:
    """One workload: steps with homes alone and with a live placement, on this rank. seconds include the controller's,
    which `moving_s` has alone; `placements`: the live ones, one for each step."""

    static: Times = field(default_factory=Times)
    live: Times = field(default_factory=Times)
    moving_s: list[float] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    max_rel_err: float = 0.0  # of the last step, between both


def follow(
    world: World, options: BalanceOptions, transport: Transport, sleep: Calibration, link: LinkSpec,
    ids_of: Callable[[int], torch.Tensor], x_TD: torch.Tensor,
) -> Live:  # fmt: skip
    """The steps of one workload; ids_of: the choices of this rank in a step, int32 [T, k]. Collective."""
    phases = costs(options, sleep, link, SCHEDULE)
    still, moving = Unit(options, transport, sleep), Unit(options, transport, sleep)
    planner = partial(_flex, options, topology_of(options, phases[0]))
    controller = PlacementController(
        moving, planner, phases, interval=INTERVAL, horizon=4 * INTERVAL, ranks_per_node=options.ranks_per_node
    )
    pair = pair_of(SCHEDULE, options.chunks)
    found = Live()
    with slept_experts(sleep if options.compute == "slept" else None), quiet_collector():
        for step in range(options.live_steps):
            ids_TK = ids_of(step)
            time_step(world, still, Planned(planner="static", schedule=SCHEDULE, pair=pair), ids_TK, x_TD, found.static)
            kept = moving.moe.dispatcher.placement
            found.placements.append(kept)
            plan = Planned(planner="live", schedule=SCHEDULE, pair=pair, kept=kept)
            time_step(world, moving, plan, ids_TK, x_TD, found.live)
            moving.zero_grad(set_to_none=True)
            world.barrier()
            start_s = time.perf_counter()
            controller.step()
            found.moving_s.append(time.perf_counter() - start_s)
            found.live.seconds[-1] += found.moving_s[-1]
    found.progress = controller.progress[0]
    right, _ = max_rel_err(world, still, Planned(planner="static", schedule=SCHEDULE, pair=pair), ids_TK, x_TD, None)
    last = Planned(planner="live", schedule=SCHEDULE, pair=pair, kept=moving.moe.dispatcher.placement)
    found.max_rel_err = max_rel_err(world, moving, last, ids_TK, x_TD, right)[1]
    return found


def _flex(options: BalanceOptions, topology: Topology, counts_WE: np.ndarray, current: Placement) -> Placement:
    slots = options.experts // options.ranks + options.slots
    return Flex()(counts_WE, topology, slots=slots, current=current)
