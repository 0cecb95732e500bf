"""`bench layer --device cuda --link staged`, and benchmarks/gpu_staged.py, which `make gpu` runs, from end to end: on
tiny shapes and played streams, with a clock that makes times up."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_process, gpu_staged
from moe_overlap.commands import cli
from moe_overlap.commands.bench import cuda_timing
from moe_overlap.commands.bench import staged_rows as bench
from moe_overlap.commands.bench import staged_ways as ways
from moe_overlap.commands.bench.staged import COLUMNS, StagedOptions, table
from moe_overlap.transport import staged
from tests.transport.played import PlayedEngine, PlayedEvent

QWEN3 = replace(ways.SHAPES[0], tokens=40, hidden=16, ffn=8, experts=8, top_k=2)
MIXTRAL = replace(ways.SHAPES[1], tokens=33, hidden=24, ffn=16, experts=4, top_k=2)
SECONDS = {"serial": 10e-3, "nocomm": 4e-3, "overlapped": 7e-3, "chunks_nocomm": 5e-3}
TERMS = {"D": 2.0, "E": 1.0, "C": 2.0, "Ct": 2.0, "Ed": 1.0, "Ew": 1.0, "Dt": 2.0, "B": 3.0, "Bt": 6.0}


def made_up(contenders: dict, *, repeats: int = 10) -> dict:
    """Runs everything once; both phases take half of a contender's time."""
    for forward, backward in contenders.values():
        backward(forward()[1])
    halves = {name: SECONDS[name] / 2 for name in contenders}
    return {name: (cuda_timing.Time(half, half, half),) * 2 for name, half in halves.items()}


class PlayedClock:
    """Of played events: a microsecond for each thing that was done."""

    def __init__(self, device: torch.device) -> None:
        self._base_s = time.perf_counter()

    def seconds(self, stamp: PlayedEvent) -> float:
        assert stamp.last is not None and stamp.last.at is not None
        return self._base_s + stamp.last.at * 1e-6


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "DEVICE", "cpu")
    monkeypatch.setattr(ways, "DTYPE", torch.float32)
    monkeypatch.setattr(ways, "SHAPES", (QWEN3, MIXTRAL))
    monkeypatch.setattr(bench, "StreamClock", PlayedClock)
    monkeypatch.setattr(staged, "Engine", PlayedEngine)
    monkeypatch.setattr(cuda_timing, "two_phases", made_up)
    monkeypatch.setattr(cuda_timing, "host_s", lambda call: 2e-3)
    monkeypatch.setattr(cuda_timing, "once", lambda call: (call(), cuda_timing.Time(1e-3, 1e-3, 1e-3))[1])
    monkeypatch.setattr(gpu_process, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_process, "about", lambda: {"device": "none"})


def rows(out: Path, *argv: str) -> list[dict[str, Any]]:
    assert gpu_staged.main([f"--out={out}", *argv]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_way_is_checked_and_measured_on_the_wire(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "timeline.png"
    monkeypatch.setattr(bench, "terms", lambda serial: {verb: seconds * 1e-3 for verb, seconds in TERMS.items()})
    found = rows(tmp_path / "rows.jsonl", f"--timeline={picture}")
    assert not [row for row in found if "result" in row]
    for shape in (QWEN3, MIXTRAL):
        mine = {row["implementation"]: row for row in found if row["case"] == shape.name}
        assert list(mine) == ["link", *ways.WAYS, *(f"timeline of {way}" for way in ways.DRAWN)]
        assert mine["link"]["bytes"] == shape.tokens * shape.top_k * shape.hidden * 4 * 7 // 8
        assert mine["link"]["bytes_per_s"] == mine["link"]["bytes"] * 1000
        assert mine["serial"]["ms"] == 10 and mine["serial"]["terms_ms"]["Bt"] == 6
        for way in ways.WAYS[1:]:
            row = mine[way]
            assert (row["ms"], row["serial_ms"], row["nocomm_ms"], row["chunks_nocomm_ms"]) == (7, 10, 4, 5)
            # Three milliseconds less than serial are allowed, of which the exchanges take six; seven in the window.
            allowed, met = (1.167, False) if way == "shortcut" else (0.5, True)
            assert (row["overlap_eff"], row["allowed"], row["met"]) == (0.5, allowed, met)
            assert row["share"] == pytest.approx(0.5 / allowed, abs=0.001)
        # Eight exchanges of four chunks, forward and backward, and compute beside them.
        assert mine["timeline of chunked(4)"]["events"] > 16
    assert picture.stat().st_size > 10_000


def test_what_is_better_than_its_bound_meets_no_target(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "terms", lambda serial: {verb: seconds * 0.5e-3 for verb, seconds in TERMS.items()})
    row = rows(tmp_path / "rows.jsonl", "--cases=qwen3", "--ways=chunked(2)")[-1]
    assert row["share"] == 2.0 and "better than its bound" in row["note"] and "met" not in row


def test_bounds_are_the_closed_forms() -> None:
    # Serial: 2 + 1 + 2 forward. Two chunks: max(4, 2 + 1, 3 + 0.5) = 4. Backward 6, max(4, 2 + 1, 3 + 0.5, 1 + 2) = 4.
    assert bench.bounds("chunked(2)", TERMS) == (1.0, 2.0)
    # Beside three seconds of ops the exchanges still take one; beside six in backward they vanish.
    assert bench.bounds("shortcut", TERMS) == (3.0, 4.0)


def test_terms_are_those_of_the_recorded_step(tiny: None) -> None:
    parts = ways.Parts(QWEN3, 8)
    found = bench.terms(ways.Contender(parts, "shortcut", "staged", overlap=False))
    assert all(found[verb] > 0 for verb in TERMS)


def test_wrong_and_failing_ways_have_no_time_and_stop_nobody(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ways.Parts.build

    def spoiled(parts: ways.Parts, way: str, link: str, **options: Any) -> torch.nn.Module:
        if way == "chunked(4)":
            raise RuntimeError("no\nroom")
        model = build(parts, way, link, **options)
        if way == "chunked(2)" and link == "staged":
            model.register_forward_hook(lambda module, inputs, out: out * (1 + 1e-6))
        return model

    monkeypatch.setattr(ways.Parts, "build", spoiled)
    found = {row["implementation"]: row for row in rows(tmp_path / "rows.jsonl", "--cases=mixtral")}
    assert found["chunked(4)"]["result"] == "not measured: RuntimeError: no room"
    assert found["chunked(2)"]["result"].startswith("not measured: ValueError: not the bits of local: y, dx")
    assert all("ms" not in found[way] for way in ("chunked(2)", "chunked(4)"))
    assert all("ms" in found[way] for way in ("serial", "chunked(8)", "shortcut"))


def test_without_a_device_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_staged.main([f"--out={tmp_path / 'rows.jsonl'}"]) == 2
    assert "gpu_staged: not run: no CUDA device" in capsys.readouterr().err


def test_nothing_is_begun_when_the_time_is_over(tiny: None, tmp_path: Path) -> None:
    found = rows(tmp_path / "rows.jsonl", "--most-s=-1")
    assert {row["result"] for row in found} == {"not measured: TimeoutError: the time is over"}


# ---------------------------------------------------------------- the command


@pytest.fixture
def card(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timing, "no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a played card")
    monkeypatch.setattr(bench, "terms", lambda serial: {verb: seconds * 1e-3 for verb, seconds in TERMS.items()})


def command(*words: str) -> int:
    return cli.main(["bench", "layer", *words])


def test_the_command_gives_the_same_rows_a_table_and_a_timeline(
    card: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert command("--device", "cuda", "--link", "staged", "--out", str(out)) == 0
    mine = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    theirs = rows(tmp_path / "rows.jsonl", f"--timeline={tmp_path / 'timeline.png'}")
    marks = ("date", "commit", "torch", "device", "time", "clocks")
    assert [{k: v for k, v in row.items() if k not in marks} for row in mine] == [
        {k: v for k, v in row.items() if k not in marks} for row in theirs
    ]
    assert all(row["device"] == "a played card" and row["torch"] == torch.__version__ for row in mine)
    assert (out / "timeline.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "bytes of one of 8 ranks" in text and all(name in text for name, _ in COLUMNS)
    for shape in (QWEN3, MIXTRAL):
        line = next(one for one in text.splitlines() if one.startswith(shape.name) and "chunked(8)" in one)
        assert line.split()[-6:] == ["10.0", "4.0", "7.0", "0.5", "0.5", "1.0"]


def test_ranks_cases_and_schedules_are_taken(card: None, tmp_path: Path) -> None:
    words = ["--link=staged", "--device=cuda", f"--out={tmp_path}", "--ranks=2", "--cases=mixtral"]
    assert command(*words, "--schedules=serial,chunked(3)") == 0
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["implementation"] for row in found] == ["link", "serial", "chunked(3)", "timeline of serial"]
    assert found[0]["bytes"] == MIXTRAL.tokens * MIXTRAL.top_k * MIXTRAL.hidden * 4 // 2
    assert {row["case"] for row in found} == {MIXTRAL.name} and {row["ranks"] for row in found} == {2}


def test_what_was_not_measured_is_in_the_table_and_in_the_status(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(parts: ways.Parts, way: str, link: str, **options: Any) -> torch.nn.Module:
        raise RuntimeError("no room")

    monkeypatch.setattr(ways.Parts, "build", broken)
    assert command("--link=staged", "--device=cuda", f"--out={tmp_path}", "--cases=qwen3") == 1
    assert "not measured: RuntimeError: no room" in capsys.readouterr().out


def test_a_row_without_overlap_eff_has_its_note_in_the_table() -> None:
    row = {"case": "a", "implementation": "shortcut", "ms": 1.0, "overlap_eff": None, "note": "nothing to hide"}
    assert table([row], StagedOptions(), "card")[2].endswith("nothing to hide")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device cuda", ["--device", "--link staged"]),
        ("--device cuda --link 1gbit", ["--device", "--link staged"]),
        ("--device cuda --link staged --tokens 9", ["--tokens", "--link staged"]),
        ("--device cuda --link staged --compute slept", ["--compute", "--link staged"]),
        ("--device cuda --link staged --phases infer,train", ["--phases = 'infer,train'", "--link staged"]),
        ("--device cuda --link staged --repeats 20", ["--repeats", "--link staged"]),
        ("--device cuda --link staged --cases top2", ["--cases", "qwen3, mixtral"]),
        ("--device cuda --link staged --schedules auto", ["--schedules", "--link staged"]),
        ("--device cuda --link staged --schedules chunked(17)", ["--schedules", "chunked(16)"]),
        ("--device cuda --link staged --ranks 1", ["--ranks"]),
        ("--link staged", ["--link staged: needs --device cuda"]),
        ("--device cpu --link staged", ["--link staged: needs --device cuda"]),
        ("--device tpu", ["--device"]),
    ],
)
def test_what_does_not_go_together_is_one_line_that_names_it(
    words: str, said: list[str], card: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = command(*words.split(), f"--out={tmp_path / 'out'}")
    except SystemExit as end:
        status = end.code
    text = capsys.readouterr().err
    assert status == 2 and len(text.splitlines()) == 1 and all(word in text for word in said), text
    assert not (tmp_path / "out").exists()


def test_under_torchrun_it_is_refused(
    card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert command("--device", "cuda", "--link", "staged", f"--out={tmp_path}") == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_command_without_a_device_says_so(capsys: pytest.CaptureFixture) -> None:
    assert command("--device", "cuda", "--link", "staged") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "--link staged: needs --device cuda, and there is none: no CUDA device" in text
