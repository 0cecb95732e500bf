"""Step times of routings that were trained: `moe-overlap bench layer --routing FILE` for several files in one run.

    python benchmarks/locmoe_steps.py out/locmoe/switch-switch-0-0.safetensors out/locmoe/hash-hash-0-0.safetensors \\
        out/locmoe/locmoe-bias-0.1-0.safetensors --rows out/steps.jsonl --link 400mbit:50us --repeats 10 ...

The files are those of `benchmarks/locmoe.py --save-routing`. All other options are those of `bench layer`, and so are
the rows; what differs is that the lengths of the slept ops are calibrated once, for all files, since the difference
of two calibrations would be taken for one of the routers. A file may stand again at the end: by what it differs from
itself is noise.

Table (Markdown): median step of the slowest rank for each schedule; by how much it is below that of each file whose
name begins with switch or hash; the step without exchanges; bytes across nodes of the rank that sends most; local
share; max/mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_overlap.commands.bench.options import LayerOptions, parse
from moe_overlap.commands.bench.phase import measure_phase
from moe_overlap.commands.bench.routing import load
from moe_overlap.commands.bench.setting import Setting
from moe_overlap.launch.launch import World, run
from moe_overlap.measure.report import write_jsonl

PROGRAM = "locmoe_steps.py"
SETTING = ("--ranks", "4", "--ranks-per-node", "2", "--compute", "slept", "--cases", "shared1", "--phases", "train",
           "--schedules", "serial,shared_expert", "--tokens", "4096", "--hidden", "128", "--ffn", "256",
           "--dtype", "fp32")  # fmt: skip
Row = Mapping[str, Any]


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[LayerOptions]]:
    """(own arguments, the options of each file)."""
    parser = argparse.ArgumentParser(prog=PROGRAM)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    asked, rest = parser.parse_known_args(list(argv))
    out = str(asked.rows.parent)
    return asked, [parse([*SETTING, *rest, "--out", out, "--routing", file]) for file in asked.files]


def rank_main(world: World, argv: Sequence[str]) -> int:
    """Every rank: all files, one after the other."""
    asked, every = arguments(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    sleep = None
    for options in every:
        if sleep is not None:  # known from the first file
            options = replace(options, compute="real")
        routing = load(options.routing, out=options.out, tokens=options.tokens, experts=options.experts,
                       top_k=options.top_k, rank=world.rank, ranks=world.size)  # fmt: skip
        setting = Setting.build(options, world, routing, lambda text: None)
        sleep = sleep or setting.sleep
        setting = replace(setting, sleep=sleep, oversubscribed=False)
        setting.constant["compute"] = "slept"
        found = [row for phase in options.phases for row in measure_phase(setting, phase).rows]
        rows += [row for row in found if row["case"] in options.cases]
        if world.rank == 0:
            write_jsonl(asked.rows, rows)  # so far
            print(f"{options.routing} is measured", file=sys.stderr, flush=True)
    if world.rank == 0:
        print(table(rows))
    return 0


def table(rows: Sequence[Row]) -> str:
    """One line for each schedule and file."""
    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    first = {(row["schedule"], row["routing"]): row for row in reversed(rows)}
    bases = [name for name in dict.fromkeys(row["routing"] for row in rows) if name.startswith(("switch", "hash"))]
    less = [f"less than {name.partition('-')[0]}" for name in bases]
    head = ["routing", "schedule", "step ms", *less, "without exchanges", "MB across nodes", "local share", "max/mean",
            "flag"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for schedule in schedules:
        for row in (row for row in rows if row["schedule"] == schedule):
            cells = [row["routing"].removesuffix(".safetensors"), schedule, f"{row['time_ms_median']:.1f}"]
            for name in bases:
                base = first[schedule, name]["time_ms_median"]
                cells.append(f"{1 - row['time_ms_median'] / base:.2%}")
            cells += [f"{row['nocomm_ms']:.1f}", f"{row['inter_node_bytes'] / 1e6:.2f}", f"{row['local_share']:.3f}",
                      f"{row['max_over_mean']:.3f}", row["flagged"] or ""]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    asked, every = arguments(argv)
    asked.rows.parent.mkdir(parents=True, exist_ok=True)
    return run(rank_main, list(argv), every[0].ranks, timeout_s=every[0].timeout_s, program=PROGRAM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
