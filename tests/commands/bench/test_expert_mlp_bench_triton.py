"""benchmarks/gpu_expert_mlp.py from end to end on tiny shapes, interpreted, with a clock that makes times up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.interpreted import needs_triton

needs_triton(interpreter=True)

from benchmarks import gpu_expert_mlp as bench  # noqa: E402
from benchmarks import gpu_expert_mlp_cases as cases  # noqa: E402
from benchmarks import gpu_expert_mlp_ways as ways  # noqa: E402
from benchmarks import gpu_process, gpu_timing  # noqa: E402
from moe_overlap.ops import expert_mlp_tune_triton  # noqa: E402

QWEN3 = replace(cases.SHAPES[0], tokens=11, top_k=2, experts=3, hidden=16, ffn=8)
DEEPSEEK = replace(cases.SHAPES[3], tokens=20, experts=3, hidden=16, ffn=8)
SHAPES = (QWEN3, DEEPSEEK)


def made_up(contenders: dict, *, repeats: int = 10) -> dict:
    """Runs everything once. A forward takes a microsecond, a backward two."""
    for forward, backward in contenders.values():
        backward(forward()[1])
    return {key: (gpu_timing.Time(1e-6, 1e-6, 1e-6), gpu_timing.Time(2e-6, 2e-6, 2e-6)) for key in contenders}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "DTYPE", torch.float32)
    monkeypatch.setattr(cases, "SHAPES", SHAPES)
    monkeypatch.setattr(bench, "LEFT_TO_OTHERS", (1, 2))
    for name, value in {
        "sustained": lambda seconds: 1e9,
        "double_rate": lambda: 1e12,
        "multiprocessors": lambda: 3,
    }.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "memory", lambda: 0)
    monkeypatch.setattr(gpu_timing, "peak_bytes", lambda call: (call(), 4096))
    monkeypatch.setattr(gpu_timing, "two_phases", made_up)
    monkeypatch.setattr(gpu_process, "about", lambda: {"device": "none"})
    monkeypatch.setattr(gpu_process, "clocks", lambda: "?")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def rows(out: Path, *argv: str) -> list[dict[str, Any]]:
    assert bench.main([f"--out={out}", *argv]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_contender_is_checked_and_measured(tiny: None, tmp_path: Path) -> None:
    found = rows(tmp_path / "rows.jsonl", "--budgets")
    timed = [row for row in found if "tflops" in row]
    assert found[0]["kind"] == "limit" and found[-1]["kind"] == "summary"
    seen = {(r["case"], r["routing"], r["implementation"], r.get("num_sms"), r["phase"]) for r in timed}
    for shape in SHAPES:
        for phase in cases.PHASES:
            for name in ("triton", "grouped_mm", "compile", "loop"):
                assert {(shape.name, routing, name, None, phase) for routing in cases.ROUTINGS} <= seen
            assert {(shape.name, "uniform", "triton", count, phase) for count in (1, 2, 3)} <= seen
            dealt = [
                row for row in timed if (row["case"], row["phase"], row.get("tiles")) == (shape.name, phase, "dealt")
            ]
            assert [(row["implementation"], row["routing"]) for row in dealt] == [("triton", "uniform")]
    for row in timed:
        assert row["error_over_tolerance"] <= 1 and row["share"] >= 0 and row["peak_gib"] >= 0
        assert ("blocks" in row) == (row["implementation"] == "triton")
        judged = row["implementation"] in ways.IMPLEMENTATIONS and not {"num_sms", "tiles"} & row.keys()
        deepseek_backward = row["case"] == DEEPSEEK.name and row["phase"] == "backward"
        assert ("met" in row) == (judged and not deepseek_backward)
    absent = [row for row in found if row.get("implementation") == "liger"]
    assert len(absent) == 2 and all(row["result"].startswith("not run: ModuleNotFoundError") for row in absent)
    # A made-up microsecond is no target's.
    assert len(found[-1]["missed"]) == 6 and "430" in found[-1]["missed"][0]


def test_wrong_and_failing_contenders_have_no_speed_and_stop_nobody(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ways.contender

    def spoiled(way: ways.Way, inputs: cases.Inputs, measured: dict) -> ways.Contender:
        found = right(way, inputs, measured)
        if way.name == "loop":
            raise RuntimeError("no\nroom")
        if way.name == "grouped_mm":  # one gradient is off
            return replace(
                found, backward=lambda saved: {k: v * (1 + (k == "w_in")) for k, v in found.backward(saved).items()}
            )
        if way.name == "compile":  # one number is NaN
            return replace(
                found, forward=lambda: (found.forward()[0] + torch.tensor([torch.nan] + 15 * [0.0]), found.forward()[1])
            )
        return found

    monkeypatch.setattr(ways, "contender", spoiled)
    found = rows(tmp_path / "rows.jsonl", "--only=qwen3")
    assert {row["case"] for row in found if "case" in row} == {QWEN3.name}
    said = {(r["implementation"], r.get("phase")): r for r in found if r.get("routing") == "uneven"}
    assert said["loop", None]["result"] == "not measured: RuntimeError: no room"
    assert "tflops" in said["grouped_mm", "forward"] and "w_in" in said["grouped_mm", "backward"]["result"]
    assert all(
        "tflops" not in said["compile", phase] and "nan" in said["compile", phase]["result"] for phase in cases.PHASES
    )
    assert "tflops" not in said["grouped_mm", "backward"]
    assert all("tflops" in said["triton", phase] for phase in cases.PHASES)


def test_nothing_is_begun_when_the_time_is_over(tiny: None, tmp_path: Path) -> None:
    found = rows(tmp_path / "rows.jsonl", "--most-s=-1")
    assert {row["result"] for row in found if row["kind"] == "expert_mlp"} == {"not measured: the time is over"}
    assert found[-1]["missed"] == []


def test_tuning_prints_lines_for_the_table_and_measures_them(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a clock that likes large groups of row tiles."""
    monkeypatch.setattr(bench, "MAIN", (ways.Way("triton"),))
    monkeypatch.setattr(bench, "LEFT_TO_OTHERS", ())
    monkeypatch.setattr(expert_mlp_tune_triton, "_median_s", clock())
    found = rows(tmp_path / "rows.jsonl", "--tune", "--only=qwen3")
    lines = next(row["lines"] for row in found if row["kind"] == "tuned")
    assert lines[0] == '"up": _row("interpreter", 4, (16, 16, 16), (16, 1, 1, 1), rows=7, ffn=8, hidden=16),'
    assert len(lines) == 4 and "\n".join(lines) in capsys.readouterr().out
    groups = {row.get("tuned", False): row["blocks"]["up"]["group"] for row in found if "blocks" in row}
    assert groups == {False: 2, True: 16}


def clock():
    """Each call is faster than the one before."""
    calls = []

    def seconds(body) -> float:
        calls.append(body)
        return 1.0 / len(calls)

    return seconds
