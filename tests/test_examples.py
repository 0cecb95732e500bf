"""Every example runs as its first line says, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
ALONE = [sys.executable]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# What it prints, by the words of its command.
SAYS = {
    "one_rank.py": (ALONE, r"loss \d\.\d+ -> \d\.\d+\n512 rows went to 8 experts"),
    "several_ranks.py": (TWO_RANKS, r"Exchanges run beside compute in forward and in backward, on 2 ranks"),
    "shortcut_block.py": (TWO_RANKS, r"ShortcutBlock\(\.\.\., slot=1, chunks=1, backward_slot=1, backward_chunks=1\)"),
    "ops_only.py": (ALONE, r"difference from plain PyTorch: \d\.\de-0[5-9]"),
    "plan.py": (ALONE, r"\d ms, 1\.\d+x serial\nShortcutBlock\("),
    "transformers_finetune.py": (ALONE, r"2 layers have their experts here\nloss \d\.\d+ -> \d\.\d+"),
    "train_lm.py": (TWO_RANKS, r"step    2  loss \d\.\d+ nats/byte"),
}

MORE = {"train_lm.py": [str(ROOT / "README.md"), "--steps", "3"]}


def test_no_example_is_forgotten():
    assert sorted(SAYS) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name, tmp_path):
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    command, said = SAYS[name]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*command, str(FOLDER / name), *MORE.get(name, ())]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout
    losses = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)
    assert losses is None or float(losses[2]) < float(losses[1])
