"""Every published schedule of docs/schedules.md side by side: one block pair, one emulated link, interleaved rounds.

    python benchmarks/builders.py --out benchmarks/results/cpu-2core/DATE-builders.jsonl

The cases are those of `moe-overlap bench layer` (attention, MLP, attention, experts; `top2`, `shared1` and ScMoE's
positions), which are models of their own: a time is to be held against `serial` of its own case. 2 ranks, one thread
each. Every round runs every schedule once with overlap and once joined, the order turning round. Rows have the medians
over the rounds of the slowest rank (p10 and p90 beside them), in milliseconds, and the two ratios:

    speedup    serial of the case / this schedule
    overlap    this schedule joined / this schedule: what the order alone gives, chunks and all
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.options import LayerOptions
from moe_overlap.commands.bench.routing import load
from moe_overlap.commands.bench.setting import constants
from moe_overlap.commands.bench.timing import Runner, Variant
from moe_overlap.commands.bench.wires import Wires
from moe_overlap.launch.launch import World, spawn
from moe_overlap.measure.overlap import is_noisy, median, percentile
from moe_overlap.measure.report import write_jsonl
from moe_overlap.schedule.builders import SchedulePair, chunked, serial, shared_expert, shortcut, window
from moe_overlap.schedule.published import arctic, compressed, expert_stages, filled, longcat, megatron_shared, pairwise
from moe_overlap.transport.link import LinkSpec

WARMUP = 2
BUILDERS: dict[str, dict[str, SchedulePair]] = {
    "top2": {
        "serial": serial(),
        "chunked(2)": chunked(2),
        "compressed(4)": compressed(4),
        "expert_stages(2)": expert_stages(2),
        "expert_stages(4)": expert_stages(4),
        "filled(4)": filled(4),
        "pairwise(2)": pairwise(2),
    },
    "shared1": {
        "serial": serial(shared=True),
        "megatron_shared()": megatron_shared(),
        "shared_expert(0)": shared_expert(0),
        "chunked(2, shared)": chunked(2, shared=True),
    },
    "scmoe_pos1": {"serial": window(2, 0).join(), "arctic()": arctic()},
    "scmoe_pos2": {"serial": window(3, 0).join(), "longcat()": longcat(), "longcat(slot=2)": longcat(slot=2)},
    "scmoe_pos3": {"serial": window(4, 0).join(), "shortcut(3, 2)": shortcut(3, 2)},
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="of a rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--link", default="250mbit:0.5ms")
    parser.add_argument("--phases", default="infer,train")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the rows to this .jsonl file")
    return parser.parse_args(argv)


def run_rank(world: World, argv: Sequence[str]) -> int:
    """What every rank does; rank 0 prints and writes."""
    known = parse(argv)
    torch.set_num_threads(1)
    options = LayerOptions(ranks=world.size, tokens=known.tokens, hidden=known.hidden, ffn=known.ffn,
                           experts=4 * world.size, dtype="fp32", link=known.link, repeats=known.repeats)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for phase in known.phases.split(","):
        found = rows_of(world, options, phase)
        rows += found
        for row in found if world.rank == 0 else ():
            print(f"{row['phase']:5} {row['case']:10} {row['builder']:18} {row['time_ms_median']:7.2f} ms, "
                  f"{row['speedup']:.2f}x serial, {row['overlap']:.2f}x joined {row['flagged'] or ''}",
                  flush=True)  # fmt: skip
        if world.rank == 0 and known.out is not None:
            write_jsonl(known.out, rows)  # so far
    return 0


def rows_of(world: World, options: LayerOptions, phase: str) -> list[dict[str, Any]]:
    """The rows of one phase. Collective."""
    ids_TK, weights_TK = load("balanced", out=options.out, tokens=options.tokens, experts=options.experts,
                              top_k=options.top_k, rank=world.rank, ranks=world.size)  # fmt: skip
    variants = []
    for case, builders in BUILDERS.items():
        wires = Wires.open(world, options.timeout_s)  # for each: a transport is open for layers of one form
        wires.emulate(LinkSpec.parse(options.link), 1)
        model = BlockPair(case, options.sizes, ids_TK, weights_TK, wires.core, dtype=options.torch_dtype)
        for name, pair in builders.items():
            variants += [Variant(name=f"{case} {name}", model=model, pair=pair.join(joined), transport=wires.link)
                         for joined in (False, True)]  # fmt: skip
    x_TD, dy_TD = (torch.randn(options.tokens, options.hidden) for _ in range(2))
    samples = Runner(world, phase, x_TD, dy_TD).interleave(variants, [options.repeats] * len(variants), warmup=WARMUP)
    rows: list[dict[str, Any]] = []
    serial_s = {}
    for at in range(0, len(variants), 2):
        case, _, name = variants[at].name.partition(" ")
        on_s, off_s = median(samples[at].time_s), median(samples[at + 1].time_s)
        if name == "serial":
            serial_s[case] = on_s = off_s
        found = samples[at + (name == "serial")].time_s
        rows.append({
            "benchmark": "builders", "phase": phase, "case": case, "builder": name, "link": options.link,
            "time_ms_median": round(on_s * 1e3, 3), "time_ms_p10": round(percentile(found, 0.1) * 1e3, 3),
            "time_ms_p90": round(percentile(found, 0.9) * 1e3, 3), "joined_ms_median": round(off_s * 1e3, 3),
            "speedup": round(serial_s[case] / on_s, 3), "overlap": round(off_s / on_s, 3),
            "flagged": "noisy" if is_noisy(found) else None, **constants(options),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(spawn(run_rank, sys.argv[1:], 2, timeout_s=120.0, program="builders"))
