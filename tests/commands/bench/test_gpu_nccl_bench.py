"""benchmarks/gpu_nccl.py: its comparison over gloo, and the processes that end whatever happens."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_nccl, gpu_process
from tests.ranks import gloo_pool


def compared(spoiled: str) -> list[str]:
    """On one rank: with one result that is off, of the layers over the group and, of "off", without overlap."""
    results = gpu_nccl.results

    def spoil(transport, ranks, device, *, overlap=True, **options):
        found = results(transport, ranks, device, overlap=overlap, **options)
        if spoiled and len(ranks) == 1 and (spoiled != "off" or not overlap):
            found["dx" if spoiled == "off" else spoiled] *= 1 + 1e-6 if spoiled == "off" else 1.1
        return found

    gpu_nccl.results = spoil
    try:
        return gpu_nccl.compare(dist.group.WORLD, dist.get_rank(), "cpu")
    finally:
        gpu_nccl.results = results


def test_two_ranks_are_one() -> None:
    assert gloo_pool(2).run(compared, "") == [[], []]


@pytest.mark.parametrize("spoiled", ["y", "dx", "experts.down_proj", "off"])
def test_a_difference_is_found_on_every_rank(spoiled: str) -> None:
    name, text = ("dx", "differs with overlap off") if spoiled == "off" else (spoiled, "is off by")
    for wrong in gloo_pool(2).run(compared, spoiled):
        assert len(wrong) == 2 and all(name in one and text in one for one in wrong)


@pytest.mark.parametrize(
    "script, result",
    [
        ("""echo 'nccl: {"result": "right"}'""", "right"),
        ("""echo 'nccl: {"result": "right"}'; exec sleep 600""", "right"),
        ("""echo 'nccl: {"result": "chunked(4) y is off by 1"}'""", "chunked(4) y is off by 1"),
        ("echo begun; exec sleep 600", "not run: not over within 2 s: begun"),
        (
            "echo 'x: NCCL WARN Duplicate GPU detected'; echo later; exit 1",
            "not run: x: NCCL WARN Duplicate GPU detected",
        ),
        ("echo 'NCCL version 2.28'; echo 'AssertionError: 1'; exit 1", "failed: status 1: AssertionError: 1"),
        ("exit 3", "failed: status 3: it said nothing"),
    ],
)
def test_what_became_of_the_ranks(script: str, result: str) -> None:
    assert gpu_nccl.outcome(["sh", "-c", script], 2.0) == result


def test_what_the_ranks_started_has_ended_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    gpu_nccl.outcome(["sh", "-c", f"sleep 600 & echo $! > {file}; wait"], 2.0)
    pid = int(file.read_text())
    deadline = time.monotonic() + 10.0
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """A process that has ended and that nobody has asked for does not."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    "result, status", [("right", 0), ("not run: late", 0), ("failed: status 1", 1), ("y is off", 1)]
)
def test_one_row_says_it(result: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_process, "about", lambda: {"device": "none"})
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(gpu_nccl, "outcome", lambda command, limit_s: result)
    out = tmp_path / "rows.jsonl"
    assert gpu_nccl.main([f"--out={out}"]) == status
    row = json.loads(out.read_text())
    assert row["kind"] == "nccl" and row["result"] == result


def test_without_a_device_nothing_runs(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_nccl.main([]) == 2
    assert "gpu_nccl: not run: no CUDA device" in capsys.readouterr().err
