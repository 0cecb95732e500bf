"""docs/checkpoints.md: every program of the page runs on gloo ranks; what one saves others load on other ranks."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from tests.ranks import gloo_pool

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
PREAMBLE, *PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SAVING, LOADING, *OTHERS = PROGRAMS


def run(program: str, folder: str) -> None:
    """A program in a folder, which the ranks share."""
    before = Path.cwd()
    path = Path(folder) / f"program-{os.getpid()}.py"
    path.write_text(PREAMBLE + program)
    os.chdir(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(path))
    finally:
        os.chdir(before)


def test_no_program_is_lost():
    assert len(PROGRAMS) == PAGE.count("```") // 2 - 1 == PAGE.count("```python") - 1
    assert "dcp.save" in SAVING and "dcp.load" in LOADING


@pytest.mark.parametrize("m", [1, 2, 3])
def test_what_two_ranks_save_others_load(m, tmp_path):
    gloo_pool(2).run(run, SAVING, str(tmp_path))
    gloo_pool(m).run(run, LOADING, str(tmp_path))


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_the_other_programs_run(number, tmp_path):
    gloo_pool(2).run(run, OTHERS[number], str(tmp_path))
