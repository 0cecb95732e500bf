"""Bytes between nodes and step times: a row for each expert, for each rank, and one to each node.

    python benchmarks/hierarchical.py --out out/hierarchical [-- --repeats 10 ...]

Runs `moe-overlap bench layer --dedup D` for every D (options after `--` go to each run) on four slept ranks of two
nodes and gathers the rows in OUT/hierarchical.jsonl, with a table beside them: what was measured and the closed forms.

Closed forms, for W ranks, L on a node, E experts of which each token wants k, all choices equally likely. Rows of a
token that cross nodes, each way:

    off            k (W - L) / W
    on             (W - L) (1 - C(E - E/W, k) / C(E, k))
    hierarchical   (W/L - 1) (1 - C(E - E L/W, k) / C(E, k))

Time of a serial step: without communication, as measured, and for each exchange the link's latency and bytes / rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

from moe_overlap.agreement.cost import agreement_cost
from moe_overlap.commands.bench.options import DTYPES
from moe_overlap.commands.bench.sweep import parse, sweep
from moe_overlap.measure.report import read_jsonl
from moe_overlap.transport.link import LinkSpec

Row = dict[str, Any]
SETTING = ("--ranks", "4", "--ranks-per-node", "2", "--compute", "slept", "--routing", "uniform", "--cases", "top2",
           "--schedules", "serial,chunked", "--tokens", "512", "--hidden", "512", "--ffn", "512", "--experts", "32",
           "--top-k", "8", "--link", "20mbit:1ms", "--timeout-s", "300")  # fmt: skip
WAYS = ("off", "on", "hierarchical")


def crossing_rows(row: Row) -> float:
    """Rows of a token that cross nodes, each way."""
    ranks, size, experts, k = (int(row[name]) for name in ("ranks", "ranks_per_node", "experts", "top_k"))
    if row["dedup"] == "off":
        return k * (ranks - size) / ranks
    groups, others = (ranks, ranks - size) if row["dedup"] == "on" else (ranks // size, ranks // size - 1)
    return others * (1 - comb(experts - experts // groups, k) / comb(experts, k))


def crossing_bytes(row: Row) -> float:
    """Bytes of rows that a rank sends to other nodes in a step."""
    exchanges = 4 if row["phase"] == "train" else 2
    return crossing_rows(row) * int(row["tokens"]) * int(row["hidden"]) * DTYPES[row["dtype"]].itemsize * exchanges


def serial_ms(row: Row) -> float:
    """Time of a serial step, in ms."""
    link = LinkSpec.parse(row["link"].removeprefix("emulated "))
    assert link is not None
    train, dedup, k = row["phase"] == "train", row["dedup"] != "off", int(row["top_k"])
    away = int(row["ranks"]) - int(row["ranks_per_node"])
    nodes = int(row["ranks"]) // int(row["ranks_per_node"]) if row["dedup"] == "hierarchical" else 0
    exchanges = 4 if train else 2
    messages = [crossing_bytes(row) / exchanges] * exchanges
    # The record (N), and what a backward says when it begins, in messages of one length.
    cost = agreement_cost(ranks=int(row["ranks"]), experts=int(row["experts"]), dedup=int(dedup), nodes=nodes)
    messages += [cost.bytes / (int(row["ranks"]) - 1) * away] * (2 if train else 1)
    if dedup:  # ids and weights beside the rows, 4 bytes each, and in training the weights' gradients
        beside = crossing_rows(row) * int(row["tokens"]) * k * 4
        messages += [2 * beside, beside] if train else [2 * beside]
    return float(row["nocomm_ms"]) + 1e3 * sum(link.seconds(int(size)) for size in messages)


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for each row, of a table in Markdown."""
    lines = [
        "| phase | dedup | schedule | rows a token | between nodes, MB | closed form | step, ms | closed form, bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["phase"], WAYS.index(row["dedup"]))):
        schedule = row["schedule"] if row["schedule"] == "serial" else f"{row['schedule']}({row['chunks']})"
        beside = serial_ms(row) if row["schedule"] == "serial" else row["bound_ms"]
        lines.append(
            f"| {row['phase']} | {row['dedup']} | {schedule} | {crossing_rows(row):.3f} "
            f"| {row['inter_node_bytes'] / 1e6:.3f} | {crossing_bytes(row) / 1e6:.3f} "
            f"| {row['time_ms_median']:.0f} | {beside:.0f} |"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/hierarchical", help="folder for hierarchical.jsonl and the runs")
    known, rest = parse(parser, argv)
    file = Path(known.out) / "hierarchical.jsonl"
    status = sweep({way: (*SETTING, "--dedup", way) for way in WAYS}, rest, file, summary)
    if status == 0:
        file.with_suffix(".md").write_text("\n".join([*summary(read_jsonl(file)), ""]), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
