"""What `bench balance` times: one layer behind a dense op under a workload and a planner; both sleep, or compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from moe_overlap.agreement.seats import StepRule, seats_of
from moe_overlap.auto.parallelism import ParallelismSwitch
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.auto.replicate import ReplicationRule, load_of
from moe_overlap.commands.bench.balance_auto import MATRICES, agreed, auto_schedule, replay
from moe_overlap.commands.bench.balance_options import KEPT, BalanceOptions
from moe_overlap.commands.bench.cases import Branch, Residual
from moe_overlap.commands.bench.routing import ForcedRouter
from moe_overlap.commands.bench.slept import Calibration, Slept, slept_experts
from moe_overlap.commands.bench.timing import quiet_collector
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.moving import set_placement
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.placement.planners import Eplb, Flex, Planner, Proportional
from moe_overlap.placement.topology import Topology
from moe_overlap.planning.copy_costs import GRADIENT_BYTES, PhaseCosts
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.planning.replication import priced
from moe_overlap.schedule.builders import SchedulePair, chunked, serial, window
from moe_overlap.transport.accounting import CommCpu
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import LinkSpec

EXCHANGES = {"forward": 2, "backward": 2}


def scaled(found: Calibration, options: BalanceOptions) -> Calibration:
    """The calibrated times of experts, all longer by one factor, so that a rank's balanced step has --compute-ms; real
    compute takes what it takes."""
    if options.compute == "real":
        return found
    rows = options.tokens * options.top_k
    factor = 1e-3 * options.compute_ms / (rows * (found.expert_row_s + found.dgrad_row_s + found.wgrad_row_s))
    moe_s = 1e-3 * options.compute_ms / (1.0 - options.comm_share)
    dense_s = moe_s * (1.0 - options.moe_share) / options.moe_share
    return Calibration(
        attention_forward_s=0.0, attention_backward_s=0.0,
        mlp_forward_s=dense_s / 3, mlp_backward_s=dense_s * 2 / 3,
        expert_row_s=found.expert_row_s * factor, dgrad_row_s=found.dgrad_row_s * factor,
        wgrad_row_s=found.wgrad_row_s * factor,
    )  # fmt: skip


def balanced_s(options: BalanceOptions, found: Calibration) -> float:
    """Seconds of a rank's experts in a step with balanced load, both phases."""
    return options.tokens * options.top_k * (found.expert_row_s + found.dgrad_row_s + found.wgrad_row_s)


def link_of(options: BalanceOptions, compute_s: float | None = None) -> LinkSpec:
    """The link at which the four exchanges of a balanced training step are --comm-share of layer and exchanges; the
    experts of a rank take compute_s in it (--compute-ms)."""
    compute_s = 1e-3 * options.compute_ms if compute_s is None else compute_s
    row_bytes = options.hidden * options.torch_dtype.itemsize
    away = (options.ranks - options.ranks_per_node) / options.ranks
    sent = sum(EXCHANGES.values()) * options.tokens * options.top_k * row_bytes * away
    wire_s = compute_s * options.comm_share / (1.0 - options.comm_share)
    transfer_s = wire_s - sum(EXCHANGES.values()) * 1e-6 * options.latency_us
    if transfer_s <= 0:
        raise ConfigError(
            "--latency-us", options.latency_us, f"less than {1e6 * wire_s / 4:.0f}: the exchanges take no longer"
        )
    return LinkSpec(bytes_per_s=125e3 * float(f"{sent / transfer_s / 125e3:.4g}"), latency_s=1e-6 * options.latency_us)


def costs(options: BalanceOptions, sleep: Calibration, link: LinkSpec, schedule: str) -> tuple[PhaseCosts, ...]:
    """Forward and backward, from the calibrated times and the link; the ranks of a node talk for nothing. schedule: one
    of SCHEDULES; in a shortcut the dense op is in the window."""
    size = options.torch_dtype.itemsize
    expert = MATRICES * options.hidden * options.ffn
    free = AlphaBeta(alpha_s=0.0, beta_s=0.0)

    def over(num_bytes: int) -> tuple[AlphaBeta, AlphaBeta]:
        return AlphaBeta(alpha_s=link.latency_s, beta_s=num_bytes / link.bytes_per_s), free

    row = over(options.hidden * size)
    joined, shortcut = schedule == "serial", schedule.startswith("shortcut")
    forward = PhaseCosts(
        row_s=sleep.expert_row_s, exchange=row, copy=over(expert * size), joined=joined,
        chunks=1 if joined else options.chunks, exposed_copies=schedule == "shortcut_exposed",
        beside_s=sleep.mlp_forward_s if shortcut else 0.0, relays=True,
    )  # fmt: skip
    backward_s = sleep.mlp_backward_s if shortcut else 0.0
    return forward, replace(
        forward, row_s=sleep.dgrad_row_s + sleep.wgrad_row_s, wgrad_row_s=sleep.wgrad_row_s,
        copy=over(expert * GRADIENT_BYTES), beside_s=backward_s, relays=False,
    )  # fmt: skip


def pair_of(schedule: str, chunks: int) -> SchedulePair:
    """The pair of one of SCHEDULES but "auto"."""
    if schedule.startswith("shortcut"):
        return replace(window(1, 1, chunks=chunks), joined_copies=schedule == "shortcut_exposed")
    return serial() if schedule == "serial" else chunked(chunks)


@dataclass(frozen=True, kw_only=True)
class ShadowRule:
    """FasterMoE's shadows (PPoPP 2022) for one step: the k hottest experts get a copy on every rank, where tokens then
    stay; k grows while 3 c B_k + 4 f B_k + k m falls (B_k: tokens of the hottest expert without a shadow). c, f, m:
    seconds of a token's forward, of its row on the wire, and of an expert's weights there and back."""

    token_s: float
    row_s: float
    weights_s: float
    most: int
    digest: int = 1

    def __call__(self, counts: np.ndarray, base: Placement) -> Placement:
        """As `StepRule`; counts int64 [W, BLOCKS, E]."""
        load_E = counts.sum(axis=(0, 1))
        hottest = np.argsort(-load_E, kind="stable")
        times = [(3 * self.token_s + 4 * self.row_s) * int(load_E[e]) + k * self.weights_s
                 for k, e in enumerate(hottest)]  # fmt: skip
        k = 0
        while k < min(self.most, len(times) - 1) and times[k + 1] < times[k]:
            k += 1
        if not k:
            return base
        ranks = [own + [int(e) for e in sorted(hottest[:k]) if e not in own] for own in base.experts_of_ranks()]
        return Placement.of_ranks(ranks, homes=base.home_ranks, selector=LocalFirst())


@dataclass(frozen=True, kw_only=True)
class Auto:
    """A planned schedule that has chosen for some steps of the workload: the share of them that it did not search for,
    and milliseconds of a search on this rank; `predicted_s`: of the layer in the step that is timed."""

    schedule: PlannedSchedule
    hit_rate: float | None
    search_ms: float
    predicted_s: float


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One planner with a schedule. rule: decides in every step; None: `kept` holds, or, where that is None too, the
    experts' homes alone. auto: runs in the place of `pair`, which is what it chooses for the step that is timed."""

    planner: str
    schedule: str
    pair: SchedulePair
    rule: StepRule | None = None
    kept: Placement | None = None
    auto: Auto | None = None

    @property
    def step_rule(self) -> StepRule | None:
        """`rule`, with the prices of the planned schedule where it has none of its own."""
        if self.auto is None or not isinstance(self.rule, ReplicationRule):
            return self.rule
        return self.rule.under(self.auto.schedule, grad=True)


def topology_of(options: BalanceOptions, forward: PhaseCosts) -> Topology:
    """What placement planners know of the run: the prices of its forward."""
    expert = MATRICES * options.hidden * options.ffn * options.torch_dtype.itemsize
    return Topology(
        world_size=options.ranks, ranks_per_node=options.ranks_per_node, row_s=forward.row_s,
        row_bytes=options.hidden * options.torch_dtype.itemsize, expert_bytes=expert,
        inter_bytes_per_s=expert / forward.copy[0].beta_s,
    )  # fmt: skip


def kept_placement(planner: str, options: BalanceOptions, history_WE: np.ndarray, forward: PhaseCosts) -> Placement:
    """What a planner makes of the load of earlier steps, int64 [W, E], with the prices of the run; homes stay."""
    topology = topology_of(options, forward)
    planners: dict[str, Planner] = {
        "flex": Flex(keep_homes=True),
        "eplb": Eplb(keep_homes=True),
        "proportional": Proportional(keep_homes=True),
    }
    slots = options.experts // options.ranks + options.slots
    current = Placement.identity(options.experts, options.ranks)
    return planners[planner](history_WE, topology, slots=slots, current=current)


def with_auto(
    plan: Planned, options: BalanceOptions, sleep: Calibration, link: LinkSpec, workload: str, counts_WE: np.ndarray
) -> Planned:
    """The same planner with a planned schedule that has seen some steps of the workload; counts: of the timed step."""
    schedule = auto_schedule(options, sleep, link)
    rule = plan.rule.under(schedule, grad=True) if isinstance(plan.rule, ReplicationRule) else plan.rule
    replay(schedule, options, workload, rule, plan.kept)
    hit_rate, tally = schedule.hit_rate, schedule.tally
    base = seats_of(plan.kept or Placement.identity(options.experts, options.ranks))
    found = schedule.planned(agreed(counts_WE, base, rule, options, step=0))
    auto = Auto(schedule=schedule, hit_rate=hit_rate, search_ms=1e-3 * tally["search_us"] / tally["searched"],
                predicted_s=found.predicted_s)  # fmt: skip
    return replace(plan, pair=found.pair, auto=auto)


def planned(options: BalanceOptions, sleep: Calibration, link: LinkSpec, history_WE: np.ndarray) -> list[Planned]:
    """The rows of one workload. Shadows with exposed copies are those of a serial schedule; beside it our own."""
    forward, backward = costs(options, sleep, link, "serial")
    shadow = ShadowRule(token_s=forward.row_s, row_s=forward.exchange[0].beta_s,
                        weights_s=forward.copy[0].beta_s + backward.copy[0].beta_s, most=options.slots)  # fmt: skip
    found = []
    for planner in options.planners:
        for schedule in options.schedules:
            rule: StepRule | None = None
            kept = kept_placement(planner, options, history_WE, forward) if planner in KEPT else None
            phases = costs(options, sleep, link, schedule.removesuffix("_exposed"))  # the same copies
            if planner == "replicate":
                rule = ReplicationRule(
                    phases=None if schedule == "auto" else phases,
                    spare=options.slots,
                    ranks_per_node=options.ranks_per_node,
                )
            elif planner == "switch":
                rule = ParallelismSwitch(phases=phases, ranks_per_node=options.ranks_per_node)
            elif planner == "shadow":
                rule = shadow
            pair = pair_of("chunked" if schedule == "auto" else schedule, options.chunks)
            found.append(Planned(planner=planner, schedule=schedule, pair=pair, rule=rule, kept=kept))
    return found


class Unit(nn.Module):
    """A dense op before the layer or beside it, whose router wants what `use` says."""

    def __init__(self, options: BalanceOptions, transport: Transport, sleep: Calibration) -> None:
        super().__init__()
        torch.manual_seed(options.seed)
        even = torch.full((options.tokens, options.top_k), 1.0 / options.top_k)
        ids_TK = torch.zeros(options.tokens, options.top_k, dtype=torch.int32)
        wide = torch.float64 if options.torch_dtype == torch.float64 else torch.float32
        self.router = ForcedRouter(ids_TK, even.to(wide), options.experts)
        self.dense: nn.Module = Slept(sleep.mlp_forward_s, sleep.mlp_backward_s)
        if options.compute == "real":
            self.dense = Residual(Branch(options.hidden, options.ffn, dtype=options.torch_dtype))
        self.alone = Placement.identity(options.experts, options.ranks)
        self.moe = MoELayer(
            options.hidden, options.ffn, options.experts, options.top_k, router=self.router, activation="swiglu",
            schedule=serial(), transport=transport, ranks_per_node=options.ranks_per_node, dtype=options.torch_dtype,
        )  # fmt: skip
        self.block = ShortcutBlock([self.dense], self.moe, tap=0, schedule=window(1, 1))

    def use(self, plan: Planned, ids_TK: torch.Tensor) -> None:
        """The coming step's routing, schedule and rule, on all ranks alike. Copies are fetched as after a step of an
        optimizer: in each step anew."""
        self.router.ids_TK = ids_TK
        self.router.tokens_per_expert_E = torch.bincount(
            ids_TK.flatten().long(), minlength=self.moe.dispatcher.placement.num_experts
        )
        self.beside = plan.pair.num_ops > 0
        module = self.block if self.beside else self.moe
        module.schedule = plan.pair if plan.auto is None else plan.auto.schedule  # type: ignore[assignment]
        self.moe.dispatcher.rule = plan.rule
        wanted = plan.kept or self.alone
        if self.moe.dispatcher.placement.digest != wanted.digest:
            set_placement(self.moe, wanted)
        self.moe.forget_copies()

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.block(x_TD) if self.beside else self.moe(self.dense(x_TD))
        return y_TD

    def routed(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What the experts alone make of x, in the schedule of `use`."""
        dense, self.block.backbone[0] = self.dense, nn.Identity()
        self.dense = nn.Identity()
        y_TD = self.forward(x_TD)
        self.dense = self.block.backbone[0] = dense
        return y_TD - x_TD if self.beside else y_TD


@dataclass
class Times:
    """Of one row on this rank: seconds of its steps, CPU seconds of the transports' threads, bytes of a step."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    payload_bytes: int = 0


def time_rows(
    world: World, unit: Unit, rows: Sequence[tuple[Planned, torch.Tensor]], x_TD: torch.Tensor,
    sleep: Calibration | None, repeats: int,
) -> list[Times]:  # fmt: skip
    """Training steps of all rows, interleaved; every other round backwards. Without `sleep` experts compute.
    Collective."""
    found = [Times() for _ in rows]
    with slept_experts(sleep), quiet_collector():
        for round_ in range(repeats + 1):
            order = range(len(rows)) if round_ % 2 else reversed(range(len(rows)))
            for i in order:
                time_step(world, unit, *rows[i], x_TD, found[i] if round_ else None)
    return found


def time_step(
    world: World, unit: Unit, plan: Planned, ids_TK: torch.Tensor, x_TD: torch.Tensor, times: Times | None
) -> None:
    """One training step, its seconds into `times` (None: a warm-up). Collective."""
    unit.use(plan, ids_TK)
    unit.zero_grad(set_to_none=True)
    x_TD = x_TD.detach().requires_grad_()
    stats = unit.moe.transport.stats
    before = stats.weight_bytes, stats.payload_bytes
    world.barrier()
    start_s = time.perf_counter()
    with CommCpu() as others:
        unit(x_TD).backward(x_TD.detach())
        end_s = time.perf_counter()
    if times is not None:
        times.seconds.append(end_s - start_s)
        times.cpu_s.append(others.seconds)
        times.weight_bytes, times.payload_bytes = stats.weight_bytes - before[0], stats.payload_bytes - before[1]


def max_rel_err(
    world: World, unit: Unit, plan: Planned, ids_TK: torch.Tensor, x_TD: torch.Tensor, right: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """(y of this rank with real experts, its largest difference from `right` over the largest |right|). Collective."""
    unit.use(plan, ids_TK)
    with torch.no_grad():
        y_TD = unit.routed(x_TD)
    if right is None:
        return y_TD, 0.0
    error = float((y_TD - right).abs().max() / right.abs().max())
    return y_TD, max(float(one) for one in world.gather(torch.tensor([error], dtype=torch.float64)))


def predicted_s(plan: Planned, counts_WE: np.ndarray, placement: Placement, phases: Sequence[PhaseCosts],
                ranks_per_node: int) -> tuple[float, float, int]:  # fmt: skip
    """(seconds of the layer, rows of the fullest rank over the mean, copies) from the counts of a step. Rows are taken
    as spread evenly over the blocks of tokens. The copies of our rules alone may go from rank to rank."""
    if not isinstance(plan.rule, ReplicationRule | ParallelismSwitch):
        phases = [replace(phase, relays=False) for phase in phases]
    blocks_WBE = counts_WE[:, None, :]
    placed = plan.kept or placement
    rule = plan.step_rule
    placed = placed if rule is None else rule(blocks_WBE, placed)
    load = load_of(blocks_WBE, placed, [0] * placed.world_size, ranks_per_node)
    loads = np.zeros(placed.world_size)
    for _, rank, rows in load.seats:
        loads[rank] += rows
    seconds = priced(load, load.seats, phases) if plan.auto is None else plan.auto.predicted_s
    return seconds, float(loads.max() / loads.mean()), placed.num_slots - placed.num_experts
