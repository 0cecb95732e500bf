"""`make gpu` from its first line to its last on a CPU: the commands of every part played, by a clock that they set."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_parts, gpu_process, gpu_run, gpu_take
from moe_overlap.native import native
from moe_overlap.ops import hardware, verified

ABOUT = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "NVIDIA H200", "clocks": "?"}
CASES = [
    {"id": "tests/gpu/test_gpu_rows.py::test_pack[a]", "covers": [["pack", "cuda", "float32"]]},
    {"id": "tests/gpu/test_gpu_rows.py::test_pack[b]", "covers": [["pack", "cuda", "float32"]]},
    {"id": "tests/gpu/test_gpu_rows.py::test_pack[c]", "covers": [["pack", "cuda", "float32"]]},
    {"id": "tests/gpu/test_gpu_maps.py::test_map", "covers": [["row_map", "cuda", "int32"]]},
    {"id": "tests/gpu/test_gpu_guarantees.py::test_repeats", "covers": []},
    {"id": "tests/gpu/test_gpu_static.py::test_graphs", "covers": []},
]
SECONDS = {
    "setup.py": 27.0,
    "collect": 13.0,
    "gpu_probe": 5.0,
    "gpu_expert_mlp": 20.0,
    "gpu_kernels": 53.0,
    "gpu_layer": 45.0,
    "gpu_staged": 45.0,
    "ncu": 10.0,
    "compute-sanitizer": 40.0,
    "gpu_offload": 30.0,
    "gpu_nccl": 40.0,
}
"""Of each command, near what an H200 took; of what none has run a guess."""
TESTS_S = 30.0
"""For a process of tests: there are some 20 times as many as here, ten at a time, 15 seconds each."""
SAID = {"ncu": "    DRAM Throughput                   %        88.21\n", "compute-sanitizer": "ERROR SUMMARY: 0 errors"}
ENDS = {"killed": (-9, 1.0), "failing": (3, 1.0), "late": (0, 1e9)}
"""(status, seconds) of every command of a part that goes wrong."""


@dataclass
class Played:
    """The commands of a run, and its clock. part: at work; bad, end: the parts that go wrong, and how; endless: an
    option of commands that never end."""

    bad: tuple[str, ...] = ()
    end: tuple[int, float] = (0, 0.0)
    endless: str = "--none"
    now_s: float = 0.0
    part: str = ""
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def command(self, run: gpu_process.Run, *words: str, most_s: float, quiet: bool = False, **environment: str) -> Any:
        with self.lock:
            name = next((name for name in SECONDS if any(name in word for word in words)), "tests")
            self.asked.append((self.part, words))
            status, seconds = self.end if self.part in self.bad else (0, SECONDS.get(name, TESTS_S))
            if any(word.startswith(self.endless) for word in words):
                seconds = 1e9
            limit_s = max(1.0, min(most_s, run.left_s()))
            side_by_side = len(gpu_parts.TOOLS) if name == "compute-sanitizer" else 1
            self.now_s += min(seconds, limit_s) / side_by_side
            if seconds > limit_s:
                return gpu_process.Done(None, f"stopped after {limit_s:.0f} s", limit_s)
            if status != 0:
                return gpu_process.Done(status, "words", seconds)
            self.works(name, words)
            return gpu_process.Done(status, SAID.get(name, ""), seconds)

    def works(self, name: str, words: tuple[str, ...]) -> None:
        """What the command writes where all is well."""
        told = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "--gpu-cases" in told:
            Path(told["--gpu-cases"]).write_text(json.dumps(CASES))
        elif "--gpu-record" in told:
            passed = [{"id": word, "outcome": "passed", "text": ""} for word in words if "::" in word]
            Path(told["--gpu-record"]).write_text("".join(json.dumps(row) + "\n" for row in passed))
        elif "--out" in told:
            with Path(told["--out"]).open("a") as file:
                file.write(json.dumps(ABOUT | {"kind": "played", "part": self.part, "program": name}) + "\n")


Start = Callable[..., tuple[int, list[dict], Played]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(*options, limit_s=, bad=, end=, endless=) -> (exit status of gpu_run.py, rows, what was played), of one run
    after another."""
    runs: list[Played] = []
    clock = SimpleNamespace(monotonic=lambda: runs[-1].now_s)
    for module in (gpu_checks, gpu_parts, gpu_process, gpu_run):
        monkeypatch.setattr(module, "time", clock)

    def marked(part: gpu_process.Part) -> gpu_process.Part:
        def call(run: gpu_process.Run, most_s: float) -> str:
            runs[-1].part = part.name
            return part.call(run, most_s)

        return replace(part, call=call)

    monkeypatch.setattr(gpu_run, "PARTS", [marked(part) for part in gpu_parts.PARTS])
    monkeypatch.setattr(gpu_run, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_run, "about", lambda: ABOUT)
    monkeypatch.setattr(gpu_parts, "find_tool", lambda name: f"/cuda/bin/{name}")
    # On the played clock commands come one after another: two at once would both be given the time that is left.
    monkeypatch.setattr(gpu_checks, "PROCESSES", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    monkeypatch.setattr(hardware, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(native, "kernel_sources", lambda: "5c")
    monkeypatch.setattr(gpu_process.Run, "command", lambda run, *words, **how: runs[-1].command(run, *words, **how))

    def started(*words: str, limit_s: float = 300.0, **how: Any) -> tuple[int, list[dict], Played]:
        verified.write([])
        runs.append(Played(**how))
        status = gpu_run.main([f"--out={tmp_path / 'out'}", f"--limit-s={limit_s}", *words])
        lines = (tmp_path / "out/rows.jsonl").read_text().splitlines()
        return status, [json.loads(line) for line in lines], runs[-1]

    return started


def parts_of(rows: list[dict]) -> dict[str, dict]:
    return {row["part"]: row for row in rows if row["kind"] == "part"}


def test_in_five_minutes_what_no_card_has_said_comes_home(start: Start, capsys: pytest.CaptureFixture) -> None:
    status, rows, played = start()
    parts = parts_of(rows)
    assert status == 1 and played.now_s <= 300.0  # some parts had no time
    well = [name for name, row in parts.items() if row["result"] == gpu_process.GOOD]
    assert well[:6] == ["build", "limits", "checks", "layers", "layer", "staged"]
    late = [row["result"] for name, row in parts.items() if name not in well]
    assert all(words.startswith(("not run: the time was over", "too long: stopped after")) for words in late)
    assert list(parts) == [part.name for part in gpu_parts.PARTS]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[-len(parts) - 1 : -1]] == [["part", name] for name in parts]
    assert "gpu_take.py" in said[-1]


def test_with_time_enough_all_parts_say_something(start: Start) -> None:
    status, rows, played = start(limit_s=1e4)
    parts = parts_of(rows)
    assert status == 0 and {row["result"] for row in parts.values()} == {gpu_process.GOOD}
    limits = {part.name: part.most_s for part in gpu_parts.PARTS}
    assert all(row["seconds"] <= limits[name] for name, row in parts.items())
    collected = [words for _, words in played.asked if "--collect-only" in words]
    assert len(collected) == 1
    tested = {
        part: [word.rpartition("::")[2] for of, words in played.asked if of == part for word in words if "::" in word]
        for part in ("checks", "layers", "tests")
    }
    assert sorted(tested["checks"]) == ["test_map", "test_pack[a]", "test_pack[c]"]  # the essential ones
    assert sorted(tested["layers"]) == ["test_graphs", "test_repeats"] and tested["tests"] == ["test_pack[b]"]


def test_a_folder_of_a_whole_run_goes_into_the_tree(start: Start, tmp_path: Path, monkeypatch) -> None:
    _, rows, _ = start()
    status = tmp_path / "status.md"
    status.write_text(f"{gpu_take.TABLE_BEGIN}\nold\n{gpu_take.TABLE_END}\n")
    monkeypatch.setattr(gpu_take, "STATUS", status)
    monkeypatch.setattr(gpu_take, "RESULTS", tmp_path / "tree")
    verified.write([])
    assert gpu_take.main([str(tmp_path / "out")]) == 0
    assert {record.op for record in verified.read()} == {"pack", "row_map"}
    assert (
        "| `pack` | cuda | float32, bfloat16, float16, float64 | sm_90 float32 (abc, 2026-01-02) |"
        in status.read_text()
    )
    assert len((tmp_path / "tree/h200/2026-01-02-abc-gpu.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("how", ENDS)
def test_every_part_may_end_badly_alone(start: Start, how: str, capsys: pytest.CaptureFixture) -> None:
    """Each one once killed, failing, past its limit: what the others have to say is there, within their limits."""
    limits = {part.name: part.most_s for part in gpu_parts.PARTS}
    for bad in limits:
        status, rows, played = start(limit_s=1e4, bad=(bad,), end=ENDS[how])
        parts = parts_of(rows)
        assert list(parts) == list(limits), bad
        wrong = {name: row["result"] for name, row in parts.items() if row["result"] != gpu_process.GOOD}
        # A sanitizer that cannot start is no finding.
        assert set(wrong) == ({bad} if bad != "sanitize" else set()), (bad, wrong)
        assert status == bool(wrong)
        assert all(row["seconds"] <= limits[name] + 1.0 for name, row in parts.items()), bad
        programs = {
            part
            for part, words in played.asked
            if any("benchmarks/" in word and "counters" not in word for word in words)
        }
        assert {row["part"] for row in rows if row["kind"] == "played"} == programs - {bad}


def test_a_run_ends_in_time_whatever_is_late(start: Start) -> None:
    every = tuple(part.name for part in gpu_parts.PARTS)
    status, rows, played = start(bad=every, end=ENDS["late"])
    assert status == 1 and played.now_s <= 302.0
    assert list(parts_of(rows)) == list(every)


def test_tests_that_never_end_do_not_outlast_their_part(start: Start) -> None:
    """The time in which they are looked for counts too."""
    _, rows, _ = start("--only=layers", limit_s=1e4, endless="--gpu-record")
    (part,) = parts_of(rows).values()
    limits = {part.name: part.most_s for part in gpu_parts.PARTS}
    assert SECONDS["collect"] < part["seconds"] <= limits["layers"] and "tests passed" in part["result"]


def test_what_no_card_has_run_is_tested_first(start: Start) -> None:
    _, _, played = start(limit_s=1e4)
    files = [
        word.partition("::")[0] for part, words in played.asked if part == "layers" for word in words if "::" in word
    ]
    assert files == ["tests/gpu/test_gpu_static.py", "tests/gpu/test_gpu_guarantees.py"]
    assert all((gpu_process.ROOT / file).is_file() for file in gpu_parts.NOT_YET_RUN)


def test_tests_that_cannot_be_imported_are_told_and_the_others_run(start: Start, monkeypatch) -> None:
    command = Played.command

    def spoilt(self: Played, run: gpu_process.Run, *words: str, **how: Any) -> Any:
        done = command(self, run, *words, **how)
        return gpu_process.Done(2, "ImportError: no such thing", 1.0) if "--collect-only" in words else done

    monkeypatch.setattr(Played, "command", spoilt)
    status, rows, _ = start(limit_s=1e4)
    parts = parts_of(rows)
    assert (
        status == 1
        and parts["layers"]["result"] == "2 of 2 tests passed, 2 kernels right, 0 not, 0 tests cut, some not collected"
    )
    (row,) = [row for row in rows if row["kind"] == "test"]
    assert row["outcome"] == "not collected" and "no such thing" in row["text"]


def test_the_python_that_runs_the_parts_is_this_one(start: Start) -> None:
    _, _, played = start(limit_s=1e4)
    assert all(sys.executable in words for _, words in played.asked)
