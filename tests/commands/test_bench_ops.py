"""`moe-overlap bench ops`: rows, table, picture, what is checked before anything is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moe_overlap import ConfigError
from moe_overlap.commands import cli
from moe_overlap.commands.bench import ops as bench_ops
from moe_overlap.commands.bench.ops_cases import NAMES, cases
from moe_overlap.commands.bench.ops_report import verdict

SMALL = "--tokens 24 --hidden 16 --ffn 24 --experts 4 --repeats 2".split()


def test_a_row_for_each_op_and_phase(tmp_path, capsys):
    assert cli.main(["bench", "ops", *SMALL, "--compile", "off", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["op"], row["phase"]) for row in rows] == [
        (name, phase) for name in NAMES for phase in bench_ops.PHASES[: 1 + (name != "row_map")]
    ]
    assert all(row["fused_ms"] > 0 and row["plain_ms"] > 0 and row["compiled_ms"] is None for row in rows)
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "x plain" in said.out and "rows are at least as fast as plain PyTorch" in said.out.splitlines()[-1]


def test_the_compiled_form_is_timed_too(tmp_path):
    words = ["bench", "ops", *SMALL, "--ops", "activation,expert_mlp", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    compiled = {row["op"]: row["speedup_vs_compiled"] is not None for row in rows}
    assert compiled == {"activation": True, "expert_mlp": False}
    assert {row["not_compiled"] for row in rows if row["op"] == "expert_mlp"} != {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_forms_have_the_gradients_of_the_ops(dtype):
    for case in cases(tokens=20, hidden=8, ffn=12, experts=4, top_k=2, dtype=dtype, device=torch.device("cpu")):
        assert bench_ops.distance(case) <= bench_ops.FAR.get(case.dtype, 0.0)
        if case.grads:
            found = [bench_ops._call(case, way, "forward+backward")() for way in (case.fused, case.plain)]
            for got, want in zip(*found, strict=True):
                assert (got - want).abs().max() <= bench_ops.FAR[case.dtype] * want.abs().max()


def test_an_op_that_differs_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(**sizes):
        return [replace(case, plain=lambda *args, plain=case.plain: 1.5 * plain(*args)) for case in cases(**sizes)]

    monkeypatch.setattr(bench_ops, "cases", wrong)
    assert cli.main(["bench", "ops", *SMALL, "--ops", "permute", "--out", str(tmp_path)]) == 1
    assert "correctness: permute" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results.jsonl").exists()


def test_the_verdict_names_what_is_slower():
    rows = [{"op": "a", "phase": "forward", "speedup_vs_plain": 0.5}, {"op": "b", "phase": "", "speedup_vs_plain": 1.0}]
    assert verdict(rows).startswith("1 of 2 rows") and "a (forward, 0.50x)" in verdict(rows)
    assert "slower" not in verdict(rows[1:])


@pytest.mark.parametrize("options", [{"ops": "softmax"}, {"compile": "yes"}, {"top_k": 20}, {"dtype": "fp8"}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ConfigError, match="--" + next(iter(options)).replace("_", "-")):
        bench_ops.OpsOptions(**options)
