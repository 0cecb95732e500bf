"""The equality matrix: every three factor values on virtual ranks (all four: `make soak`), every pair on gloo. See
`equality.py`."""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.equality import (
    CHUNKS,
    DTYPES,
    LOADS,
    SCHEDULES,
    WORLDS,
    all_cases,
    cases_in_turn,
    check_right,
    pairwise_cases,
    published_cases,
    run_both,
    run_on_gloo,
)
from tests.ranks import gloo_pool, virtual_world


def check_on_virtual_ranks(cases):
    for seed, case in enumerate(cases):
        results = virtual_world(case.world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_overlap_on_equals_off_and_the_oracle(world, schedule, load):
    cases = [case for case in cases_in_turn(world) if case.schedule == schedule and case.load == load]
    assert {case.dtype for case in cases} == set(DTYPES)
    check_on_virtual_ranks(cases)


@pytest.mark.parametrize(
    ("schedule", "dedup"),
    [("chunked-pairwise", "off"), ("chunked-filled", "off"), ("chunked-filled", "on"), ("chunked-filled", "static")],
)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_published_overlap_on_equals_off_and_the_oracle(world, schedule, dedup):
    check_on_virtual_ranks(published_cases(world, schedule, dedup))


@pytest.mark.parametrize("dedup", ["on", "auto"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_deduplicated_overlap_on_equals_off_and_the_oracle(world, schedule, dedup):
    """`auto` on the loads of which some pay and others do not."""
    chunks = CHUNKS if dedup == "on" else CHUNKS[:2]
    cases = [case for case in cases_in_turn(world, dedup) if case.schedule == schedule and case.chunks in chunks]
    assert {case.load for case in cases} == set(LOADS)
    check_on_virtual_ranks(cases)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_static_overlap_on_equals_off_and_the_oracle(world, schedule):
    cases = [
        case for case in cases_in_turn(world, "static") if case.schedule == schedule and case.chunks in CHUNKS[::2]
    ]
    assert {case.load for case in cases} == set(LOADS)
    check_on_virtual_ranks(cases)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dedup", ["off", "on", "auto", "static"])
@pytest.mark.parametrize("world", WORLDS)
def test_overlap_on_equals_off_and_the_oracle_in_every_combination(world, dedup, schedule):
    check_on_virtual_ranks([case for case in all_cases(world, dedup) if case.schedule == schedule])


def test_dtypes_in_turn_leave_no_combination_of_three_factors_out():
    def found(cases, count):
        factors = [(case.schedule, case.chunks, case.dtype, case.load) for case in cases]
        return {chosen for one in factors for chosen in combinations(enumerate(one), count)}

    for world in WORLDS:
        assert found(cases_in_turn(world), 3) == found(all_cases(world), 3)
    assert found([case for world in WORLDS for case in cases_in_turn(world)], 4) == found(all_cases(1), 4)


@pytest.mark.parametrize("dedup", ["off", "on", "static"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_factors_on_gloo(world, dedup):
    cases = pairwise_cases(world, dedup)
    fields = [(case.world, case.schedule, case.chunks, case.dtype, case.load, case.dedup) for case in cases]
    by_rank = gloo_pool(world).run(run_on_gloo, fields, limit_s=150.0)
    for case, *results in zip(cases, *by_rank, strict=True):
        check_right(case, results)
