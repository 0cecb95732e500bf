"""The plan against committed measurements: one number is fitted, the rest follows from sizes and the link.

The number is the rate of matmuls, from the top2 block pair with exchanges replaced by local copies (`nocomm_ms`). Every
row of every schedule then has to lie within 10 % of its measured median.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_overlap.forecast.options import PlanOptions
from moe_overlap.forecast.sweep import asked
from moe_overlap.transport.link import LinkSpec

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-2core"
FILES = sorted(RESULTS.glob("2026-11-22-bench-layer-share*.jsonl"))
TOLERANCE = 0.10


def options_of(row):
    """The same question; for this machine, 0.1 ms to start something and 3 GB/s to move rows."""
    link = LinkSpec.parse(row["link"].removeprefix("emulated "))
    same = {name: row[name] for name in "ranks ranks_per_node tokens hidden ffn experts top_k dtype phase".split()}
    wires = {"bandwidth": link.bytes_per_s, "latency": link.latency_s, "message": 0.0}
    machine = {"launch": 1e-4, "issue": 1e-4, "memory_bandwidth": 3e9, "compute_slowdown": 1.0, "sequence": 256}
    return PlanOptions(**same, **wires, **machine)


def with_fitted_flops(options, compute_s):
    """compute_s of the plan is a constant plus FLOPs / rate: two rates give both."""
    at_s = {rate: asked(replace(options, flops=rate), "top2").compute_s for rate in (1e11, 1e12)}
    flops = (at_s[1e11] - at_s[1e12]) / (1e-11 - 1e-12)
    return replace(options, flops=flops / (compute_s - (at_s[1e12] - flops / 1e12)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.split("bench-layer-")[-1])
def test_every_measured_row_is_predicted_within_ten_percent(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    top2 = next(row for row in rows if row["case"] == "top2")
    options = with_fitted_flops(options_of(top2), top2["nocomm_ms"] / 1e3)
    points = {row["case"]: asked(options, row["case"]) for row in rows}
    assert points["top2"].compute_s == pytest.approx(top2["nocomm_ms"] / 1e3)
    measured = [row for row in rows if row["flagged"] is None]
    assert len(measured) >= 3
    for row in measured:
        point = points[row["case"]]
        predicted_s = point.serial_s if row["schedule"] == "serial" else point.of_chunks(row["chunks"])
        error = 1e3 * predicted_s / row["time_ms_median"] - 1
        assert abs(error) < TOLERANCE, (row["case"], row["schedule"], row["chunks"], error)


def test_there_are_measured_rows():
    assert len(FILES) >= 4
