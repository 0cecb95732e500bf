"""What a step is shorter by when other work runs while its ranks agree, beside the time of the agreement alone.

    python benchmarks/route_ahead.py --out out/route-ahead.jsonl

The block pair scmoe_pos2 of `moe-overlap bench layer --compute slept` (attention, tap, MLP, attention, shared expert,
each of which sleeps --op-ms) on 4 ranks, each a node of its own, behind an emulated link of 2 ms latency. Ways:

    plain    N P D0 mlp attn2 E0 C0 shared U, N waited for at once
    ops      the same model: the MLP runs while ranks agree
    router   another model: the router reads before the attention, which runs while ranks agree

Every round runs every way once and the agreement alone, all from a common barrier; the order turns round. Times are
those of the slowest rank. saved_ms: the median over the rounds of plain minus this way; agree_ms: the median of the
agreement alone, from when a rank begins to tell what it will send to when it knows the plan; agree_wait_ms: the part of
it that waits. predicted_ms: with ops of o, agreement n, dispatch d, all measured alone, `router` saves min(n, o) and
`ops` that less what of the dispatch is no longer hidden, max(0, d - o) - max(0, d - 2 o).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.options import LayerOptions
from moe_overlap.commands.bench.routing import load
from moe_overlap.commands.bench.setting import constants
from moe_overlap.commands.bench.slept import Calibration, slept_experts
from moe_overlap.commands.bench.timing import Runner, Samples, Variant, quiet_collector
from moe_overlap.commands.bench.wires import Wires, isolated
from moe_overlap.launch.launch import World, spawn
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.measure.overlap import is_noisy, median, percentile
from moe_overlap.schedule.builders import agree_ahead
from moe_overlap.transport.link import LinkSpec

CASE, WARMUP = "scmoe_pos2", 3
WAYS = ("plain", "ops", "router")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--op-ms", default="1,2,4,8,12", help="how long each op sleeps, forward; twice in backward")
    parser.add_argument("--link", default="1gbit:2ms")
    parser.add_argument("--phases", default="infer,train")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the rows to this .jsonl file")
    return parser.parse_args(argv)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does; rank 0 prints and writes."""
    known = parse(argv)
    torch.set_num_threads(1)
    options = LayerOptions(ranks=world.size, tokens=64, hidden=64, ffn=64, experts=2 * world.size, dtype="fp32",
                           link=known.link, compute="slept", repeats=known.repeats)  # fmt: skip
    wires = Wires.open(world, options.timeout_s)
    wires.emulate(LinkSpec.parse(known.link), 1)
    rows = []
    for op_ms in map(float, known.op_ms.split(",")):
        sleep = Calibration(attention_forward_s=op_ms / 1e3, attention_backward_s=op_ms / 500, mlp_forward_s=op_ms / 1e3,
                            mlp_backward_s=op_ms / 500, expert_row_s=1e-5, dgrad_row_s=1e-5,
                            wgrad_row_s=1e-5)  # fmt: skip
        for phase in known.phases.split(","):
            with slept_experts(sleep):
                found = rows_of(world, options, wires, sleep, phase, op_ms)
            rows += found
            if world.rank == 0:
                for row in found:
                    print(f"{phase} op {op_ms:g} ms, {row['way']:6}: step {row['time_ms_median']:7.2f} ms, saved "
                          f"{row['saved_ms']:6.2f} (predicted {row['predicted_ms']:5.2f}) of an agreement of "
                          f"{row['agree_ms']:.2f} ms: {row['saved_share']:.2f} {row['flagged'] or ''}", flush=True)  # fmt: skip
    if world.rank == 0 and known.out is not None:
        known.out.parent.mkdir(parents=True, exist_ok=True)
        known.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


def rows_of(
    world: World, options: LayerOptions, wires: Wires, sleep: Calibration, phase: str, op_ms: float
) -> list[dict[str, Any]]:
    """The rows of one length of the ops. Collective."""
    ids_TK, weights_TK = load("balanced", out=options.out, tokens=options.tokens, experts=options.experts,
                              top_k=options.top_k, rank=world.rank)  # fmt: skip

    def model(router_tap: int) -> BlockPair:
        made = BlockPair(
            CASE, options.sizes, ids_TK, weights_TK, wires.core, dtype=options.torch_dtype, wrap=sleep.wrap
        )
        # The attention before the tap sleeps too; it is outside of the schedule.
        assert isinstance(made.block, ShortcutBlock)
        made.block.router_tap = router_tap
        return made

    plain, early = model(1), model(0)
    pair = plain.window_pair(2)
    variants = [Variant(name=way, model=early if way == "router" else plain, transport=wires.link,
                        pair=agree_ahead(pair) if way == "ops" else pair) for way in WAYS]  # fmt: skip
    x_TD, dy_TD = (torch.randn(options.tokens, options.hidden) for _ in range(2))
    runner = Runner(world, phase, x_TD, dy_TD)
    dispatch_s = isolated(world, plain, pair, wires, phase).dispatch_s
    samples = [Samples() for _ in WAYS]
    alone: list[tuple[float, float]] = []
    with quiet_collector():
        for round_ in range(WARMUP + options.repeats):
            for at in range(len(WAYS)) if round_ % 2 else reversed(range(len(WAYS))):
                runner.once(variants[at], samples[at] if round_ >= WARMUP else None)
            found = agree_alone(world, plain, variants[0])
            alone += [found] if round_ >= WARMUP else []
    times = [runner.maximum(one.own_s) for one in samples]
    agree_s, wait_s = (median(runner.maximum([one[i] for one in alone])) for i in (0, 1))
    return [
        row_of(options, phase, op_ms, variant, times[at], times[0], waits_of(samples[at]), agree_s, wait_s, dispatch_s)
        for at, variant in enumerate(variants)
    ]


def agree_alone(world: World, model: BlockPair, variant: Variant) -> tuple[float, float]:
    """(seconds of the agreement, of the wait for it) on this rank, with nothing beside it. Collective."""
    model.use(variant.pair, variant.transport)
    dispatcher, rows_TD = model.moe.dispatcher, torch.empty(model.sizes.tokens, model.sizes.hidden)
    ids_TK = model.moe.router.ids_TK
    assert isinstance(ids_TK, torch.Tensor)
    world.barrier()
    start_s = time.perf_counter()
    agreement = dispatcher.begin(ids_TK, rows_TD, variant.pair)
    said_s = time.perf_counter()
    dispatcher.finish(agreement)
    end_s = time.perf_counter()
    return end_s - start_s, end_s - said_s


def waits_of(samples: Samples) -> float:
    """Seconds that this rank stood still for the agreement, the median of its steps."""
    waits = [[e.end_s - e.start_s for e in events if (e.action, e.lane) == ("N", "wait")] for events in samples.events]
    return median([sum(one) for one in waits])


def row_of(
    options: LayerOptions, phase: str, op_ms: float, variant: Variant, times: Sequence[float], plain: Sequence[float],
    waited_s: float, agree_s: float, wait_s: float, dispatch_s: float,
) -> dict[str, Any]:  # fmt: skip
    saved_s = median([before - after for before, after in zip(plain, times, strict=True)])
    o, d = op_ms / 1e3, dispatch_s
    predicted_s = 0.0 if variant.name == "plain" else min(agree_s, o)
    if variant.name == "ops":
        predicted_s -= max(0.0, d - o) - max(0.0, d - 2 * o)
    return {
        "case": CASE, "phase": phase, "way": variant.name, "schedule": variant.pair.forward.text, "op_ms": op_ms,
        "time_ms_median": round(1e3 * median(times), 3), "time_ms_p10": round(1e3 * percentile(times, 0.1), 3),
        "time_ms_p90": round(1e3 * percentile(times, 0.9), 3), "saved_ms": round(1e3 * saved_s, 3),
        "predicted_ms": round(1e3 * predicted_s, 3), "agree_ms": round(1e3 * agree_s, 3),
        "agree_wait_ms": round(1e3 * wait_s, 3), "dispatch_ms": round(1e3 * dispatch_s, 3),
        "n_wait_ms": round(1e3 * waited_s, 3), "saved_share": round(saved_s / agree_s, 4),
        "flagged": "noisy" if is_noisy(times) else None, "link": options.link, **constants(options),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(spawn(run_rank, sys.argv[1:], parse(sys.argv[1:]).ranks, timeout_s=120.0, program="route_ahead"))
