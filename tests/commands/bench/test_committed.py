"""The committed results say what the documents claim of them."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import pytest

from moe_overlap.measure.overlap import cut_bound

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks/results"


def rows_of(pattern: str, without: str = " ") -> list[dict]:
    files = [file for file in sorted(RESULTS.glob(pattern)) if without not in file.name]
    assert files, pattern
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_predictions_hold():
    rows = [row for row in rows_of("**/*-predict.jsonl") if row["flagged"] is None]
    assert len(rows) >= 40
    assert len({(r["case"], r["schedule"], r["link"], r["tokens"], r["ffn"], r["phase"]) for r in rows}) >= 40
    near = [abs(row["predicted_ms"] / row["time_ms_median"] - 1) <= 0.10 for row in rows]
    assert sum(near) >= 0.9 * len(near)


def test_auto_is_the_best_or_close_to_it():
    groups = defaultdict(list)
    for row in rows_of("**/*-predict.jsonl"):
        if row["flagged"] is None:
            groups[tuple(row[key] for key in ("case", "phase", "link", "tokens", "ffn"))].append(row)
    verdicts = []
    for group in groups.values():
        best = min(group, key=lambda row: row["time_ms_median"])
        for row in group:
            if row["schedule"] == "auto":
                close = row["time_ms_median"] <= 1.05 * best["time_ms_median"]
                verdicts.append(close or row["time_ms_p10"] <= best["time_ms_p90"])
    assert len(verdicts) >= 10 and sum(verdicts) >= 0.95 * len(verdicts)


def test_the_summary_counts_what_it_says():
    row = {"flagged": None, "case": "top2", "phase": "infer", "link": "x", "tokens": 1, "ffn": 1}
    quick = {**row, "schedule": "chunked", "predicted_ms": 10.0, "time_ms_median": 10.0, "time_ms_p10": 9.9,
             "time_ms_p90": 10.1}  # fmt: skip
    slow = {**row, "schedule": "auto", "predicted_ms": 10.0, "time_ms_median": 20.0, "time_ms_p10": 19.0,
            "time_ms_p90": 21.0}  # fmt: skip
    late = {**quick, "predicted_ms": 5.0, "flagged": "drifted"}
    clean, auto, drifted, auto_too = script("predict").summary([quick, slow, {**quick, "flagged": "noisy"}, late])
    assert "2 unflagged rows of 4" in clean and "1 of 2 (50%)" in clean and "50.0%" in clean
    assert auto.endswith("0 of 1") and auto_too.endswith("0 of 1")
    assert "drifted, 3 rows" in drifted and "1 of 3 (33%)" in drifted


def test_schedules_reach_their_bounds_at_every_share():
    limit = script("limit")
    groups = defaultdict(list)
    for row in rows_of("**/*-limit.jsonl"):
        ratio = limit.time_over_bound(row)
        if ratio is not None:
            key = row["case"], row["phase"], round(row["comm_share"], 2)
            groups[key].append(ratio / limit.LIMITS[row["case"]][row["phase"]])
    for case, phases in limit.LIMITS.items():
        for phase in phases:
            shares = sorted(share for *group, share in groups if group == [case, phase])
            assert len(shares) >= 5 and shares[0] <= 0.12 and shares[-1] >= 0.68
    assert all(min(ratios) <= 1 for ratios in groups.values()), "the best row of every share"
    kept = [ratio <= 1 for ratios in groups.values() for ratio in ratios]
    assert sum(kept) >= 0.95 * len(kept), "and nearly all the others"


def bounds(rows):
    """(time over bound, row) of every unflagged row, the bound of a row that is cut made of its case's serial row."""
    serial: dict[tuple, dict] = {}
    rows = [row for row in rows if "bound_ms" in row and "exchange_ms" in row]
    names = "case phase link tokens ffn hidden experts top_k dedup ranks compute serial_ms nocomm_ms".split()
    for row in rows:
        if row["schedule"] == "serial":
            serial[tuple(row.get(name) for name in names)] = row
    for row in rows:
        if row["bound_ms"] is None or row["flagged"] is not None:
            continue
        alone, bound_ms = row["case"] == "top2", row["bound_ms"]
        # Rows of before there was a choice have as many chunks in backward.
        back = row.get("backward_chunks", row["chunks"]) if row["phase"] == "train" else None
        if alone or max(row["chunks"], back or 1) > 1:
            one = serial[tuple(row.get(name) for name in names)]
            alone = alone and row.get("dedup", "off") == "off"
            bound_ms = cut_bound(row["nocomm_ms"], one["exchange_ms"], row["chunks"], back,
                                 alone=alone, even=row["routing"] == "balanced")  # fmt: skip
        yield row["time_ms_median"] / bound_ms, row


def test_no_row_is_faster_than_its_bound_but_for_noise():
    """Two of 195 are 2.2 and 2.9 % below: the compute alone of one was measured slower than its whole step, that of the
    other is slept."""
    found = [ratio for ratio, _ in bounds(rows_of("cpu-2core/*.jsonl", without="overlap-lab"))]
    assert len(found) >= 180
    assert sum(ratio < 0.98 for ratio in found) <= 2 and min(found) > 0.97


def test_most_rows_of_the_laboratory_are_not_faster_than_their_bounds():
    """Four or five repeats each, on a machine that was not quiet all along: 8 of 100 are below, of three baselines."""
    found = [ratio for ratio, _ in bounds(rows_of("cpu-2core/*overlap-lab*.jsonl"))]
    assert len(found) >= 100
    assert sum(ratio < 0.98 for ratio in found) <= 0.08 * len(found)


def test_a_row_that_cannot_be_judged_is_not():
    row = {"flagged": None, "case": "top2", "bound_ms": 10.0, "time_ms_median": 12.0, "comm_cpu_ms": 1.0,
           "exchange_ms": 30.0, "phase": "infer", "schedule": "chunked", "chunks": 2, "comm_share": 0.3}  # fmt: skip
    limit = script("limit")
    assert limit.time_over_bound(row) == 1.2
    assert limit.time_over_bound(row | {"flagged": "drifted"}) == 1.2, "that is about predictions"
    for other in (
        {"flagged": "noisy"},
        {"schedule": "mirrored"},
        {"bound_ms": None},
        {"case": "shared1"},
        {"comm_cpu_ms": 2.0},
    ):
        assert limit.time_over_bound(row | other) is None
    assert limit.summary([row, row | {"time_ms_median": 10.4}])[-1] == "1 of 2 rows within the limit; 2 rows in all"


@pytest.mark.parametrize("chunks", [1, 2])
def test_deferred_weight_gradients_help_and_change_no_bit(chunks):
    rows = {r["deferred"]: r for r in rows_of("**/*-deferred.jsonl") if r["chunks"] == chunks}
    assert rows[True]["bit_equal"] and rows[False]["bit_equal"]
    if chunks == 1:
        assert rows[True]["flagged"] is None and rows[False]["flagged"] is None and rows[True]["speedup"] >= 1.10
    assert rows[True]["time_ms_p10"] <= rows[False]["time_ms_p90"], "never slower beyond noise"


def test_a_backward_of_its_own_beats_its_mirror_somewhere_and_loses_nowhere_beyond_noise():
    groups = defaultdict(dict)
    for row in [*rows_of("**/*-predict.jsonl"), *rows_of("**/*-bench-auto-*.jsonl")]:
        if row["phase"] == "train" and row["flagged"] is None:
            key = tuple(row[name] for name in ("case", "link", "tokens", "ffn", "date"))
            groups[key][row["schedule"]] = row
    pairs = [(group["auto"], group["mirrored"]) for group in groups.values() if {"auto", "mirrored"} <= set(group)]
    assert any(own["time_ms_p90"] < mirror["time_ms_p10"] for own, mirror in pairs)
    assert all(own["time_ms_p10"] <= mirror["time_ms_p90"] for own, mirror in pairs)


@pytest.mark.parametrize(("share", "least"), [("60-infer", 1.95), ("60-train", 1.90)])
def test_scmoe_over_serial_top2_at_60_percent(share, least):
    """And faster than pipelined top-2 and the overlapped shared expert in the same table."""
    rows = [row for row in rows_of(f"**/*-bench-layer-share{share}.jsonl") if row["flagged"] is None]
    assert all(0.54 <= row["comm_share"] <= 0.66 for row in rows)
    scmoe = max(row["speedup_vs_top2"] for row in rows if row["schedule"] == "shortcut")
    others = [row["speedup_vs_top2"] for row in rows if row["schedule"] in ("chunked", "shared_expert")]
    assert scmoe >= least and len(others) == 4 and scmoe > max(others)


@pytest.mark.parametrize(("name", "least"), [("bench-layer-share15-train", 0.93), ("bench-auto-share15-infer", 0.95)])
def test_scmoe_reaches_what_a_15_percent_share_allows(name, least):
    rows = [row for row in rows_of(f"**/*-{name}.jsonl") if row["flagged"] is None]
    assert all(0.12 <= row["comm_share"] <= 0.20 for row in rows)
    (serial_ms,) = (r["time_ms_median"] for r in rows if (r["case"], r["schedule"]) == ("top2", "serial"))
    for row in rows:
        if row["schedule"] in ("shortcut", "auto") and row["case"].startswith("scmoe"):
            assert row["speedup_vs_top2"] * row["nocomm_ms"] / serial_ms >= least


def test_hierarchical_exchanges_send_what_their_closed_form_says():
    bench = script("hierarchical")
    rows = rows_of("**/*-hierarchical.jsonl")
    assert {(row["dedup"], row["phase"]) for row in rows} == {(d, p) for d in bench.WAYS for p in ("infer", "train")}
    for row in rows:
        # Of the busiest rank, with choices that are drawn.
        assert row["inter_node_bytes"] == pytest.approx(bench.crossing_bytes(row), rel=0.02)
        if row["schedule"] == "serial" and row["flagged"] is None:
            assert row["time_ms_median"] == pytest.approx(bench.serial_ms(row), rel=0.1)


def test_closed_forms_of_rows_that_cross_nodes():
    bench = script("hierarchical")
    row = {"ranks": 4, "ranks_per_node": 2, "experts": 32, "top_k": 8}
    crossing = [bench.crossing_rows({**row, "dedup": way}) for way in bench.WAYS]
    # k (W - L) / W; 2 (1 - C(24, 8) / C(32, 8)); 1 - C(16, 8) / C(32, 8)
    assert crossing == pytest.approx([4.0, 1.86015, 0.99878], rel=1e-5)
