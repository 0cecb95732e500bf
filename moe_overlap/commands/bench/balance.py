"""`moe-overlap bench balance`: skewed routing under placements, copies of experts and shadows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_overlap import config
from moe_overlap.commands.bench.balance_cases import (
    Planned,
    Times,
    Unit,
    balanced_s,
    costs,
    link_of,
    max_rel_err,
    pair_of,
    planned,
    predicted_s,
    scaled,
    time_rows,
    with_auto,
)
from moe_overlap.commands.bench.balance_live import follow
from moe_overlap.commands.bench.balance_options import LIVE_SCHEDULE as SCHEDULE
from moe_overlap.commands.bench.balance_options import BalanceOptions, parse
from moe_overlap.commands.bench.balance_oracle import with_oracle
from moe_overlap.commands.bench.balance_report import KEYS, print_rows, write_picture
from moe_overlap.commands.bench.layer import on_rank
from moe_overlap.commands.bench.options import LayerOptions
from moe_overlap.commands.bench.phase import CheckFailed
from moe_overlap.commands.bench.slept import Calibration, calibrate
from moe_overlap.commands.bench.wires import Wires
from moe_overlap.commands.bench.workloads import choices, counts_of, imbalance
from moe_overlap.commands.parser import fresh_folder
from moe_overlap.launch.launch import World, run, torchrun_world_size
from moe_overlap.measure.machine import commit, hardware
from moe_overlap.measure.overlap import is_noisy, median, percentile
from moe_overlap.measure.report import Row, write_jsonl
from moe_overlap.placement import Placement
from moe_overlap.schedule.builders import serial
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import LinkSpec

PROGRAM = "moe-overlap bench balance"
ROWS = "results.jsonl"
OUTPUTS = (ROWS, "balance.png")
IDEAL = "forced_balanced"  # beside each schedule: what balanced routing takes
STEP = 3  # of the workloads: all rows of a run have the same tokens
MAX_REL_ERR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark on ranks it spawns, or on torchrun's; the exit status. ConfigError for bad input."""
    options = parse(argv, ranks=torchrun_world_size())
    if options.compute == "slept":
        link_of(options)  # refuses a latency that leaves nothing for the bytes
    if options.recorded:
        counts_of("recorded", options.sizes, seed=0, step=0, recorded=Path(options.recorded))
    if not config.torchrun("RANK"):
        fresh_folder("--out", options.out, OUTPUTS)
    return run(run_rank, argv, options.ranks, timeout_s=options.timeout_s, program=PROGRAM)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does. What a user can act on becomes one line on stderr."""
    options = parse(argv, ranks=world.size)
    return on_rank(world, PROGRAM, 1, lambda: _run(options, world))


def _run(options: BalanceOptions, world: World) -> int:
    rows, sleep = _measure(options, world)
    if world.rank == 0:
        out = Path(options.out)
        link = link_of(options, balanced_s(options, sleep))
        with_oracle(options, rows, sleep, link, step=STEP, ideal=IDEAL)  # the other ranks wait no longer
        write_jsonl(out / ROWS, rows)
        write_picture(out / "balance.png", rows)
        print_rows(rows)
        print(f"wrote {', '.join(str(out / name) for name in OUTPUTS)}")
    return 0


def _measure(options: BalanceOptions, world: World) -> tuple[list[dict[str, Any]], Calibration]:
    """The rows of all workloads, the same on all ranks, and the times of compute; rank 0 writes those of each workload
    when they are there, without what `with_oracle` fills in. Collective."""
    sleep = scaled(calibrate(world, _layer_options(options)), options)
    link = link_of(options, balanced_s(options, sleep))
    wires = Wires.open(world, options.timeout_s)
    wires.emulate(link, options.ranks_per_node)
    unit = Unit(options, wires.link, sleep)
    generator = torch.Generator().manual_seed(options.seed + world.rank)
    x_TD = torch.randn(options.tokens, options.hidden, generator=generator).to(options.torch_dtype)
    found: list[dict[str, Any]] = []
    for workload in options.workloads:
        if world.rank == 0:
            print(f"{PROGRAM}: {workload}", file=sys.stderr, flush=True)
        if options.live_steps:
            rows = _live_rows(options, world, workload, wires.link, link, sleep, x_TD)
        else:
            rows = _workload_rows(options, world, workload, unit, link, sleep, x_TD)
        _check(rows, MAX_REL_ERR[options.torch_dtype])
        found += rows
        if world.rank == 0:  # what was measured is there, however the run ends
            write_jsonl(Path(options.out) / ROWS, found)
    return found, sleep


def _check(rows: Sequence[Row], most: float) -> None:
    """Raises CheckFailed for a row whose results are wrong."""
    for row in rows:
        if not row["max_rel_err"] <= most:
            raise CheckFailed(f"{row['workload']} {row['planner']} is off by {row['max_rel_err']:.2g}")


def _workload_rows(
    options: BalanceOptions, world: World, workload: str, unit: Unit, link: LinkSpec, sleep: Calibration,
    x_TD: torch.Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one workload: balanced routing, then every planner. Collective."""
    plans = [_with_auto(one, options, sleep, link, workload)
             for one in planned(options, sleep, link, _history(options, workload))]  # fmt: skip
    ideals = [plan for plan in plans if plan.planner == options.planners[0]]
    ids_TK = _ids(options, workload, world.rank)
    even_TK = _ids(options, "balanced", world.rank)
    errors = _errors(world, unit, plans, ids_TK, x_TD)
    # Balanced routing needs no copies: the schedules of the first planner without its rule.
    even = [_with_auto(Planned(planner=IDEAL, schedule=one.schedule, pair=one.pair), options, sleep, link, "balanced")
            for one in ideals]  # fmt: skip
    rows = [*((one, even_TK) for one in even), *((one, ids_TK) for one in plans)]
    times = time_rows(world, unit, rows, x_TD, sleep if options.compute == "slept" else None, options.repeats)
    return _rows(options, world, workload, [plan for plan, _ in rows], times, [0.0] * len(even) + errors, link, sleep)


def _with_auto(plan: Planned, options: BalanceOptions, sleep: Calibration, link: LinkSpec, workload: str) -> Planned:
    """The plan; where its schedule is "auto", with one that has seen steps of the workload, alike on all ranks."""
    if plan.schedule != "auto":
        return plan
    return with_auto(plan, options, sleep, link, workload, _counts(options, workload))


def _counts(options: BalanceOptions, workload: str) -> np.ndarray:
    """int64 [W, E] of the timed step."""
    path = Path(options.recorded) if options.recorded else None
    return counts_of(workload, options.sizes, seed=options.seed, step=STEP, recorded=path)


def _errors(
    world: World, unit: Unit, plans: Sequence[Planned], ids_TK: torch.Tensor, x_TD: torch.Tensor
) -> list[float]:
    """By how much a row's output, with real experts, differs from that of the first one without copies. Collective."""
    alone = Planned(planner="static", schedule="serial", pair=serial())
    right, _ = max_rel_err(world, unit, alone, ids_TK, x_TD, None)
    return [max_rel_err(world, unit, plan, ids_TK, x_TD, right)[1] for plan in plans]


def _history(options: BalanceOptions, workload: str) -> np.ndarray:
    """int64 [W, E]: the load that kept placements are made of, of the steps before the one that is timed."""
    path = Path(options.recorded) if options.recorded else None
    return np.sum([counts_of(workload, options.sizes, seed=options.seed, step=step, recorded=path)
                   for step in range(STEP)], axis=0)  # fmt: skip


def _ids(options: BalanceOptions, workload: str, rank: int) -> torch.Tensor:
    path = Path(options.recorded) if options.recorded else None
    return choices(workload, options.sizes, seed=options.seed, step=STEP, rank=rank, recorded=path)[0]


def _layer_options(options: BalanceOptions) -> LayerOptions:
    """What the calibration of sleeps asks for."""
    return LayerOptions(
        ranks=options.ranks, ranks_per_node=options.ranks_per_node, tokens=options.tokens, hidden=options.hidden,
        ffn=options.ffn, experts=options.experts, top_k=max(2, options.top_k), dtype=options.dtype,
    )  # fmt: skip


def _rows(
    options: BalanceOptions, world: World, workload: str, plans: Sequence[Planned], times: Sequence[Times],
    errors: Sequence[float], link: LinkSpec, sleep: Calibration,
) -> list[dict[str, Any]]:  # fmt: skip
    """Collective."""
    placement = Placement.identity(options.experts, options.ranks)
    skewed, even = _counts(options, workload), _counts(options, "balanced")
    dense_s = sleep.mlp_forward_s + sleep.mlp_backward_s
    slowest = [_slowest(world, one) for one in times]
    medians = [median(one) for one in slowest]
    by_name = {(plan.planner, plan.schedule): seconds for plan, seconds in zip(plans, medians, strict=True)}
    constant = _constant(options, link)
    outside_s: dict[str, float] = {}  # by schedule; the ideal rows come first
    rows = []
    for plan, one, seconds, samples, error in zip(plans, times, medians, slowest, errors, strict=True):
        ideal = plan.planner == IDEAL
        counts_WE = even if ideal else skewed
        phases = costs(options, sleep, link, plan.schedule)
        predicted, load, copies = predicted_s(plan, counts_WE, placement, phases, options.ranks_per_node)
        if not plan.pair.num_ops:
            predicted += dense_s
        if ideal:
            outside_s[plan.schedule] = seconds - predicted
        static_s, ideal_s = by_name.get(("static", plan.schedule)), by_name[IDEAL, plan.schedule]
        ported = torch.tensor([one.weight_bytes, one.payload_bytes, 1e6 * median(one.cpu_s)], dtype=torch.float64)
        most = torch.stack(world.gather(ported)).amax(dim=0).tolist()
        row = {
            **constant,
            "workload": workload,
            "planner": plan.planner,
            "schedule": plan.schedule,
            "chunks": plan.pair.chunks,
            "backward_chunks": plan.pair.backward_chunks,
            "predicted_ms": 1e3 * (predicted if ideal else predicted + outside_s[plan.schedule]),
            "outside_ms": 1e3 * outside_s[plan.schedule],
            "time_ms_median": 1e3 * seconds,
            "time_ms_p10": 1e3 * percentile(samples, 0.1),
            "time_ms_p90": 1e3 * percentile(samples, 0.9),
            "ideal_ms": 1e3 * ideal_s,
            **dict.fromkeys(("oracle_ms", "oracle_proven", "of_oracle")),  # see `with_oracle`
            "ceiling": None if static_s is None else static_s / ideal_s,
            "speedup_vs_static": None if static_s is None else static_s / seconds,
            "static_max_over_mean": imbalance(counts_WE, np.array(placement.home_ranks)),
            "max_over_mean": load,
            "moe_share": 1.0 - dense_s / seconds,
            "copies": copies,
            "migration_ms": 0.0,  # copies are fetched in every step and are in its time; homes do not move
            "weight_bytes": int(most[0]),
            "payload_bytes": int(most[1]),
            "comm_cpu_ms": most[2] / 1e3,
            "max_rel_err": error,
            "steps": 1,
            "changes": 0,
            "moved_bytes": 0,
            "hit_rate": None if plan.auto is None else plan.auto.hit_rate,
            "search_ms": None if plan.auto is None else plan.auto.search_ms,
            "flagged": "noisy" if is_noisy(samples) else None,
        }
        rows.append({key: _rounded(row[key]) for key in KEYS})
    return rows


def _live_rows(
    options: BalanceOptions, world: World, workload: str, transport: Transport, link: LinkSpec, sleep: Calibration,
    x_TD: torch.Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for homes alone and one for a placement that follows the load: means over the steps. Collective."""
    path = Path(options.recorded) if options.recorded else None

    def ids_of(step: int) -> torch.Tensor:
        return choices(workload, options.sizes, seed=options.seed, step=step, rank=world.rank, recorded=path)[0]

    found = follow(world, options, transport, sleep, link, ids_of, x_TD)
    home = Placement.identity(options.experts, options.ranks)
    phases, dense_s = costs(options, sleep, link, SCHEDULE), sleep.mlp_forward_s + sleep.mlp_backward_s
    loads = [counts_of(workload, options.sizes, seed=options.seed, step=step, recorded=path)
             for step in range(options.live_steps)]  # fmt: skip
    pair, rows = pair_of(SCHEDULE, options.chunks), []
    still_s = float(np.mean(_slowest(world, found.static)))
    most = torch.stack(world.gather(torch.tensor([float(np.mean(found.moving_s))], dtype=torch.float64))).amax()
    for name, times, placements in (
        ("static", found.static, [home] * len(loads)),
        ("live", found.live, found.placements),
    ):
        moved = name == "live"
        samples = _slowest(world, times)
        plans = [Planned(planner=name, schedule=SCHEDULE, pair=pair, kept=one) for one in placements]
        priced = [predicted_s(plan, counts, home, phases, options.ranks_per_node)
                  for plan, counts in zip(plans, loads, strict=True)]  # fmt: skip
        row = dict.fromkeys(KEYS) | _constant(options, link) | {
            "workload": workload, "planner": f"{name} over steps", "schedule": SCHEDULE, "chunks": pair.chunks,
            "backward_chunks": pair.backward_chunks,
            "predicted_ms": 1e3 * (float(np.mean([seconds for seconds, _, _ in priced])) + dense_s),
            "time_ms_median": 1e3 * median(samples), "time_ms_p10": 1e3 * percentile(samples, 0.1),
            "time_ms_p90": 1e3 * percentile(samples, 0.9), "speedup_vs_static": still_s / float(np.mean(samples)),
            "static_max_over_mean": float(np.mean([imbalance(one, np.array(home.home_ranks)) for one in loads])),
            "max_over_mean": float(np.mean([load for _, load, _ in priced])), "copies": priced[-1][2],
            "moe_share": 1.0 - dense_s / float(np.mean(samples)), "migration_ms": 1e3 * float(most) if moved else 0.0,
            "weight_bytes": times.weight_bytes, "payload_bytes": times.payload_bytes,
            "comm_cpu_ms": 1e3 * median(times.cpu_s), "max_rel_err": found.max_rel_err if moved else 0.0,
            "steps": len(samples), "changes": found.progress.changed if moved else 0,
            "moved_bytes": found.progress.moved_bytes if moved else 0,
        }  # fmt: skip
        rows.append({key: _rounded(row[key]) for key in KEYS})
    return rows


def _slowest(world: World, times: Times) -> list[float]:
    parts = world.gather(torch.tensor(times.seconds, dtype=torch.float64))
    return [float(one) for one in torch.stack(parts).amax(dim=0)]


def _constant(options: BalanceOptions, link: LinkSpec) -> dict[str, Any]:
    names = "ranks ranks_per_node tokens hidden ffn experts top_k dtype slots comm_share seed repeats".split()
    return {
        **{name: getattr(options, name) for name in names},
        "phase": "train",
        "compute": options.compute,
        "link": f"emulated {link}",
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
