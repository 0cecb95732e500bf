"""`moe-overlap bench balance`: its numbers before the run, and one small run."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from moe_overlap.commands import cli
from moe_overlap.commands.bench.balance_cases import (
    Planned,
    ShadowRule,
    costs,
    kept_placement,
    link_of,
    predicted_s,
    scaled,
)
from moe_overlap.commands.bench.balance_options import BalanceOptions, parse
from moe_overlap.commands.bench.balance_oracle import with_oracle
from moe_overlap.commands.bench.balance_report import KEYS
from moe_overlap.commands.bench.slept import Calibration
from moe_overlap.commands.bench.workloads import counts_of
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.replication import decide
from moe_overlap.schedule.builders import serial

SLEEP = Calibration(attention_forward_s=0.1, attention_backward_s=0.2, mlp_forward_s=0.3, mlp_backward_s=0.4,
                    expert_row_s=1e-6, dgrad_row_s=2e-6, wgrad_row_s=1e-6)  # fmt: skip


def test_sleeps_and_link_give_the_shares_that_were_asked_for():
    options = BalanceOptions(compute_ms=50.0, comm_share=0.4, moe_share=0.8, latency_us=0.0)
    sleep, link = scaled(SLEEP, options), link_of(options)
    placement = Placement.identity(options.experts, options.ranks)
    even = counts_of("balanced", options.sizes, seed=0, step=0)
    plan = Planned(planner="static", schedule="serial", pair=serial())
    seconds, load, copies = predicted_s(plan, even, placement, costs(options, sleep, link, "serial"), 4)
    assert (load, copies) == (1.0, 0) and seconds == pytest.approx(0.05 / 0.6, rel=1e-3)
    dense_s = sleep.mlp_forward_s + sleep.mlp_backward_s
    assert seconds / (seconds + dense_s) == pytest.approx(0.8, rel=1e-3)
    with pytest.raises(ConfigError, match="chunked, which is what --live-steps runs"):
        BalanceOptions(live_steps=3, schedules=("auto",))
    assert BalanceOptions(live_steps=3, oracle_s=0.0).live_steps == 3
    with pytest.raises(ConfigError, match="latency-us"):
        link_of(BalanceOptions(compute_ms=1.0, latency_us=1000.0))


def test_shadows_are_those_of_the_closed_form():
    base = Placement.identity(4, 2)
    counts = np.zeros((2, 16, 4), dtype=np.int64)
    counts[:, 0] = [100, 40, 1, 1]

    def shadowed(weights_s, most=4):
        rule = ShadowRule(token_s=1.0, row_s=0.25, weights_s=weights_s, most=most)
        return rule(counts, base).num_slots - 4

    # 4 times 200, 80, 2, 2 tokens: 800, 320 + m, 8 + 2 m.
    assert [shadowed(one) for one in (481.0, 400.0, 311.0)] == [0, 1, 2] and shadowed(1.0, most=1) == 1


def test_kept_placements_come_from_the_history_and_keep_their_homes():
    options = BalanceOptions(slots=2)
    forward = costs(options, scaled(SLEEP, options), link_of(options), "serial")[0]
    history = counts_of("zipf1.5", options.sizes, seed=0, step=0)
    for planner in ("flex", "eplb", "proportional"):
        found = kept_placement(planner, options, history, forward)
        assert found.home_ranks == Placement.identity(16, 8).home_ranks and found.has_replicas
        assert max(found.slots_by_rank) <= 4


@pytest.mark.parametrize(
    "words", ["--ranks 6", "--ranks-per-node 8", "--experts 12", "--top-k 17", "--workloads zipf", "--planners best",
              "--planners ,", "--schedules fast", "--comm-share 1", "--moe-share 0", "--workloads recorded",
              "--recorded nowhere", "--chunks 17", "--hidden 32", "--latency-us 900000", "--dtype int8",
              "--compute-ms nan", "--compute gpu", "--oracle-s -1"],
)  # fmt: skip
def test_bad_options_are_one_line(words, tmp_path, capsys):
    given = words.split()
    assert cli.main(["bench", "balance", *given, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_small_run_has_a_row_for_everything(tmp_path, capsys):
    words = "--ranks 2 --ranks-per-node 1 --tokens 256 --experts 4 --ffn 32 --compute-ms 8 --latency-us 50 --repeats 1"
    words += " --top-k 1 --workloads one_hot_expert --comm-share 0.2 --oracle-s 200"  # proven in a second, if let
    words += " --planners static,replicate,switch,shadow,flex,eplb,proportional"
    assert cli.main(["bench", "balance", *words.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 8 and all(list(row) == KEYS for row in rows)
    by_name = {(row["planner"], row["schedule"]): row for row in rows}
    static, replicate = by_name["static", "serial"], by_name["replicate", "serial"]
    assert static["copies"] == 0 and static["weight_bytes"] == 0 and static["max_over_mean"] > 1.25
    assert replicate["copies"] > 0 and replicate["weight_bytes"] > 0
    assert replicate["max_over_mean"] < static["max_over_mean"] == static["static_max_over_mean"]
    for schedule in ("serial", "chunked"):  # which degree it is hangs on what was calibrated
        switch = by_name["switch", schedule]
        assert (switch["copies"] > 0) == (switch["weight_bytes"] > 0) == (switch["payload_bytes"] == 0)
        assert switch["max_over_mean"] == (1.0 if switch["copies"] else static["max_over_mean"])
    assert by_name["forced_balanced", "chunked"]["max_over_mean"] == 1.0
    for (planner, _), row in by_name.items():
        bound = (row["oracle_ms"], row["oracle_proven"], row["of_oracle"])
        if planner == "forced_balanced":
            assert bound == (None, None, None)
            continue
        assert row["oracle_proven"] and row["of_oracle"] == pytest.approx(
            row["oracle_ms"] / row["time_ms_median"], rel=1e-3
        )
        assert planner == "switch" or row["oracle_ms"] <= row["predicted_ms"] * (1 + 1e-4), "but for its slots"
    assert all(row["max_rel_err"] < 1e-5 for row in rows) and (tmp_path / "balance.png").stat().st_size > 1000


def test_copies_beside_the_dense_op_and_exposed(tmp_path, capsys):
    words = "--ranks 2 --ranks-per-node 1 --tokens 64 --experts 4 --ffn 32 --compute-ms 8 --latency-us 50 --repeats 1"
    words += " --top-k 1 --workloads flipping --comm-share 0.2 --moe-share 0.6 --chunks 2"
    words += " --planners static,replicate --schedules shortcut,shortcut_exposed --oracle-s 0"
    assert cli.main(["bench", "balance", *words.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["oracle_ms"] for row in rows} == {None}
    by_name = {(row["planner"], row["schedule"]): row for row in rows}
    priced = {name: row["predicted_ms"] - row["outside_ms"] for name, row in by_name.items()}
    assert by_name["replicate", "shortcut"]["copies"] > 0
    assert priced["replicate", "shortcut"] <= priced["replicate", "shortcut_exposed"] + 0.01
    assert all(row["max_rel_err"] < 1e-5 for row in rows)
    assert priced["static", "shortcut"] == pytest.approx(priced["static", "shortcut_exposed"], abs=0.01)


def test_experts_and_the_dense_op_that_compute(tmp_path, capsys):
    words = "--ranks 2 --ranks-per-node 1 --tokens 64 --experts 4 --ffn 32 --compute real --latency-us 1 --repeats 1"
    words += " --top-k 1 --workloads one_hot_expert --planners static,replicate --schedules chunked,shortcut --chunks 2"
    assert cli.main(["bench", "balance", *words.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 and {row["compute"] for row in rows} == {"real"}
    assert all(row["max_rel_err"] < 1e-5 and row["time_ms_median"] > 0 for row in rows)


def test_a_placement_that_follows_the_load_over_some_steps(tmp_path, capsys):
    words = (
        "--ranks 2 --ranks-per-node 1 --tokens 64 --experts 8 --ffn 32 --compute-ms 8 --latency-us 50 --live-steps 11"
    )
    words += " --top-k 1 --workloads zipf1.5 --comm-share 0.2"
    assert cli.main(["bench", "balance", *words.split(), "--out", str(tmp_path)]) == 0
    still, live = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert list(live) == KEYS and (still["changes"], still["moved_bytes"], live["steps"]) == (0, 0, 11)
    assert live["changes"] > 0 and live["moved_bytes"] > 0 and live["migration_ms"] > 0
    assert live["max_over_mean"] < still["max_over_mean"] == still["static_max_over_mean"]
    assert live["predicted_ms"] < still["predicted_ms"] and live["max_rel_err"] < 1e-5


@pytest.mark.parametrize("ignored", ["--planners static,flex", "--oracle-s 3", "--repeats 7"])
def test_what_live_steps_would_ignore_is_refused(ignored, capsys, tmp_path):
    words = ["bench", "balance", "--live-steps", "3", *ignored.split(), "--out", str(tmp_path)]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ignored.split()[0] in line and "beside --live-steps" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--recorded {}", "recorded among --workloads"),
        ("--compute real --moe-share 0.5", "--moe-share = 0.5: expected no such option beside --compute real"),
        ("--compute real --compute-ms 9", "--compute-ms = 9.0: expected no such option beside --compute real"),
        ("--schedules serial --chunks 2", "--chunks = 2: expected no such option beside --schedules serial"),
        ("--live-steps 3 --schedules chunked,shortcut", "--schedules = 'chunked,shortcut': expected chunked, which"),
    ],
)
def test_what_would_be_ignored_is_refused(words, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        parse(words.format(tmp_path).split())


def rows_of(options):
    """One skewed row for each schedule, as measured in 10 s."""
    row = {"workload": "zipf1.0", "planner": "static", "outside_ms": 1.0, "time_ms_median": 1e4}
    return [row | {"schedule": schedule} | dict.fromkeys(("oracle_ms", "oracle_proven", "of_oracle"))
            for schedule in ("serial", "shortcut")]  # fmt: skip


def test_the_oracle_has_what_the_price_leaves_out():
    pytest.importorskip("scipy")
    options = BalanceOptions(ranks=4, ranks_per_node=2, experts=4, tokens=64, compute_ms=50.0)
    sleep, link = scaled(SLEEP, options), link_of(options)
    rows = rows_of(options)
    with_oracle(options, rows, sleep, link, step=3, ideal="forced_balanced")
    home, counts = Placement.identity(4, 4), counts_of("zipf1.0", options.sizes, seed=0, step=3)
    for row, dense_s in zip(rows, (sleep.mlp_forward_s + sleep.mlp_backward_s, 0.0), strict=True):
        phases = costs(options, sleep, link, row["schedule"])
        load = Load.at_home(counts, home.home_ranks, [options.slots] * 4, ranks_per_node=2)
        left_ms = 1e3 * (decide(load, phases, margin=0.0).predicted_s + dense_s) + 1.0
        assert row["oracle_proven"] and 0.9 * left_ms < row["oracle_ms"] <= left_ms * (1 + 1e-4)
        assert row["of_oracle"] == pytest.approx(row["oracle_ms"] / 1e4, rel=1e-4)


def test_without_scipy_there_is_no_oracle_and_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    options = BalanceOptions()
    rows = rows_of(options)
    with_oracle(options, rows, scaled(SLEEP, options), link_of(options), step=3, ideal="forced_balanced")
    assert rows == rows_of(options) and capsys.readouterr().err.count("scipy is not installed") == 1


def test_rows_of_planned_schedules_say_how_often_steps_were_searched_for(tmp_path, capsys):
    words = "--ranks 2 --ranks-per-node 1 --tokens 64 --experts 4 --ffn 32 --compute-ms 8 --latency-us 50 --repeats 1"
    words += " --top-k 1 --workloads flipping --comm-share 0.2 --planners static,replicate,flex --schedules serial,auto"
    assert cli.main(["bench", "balance", *words.split(), "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 and all(list(row) == KEYS and row["max_rel_err"] < 1e-5 for row in rows)
    for row in rows:
        assert (row["hit_rate"] is None) == (row["search_ms"] is None) == (row["schedule"] == "serial")
    planned = {row["planner"]: row for row in rows if row["schedule"] == "auto"}
    assert all(0.5 < row["hit_rate"] < 1 and row["search_ms"] > 0 and row["chunks"] > 1 for row in planned.values())
    assert planned["forced_balanced"]["hit_rate"] >= planned["replicate"]["hit_rate"]
    serial = {row["planner"]: row for row in rows if row["schedule"] == "serial"}
    inside = {name: [row["predicted_ms"] - row["outside_ms"] for row in (planned[name], serial[name])]
              for name in ("static", "replicate")}  # fmt: skip
    assert all(one < other for one, other in inside.values()), "what is planned is predicted to be faster"
