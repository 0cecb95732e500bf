"""The equality matrix on virtual ranks, in full: see `equality.py`."""

from __future__ import annotations

import pytest
from equality import DTYPES, LOADS, SCHEDULES, WORLDS, all_cases, check_right, run_both

from moe_overlap.transport.virtual import VirtualWorld


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_overlap_on_equals_off_and_the_oracle(world, schedule, load):
    cases = [case for case in all_cases(world) if case.schedule == schedule and case.load == load]
    assert {case.dtype for case in cases} == set(DTYPES)
    for seed, case in enumerate(cases):
        results = VirtualWorld(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)
