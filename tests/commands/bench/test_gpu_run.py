"""The parts of `make gpu` that can be checked without a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, gpu_parts, gpu_probe_symmetric, gpu_process, gpu_run, gpu_take, gpu_timing
from moe_overlap.native import native
from moe_overlap.ops import cuda_kernels, hardware, triton_kernels, verified

ABOUT = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "NVIDIA H200", "clocks": "?"}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[gpu_process.Run]:
    found = gpu_process.Run(tmp_path / "results", ABOUT)
    yield found
    shutil.rmtree(found.scratch)


def rows(run: gpu_process.Run) -> list[dict]:
    return [json.loads(line) for line in run.file.read_text().splitlines()]


def test_folder_of_a_device() -> None:
    assert gpu_take.slug("NVIDIA H200") == "h200"
    assert gpu_take.slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


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
    row = gpu_parts.sanitizer_result("memcheck", gpu_process.Done(status, text, 1.0))
    assert row["result"] == result
    if status == 86:
        assert "pack.cu:3" in row["first"]


def test_a_command_that_hangs_is_stopped(run: gpu_process.Run, capfd) -> None:
    # A shell, which begins at once: Python alone may take a second on a busy machine.
    done = run.command("sh", "-c", "echo begun; exec sleep 600", most_s=5.0)
    assert done.status is None and "begun" in done.text and "stopped after 5 s" in done.text
    assert run.command(sys.executable, "-c", "raise SystemExit(3)", most_s=30).status == 3


@pytest.mark.parametrize("nvcc", [None, "/cuda/bin/nvcc"])
def test_without_a_compiler_for_kernels_the_rest_is_built(run: gpu_process.Run, monkeypatch, nvcc) -> None:
    asked = []

    def command(*words: str, most_s: float, **environment: str) -> gpu_process.Done:
        asked.append((words[1:3], environment["MOE_OVERLAP_BUILD"], environment["CUDACXX"]))
        return gpu_process.Done(0, "", 1.0)

    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(gpu_parts, "find_tool", lambda name: nvcc)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    said = gpu_parts.build(run, 10.0)
    assert asked == [(("setup.py", "-q"), "cuda" if nvcc else "cpu", nvcc or "")]
    assert said == gpu_process.GOOD if nvcc else said.startswith("no CUDA kernels, as nvcc was not found")


def test_layers_are_tested_before_anything_is_timed_and_the_rest_of_the_tests_once(
    run: gpu_process.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [gpu_checks.Case("whole", ()), gpu_checks.Case("one", (ONE,)), gpu_checks.Case("two", (TWO,))]
    tested = []

    def done(command, folder, these, *, most_s: float, each_s: float) -> list[gpu_checks.Outcome]:
        tested.append([case.id for case in these])
        return [gpu_checks.Outcome(case, "passed") for case in these]

    monkeypatch.setattr(gpu_checks, "collect", lambda *_: (cases, ""))
    monkeypatch.setattr(gpu_checks, "run", done)
    monkeypatch.setattr(gpu_checks, "verify", lambda *_: 0)
    monkeypatch.setattr(gpu_checks, "architecture", lambda: "sm_90")
    monkeypatch.setattr(gpu_parts, "save_verified", lambda run: None)
    assert gpu_parts.layers(run, 60.0) == gpu_parts.tests(run, 60.0) == gpu_process.GOOD
    assert tested == [["whole"], ["one", "two"]]
    names = [part.name for part in gpu_parts.PARTS]
    assert names.index("layers") < min(names.index(name) for name in ("layer", "staged", "kernels", "mlp-qwen3"))


def test_missing_sanitizer_is_recorded_and_not_red(run: gpu_process.Run, monkeypatch) -> None:
    monkeypatch.setattr(gpu_process.shutil, "which", lambda name, path: None)
    assert gpu_parts.sanitize(run, 10.0) == gpu_process.GOOD
    assert [row["result"] for row in rows(run)] == ["not run: compute-sanitizer not found"] * 3


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verified.json in a place of its own, on a machine that is sm_90."""
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    monkeypatch.setattr(hardware, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(native, "kernel_sources", lambda: "5c")
    old = [
        verified.Record("pack", "cuda", "sm_90", "float32", "01", "old", "2025-01-01"),
        verified.Record("pack", "cuda", "sm_90", "bfloat16", "01", "old", "2025-01-01"),
        verified.Record("pack", "cuda", "sm_80", "float32", "01", "old", "2025-01-01"),
    ]
    verified.write(old)


def verified_now() -> list[tuple[str, ...]]:
    return [(r.op, r.implementation, r.architecture, r.dtype, r.sources, r.commit) for r in verified.read()]


def test_table_in_the_status_is_what_the_record_says() -> None:
    text = gpu_take.STATUS.read_text()
    assert gpu_take.with_table(text) == text
    assert all(f"| `{op}` | cuda |" in text for op in cuda_kernels.OPS)
    assert all(f"| `{op}` | triton |" in text for op in triton_kernels.KERNELS)


def test_what_is_right_is_written_down_and_what_is_not_taken_out(record: None) -> None:
    """Others that have not been looked at stay."""
    found = {
        ("pack", "cuda", "float32"): "failed: a test",
        ("combine", "triton", "bfloat16"): "right",
        ("unpack", "cuda", "float32"): "right",
    }
    assert gpu_checks.verify(found, "abc", "2026-01-02") == 2
    assert verified_now() == [
        ("combine", "triton", "sm_90", "bfloat16", triton_kernels.sources(), "abc"),
        ("pack", "cuda", "sm_80", "float32", "01", "old"),
        ("pack", "cuda", "sm_90", "bfloat16", "01", "old"),
        ("unpack", "cuda", "sm_90", "float32", "5c", "abc"),
    ]
    cases = [gpu_checks.Case("t", (kernel,)) for kernel in found] + [
        gpu_checks.Case("old", (("pack", "cuda", "bfloat16"),))
    ]
    assert [case.covers[0][0] for case in gpu_checks.unverified(cases)] == ["pack", "pack"]


def test_a_folder_is_taken_into_the_tree(record: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, folder = tmp_path / "status.md", tmp_path / "brought"
    status.write_text(f"# Status\n{gpu_take.TABLE_BEGIN}\nold\n{gpu_take.TABLE_END}\nafter\n")
    monkeypatch.setattr(gpu_take, "STATUS", status)
    monkeypatch.setattr(gpu_take, "RESULTS", tmp_path / "tree")
    folder.mkdir()
    new = verified.Record("combine", "triton", "sm_90", "bfloat16", "x", "abc", "2026-01-02")
    of_the_tree_that_travelled = verified.Record("unpack", "cuda", "sm_90", "float32", "01", "old", "2025-01-01")
    verified.write([of_the_tree_that_travelled, new], folder / "verified.json")
    checks = {"kind": "checks", "architecture": "sm_90", "kernels_wrong": {"pack cuda float32": "failed: a test"}}
    lines = [json.dumps(ABOUT | row) for row in ({"kind": "limit"}, checks)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert gpu_take.main([str(folder)]) == 0
    assert verified_now() == [  # what this run said, and else what was there
        ("combine", "triton", "sm_90", "bfloat16", "x", "abc"),
        ("pack", "cuda", "sm_80", "float32", "01", "old"),
        ("pack", "cuda", "sm_90", "bfloat16", "01", "old"),
    ]
    table = status.read_text()
    assert "old\n" not in table and table.startswith("# Status\n") and table.endswith("\nafter\n")
    dtypes = "float32, bfloat16, float16, float64"
    assert f"| `combine` | triton | {dtypes} | sm_90 bfloat16 (abc, 2026-01-02) |" in table
    assert "| `combine` | cuda | float32, bfloat16, float16 | **no** |" in table
    taken = tmp_path / "tree/h200/2026-01-02-abc-gpu.jsonl"
    assert taken.read_text().splitlines() == lines
    more = json.dumps(ABOUT | {"kind": "kernel", "us": 5.0})  # a second run of this commit
    (folder / "rows.jsonl").write_text(more + "\n")
    assert gpu_take.main([str(folder)]) == gpu_take.main([str(folder)]) == 0
    assert taken.read_text().splitlines() == [*lines, more]
    with pytest.raises(SystemExit):
        gpu_take.main([str(tmp_path)])


ONE, TWO = ("pack", "cuda", "float32"), ("combine", "triton", "bfloat16")


def test_essential_are_the_first_and_the_last_case_of_each_function_and_kernel() -> None:
    cases = [gpu_checks.Case(f"f.py::test_a[{i}]", (ONE,)) for i in range(4)]
    cases += [gpu_checks.Case("f.py::test_a[x]", (TWO,)), gpu_checks.Case("f.py::test_free", ())]
    assert [case.id[-3:] for case in gpu_checks.essential(cases)] == ["[0]", "[3]", "[x]"]


def test_one_outcome_that_is_not_passed_makes_a_kernel_wrong() -> None:
    def outcome(word: str, *kernels: gpu_checks.Kernel) -> gpu_checks.Outcome:
        return gpu_checks.Outcome(gpu_checks.Case(f"test_{word}", kernels), word)

    assert gpu_checks.verdicts([outcome("passed", ONE, TWO), outcome("lost", TWO), outcome("passed", TWO)]) == {
        ONE: "right",
        TWO: "lost: test_lost",
    }
    found = gpu_checks.verdicts([outcome("failed", ONE), outcome("passed", ONE), outcome("skipped", TWO)])
    assert found == {ONE: "failed: test_failed"}
    assert gpu_checks.wrong_pairs(found) == {("pack", "cuda")}
    assert gpu_checks.verdicts([outcome("passed", ONE), outcome("cut", ONE, TWO)]) == {ONE: "right"}


def test_what_the_part_had_no_time_for_is_cut_and_not_lost(tmp_path: Path) -> None:
    group = [gpu_checks.Case("a", (ONE,)), gpu_checks.Case("b", (ONE,))]
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps({"id": "a", "outcome": "passed", "text": ""}) + "\n")
    for status, cut, want in ((None, True, "cut"), (None, False, "lost"), (-9, True, "lost")):
        found = gpu_checks.outcomes(group, record, gpu_process.Done(status, "words", 1.0), cut=cut)
        assert [one.outcome for one in found] == ["passed", want]
    overdue = gpu_checks.run(lambda *words, **how: None, tmp_path, group, most_s=0.0, each_s=5.0)
    assert [one.outcome for one in overdue] == ["cut", "cut"]


COVERING = """
import os, time
import pytest, torch

@pytest.fixture
def gpu():  # instead of the one that wants a device
    pass

@pytest.mark.gpu
@pytest.mark.covers("pack", torch.float32)
@pytest.mark.parametrize("i", range(3))
def test_good(i): pass

@pytest.mark.gpu
@pytest.mark.covers("combine", torch.bfloat16, "triton")
def test_bad(): assert False, "seven"

@pytest.mark.gpu
@pytest.mark.covers("unpack", torch.float32)
def test_left_out(): pytest.skip("not here")

@pytest.mark.gpu
@pytest.mark.covers("permute", torch.float32)
@pytest.mark.parametrize("i", range(2))
def test_crash(i): os._exit(9) if i else None

@pytest.mark.gpu
@pytest.mark.covers("permute", torch.float64)
def test_hang(): time.sleep(600)
"""


def test_each_kernel_has_a_process_of_its_own(
    run: gpu_process.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fails, one takes its process down, one never ends: the others are right."""
    (tmp_path / "test_it.py").write_text(COVERING)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p tests.gpu.conftest")
    monkeypatch.setenv("PYTHONPATH", str(gpu_process.ROOT))
    monkeypatch.setattr(gpu_process, "ROOT", tmp_path)
    cases, said = gpu_checks.collect(run.command, run.scratch, ["test_it.py"], 120)
    assert said == "" and [len(case.covers) for case in cases] == [1] * 8
    hang = [case for case in cases if "hang" in case.id]
    found = gpu_checks.run(run.command, run.scratch, hang, most_s=300, each_s=5)
    found += gpu_checks.run(run.command, run.scratch, [c for c in cases if c not in hang], most_s=300, each_s=250)
    assert {kernel: verdict.partition(":")[0] for kernel, verdict in gpu_checks.verdicts(found).items()} == {
        ("pack", "cuda", "float32"): "right",
        ("combine", "triton", "bfloat16"): "failed",
        ("permute", "cuda", "float32"): "lost",
        ("permute", "cuda", "float64"): "lost",
    }
    texts = {one.case.id.rpartition("::")[2]: one.text for one in found}
    assert "seven" in texts["test_bad"] and "past its limit" in texts["test_hang"]
    assert "ended with status 9" in texts["test_crash[1]"] and texts["test_crash[0]"] == ""


def test_a_part_that_goes_wrong_costs_itself_alone(run: gpu_process.Run, capsys) -> None:
    """Killed, failing, over its limit, broken: what stands after it runs, and all of it is in the rows."""

    def command(*words: str) -> Callable[[gpu_process.Run, float], str]:
        return lambda run, most_s: run.command("sh", "-c", *words, most_s=most_s, quiet=True).verdict

    def broken(run: gpu_process.Run, most_s: float) -> str:
        raise RuntimeError("no such thing")

    run.limit_s = 600.0
    parts = [
        gpu_process.Part("killed", 60, command("kill -9 $$")),
        gpu_process.Part("failing", 60, command("echo words; exit 3")),
        gpu_process.Part("late", 1, command("echo begun; exec sleep 600"), least_s=0),
        gpu_process.Part("broken", 60, broken),
        gpu_process.Part("well", 60, command("exit 0")),
        gpu_process.Part("too long for what is left", 60, command("exit 0"), least_s=1e6),
    ]
    assert not gpu_run.go(run, parts)
    assert {row["part"]: row["result"] for row in rows(run)} == {
        "killed": "status -9: it said nothing",
        "failing": "status 3: words",
        "late": "too long: stopped after 1 s",
        "broken": "failed: RuntimeError: no such thing",
        "well": "ok",
        "too long for what is left": "not run: the time was over",
    }
    assert gpu_run.go(run, parts[4:5])
    assert "words" in run.log.read_text()


def test_kernel_cases_go_on_behind_one_that_took_the_process_down(run: gpu_process.Run, monkeypatch) -> None:
    begun = []

    def script(name: str, *words: str, most_s: float) -> gpu_process.Done:
        begin = int(words[0].removeprefix("--begin="))
        begun.append((begin, words[3]))
        Path(words[1].removeprefix("--mark=")).write_text("4 gate k8")
        return gpu_process.Done(3 if begin < 4 else 0, "an illegal access", 1.0)

    monkeypatch.setattr(run, "script", script)
    run.wrong = {("pack", "cuda"), ("gate_topk", "triton")}
    assert gpu_parts.each_case(run, 60.0, "cuda") == "gate k8: status 3: an illegal access"
    assert begun == [(0, "--skip=gate_topk:triton,pack:cuda"), (5, "--skip=gate_topk:triton,pack:cuda")]


def test_parts_are_named_once_and_fit_the_limit() -> None:
    names = [part.name for part in gpu_parts.PARTS]
    assert len(set(names)) == len(names)
    assert sum(part.most_s for part in gpu_parts.PARTS[:3]) < gpu_process.LIMIT_S
    for name in ("gpu_probe", "gpu_kernels", "gpu_expert_mlp", "gpu_layer", "gpu_counters"):
        assert (gpu_process.ROOT / f"benchmarks/{name}.py").is_file()


NCU = """
  void permute_kernel(int) (8192, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Throughput                   %        88.21
    Elapsed Cycles                cycle      150,100
    ----------------------- ----------- ------------
"""


def test_what_a_profiler_counted_is_read() -> None:
    assert gpu_parts.counted(NCU) == {"DRAM Throughput": "88.21 %", "Elapsed Cycles": "150,100 cycle"}


def test_end_of_the_output_has_the_rows_in_short_and_the_parts_last(run: gpu_process.Run) -> None:
    run.record(kind="part", part="build", seconds=1.0, result="ok")
    run.record(kind="profile", case="one", kernels={})
    run.record(kind="kernel", case="gate 16384x128 k8", us=5.5, met=True)
    assert gpu_run.digest(run) == ["kernel gate 16384x128 k8 5.5 True", "part build 1.0 ok"]


def test_commit_of_sources_without_their_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_COMMIT", "abc123")
    assert gpu_process.commit() == "abc123"


def test_bad_options_and_no_gpu(capsys) -> None:
    with pytest.raises(SystemExit):
        gpu_run.main(["--skip", "everything"])
    assert "expected some of build, limits, checks" in capsys.readouterr().err
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
