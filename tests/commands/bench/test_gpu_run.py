"""The parts of `make gpu` that can be checked without a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_probe_symmetric, gpu_run, gpu_timing
from moe_overlap.native import native
from moe_overlap.ops import cuda_kernels, hardware, triton_kernels, verified

DONE = gpu_run.Done(0, "all passed", 1.0)
ABOUT = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "NVIDIA H200", "clocks": "?"}


@pytest.fixture
def run(tmp_path: Path) -> gpu_run.Run:
    return gpu_run.Run(tmp_path / "results", ABOUT)


def rows(run: gpu_run.Run) -> list[dict]:
    return [json.loads(line) for line in run.file.read_text().splitlines()]


def test_folder_of_a_device() -> None:
    assert gpu_run.slug("NVIDIA H200") == "h200"
    assert gpu_run.slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


@pytest.mark.parametrize(
    "status, text, result",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        (86, "========= Invalid __global__ write of size 4 at pack.cu:3\n========= ERROR SUMMARY: 1 error", "found"),
        (0, "========= ERROR SUMMARY: 2 errors", "found"),
        (1, "========= Error: Device not supported", "not run: Error: Device not supported"),
        (0, "3 passed in 1 s", "not run: 3 passed in 1 s"),  # the tool never said that it looked
        (None, "...\nstopped after 60 s", "not run: stopped after 60 s"),
        (1, "", "not run: it said nothing"),
    ],
)
def test_only_findings_of_a_sanitizer_are_red(status, text, result) -> None:
    row = gpu_run.sanitizer_result("memcheck", gpu_run.Done(status, text, 1.0))
    assert row["result"] == result
    if status == 86:
        assert "pack.cu:3" in row["first"]


def test_a_command_that_hangs_is_stopped(run: gpu_run.Run, capfd) -> None:
    # A shell, which begins at once: Python alone may take a second on a busy machine.
    done = run.command("sh", "-c", "echo begun; exec sleep 600", most_s=5.0)
    assert done.status is None and "begun" in done.text and "stopped after 5 s" in done.text
    assert run.command(sys.executable, "-c", "raise SystemExit(3)", most_s=30).status == 3


def test_missing_sanitizer_is_recorded_and_not_red(run: gpu_run.Run, monkeypatch) -> None:
    monkeypatch.setattr(gpu_run.shutil, "which", lambda name, path: None)
    assert gpu_run.sanitize(run)
    assert [row["result"] for row in rows(run)] == ["not run: compute-sanitizer not found"] * 3


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """verified.json in a place of its own, on a machine that is sm_90."""
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    monkeypatch.setattr(hardware, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(native, "kernel_sources", lambda: "5c")
    old = [
        verified.Record("pack", "cuda", "sm_90", "float32", "01", "old", "2025-01-01"),
        verified.Record("pack", "cuda", "sm_80", "float32", "01", "old", "2025-01-01"),
    ]
    verified.write(old)
    return tmp_path / "told.json"


def test_table_in_the_status_is_what_the_record_says() -> None:
    text = gpu_run.STATUS.read_text()
    assert gpu_run.with_table(text) == text
    assert all(f"| `{op}` | cuda |" in text for op in cuda_kernels.OPS)
    assert all(f"| `{op}` | triton |" in text for op in triton_kernels.KERNELS)


def test_what_passed_is_written_down(run: gpu_run.Run, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = record.with_name("status.md")
    status.write_text(f"# Status\n{gpu_run.TABLE_BEGIN}\nold\n{gpu_run.TABLE_END}\nafter\n")
    monkeypatch.setattr(gpu_run, "STATUS", status)
    record.write_text(
        json.dumps({"covered": [["pack", "cuda", "float32"], ["combine", "triton", "bfloat16"]], "failed": []})
    )
    assert gpu_run.verify(run, record, DONE)
    assert [(r.op, r.implementation, r.architecture, r.dtype, r.sources, r.commit) for r in verified.read()] == [
        ("combine", "triton", "sm_90", "bfloat16", triton_kernels.sources(), "abc"),
        ("pack", "cuda", "sm_80", "float32", "01", "old"),
        ("pack", "cuda", "sm_90", "float32", "5c", "abc"),
    ]
    table = status.read_text()
    assert "old\n" not in table and table.startswith("# Status\n") and table.endswith("\nafter\n")
    dtypes = "float32, bfloat16, float16, float64"
    assert f"| `combine` | triton | {dtypes} | sm_90 bfloat16 (abc, 2026-01-02) |" in table
    assert "| `combine` | cuda | float32, bfloat16, float16 | **no** |" in table
    assert f"| `unpack` | cuda | {dtypes} | **no** |" in table
    assert rows(run)[0]["kind"] == "tests" and rows(run)[0]["device"] == "NVIDIA H200"


@pytest.mark.parametrize(
    "told", [{"covered": [["pack", "cuda", "float32"]], "failed": ["a test"]}, {"covered": [], "failed": []}]
)
def test_nothing_is_verified_by_a_red_or_an_empty_run(run: gpu_run.Run, record: Path, told: dict) -> None:
    before = verified.read()
    record.write_text(json.dumps(told))
    assert not gpu_run.verify(run, record, DONE)
    assert not gpu_run.verify(run, record.with_name("never-written.json"), DONE)
    record.write_text(json.dumps({"covered": [["pack", "cuda", "float32"]], "failed": []}))
    assert not gpu_run.verify(run, record, gpu_run.Done(2, "a file that cannot be imported", 1.0))
    assert verified.read() == before


COVERING = """
import pytest, torch

@pytest.fixture
def gpu():  # instead of the one that wants a device
    pass

@pytest.mark.covers("pack", torch.float32)
@pytest.mark.parametrize("i", range(3))
def test_good(i): pass

@pytest.mark.covers("combine", torch.bfloat16, "triton")
def test_bad(): assert False

@pytest.mark.covers("unpack", torch.float32)
def test_left_out(): pytest.skip("not here")
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_what_was_covered_is_told_by_all_test_processes(tmp_path: Path, processes: int) -> None:
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(COVERING)
    words = ["-q", "-p", "tests.gpu.conftest", f"--gpu-record={tmp_path}/told.json", "test_it.py"]
    words += ["-n", str(processes)] if processes else []
    paths = [str(gpu_run.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, env=environment, timeout=200, check=False)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told == {"covered": [["pack", "cuda", "float32"]], "failed": ["test_it.py::test_bad (call)"]}


@pytest.mark.parametrize(
    "passed, clean, skip, begun, status",
    [
        (True, True, "", ["probe", "kernels", "expert_mlp"], 0),
        (True, True, "probe,expert_mlp", ["kernels"], 0),
        (False, True, "", ["probe"], 1),  # the chip can still be measured, our kernels are not
        (True, False, "", ["probe"], 1),
        (False, True, "probe,sanitize", [], 1),
    ],
)
def test_no_kernel_is_timed_on_red(passed, clean, skip, begun, status, tmp_path, monkeypatch, capsys) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu_run, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_run, "about", lambda: ABOUT)
    monkeypatch.setattr(gpu_run, "build", lambda run: True)
    monkeypatch.setattr(gpu_run, "test", lambda run, paths: passed)
    monkeypatch.setattr(gpu_run, "sanitize", lambda run: clean)
    monkeypatch.setattr(gpu_run, "measure", lambda run, parts: ran.extend(parts))
    assert gpu_run.main([f"--out={tmp_path}", f"--skip={skip}"]) == status
    assert ran == begun
    assert ("no kernel of ours was timed" in capsys.readouterr().err) == (status == 1)


def test_end_of_the_output_has_every_row_in_short(run: gpu_run.Run) -> None:
    run.record(kind="kernel", case="gate 16384x128 k8", us=5.5, met=True)
    assert gpu_run.digest(run) == ["kind=kernel case=gate 16384x128 k8 us=5.5 met=True"]


def test_commit_of_sources_without_their_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_COMMIT", "abc123")
    assert gpu_run.commit() == "abc123"


def test_bad_options_and_no_gpu(capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_run.main(["--skip", "tests"])
    assert "expected some of sanitize, probe, kernels, expert_mlp" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_run.main([]) == 2
        assert "make gpu: no CUDA device" in capsys.readouterr().err


def test_times_are_medians_with_their_spread() -> None:
    found = gpu_timing.Time.of([3.0, 1.0, 2.0, 9.0, 4.0])
    assert (found.median_s, found.p10_s, found.p90_s) == (3.0, 1.0, 9.0)
    assert gpu_timing.sets_needed(4 * gpu_timing.CACHE_BYTES) == 1
    assert gpu_timing.sets_needed(gpu_timing.CACHE_BYTES) == 4
    assert gpu_timing.rounds_needed(1, 300 << 20) == 20
    assert gpu_timing.rounds_needed(64, 1 << 20) == 4


def answer_and_hang(rank: int, world: int, port: int, out) -> None:
    if rank == 0:
        out.put({"world": world})
    time.sleep(60)


def die(rank: int, world: int, port: int, out) -> None:
    sys.exit(5)


def vanish(rank: int, world: int, port: int, out) -> None:
    os._exit(6)


def test_processes_of_a_probe_are_ended_whatever_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe_symmetric, "WORLD_LIMIT_S", 30.0)
    monkeypatch.setattr(gpu_probe_symmetric, "JOIN_LIMIT_S", 0.5)
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "")
    others = set(multiprocessing.active_children())  # ranks that other tests keep
    assert gpu_probe_symmetric.world(answer_and_hang, 2) == {"world": 2}
    assert set(multiprocessing.active_children()) <= others
    assert gpu_probe_symmetric.world(die, 1) == {"result": "not run: rank 0: SystemExit: 5"}
    assert gpu_probe_symmetric.world(vanish, 1)["result"].endswith("exit codes [6]")
