"""How long the planner's search takes: over its default space, and for whole steps of schedule="auto".

    python benchmarks/planner_search.py

The default space: 1, 2, 4, 8 and 16 chunks by tokens and 2, 4 and 8 by experts, beside four backbone ops. Chunks are
equal or, as real routing makes them, all different (then their order is searched too); lanes slow each other down or do
not. Every repeat is a new window. "core" is the compiled search alone, "search" the whole call from Python, with the
schedules as text and sorted; "reference" the same without compiled parts.

Steps: both phases of 1024 tokens on each of 4 ranks with 8 experts each, two experts a token, equally likely or not:
the cuts above with their shapes and windows, plain or with deduplication looked at too, without copies of experts or
with the first expert on every rank, beside 0, 4 and 8 ops. Milliseconds of this thread's CPU time, medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path

import torch

from moe_overlap.agreement.counts import block_counts_of_rows
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.measure.machine import hardware
from moe_overlap.measure.report import append_jsonl
from moe_overlap.native import native
from moe_overlap.placement import Placement
from moe_overlap.planning.cost_model import AlphaBeta, CostModel, DistinctCosts
from moe_overlap.planning.search import cut_arguments, search, search_reference
from moe_overlap.planning.shapes import metadata_bytes
from moe_overlap.planning.window import Chunking, Slowdown, Window

CUTS = [*((chunks, "tokens") for chunks in (1, 2, 4, 8, 16)), *((chunks, "experts") for chunks in (2, 4, 8))]
NUM_OPS = 4
RANKS, EXPERTS, TOKENS, TOP_K = 4, 32, 1024, 2
STEP_OPS = (0, 4, 8)


def window(chance: random.Random, *, equal: bool, slowdown: bool) -> Window:
    """A forward phase of about ten milliseconds."""
    exchange_s, experts_s = chance.uniform(1e-3, 5e-3), chance.uniform(1e-3, 5e-3)

    def cut(chunks: int, by: str) -> Chunking:
        sizes = [1.0 if equal else chance.uniform(0.5, 1.5) for _ in range(chunks)]
        there = tuple(20e-6 + exchange_s * size / chunks for size in sizes)
        experts = tuple(50e-6 + experts_s * size / chunks for size in sizes)
        return Chunking(chunks=chunks, by=by, first_s=there, experts_s=experts, second_s=there)  # type: ignore[arg-type]

    return Window(
        phase="forward",
        head_s=1e-4,
        tail_s=1e-4,
        ops_s=tuple(chance.uniform(1e-3, 3e-3) for _ in range(NUM_OPS)),
        issue_s=20e-6,
        slowdown=Slowdown(compute=1.1, wire=1.3) if slowdown else Slowdown(),
        chunkings=tuple(cut(*each) for each in CUTS),
    )


def core(problem: Window) -> None:
    """The compiled search of every cut."""
    planner = native.planner()
    assert planner is not None
    planner.search([(planner.Cut(*cut_arguments(problem, chunking)), True, True) for chunking in problem.chunkings])


def timed_row(name: str, run: Callable[[Window], object], repeats: int, *, equal: bool, slowdown: bool) -> dict:
    chance = random.Random(1)
    seconds = []
    for _ in range(repeats):
        problem = window(chance, equal=equal, slowdown=slowdown)
        start_s = time.thread_time()
        run(problem)
        seconds.append(time.thread_time() - start_s)
    tenths = statistics.quantiles(seconds, n=10)
    return {
        "contender": name,
        "chunks_equal": equal,
        "slowdown": slowdown,
        "time_ms_median": 1e3 * statistics.median(seconds),
        "time_ms_p10": 1e3 * tenths[0],
        "time_ms_p90": 1e3 * tenths[-1],
        "cuts": len(CUTS),
        "ops": NUM_OPS,
        "repeats": repeats,
        "hardware": hardware(),
        "python": sys.version.split()[0],
    }


def cost_model(num_ops: int, slowdown: bool) -> CostModel:
    """About the balance of a step of ten milliseconds; deduplicated steps cost the same for each row."""
    row, experts = AlphaBeta(alpha_s=0.0, beta_s=2e-8), AlphaBeta(alpha_s=5e-5, beta_s=1e-6)
    lines = {"experts": experts, "experts_dgrad": experts, "experts_wgrad": experts, "permute": row, "unpermute": row,
             "unpermute_backward": row, "permute_backward": row}  # fmt: skip
    assert set(lines) <= {field.name for field in fields(DistinctCosts)}
    ops_s = (1e-3, 2e-3, 1e-3, 5e-4, 2e-3, 1.5e-3, 1e-3, 7e-4)[:num_ops]
    return CostModel(
        exchange={"inter": AlphaBeta(alpha_s=2e-5, beta_s=1e-9)},
        **lines,  # type: ignore[arg-type]
        backbone_s=ops_s,
        backbone_backward_s=tuple(2 * seconds for seconds in ops_s),
        issue_s=2e-5,
        slowdown=Slowdown(compute=1.1, wire=1.3) if slowdown else Slowdown(),
        distinct=DistinctCosts(**lines),  # type: ignore[arg-type]
        source="assumed",
    )


def step(seed: int, *, even: bool, copies: bool) -> ExchangePlan:
    """One agreed step."""
    chance = torch.Generator().manual_seed(seed)
    local = EXPERTS // RANKS
    own = [list(range(local * rank, local * (rank + 1))) for rank in range(RANKS)]
    slots = [[*experts, 0] if copies and rank else experts for rank, experts in enumerate(own)]
    seats = seats_of(Placement.of_ranks(slots, homes=[expert // local for expert in range(EXPERTS)]))
    expert_of_seat = torch.from_numpy(seats.expert_of_seat)
    wanted = torch.ones(EXPERTS) if even else 0.2 + torch.rand(EXPERTS, generator=chance)
    wanted = torch.where(expert_of_seat < 0, 0.0, wanted[expert_of_seat.clamp(min=0)]).expand(TOKENS, -1)
    chosen = [torch.multinomial(wanted, TOP_K, generator=chance).to(torch.int32) for _ in range(RANKS)]
    tables = [block_counts_of_rows(ids, seats.num_seats, RANKS, 0)[:3] for ids in chosen]
    counts, first, last = (
        Counts.of(torch.stack(kind).to(torch.int64).numpy(), 0) for kind in zip(*tables, strict=True)
    )
    return ExchangePlan(rank=0, world_size=RANKS, step=1, phase="forward", grad_enabled=True, x_requires_grad=True,
                        counts=counts, dedup=1, first=first, last=last, seats=seats if copies else None,
                        weights_require_grad=True)  # fmt: skip


def step_s(schedule: PlannedSchedule, exchange: ExchangePlan) -> float:
    """Seconds of one search for the schedules of a step, without what it takes to know the step's kind."""
    kinds = schedule._kinds(exchange)
    start_s = time.thread_time()
    schedule._searched(kinds)
    return time.thread_time() - start_s


def step_rows(repeats: int) -> list[dict]:
    """Every setting of a step in turn, in every repeat another one."""
    no_yes = (False, True)
    settings = [dict(zip(("even", "dedup", "copies", "slowdown", "ops"), values, strict=True))
                for values in product((True, False), no_yes, no_yes, no_yes, STEP_OPS)]  # fmt: skip
    seconds: list[list[float]] = [[] for _ in settings]
    for repeat in range(repeats):
        steps = {key: step(repeat, even=key[0], copies=key[1]) for key in product(no_yes, no_yes)}
        for own, times in zip(settings, seconds, strict=True):
            schedule = PlannedSchedule(
                model=cost_model(own["ops"], own["slowdown"]),
                num_ops=own["ops"],
                row_bytes=2048,
                expert_bytes=(100_000, 200_000),
                dedup="auto" if own["dedup"] else "off",
                metadata=metadata_bytes(TOP_K, 4) if own["dedup"] else None,
            )
            exchange = steps[own["even"], own["copies"]]
            times.append(step_s(schedule, exchange))
    return [{**own, "contender": "step", "time_ms_median": 1e3 * statistics.median(times), "repeats": repeats,
             "hardware": hardware(), "python": sys.version.split()[0]}
            for own, times in zip(settings, seconds, strict=True)]  # fmt: skip


def print_steps(rows: Sequence[dict]) -> None:
    """A line for each kind of step: without slowdowns and with them, by number of ops."""
    of_ops = " / ".join(map(str, STEP_OPS))
    print(f"\nsteps of {RANKS} ranks and {EXPERTS} experts, {of_ops} ops, milliseconds")
    print(f"{'':36s} {'':20s} with slowdowns")
    for even, dedup, copies in product((True, False), (False, True), (False, True)):
        name = f"{'even' if even else 'uneven'}, {'dedup=auto' if dedup else 'plain'}{', with copies' * copies}"
        cells = [
            " / ".join(
                f"{row['time_ms_median']:.1f}"
                for row in rows
                if (row["even"], row["dedup"], row["copies"], row["slowdown"]) == (even, dedup, copies, slowdown)
            )
            for slowdown in (False, True)
        ]
        print(f"{name:36s} {cells[0]:20s} {cells[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    parser.add_argument("--step-repeats", type=int, default=25)
    options = parser.parse_args()
    contenders: dict[str, Callable[[Window], object]] = {"search": search, "reference": search_reference}
    if native.planner() is not None:
        contenders = {"core": core, **contenders}
    rows = []
    for equal in (True, False):
        for slowdown in (False, True):
            for name, run in contenders.items():
                repeats = max(2, options.repeats // 10) if name == "reference" else options.repeats
                rows.append(timed_row(name, run, repeats, equal=equal, slowdown=slowdown))
                if options.out is not None:
                    append_jsonl(options.out, rows[-1:])
    print(f"{'':10s} {'chunks':8s} {'slowdown':9s} {'median':>9s} {'p10':>9s} {'p90':>9s}")
    for row in rows:
        times = " ".join(f"{row[key]:7.2f}ms" for key in ("time_ms_median", "time_ms_p10", "time_ms_p90"))
        chunks = "equal" if row["chunks_equal"] else "unequal"
        print(f"{row['contender']:10s} {chunks:8s} {'yes' if row['slowdown'] else 'no':9s} {times}")
    of_steps = step_rows(options.step_repeats)
    print_steps(of_steps)
    if options.out is not None:
        append_jsonl(options.out, of_steps)


if __name__ == "__main__":
    main()
