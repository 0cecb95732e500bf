"""The programs of docs/transformers.md print what they say: the first in this process, the second under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


from tests.test_docs import blocks, promised, run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "transformers.md").read_text()


def test_the_programs_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = blocks(PAGE, "python")
    run(first, tmp_path)
    assert capsys.readouterr().out.splitlines() == promised(first)
    program = tmp_path / "two.py"
    program.write_text(second)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == promised(second) * 2
    assert (tmp_path / "saved" / "model.safetensors").exists()
