"""A benchmark that breaks off leaves the rows that it had measured, and none of an earlier run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from benchmarks import gather_form, planner_steps
from moe_overlap.commands.bench import balance, layer, overlap
from moe_overlap.commands.bench import ops as bench_ops
from moe_overlap.commands.bench.phase import CheckFailed, PhaseResult
from moe_overlap.commands.bench.rows import KEYS
from moe_overlap.errors import ConfigError, MoeTransportError
from moe_overlap.launch.launch import World
from moe_overlap.measure.report import read_jsonl, write_jsonl

TWO = World(rank=0, size=2, local_rank=0, group=None)


@pytest.fixture
def out(tmp_path):
    """A folder with a row of an earlier run."""
    write_jsonl(tmp_path / "results.jsonl", [{"earlier": True}])
    return tmp_path


def breaking(works, error, *, at=1):
    """`works`, which raises `error` in call `at`, counted from 0."""
    calls = []

    def call(*args, **named):
        calls.append(args)
        if len(calls) > at:
            raise error
        return works(*args, **named)

    return call


@pytest.mark.parametrize("error", [CheckFailed("wrong"), MoeTransportError("gone"), KeyboardInterrupt()])
def test_bench_layer_keeps_the_phases_before(error, out, monkeypatch):
    monkeypatch.setattr(layer, "measure_phase", breaking(layer.measure_phase, error))
    words = "--ranks 1 --tokens 32 --hidden 64 --ffn 32 --experts 4 --repeats 1 --cases top2".split()
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            layer.main([*words, "--out", str(out)])
    else:
        assert layer.main([*words, "--out", str(out)]) == 1
    rows = read_jsonl(out / "results.jsonl")
    assert [(row["phase"], row["schedule"], row["chunks"]) for row in rows] == [
        ("infer", "serial", 1), *(("infer", "chunked", r) for r in (2, 4, 8))
    ]  # fmt: skip
    assert all(list(row) == KEYS for row in rows)


def test_bench_layer_leaves_no_rows_of_an_earlier_run(out, monkeypatch):
    monkeypatch.setattr(layer, "measure_phase", breaking(layer.measure_phase, MoeTransportError("gone"), at=0))
    assert layer.main(["--ranks", "1", "--tokens", "32", "--hidden", "64", "--out", str(out)]) == 1
    assert not (out / "results.jsonl").exists()


def one_workload(options, world, workload, *_):
    return [{"workload": workload, "planner": "static", "max_rel_err": {"zipf0.6": math.nan}.get(workload, 0.0)}]


@pytest.mark.parametrize(("last", "said"), [("zipf1.0", "gone"), ("zipf0.6", "correctness: zipf0.6 static is off by")])
def test_bench_balance_keeps_the_workloads_before(last, said, tmp_path, monkeypatch, capsys):
    """Also where the last one is wrong; what takes a world is played."""
    wires = SimpleNamespace(link=None, emulate=lambda *_: None)
    for name, played in {
        "calibrate": lambda *_: None, "scaled": lambda *_: None, "balanced_s": lambda *_: 0.1, "Unit": lambda *_: None,
        "Wires": SimpleNamespace(open=lambda *_: wires),
        "_workload_rows": breaking(one_workload, MoeTransportError("gone"), at=2 if last == "zipf0.6" else 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(balance, name, played)
    words = ["--ranks-per-node", "1", "--workloads", f"balanced,{last}", "--out", str(tmp_path)]
    assert balance.run_rank(TWO, words) == 1
    assert [row["workload"] for row in read_jsonl(tmp_path / "results.jsonl")] == ["balanced"]
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_bench_balance_removes_what_an_earlier_run_left(out, monkeypatch):
    monkeypatch.setattr(balance, "run", lambda *_, **__: 1)
    assert balance.main(["--out", str(out)]) == 1
    assert not (out / "results.jsonl").exists()


def test_bench_ops_keeps_the_ops_before(out, monkeypatch):
    monkeypatch.setattr(bench_ops, "distance", breaking(bench_ops.distance, KeyboardInterrupt()))
    words = "--tokens 24 --hidden 16 --ffn 24 --experts 4 --repeats 1 --compile off".split()
    with pytest.raises(KeyboardInterrupt):
        bench_ops.main([*words, "--out", str(out)])
    rows = read_jsonl(out / "results.jsonl")
    assert {row["op"] for row in rows} == {bench_ops.NAMES[0]}


def test_bench_overlap_keeps_the_points_before(tmp_path, monkeypatch, capsys):
    result = PhaseResult(rows=[{"phase": "infer"}], panels=[], slowest={"top2 serial": "slow"})
    monkeypatch.setattr(overlap, "measure_phase", breaking(lambda *_: result, MoeTransportError("gone"), at=2))
    monkeypatch.setattr(overlap, "load_routing", lambda *_: None)
    monkeypatch.setattr(overlap, "Setting", SimpleNamespace(build=lambda options, *_: SimpleNamespace(options=options)))
    words = "--shares 0.2,0.4,0.6 --phases infer --routings balanced".split()
    assert overlap.run_rank(TWO, [*words, "--out", str(tmp_path)]) == 1
    assert [row["asked_share"] for row in read_jsonl(tmp_path / "results.jsonl")] == [0.2, 0.4]
    assert [row["asked_share"] for row in read_jsonl(tmp_path / "waits.jsonl")] == [0.2, 0.4]


def test_bench_overlap_keeps_the_wires_before(out, monkeypatch):
    def one_wire(options, wire, *, same_links):
        write_jsonl(out / wire / "results.jsonl", [{"wire": wire}])
        return int(wire == "tcp")

    monkeypatch.setattr(overlap, "_run_wire", one_wire)
    assert overlap.main(["--wires", "emulated,tcp", "--out", str(out)]) == 1
    assert read_jsonl(out / "results.jsonl") == [{"wire": "emulated"}]


@pytest.mark.parametrize("name", ["results.jsonl", "emulated/results.jsonl"])
def test_bench_overlap_replaces_no_file_that_it_is_to_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "read_links", lambda *_: None)
    monkeypatch.setattr(overlap, "_run_wire", lambda *_, **__: pytest.fail("nothing is to be run"))
    write_jsonl(tmp_path / name, [{"earlier": True}])
    with pytest.raises(ConfigError, match="does not replace"):
        overlap.main(["--links-of", str(tmp_path / name), "--out", str(tmp_path)])
    assert read_jsonl(tmp_path / name) == [{"earlier": True}]


@pytest.mark.parametrize(("module", "measure"), [(gather_form, "measure"), (planner_steps, "row_of")])
def test_scripts_keep_the_rows_before(module, measure, tmp_path, monkeypatch):
    row = {"ranks": 2, "experts": 8, "load": "even", "searched": 1, "steps": 1, "taken_over": 0, "lost": 0.0,
           "predicted_ms": 1.0, "host_ms_mean": 1.0, "search_s": 0.0, "hit_rate": 0.0}  # fmt: skip
    monkeypatch.setattr(module, measure, breaking(lambda *_: row, KeyboardInterrupt()))
    words = ["--out", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", ["script", *words])
    with pytest.raises(KeyboardInterrupt):
        module.main(*([words] if module is gather_form else []))
    assert read_jsonl(tmp_path / "rows.jsonl") == [row]
