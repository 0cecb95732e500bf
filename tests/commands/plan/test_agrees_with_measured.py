"""The plan against every committed row of `moe-overlap bench layer`: one rate is fitted for each run of a phase, the
rest follows from sizes, the link and the figures of this machine.

The rate is that of matmuls, from the top2 block pair with exchanges replaced by local copies (`nocomm_ms`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from moe_overlap.commands.plan.machine import WINDOW_OPS
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.planning.search import evaluate
from moe_overlap.schedule.builders import chunked, window
from moe_overlap.transport.link import LinkSpec

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "cpu-2core"
FILES = sorted({*RESULTS.glob("*bench-*.jsonl"), *RESULTS.glob("*predict.jsonl"), *RESULTS.glob("*limit.jsonl")})
CLOSE, MOST_OF_THEM, ANY = 0.10, 0.95, 0.15
# Of this machine, the same for all rows: to start something, to move bytes, and how the wire suffers beside compute.
MACHINE = {"launch": 1e-4, "issue": 1e-4, "memory_bandwidth": 1e10, "wire_slowdown": 1.05, "sequence": 256,
           "weights": "added"}  # fmt: skip


def options_of(row):
    """The same question. Bytes are moved by the cores that compute, which `comm_cpu_ms` says how much of."""
    link = LinkSpec.parse(row["link"].removeprefix("emulated "))
    same = {name: row[name] for name in "ranks ranks_per_node tokens hidden ffn experts top_k dtype phase".split()}
    wires = {"bandwidth": link.bytes_per_s, "latency": link.latency_s, "message": 0.0}
    slowdown = 1 + row["comm_cpu_ms"] / row["exchange_ms"]
    return PlanOptions(**same, **wires, **MACHINE, compute_slowdown=slowdown, dedup="off")


def with_fitted_flops(options, compute_s):
    """compute_s of the plan is a constant plus FLOPs / rate: two rates give both."""
    at_s = {rate: asked(replace(options, flops=rate), "top2").compute_s for rate in (1e11, 1e12)}
    flops = (at_s[1e11] - at_s[1e12]) / (1e-11 - 1e-12)
    return replace(options, flops=flops / (compute_s - (at_s[1e12] - flops / 1e12)))


def predicted_s(point, row):
    """Of the schedule that the row has; of the planner's own, the best in as many chunks."""
    if row["schedule"] == "serial":
        return point.serial_s
    if row["schedule"] == "auto":
        cuts = {"forward": row["chunks"], "backward": row["backward_chunks"]}
        return sum(phase.of_chunks(cuts[phase.phase]) for phase in point.phases)
    if row["schedule"] == "mirrored":
        return mirrored_s(point, row["chunks"])
    return point.of_chunks(row["chunks"], "tokens")


def mirrored_s(point, chunks):
    """The best forward schedule in so many chunks, with the backward that follows from it."""
    forward, backward = point.phases
    best = next(one for one in forward.candidates if one.chunks == chunks and not one.joined)
    ops = WINDOW_OPS[point.kind]
    if point.kind.startswith("scmoe"):
        pair = window(ops, best.ops_before[len(best.ops_before) // 2], chunks=chunks, by=best.by)
    else:
        pair = chunked(chunks, best.by, shared=ops == 1)
    back_s = evaluate(backward.window, pair.backward, chunks=chunks, by=best.by)
    return forward.outside_s + best.predicted_s + backward.outside_s + back_s


@lru_cache
def errors(path):
    """(predicted / measured - 1, row) of every unflagged row of a file."""
    runs = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        runs[row["phase"], row["link"], row["tokens"], row["ffn"]].append(row)
    found = []
    for rows in runs.values():
        top2 = next(row for row in rows if row["case"] == "top2")
        options = with_fitted_flops(options_of(top2), top2["nocomm_ms"] / 1e3)
        points = {case: asked(options, case) for case in {row["case"] for row in rows}}
        assert points["top2"].compute_s == pytest.approx(top2["nocomm_ms"] / 1e3)
        unflagged = [row for row in rows if row["flagged"] is None]
        found += [(1e3 * predicted_s(points[row["case"]], row) / row["time_ms_median"] - 1, row) for row in unflagged]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem[11:])
def test_no_row_is_far_off(path):
    found = errors(path)
    assert len(found) >= 3
    for error, row in found:
        assert abs(error) < ANY, (row["case"], row["schedule"], row["chunks"], row["link"], row["phase"], error)


def test_nearly_every_row_is_predicted_within_ten_percent():
    found = [error for path in FILES for error, _ in errors(path)]
    assert len(found) >= 120 and sum(abs(error) < CLOSE for error in found) >= MOST_OF_THEM * len(found)


def test_all_committed_rows_of_bench_layer_are_looked_at():
    keys = {"case", "schedule", "nocomm_ms", "bound_ms", "link"}
    firsts = {path: json.loads(path.read_text().split("\n")[0]) for path in RESULTS.glob("*.jsonl")}
    # Rows of several ways to send rows are another benchmark's (test_committed.py).
    of_bench = [path for path, first in firsts.items() if keys <= set(first) and "inter_node_bytes" not in first]
    assert sorted(of_bench) == FILES and len(FILES) >= 8
