"""The part `offload` of `make gpu` on a CPU: small sizes, an emulated link, times made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_offload, gpu_process, gpu_timing
from moe_overlap.commands.bench.cuda_timing import Time
from moe_overlap.layer import offload
from moe_overlap.planning.offload import OffloadShape
from moe_overlap.transport.host_link import EmulatedHostLink

SHAPE = OffloadShape(experts=4, bytes_per_expert=1000, bytes_per_s=1e6, rows_per_expert=8.0, row_s=1e-4)
"""A copy takes a millisecond, as ten rows do; three stay bare in a step."""
MS = {4: 6.0, 8: 3.9, 16: 3.0}
"""Of `away` beyond `resident`, by the rows of an expert: at most 3.75 is hidden."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    small = {"DEVICE": "cpu", "DTYPE": torch.float32, "HIDDEN": 16, "FFN": 8, "EXPERTS": 4, "ROWS": tuple(MS)}
    for name, value in small.items():
        monkeypatch.setattr(gpu_offload, name, value)

    def two_phases(contenders: Mapping[str, gpu_timing.Phases]) -> dict[str, tuple[Time, Time]]:
        found = {}
        for name, (forward, backward) in contenders.items():
            out, saved = forward()
            backward(saved)
            half = (10.0 + (MS[out.shape[0] * 2 // 4] if name == "away" else 0.0)) / 2e3
            found[name] = (Time(half, half, half),) * 2
        return found

    monkeypatch.setattr(gpu_timing, "two_phases", two_phases)
    monkeypatch.setattr(gpu_process, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_process, "about", lambda: {"device": "none"})

    def started(*words: str) -> list[dict[str, Any]]:
        out = tmp_path / "rows.jsonl"
        out.unlink(missing_ok=True)
        assert gpu_offload.main([f"--out={out}", *words]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return started


def test_the_crossover_is_predicted_first_and_then_measured(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_offload.Pair, "predicted", lambda pair, rows: SHAPE)
    first, *measured, last = run()
    assert (first["predicted_rows"], first["bytes_per_s"], first["row_us"]) == (10, 1_000_000, 100.0)
    assert [(row["rows_per_expert"], row["ms"], row["resident_ms"], row["hidden"]) for row in measured] == [
        (4, 16.0, 10.0, False), (8, 13.9, 10.0, False), (16, 13.0, 10.0, True)
    ]  # fmt: skip
    assert (last["predicted_rows"], last["not_hidden_rows"], last["hidden_rows"]) == (10, 8, 16)


def test_a_recorded_step_predicts(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "open_host_link", lambda device: EmulatedHostLink(1e6))
    first, *_ = run("--rows=8", "--most-s=-1")
    assert first["bytes_per_s"] == pytest.approx(1e6, rel=0.01)
    bytes_per_expert = 3 * 16 * 8 * 4
    assert first["predicted_rows"] == pytest.approx(bytes_per_expert / first["row_us"], rel=0.01, abs=1)


def test_what_differs_in_a_bit_or_is_late_has_no_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_offload.Pair, "predicted", lambda pair, rows: SHAPE)
    plain = gpu_offload.step

    def spoilt(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, *others = plain(layer, x, dy)
        return (y * (1 + 1e-6) if layer.host_link and len(x) == 16 else y, *others)

    monkeypatch.setattr(gpu_offload, "step", spoilt)
    _, *measured, last = run()
    assert "ms" in measured[0] and "ms" in measured[2]
    assert measured[1]["result"].startswith("not measured: ValueError: result 0 ")
    assert (last["not_hidden_rows"], last["hidden_rows"]) == (4, 16)
    _, *late, last = run("--most-s=-1")
    assert {row["result"] for row in late} == {"not measured: TimeoutError: the time is over"}
    assert last["not_hidden_rows"] is None and last["hidden_rows"] is None


def test_copies_that_hide_and_then_do_not_have_no_crossover_below() -> None:
    assert gpu_offload.crossover({1: True, 2: False, 3: True}) == {"not_hidden_rows": 2, "hidden_rows": 3}
    assert gpu_offload.crossover({1: True, 2: False}) == {"not_hidden_rows": 2, "hidden_rows": None}


def test_without_a_device_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_offload.main([f"--out={tmp_path / 'rows.jsonl'}"]) == 2
    assert "gpu_offload: not run: no CUDA device" in capsys.readouterr().err
