"""Several runs of `bench layer` become one table; a run that fails writes none."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from moe_overlap.commands.bench import sweep as sweeping
from moe_overlap.measure.report import append_jsonl, read_jsonl


@pytest.fixture
def runs(monkeypatch):
    """What `bench layer` was called with; a run fails where its options ask for it."""
    called = []

    def bench_layer(argv):
        called.append(list(argv))
        if "--fail" in argv:
            return 3
        append_jsonl(Path(argv[argv.index("--out") + 1]) / "results.jsonl", [{"run": len(called)}])
        return 0

    monkeypatch.setattr(sweeping, "bench_layer", bench_layer)
    return called


def test_rows_of_all_runs_in_their_order(runs, tmp_path, capsys):
    file = tmp_path / "all.jsonl"
    status = sweeping.sweep({"a": ["--x"], "b": ["--y"]}, ["--z"], file, lambda rows: [f"{len(rows)} rows"])
    assert status == 0 and read_jsonl(file) == [{"run": 1}, {"run": 2}]
    assert runs == [["--x", "--z", "--out", str(tmp_path / "a")], ["--y", "--z", "--out", str(tmp_path / "b")]]
    assert capsys.readouterr().out.splitlines() == ["2 rows", f"wrote {file}"]


def test_a_run_that_fails_ends_it_and_is_named(runs, tmp_path, capsys):
    settings = {"a": [], "b": ["--fail"], "c": []}
    assert sweeping.sweep(settings, [], tmp_path / "all.jsonl", lambda rows: []) == 3
    assert len(runs) == 2 and not (tmp_path / "all.jsonl").exists()
    assert "the run of b ended with 3" in capsys.readouterr().err


def test_what_the_script_does_not_know_goes_to_the_runs():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    known, rest = sweeping.parse(parser, ["--out", "here", "--", "--repeats", "8"])
    assert known.out == "here" and rest == ["--repeats", "8"]


def test_rows_are_appended_and_nan_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    append_jsonl(file, [{"a": 1}])
    append_jsonl(file, [{"a": 2}])
    with pytest.raises(ValueError):
        append_jsonl(file, [{"a": 3}, {"a": float("nan")}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": 2}]
