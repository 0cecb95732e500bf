"""The training run against transformers' own expert parallelism (benchmarks/transformers_ep.py), small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--steps", "2", "--probes", "1", "--batch", "4", "--length", "16", "--hidden", "32", "--ffn", "32"]


def test_the_same_losses_and_a_row_for_each_way(tmp_path):
    out = tmp_path / "rows.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(ROOT / "benchmarks/transformers_ep.py"), *SIZES, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "view tensor" not in ended.stderr, "FSDP2 found a view among the results of experts"
    rows = {row["way"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"moe_overlap", "all_reduce", "all_to_all"}
    theirs = rows["all_reduce"]
    assert len(theirs["losses"]) == 4 and theirs["losses"][-1] < theirs["losses"][0]
    tokens, hidden, layers, top_k = 4 * 16, 32, 2, 2
    # A ring of two ranks sends every byte once: y and the gradients of x and of the weights, of each layer.
    assert theirs["bytes_a_step_and_rank"] == 4 * tokens * (2 * hidden + top_k) * layers
    for row in rows.values():
        assert row["max_rel_loss_difference"] < 1e-5 and row["step_ms"] > 0
        assert row["attention"].startswith("repeated" if row is theirs else "once")
    assert rows["moe_overlap"]["bytes_a_step_and_rank"] > 0
