"""The table of docs/balance.md that says what goes with what is asked of the code: "yes" acts, and changes no number;
"no" is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.auto.planted import cost_model, planted
from tests.layer.goes import ANSWERS, JOBS, OPTIONS, row_of_job, row_of_option
from tests.ranks import gloo_pool, virtual_world

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "balance.md").read_text()
HEAD, *ROWS = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
               for line in re.findall(r"^\| beside .*(?:\n\|.*)*", PAGE, re.MULTILINE)[0].splitlines()
               if not line.startswith("|---")]  # fmt: skip
TABLE = {name: cells for name, *cells in ROWS}


def test_the_table_has_what_was_asked():
    assert tuple(HEAD[1:]) == ANSWERS and set(TABLE) == {*OPTIONS, *JOBS}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_row_of_the_table_is_what_a_layer_does(option):
    with planted(cost_model()):  # for "auto", which would measure
        rows = virtual_world(4 if "hierarchical" in option else 2).run(lambda me: row_of_option(me, option))
    assert all(row == TABLE[option] for row in rows)


@pytest.mark.parametrize("job", JOBS)
def test_a_row_of_the_table_is_what_a_job_does(job):
    for found in gloo_pool(4 if "replicas" in job else 2).run(row_of_job, job):
        assert found == TABLE[job]
