"""The part `layer` of `make gpu` on a CPU: small sizes, times made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu_layer, gpu_timing
from moe_overlap.commands.bench.cuda_timing import Time


class Rows:
    def __init__(self, file: Any) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(self, **values: Any) -> None:
        self.rows.append(values)


def two_phases(contenders: Mapping[str, gpu_timing.Phases]) -> dict[str, tuple[Time, Time]]:
    for forward, backward in contenders.values():
        backward(forward()[1])
    return {way: (Time(1e-3, 0, 0), Time(place * 1e-3, 0, 0)) for place, way in enumerate(contenders, 1)}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of a layer of 8 experts in float32, which is right on a CPU whatever makes it."""
    small = {"DEVICE": "cpu", "DTYPE": torch.float32, "TOKENS": 64, "HIDDEN": 16, "FFN": 8, "EXPERTS": 8, "TOP_K": 2}
    for name, value in small.items():
        monkeypatch.setattr(gpu_layer, name, value)
    written = Rows(None)
    monkeypatch.setattr(gpu_timing, "Results", lambda file: written)
    monkeypatch.setattr(gpu_timing, "two_phases", two_phases)
    monkeypatch.setattr(gpu_timing, "peak_bytes", lambda call: (call(), 3 << 30))
    monkeypatch.setattr(gpu_timing, "kernel_times", lambda call: {"a kernel": [1.0, 500.0]})
    monkeypatch.setattr(gpu_timing, "host_s", lambda call: 1e-3)
    monkeypatch.setattr(gpu_timing, "host_profile", lambda call: {})
    monkeypatch.setattr(gpu_layer, "graphed", lambda module, weights: module)
    return written.rows


def test_what_is_timed_is_written_before_anything_is_compiled(rows: list, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, begun = gpu_layer.make, []

    def make(way: str, weights: gpu_layer.Weights) -> nn.Module:
        if way == "compile":
            begun.append([row["implementation"] for row in rows if row["kind"] == "layer"])
            return gpu_layer.ours(weights)
        return plain(way, weights)

    monkeypatch.setattr(gpu_layer, "make", make)
    assert gpu_layer.main(["--ways=compile,ours,chunked,graph,static,static-graph,plain", "--profile"]) == 0
    assert begun == [["ours", "graph", "plain", "chunked", "static", "static-graph"]]
    found = {row["implementation"]: row for row in rows if row["kind"] == "layer"}
    times = {way: row["times_ours"] for way, row in found.items()}
    assert times == {
        "ours": 1.0,
        "graph": 1.5,
        "plain": 2.0,
        "chunked": 2.5,
        "static": 3.0,
        "static-graph": 3.5,
        "compile": 4.0,
    }
    assert (found["compile"]["times_graph"], found["compile"]["target"]) == (2.667, 1.2)
    assert found["compile"]["met_by"] == ["ours", "graph"] and "target" not in found["plain"]
    assert {row["implementation"] for row in rows if row["kind"] == "profile"} == set(times)
    assert all(row["error"] < 1e-5 and row["peak_gib"] == 3.0 for row in rows if row["kind"] == "layer")


def test_what_is_wrong_or_too_late_has_no_time_and_costs_itself_alone(rows: list, monkeypatch) -> None:
    plain = gpu_layer.make

    def make(way: str, weights: gpu_layer.Weights) -> nn.Module:
        layer = plain("ours", weights)
        if way == "chunked":
            with torch.no_grad():
                layer.experts.down_proj.mul_(2)
        if way == "static":
            raise RuntimeError("an illegal access")
        return layer

    monkeypatch.setattr(gpu_layer, "make", make)
    assert gpu_layer.main(["--ways=chunked,static,ours"]) == 0
    found = {row["implementation"]: row.get("result", "timed") for row in rows}
    assert found["ours"] == "timed" and found["static"] == "not measured: RuntimeError: an illegal access"
    assert found["chunked"].startswith("not measured: ValueError: wrong")
    rows.clear()
    assert gpu_layer.main(["--ways=ours", "--most-s=-1"]) == 0
    assert [row["result"] for row in rows] == ["not measured: TimeoutError: the time is over"]
    with pytest.raises(SystemExit, match="expected some of ours, graph"):
        gpu_layer.main(["--ways=our"])


def test_a_way_that_takes_the_process_down_leaves_the_rows_of_those_before_it(rows: list, monkeypatch) -> None:
    plain = gpu_layer.make

    def make(way: str, weights: gpu_layer.Weights) -> nn.Module:
        if way == "static-graph":
            raise KeyboardInterrupt  # nothing catches it, like an end of the process
        return plain(way, weights)

    monkeypatch.setattr(gpu_layer, "make", make)
    with pytest.raises(KeyboardInterrupt):
        gpu_layer.main(["--ways=ours,graph,plain,static-graph"])
    assert [row["implementation"] for row in rows if "ms" in row] == ["ours", "graph", "plain"]
