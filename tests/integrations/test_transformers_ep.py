"""The training run against transformers' own expert parallelism (benchmarks/transformers_ep.py), small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.transformers_ep_slept import draw_choices

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--steps", "2", "--probes", "1", "--batch", "4", "--length", "16", "--hidden", "32", "--ffn", "32"]
RANKS, TOKENS, D, F, LAYERS, K, E, V = 2, 4 * 16, 32, 32, 2, 2, 8, 256


def _rows(tmp_path, *words):
    """By way."""
    out = tmp_path / "rows.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(ROOT / "benchmarks/transformers_ep.py"), *SIZES, *words, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "view tensor" not in ended.stderr, "FSDP2 found a view among the results of experts"
    rows = {row["way"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"moe_overlap", "all_reduce", "all_to_all"}
    # A ring of two ranks sends every byte once: y and the gradients of x and of the weights, of each layer.
    assert rows["all_reduce"]["bytes_a_step_and_rank"] == 4 * TOKENS * (2 * D + K) * LAYERS
    return rows


def test_the_same_losses_and_a_row_for_each_way(tmp_path):
    rows = _rows(tmp_path)
    theirs = rows["all_reduce"]
    assert len(theirs["losses"]) == 4 and theirs["losses"][-1] < theirs["losses"][0]
    for row in rows.values():
        assert row["max_rel_loss_difference"] < 1e-5 and row["step_ms"] > 0
        assert row["attention"].startswith("repeated" if row is theirs else "once")
    assert rows["moe_overlap"]["bytes_a_step_and_rank"] > 0


HEAD_DIM = D // 4
LAYER = 2 * D * D + 2 * D * (D // 2) + 2 * HEAD_DIM + 2 * D + E * D  # q, o; k, v of half the heads; norms; router
EXPERTS = LAYERS * E * 3 * F * D


def test_each_way_sleeps_for_what_it_computes_and_sends_what_it_sent(tmp_path):
    found = _rows(tmp_path, "--compute", "slept")
    dense = LAYERS * LAYER + 2 * V * D + D
    rows = TOKENS * K // RANKS  # of a rank, whoever brings them
    for way, row in found.items():
        tokens, held = (TOKENS, dense) if way == "all_reduce" else (TOKENS // RANKS, dense // RANKS)
        s = row["slept_seconds"]
        want_s = LAYERS * tokens * (s["layer_forward_s"] + s["layer_backward_s"])
        want_s += LAYERS * rows * (s["expert_row_s"] + s["dgrad_row_s"] + s["wgrad_row_s"])
        want_s += tokens * (s["around_forward_s"] + s["around_backward_s"])
        want_s += (held + EXPERTS // RANKS) * s["parameter_s"]
        assert s["expert_row_s"] > 0 and s["around_forward_s"] > 0 and s["parameter_s"] > 0
        assert row["slept_ms"] == pytest.approx(1e3 * want_s, abs=2e-3)
        assert row["losses"] is row["max_rel_loss_difference"] is None and row["compute"] == "slept"
        assert row["flagged"] == ("cpu" if row["cpu_ms"] > 0.05 * row["step_ms"] else None)
    choices = draw_choices(layers=LAYERS, tokens=TOKENS, experts=E, top_k=K, seed=0)
    own = torch.arange(TOKENS)[:, None] // (TOKENS // RANKS)
    crossing = int((choices // (E // RANKS) != own).sum())  # rows of all ranks
    counts = LAYERS * 8 * E // RANKS
    # FSDP2 gathers weights for forward and again for backward, those of norm and head once, and scatters gradients.
    fsdp = 4 * (3 * (LAYERS * LAYER + V * D) + 2 * (V * D + D)) // RANKS
    assert found["all_to_all"]["bytes_a_step_and_rank"] == 4 * 4 * D * crossing // RANKS + counts + fsdp
