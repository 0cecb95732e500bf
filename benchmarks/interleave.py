"""Two micro-batches one after the other, interleaved, and one's forward under the other's backward, in one table.

    python benchmarks/interleave.py --out out/interleave.jsonl

--blocks blocks of an attention op (which sleeps --op-ms forward, twice in backward) and a MoE layer whose experts sleep
on --ranks ranks, each a node of its own, behind emulated links. All ways have the same tokens; every round runs each
once, the order turning round. Ways:

    serial           one micro-batch after the other, every exchange waited for at once
    chunked(2)       the same with exchanges in two chunks under the layer's own experts
    interleaved      `Interleaved`: both side by side (TBO)
    joined           the same order, every exchange waited for at once: what interleaving costs without overlap
    interleaved(2)   side by side, and in two chunks
    1f1b             `ForwardBackward.run` (train only): the first forward and the last backward stand alone
    1f1b(2)          the same in two chunks

time_ms_median: the slowest rank, both micro-batches. share: of `serial`, what it takes longer than without the link.
bound: max(communication, compute) of `serial`, over which no order of two micro-batches gets.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_overlap import ForwardBackward, Interleaved, MoEBlock, MoELayer
from moe_overlap.commands.bench.routing import ForcedRouter
from moe_overlap.commands.bench.slept import Calibration, Slept, slept_experts
from moe_overlap.commands.bench.timing import quiet_collector
from moe_overlap.commands.bench.wires import Wires
from moe_overlap.launch.launch import World, spawn
from moe_overlap.measure.machine import commit, hardware
from moe_overlap.measure.overlap import is_noisy, median, percentile
from moe_overlap.measure.report import write_jsonl
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import LinkSpec

WARMUP = 2
Way = Callable[[], None]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--op-ms", type=float, default=8.0)
    parser.add_argument("--experts-ms", type=float, default=8.0)
    parser.add_argument("--links", default="400mbit:100us,150mbit:100us,75mbit:100us")
    parser.add_argument("--phases", default="infer,train")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the rows to this .jsonl file")
    return parser.parse_args(argv)


def block(known: argparse.Namespace, transport: Transport, schedule: str = "serial") -> MoEBlock:
    ids_TK = (torch.arange(known.tokens)[:, None] + torch.arange(2)) % 8  # balanced
    router = ForcedRouter(ids_TK.to(torch.int32), torch.full((known.tokens, 2), 0.5), 8)
    moe = MoELayer(known.hidden, known.hidden, 8, 2, transport=transport, router=router, schedule=schedule)
    return MoEBlock([Slept(known.op_ms / 1e3, known.op_ms / 500)], moe)


def ways(known: argparse.Namespace, transport: Transport, phase: str, xs: list[torch.Tensor]) -> dict[str, Way]:
    trains = phase == "train"

    def blocks(schedule: str = "serial") -> list[MoEBlock]:
        return [block(known, transport, schedule) for _ in range(known.blocks)]

    def in_turn(schedule: str) -> Way:
        model = nn.Sequential(*blocks(schedule))

        def run() -> None:
            for x in xs:
                with torch.set_grad_enabled(trains):
                    y = model(x)
                    if trains:
                        y.sum().backward()

        return run

    def side_by_side(**options: Any) -> Way:
        model = Interleaved(blocks(), **options)

        def run() -> None:
            with torch.set_grad_enabled(trains):
                first, second = model(*xs)
                if trains:
                    (first.sum() + second.sum()).backward()

        return run

    def driven(chunks: int) -> Way:
        driver = ForwardBackward(blocks(), chunks=chunks)

        def run() -> None:
            driver.run(xs, lambda y, _: y.sum())

        return run

    found = {"serial": in_turn("serial"), "chunked(2)": in_turn("chunked(2)"), "interleaved": side_by_side(),
             "joined": side_by_side(overlap=False), "interleaved(2)": side_by_side(chunks=2)}  # fmt: skip
    return found | ({"1f1b": driven(1), "1f1b(2)": driven(2)} if trains else {})


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does; rank 0 prints and writes."""
    known = parse(argv)
    torch.set_num_threads(1)
    wires = Wires.open(world, 60.0)
    row_s = known.experts_ms / 1e3 / (2 * known.tokens)
    sleep = Calibration(attention_forward_s=0.0, attention_backward_s=0.0, mlp_forward_s=0.0, mlp_backward_s=0.0,
                        expert_row_s=row_s, dgrad_row_s=row_s, wgrad_row_s=row_s)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for link in known.links.split(","):
        wires.emulate(LinkSpec.parse(link), 1)
        for phase in known.phases.split(","):
            with slept_experts(sleep):
                found = rows_of(world, known, wires, phase, link)
            rows += found
            if world.rank == 0:
                for row in found:
                    print(f"{link} {phase} {row['way']:14}: {row['time_ms_median']:8.2f} ms, {row['speedup']:.2f}x "
                          f"(share {row['share']:.2f}, bound {row['bound']:.2f}x) {row['flagged'] or ''}",
                          flush=True)  # fmt: skip
                if known.out is not None:
                    write_jsonl(known.out, rows)  # so far
    return 0


def rows_of(world: World, known: argparse.Namespace, wires: Wires, phase: str, link: str) -> list[dict[str, Any]]:
    """The rows of one link and phase. Collective."""
    generator = torch.Generator().manual_seed(world.rank)
    xs = [torch.randn(known.tokens, known.hidden, generator=generator) for _ in range(2)]
    todo = ways(known, wires.link, phase, xs)
    todo["nocomm"] = ways(known, wires.nocomm, phase, xs)["serial"]
    seconds: dict[str, list[float]] = {way: [] for way in todo}
    with quiet_collector():
        for round_ in range(WARMUP + known.repeats):
            for way in list(todo) if round_ % 2 else reversed(list(todo)):
                world.barrier()
                start_s = time.perf_counter()
                todo[way]()
                if round_ >= WARMUP:
                    seconds[way].append(time.perf_counter() - start_s)
    worst = {way: slowest(world, one) for way, one in seconds.items()}
    serial_s, compute_s = median(worst["serial"]), median(worst.pop("nocomm"))
    bound_s = max(serial_s - compute_s, compute_s)
    return [
        {
            "way": way, "phase": phase, "link": f"emulated {link}", "compute": "slept",
            "time_ms_median": round(1e3 * median(times), 3), "time_ms_p10": round(1e3 * percentile(times, 0.1), 3),
            "time_ms_p90": round(1e3 * percentile(times, 0.9), 3), "speedup": round(serial_s / median(times), 4),
            "share": round(1 - compute_s / serial_s, 4), "bound": round(serial_s / bound_s, 4),
            "flagged": "noisy" if is_noisy(times) else None, "commit": commit(), "hardware": hardware(),
            "torch": torch.__version__, "threads": 1,
            **{name: getattr(known, name) for name in
               ("ranks", "blocks", "tokens", "hidden", "op_ms", "experts_ms", "repeats")},
        }
        for way, times in worst.items()
    ]  # fmt: skip


def slowest(world: World, seconds: Sequence[float]) -> list[float]:
    """By round, the rank that took longest. Collective."""
    found: list[float] = torch.stack(world.gather(torch.tensor(seconds, dtype=torch.float64))).amax(dim=0).tolist()
    return found


if __name__ == "__main__":
    sys.exit(spawn(run_rank, sys.argv[1:], parse(sys.argv[1:]).ranks, timeout_s=600.0, program="interleave"))
