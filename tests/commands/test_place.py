"""`moe-overlap place`: its figures by hand, its files, and traces that it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_overlap.commands import place as place_module
from moe_overlap.commands.cli import main
from moe_overlap.placement import Placement

STEP = [[60, 10, 5, 5], [60, 10, 5, 5]]  # two ranks, four experts


def place(tmp_path, text, *words):
    (tmp_path / "trace.jsonl").write_text(text)
    out = tmp_path / "out"
    status = main(["place", "--trace", str(tmp_path / "trace.jsonl"), "--ranks", "2", "--out", str(out), *words])
    rows = json.loads((out / "place.json").read_text()) if status == 0 else []
    return status, {row["planner"]: row for row in rows}


def test_its_figures(tmp_path, capsys):
    """Before: ranks have 140 and 20 tokens. With a second slot of expert 0 both have 80 at best."""
    words = "--planners eplb,shadow --expert-bytes 1000 --row-us 1 --row-bytes 1".split()
    status, rows = place(tmp_path, f"{json.dumps(STEP)}\n\n{json.dumps({'tokens_per_expert': STEP})}\n", *words)
    assert status == 0 and list(rows) == ["before", "eplb", "shadow"]
    assert rows["before"]["balance"] == pytest.approx(140 / 80) and rows["before"]["moves"] == 0
    # 3 forwards of 140 rows at 1 us, and 4 times the 70 rows of the other rank at 1 byte and 450 GB/s.
    assert rows["before"]["step_ms"] == pytest.approx(1e3 * (3 * 140e-6 + 4 * 70 / 450e9))
    assert 1 <= rows["eplb"]["balance"] < 1.2 and rows["eplb"]["step_ms"] < rows["before"]["step_ms"]
    assert rows["eplb"]["moved_bytes"] == 1000 * rows["eplb"]["moves"] > 0
    before = Placement.from_json(rows["before"]["placement"])
    assert before.diff(Placement.from_json(rows["eplb"]["placement"])).moves == rows["eplb"]["moves"]
    assert (tmp_path / "out" / "place.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "max/mean" in said and "judged on 1 of 2 steps" in said
    # The last column is what the legend says of it.
    name, *_, step_ms, versus = next(line for line in said.splitlines() if line.split()[:1] == ["eplb"]).split()
    assert versus == f"{rows['before']['step_ms'] / rows['eplb']['step_ms']:.2f}" and float(versus) > 1
    assert 'x before: step ms of the row "before"' in said


def test_a_budget_of_nothing_moves_nothing(tmp_path):
    _, rows = place(tmp_path, "[9, 3, 1, 1]\n", "--budget", "0")
    assert len(rows) == 7 and all(row["moves"] == 0 for row in rows.values())


def test_a_saved_routing(tmp_path):
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (64, 2))).to(torch.int32)
    path = tmp_path / "routing.safetensors"
    save_file({"ids": ids, "weights": torch.ones(64, 2)}, path, {"E": "4"})
    words = ["--routing", str(path), "--experts", "4", "--ranks", "2", "--out", str(tmp_path / "out")]
    assert main(["place", *words]) == 0
    rows = json.loads((tmp_path / "out" / "place.json").read_text())
    assert len(rows) == 7 and all(1 <= row["balance"] <= 2 for row in rows)


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "[1.5, 2, 3, 4]", "[-1, 2, 3, 4]", "[1, 2, 3, 4]\n[1, 2, 3]", "[[1, 2, 3, 4]]", '{"a": 1}',
             "[" * 100000, "[1e400, 1, 1, 1]", '["1", "2", "3", "4"]', "[99999999999999999999, 1, 1, 1]", "null",
             "[2000000000000, 1, 1, 1]", "[true, 1, 1, 1.5]", "[[1, 2], [3]]", "[1, 2, 3, 4, 5, 6, 7]",
             "[true, 1, 1, 1]", "[true, false, true, true]", "[[1, 2, 3, true], [1, 2, 3, 4]]",
             '{"tokens_per_expert": [1, 2, 3, false]}']
)  # fmt: skip
def test_a_bad_trace_is_one_line(text, tmp_path, capsys):
    assert place(tmp_path, text)[0] == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ("--trace" in lines[0] or "--slots" in lines[0])


@pytest.mark.parametrize(
    ("words", "flag"),
    [(["--planners", "best"], "--planners"), (["--planners", ","], "--planners"),
     (["--ranks-per-node", "3"], "--ranks-per-node"),
     (["--slots", "1"], "--slots"), (["--ranks", "1024", "--slots", "4096"], "at most 32 slots on each of 1024 ranks"),
     (["--experts", "4"], "beside --trace"), (["--top-k", "1"], "beside --trace"),
     (["--budget", "-2"], "--budget"), (["--routing", "x"], "--trace")],
)  # fmt: skip
def test_a_bad_option_is_named(words, flag, tmp_path, capsys):
    assert place(tmp_path, "[9, 3, 1, 1]\n", *words)[0] == 2
    assert flag in capsys.readouterr().err


def test_a_long_trace_is_refused_before_it_fills_the_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(place_module, "MOST_COUNTS", 20)
    assert place(tmp_path, "[9, 3, 1, 1]\n" * 2)[0] == 0
    assert place(tmp_path, "[9, 3, 1, 1]\n" * 3)[0] == 2
    assert "at most 2 steps for 2 ranks" in capsys.readouterr().err


def test_a_large_question_is_not_silent(tmp_path, capsys):
    """Every part is said before it begins; a small question says nothing."""
    assert place(tmp_path, "[9, 3, 1, 1]\n", "--planners", "shadow")[0] == 0 and not capsys.readouterr().err
    assert place(tmp_path, json.dumps([5] * 64), "--ranks", "1024", "--slots", "9", "--planners", "shadow")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    said = [line.split(",")[0] for line in lines if "may take" in line]
    assert said == [f"moe-overlap place: {part}" for part in ("before", "shadow", "place.png")]
    assert all("9 slots on each of 1024 ranks" in line for line in lines)
