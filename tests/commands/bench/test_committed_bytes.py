"""The committed rows of fewer bytes say what issue and note claim of them, and the note's tables are theirs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from moe_overlap.planning.shapes import distinct_ranks

ROOT = Path(__file__).resolve().parents[3]
NOTE = ROOT / "docs/notes/2026-11-28-fewer-bytes.md"


def rows_of(name: str) -> list[dict]:
    """Those of the latest file."""
    file = sorted((ROOT / "benchmarks/results").glob(f"**/*-fewer-bytes-{name}.jsonl"))[-1]
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fewer_bytes", ROOT / "benchmarks/fewer_bytes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faster(before: dict, after: dict) -> float:
    return before["time_ms_median"] / after["time_ms_median"]


def bound_ms(row: dict) -> float:
    """No step is shorter than its wire or than its compute."""
    return max(row["comm_ms"], row["nocomm_ms"])


@pytest.mark.parametrize(("phase", "kind", "least"), [("infer", "chunked", 1.5), ("train", "chunked", 1.4),
                                                      ("train", "shared", 1.4)])  # fmt: skip
def test_fewer_bytes_are_faster(script, phase, kind, least):
    assert faster(*script._best(rows_of(phase), phase, kind)) >= least


@pytest.mark.parametrize("phase", ["infer", "train"])
@pytest.mark.parametrize("kind", ["shared", "shortcut"])
def test_and_gain_what_their_bounds_allow(script, phase, kind):
    """Of max(wire, compute) before over after, nine tenths."""
    before, after = script._best(rows_of(phase), phase, kind)
    assert faster(before, after) >= 0.9 * bound_ms(before) / bound_ms(after)


@pytest.mark.parametrize("name", ["infer", "train", "ffn1d", "ffn8d"])
def test_rows_that_travel_are_those_of_the_closed_form(name):
    for row in rows_of(name):
        share = distinct_ranks(row["experts"], 2, row["top_k"]) if row["dedup"] == "on" else row["top_k"] / 2
        assert row["off_rank_rows_per_token"] == pytest.approx(share, rel=0.01)
        if row["dedup"] == "on":
            assert 0 < row["row_meta_bytes"] <= 0.08 * row["payload_bytes"]


def test_top_2_loses_nothing(script):
    rows = rows_of("k2")
    for phase in script.PHASES:
        for kind in ("serial", "chunked"):
            assert faster(*script._best(rows, phase, kind)) >= 1 / 1.02


@pytest.mark.parametrize(("name", "most"), [("ffn1d", 0.75), ("ffn8d", 0.65)])
def test_row_buffers_are_smaller_and_steps_not_slower(script, name, most):
    before, after = script._best(rows_of(name), "train", "serial")
    assert before["ffn"] == before["hidden"] * (1 if name == "ffn1d" else 8)
    assert after["rows_peak_mb"] <= most * before["rows_peak_mb"] and faster(before, after) >= 1


@pytest.mark.parametrize("name", ["infer", "train", "k2", "ffn1d", "ffn8d"])
def test_the_table_beside_the_rows_is_theirs(script, name):
    rows = rows_of(name)
    file = sorted((ROOT / "benchmarks/results").glob(f"**/*-fewer-bytes-{name}.md"))[-1]
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in file.read_text().splitlines()[2:]]
    assert lines
    for phase, kind, first, before_ms, second, after_ms, times, *_ in lines:
        before, after = script._best(rows, phase, kind)
        assert (first, second) == (before["row"], after["row"])
        assert (before_ms, after_ms) == tuple(f"{row['time_ms_median']:.1f}" for row in (before, after))
        assert times == f"{faster(before, after):.2f}"


KIND_OF = {"serial": "serial", "best chunked": "chunked", "best with": "shared", "best shortcut": "shortcut"}


@pytest.mark.parametrize("phase", ["infer", "train"])
def test_the_note_has_the_figures_of_the_rows(script, phase):
    rows, seen = rows_of(phase), 0
    table = NOTE.read_text().split(f"| {phase}, ms |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, before_ms, after_ms, times = (cell.strip() for cell in line.strip("|").split("|"))
        kind = next((kind for start, kind in KIND_OF.items() if name.startswith(start)), None)
        if kind is not None:
            before, after = script._best(rows, phase, kind)
            measured = [f"{row['time_ms_median']:.0f}" for row in (before, after)]
            assert [before_ms, after_ms, times] == [*measured, f"{faster(before, after):.2f}"]
            # "(8 chunks; 1)": which rows these are, before and after.
            best = [re.search(r"\((\d)", row["row"]) for row in (before, after)]
            inside = re.search(r"\((\d)[^;]*; (\d)\)", name)
            if inside and kind == "chunked":
                assert inside.groups() == tuple(found.group(1) for found in best)
            seen += 1
    assert seen == 4


def test_an_all_gather_of_rows_would_gain_less_than_a_percent():
    file = sorted((ROOT / "benchmarks/results").glob("**/*-gather-form.jsonl"))[-1]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [2, 4]
    for row in rows:
        assert row["saved"] < 0.01
        closed = (row["ranks"] - 1) / distinct_ranks(row["experts"], row["ranks"], row["top_k"]) - 1
        assert row["more_bytes"] == pytest.approx(closed, abs=1e-5)
