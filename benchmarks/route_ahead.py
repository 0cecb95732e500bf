"""What a step is shorter by when other work runs while its ranks agree, beside the time of the agreement alone.

    python benchmarks/route_ahead.py --out out/route-ahead.jsonl

The block pair scmoe_pos2 of `moe-overlap bench layer --compute slept` (attention, tap, MLP, attention, shared expert,
each of which sleeps --op-ms) on 4 ranks, each a node of its own, behind an emulated link of 2 ms latency. Ways:

    plain    N P D0 mlp attn2 E0 C0 shared U, N waited for at once
    ops      the same model: the MLP runs while ranks agree
    router   another model: the router reads before the attention, which runs while ranks agree

Every round runs every way once from a common moment, the order turning round, and the agreement alone. Times are
those of the slowest rank. saved_ms: the median over the rounds of plain minus this way. agree_all_ms: the agreement
alone. agree_ms: what of that a sleep of --op-ms beside it hides, with nothing else around; the rest is work of the
processor, which tells the ranks and makes the plan. link_ms: the agreement alone over the link less without it.
n_wait_ms: what the wait is in a step, of the rank that waits least. predicted_ms: with ops of o, n = agree_ms and a
dispatch of d, `router` saves n, and `ops` that less what of the dispatch is no longer hidden, max(0, d - o) -
max(0, d - 2 o).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
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
from moe_overlap.measure.report import write_jsonl
from moe_overlap.schedule.builders import SchedulePair, agree_ahead
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import LinkSpec

CASE, WARMUP = "scmoe_pos2", 3
ROOM_S = 5e-3
WAYS = ("plain", "ops", "router")


class Punctual(World):
    """Whose ranks leave a barrier at one moment of the clock that they share, instead of one by one: else the first
    exchange of a step waits for the last to leave."""

    def barrier(self) -> None:
        moments = self.gather(torch.tensor([time.perf_counter() + ROOM_S], dtype=torch.float64))
        time.sleep(max(0.0, float(torch.stack(moments).max()) - time.perf_counter()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--op-ms", default="1,4,8", help="how long each op sleeps, forward; twice in backward")
    parser.add_argument("--link", default="1gbit:2ms")
    parser.add_argument("--phases", default="infer,train")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the rows to this .jsonl file")
    return parser.parse_args(argv)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does; rank 0 prints and writes."""
    known = parse(argv)
    world = Punctual(rank=world.rank, size=world.size, local_rank=world.local_rank, group=world.group)
    torch.set_num_threads(1)
    options = LayerOptions(ranks=world.size, tokens=64, hidden=64, ffn=64, experts=2 * world.size, dtype="fp32",
                           link=known.link, compute="slept", repeats=known.repeats)  # fmt: skip
    wires = Wires.open(world, options.timeout_s)
    wires.emulate(LinkSpec.parse(known.link), 1)
    rows: list[dict[str, Any]] = []
    for op_ms in map(float, known.op_ms.split(",")):
        forward_s, backward_s, row_s = op_ms / 1e3, op_ms / 500, 1e-5
        sleep = Calibration(attention_forward_s=forward_s, attention_backward_s=backward_s, mlp_forward_s=forward_s,
                            mlp_backward_s=backward_s, expert_row_s=row_s, dgrad_row_s=row_s,
                            wgrad_row_s=row_s)  # fmt: skip
        for phase in known.phases.split(","):
            with slept_experts(sleep):
                found = rows_of(world, options, wires, sleep, phase, op_ms)
            rows += found
            if world.rank == 0:
                for row in found:
                    saved = f"saved {row['saved_ms']:6.2f} ms (predicted {row['predicted_ms']:5.2f})"
                    print(f"{phase} op {op_ms:g} ms, {row['way']:6}: step {row['time_ms_median']:7.2f} ms, {saved}, "
                          f"{row['saved_share']:.2f} of an agreement's {row['agree_ms']:.2f} ms (all of it "
                          f"{row['agree_all_ms']:.2f}), waits {row['n_wait_ms']:.2f} ms {row['flagged'] or ''}",
                          flush=True)  # fmt: skip
                if known.out is not None:
                    write_jsonl(known.out, rows)  # so far
    return 0


def rows_of(
    world: World, options: LayerOptions, wires: Wires, sleep: Calibration, phase: str, op_ms: float
) -> list[dict[str, Any]]:
    """The rows of one length of the ops. Collective."""
    ids_TK, weights_TK = load("balanced", out=options.out, tokens=options.tokens, experts=options.experts,
                              top_k=options.top_k, rank=world.rank, ranks=world.size)  # fmt: skip

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
    alone: dict[str, list[float]] = {name: [] for name in ("link", "core", "beside", "sleep")}
    with quiet_collector():
        for round_ in range(WARMUP + options.repeats):
            for at in range(len(WAYS)) if round_ % 2 else reversed(range(len(WAYS))):
                runner.once(variants[at], samples[at] if round_ >= WARMUP else None)
            for name, found in alone.items():
                transport = wires.nocomm if name == "core" else wires.link
                asleep_s = op_ms / 1e3 if name in ("beside", "sleep") else 0.0
                taken_s = agree_alone(world, plain, pair, transport, asleep_s, agree=name != "sleep")
                found += [taken_s] if round_ >= WARMUP else []
    times = [runner.maximum(one.own_s) for one in samples]
    worst = {name: runner.maximum(found) for name, found in alone.items()}
    rounds = list(zip(*(worst[name] for name in ("link", "core", "beside", "sleep")), strict=True))
    agree_s = median([link - (beside - sleep) for link, _, beside, sleep in rounds])
    waits = [least(world, waits_of(one)) for one in samples]
    alone_s = {"agree_all": median(worst["link"]), "agree": agree_s, "dispatch": dispatch_s,
               "link": median([link - core for link, core, _, _ in rounds])}  # fmt: skip
    return [
        row_of(options, phase, op_ms, variant, times[at], times[0], waits[at], alone_s)
        for at, variant in enumerate(variants)
    ]


def least(world: World, seconds: Sequence[float]) -> float:
    """The median over the rounds of what the rank took that took least. Collective."""
    parts = world.gather(torch.tensor(seconds, dtype=torch.float64))
    return median(torch.stack(parts).amin(dim=0).tolist())


def agree_alone(
    world: World, model: BlockPair, pair: SchedulePair, transport: Transport, asleep_s: float, *, agree: bool
) -> float:
    """Seconds of an agreement on this rank beside a sleep, or of the sleep alone. Collective."""
    model.use(pair, transport)
    dispatcher, router = model.moe.dispatcher, model.moe.router
    rows_TD = torch.empty(model.sizes.tokens, model.sizes.hidden)
    assert isinstance(router.ids_TK, torch.Tensor)
    world.barrier()
    start_s = time.perf_counter()
    agreement = dispatcher.begin(router.ids_TK, rows_TD, pair) if agree else None
    if asleep_s:
        time.sleep(asleep_s)
    if agreement is not None:
        dispatcher.finish(agreement)
    return time.perf_counter() - start_s


def waits_of(samples: Samples) -> list[float]:
    """Seconds that this rank stood still for the agreement, by step."""
    waits = [[e.end_s - e.start_s for e in events if (e.action, e.lane) == ("N", "wait")] for events in samples.events]
    return [sum(one) for one in waits]


def row_of(
    options: LayerOptions, phase: str, op_ms: float, variant: Variant, times: Sequence[float], plain: Sequence[float],
    waited_s: float, alone_s: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    saved_s = median([before - after for before, after in zip(plain, times, strict=True)])
    o, d, n = op_ms / 1e3, alone_s["dispatch"], alone_s["agree"]
    predicted_s = 0.0 if variant.name == "plain" else n
    if variant.name == "ops":
        predicted_s -= max(0.0, d - o) - max(0.0, d - 2 * o)
    return {
        "case": CASE, "phase": phase, "way": variant.name, "schedule": variant.pair.forward.text, "op_ms": op_ms,
        "time_ms_median": round(1e3 * median(times), 3), "time_ms_p10": round(1e3 * percentile(times, 0.1), 3),
        "time_ms_p90": round(1e3 * percentile(times, 0.9), 3), "saved_ms": round(1e3 * saved_s, 3),
        "predicted_ms": round(1e3 * predicted_s, 3), "n_wait_ms": round(1e3 * waited_s, 3),
        **{f"{name}_ms": round(1e3 * seconds, 3) for name, seconds in alone_s.items()},
        "saved_share": round(saved_s / n, 4), "saved_share_of_all": round(saved_s / alone_s["agree_all"], 4),
        "flagged": "noisy" if is_noisy(times) else None, "link": options.link, **constants(options),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(spawn(run_rank, sys.argv[1:], parse(sys.argv[1:]).ranks, timeout_s=120.0, program="route_ahead"))
