"""Rows as JSON lines and as a table."""

from __future__ import annotations

import io

import pytest

from moe_overlap.measure.report import COLUMNS, LEGEND, cell, print_table, read_jsonl, verdict, write_jsonl

ROW = {key: None for _, key, _ in COLUMNS} | {"phase": "infer", "case": "top2", "time_ms_median": 12.345}


def test_jsonl_comes_back_and_refuses_what_json_has_no_word_for(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    write_jsonl(path, [ROW, ROW | {"slot": 2}])
    assert read_jsonl(path) == [ROW, ROW | {"slot": 2}]
    with pytest.raises(ValueError):
        write_jsonl(path, [ROW | {"slot": float("nan")}])
    assert len(read_jsonl(path)) == 2, "the old file is still whole"
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]


def test_cells():
    assert cell(ROW, "time_ms_median", "{:.1f}") == "12.3"
    assert cell(ROW, "slot", "{}") == "-"
    assert cell(ROW | {"slot": 1, "backward_slot": 2}, "slot", "{}") == "1/2"
    assert cell(ROW | {"slot": 1, "backward_slot": 1}, "slot", "{}") == "1"
    assert [cell(ROW | {"bit_equal": value}, "bit_equal", "{}") for value in (True, False)] == ["equal", "DIFFER"]


def test_the_table_has_a_line_per_row():
    text = io.StringIO()
    print_table([ROW, ROW | {"phase": "train", "case": "scmoe_pos2"}], title="a title", file=text)
    assert "a title" in text.getvalue() and "12.3" in text.getvalue() and "scmoe_pos2" in text.getvalue()


def test_the_verdict_names_the_best_rows_and_what_flags_mean():
    rows = [
        ROW | {"case": case, "schedule": schedule, "time_ms_median": ms, "speedup_vs_serial": gain, "flagged": flag,
               "link": "emulated 400mbit:50us"}
        for case, schedule, ms, gain, flag in (
            ("top2", "serial", 100.0, 1.0, None), ("top2", "chunked", 80.0, 1.25, None),
            ("scmoe_pos2", "shortcut", 60.0, 1.2, "drifted"), ("shared1", "shared_expert", 20.0, 3.0, "noisy"),
        )
    ]  # fmt: skip
    first, *flags = verdict(rows)
    assert first.startswith("infer: overlap gains most in top2 chunked, 1.25x its own serial; ")
    assert "the fastest of all is scmoe_pos2 shortcut, 60.0 ms, link emulated 400mbit:50us" in first
    assert [line.split(":")[0] for line in flags] == ["drifted", "noisy"]
    assert "no verdict" in verdict([rows[0] | {"flagged": "inflated", "speedup_vs_serial": None}])[0]
    assert all(heading in LEGEND for heading, _, _ in COLUMNS if heading not in ("phase", "case", "schedule", "flag"))
