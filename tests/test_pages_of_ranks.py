"""docs/balance.md and docs/routing.md: every program runs as it is written on two gloo ranks, the same on both, and
prints what the page says where it says something."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import tempfile
from pathlib import Path

import pytest
import torch

from tests.ranks import gloo_pool
from tests.test_docs import blocks, promised

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROGRAMS = [(page, number) for page in ("balance.md", "routing.md")
            for number in range(len(blocks((DOCS / page).read_text(), "python")))]  # fmt: skip


def printed(program):
    """What a program prints on this rank."""
    said = io.StringIO()
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, torch.random.fork_rng(devices=[]):
        file.write(program)
        file.flush()
        with contextlib.redirect_stdout(said):
            runpy.run_path(file.name)
    return said.getvalue().splitlines()


@pytest.mark.parametrize(("page", "number"), PROGRAMS)
def test_every_program_of_the_page_runs_on_two_ranks(page, number):
    program = blocks((DOCS / page).read_text(), "python")[number]
    for lines in gloo_pool(2).run(printed, program):
        wanted = promised(program)
        assert len(lines) == len(wanted)
        for line, want in zip(lines, wanted, strict=True):
            assert re.fullmatch(re.escape(want).replace(r"\.\.\.", ".*"), line), line
