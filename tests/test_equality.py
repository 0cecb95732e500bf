"""The equality matrix: in full on virtual ranks, every pair of factor values on gloo. See `equality.py`."""

from __future__ import annotations

import pytest

from tests.equality import (
    CHUNKS,
    DTYPES,
    LOADS,
    SCHEDULES,
    WORLDS,
    all_cases,
    check_right,
    pairwise_cases,
    published_cases,
    run_both,
    run_on_gloo,
)
from tests.ranks import gloo_pool, virtual_world


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_overlap_on_equals_off_and_the_oracle(world, schedule, load):
    cases = [case for case in all_cases(world) if case.schedule == schedule and case.load == load]
    assert {case.dtype for case in cases} == set(DTYPES)
    for seed, case in enumerate(cases):
        results = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


@pytest.mark.parametrize(
    ("schedule", "dedup"),
    [("chunked-pairwise", "off"), ("chunked-filled", "off"), ("chunked-filled", "on"), ("chunked-filled", "static")],
)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_published_overlap_on_equals_off_and_the_oracle(world, schedule, dedup):
    for seed, case in enumerate(published_cases(world, schedule, dedup)):
        results = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


@pytest.mark.parametrize("dedup", ["on", "auto"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_deduplicated_overlap_on_equals_off_and_the_oracle(world, schedule, dedup):
    """`auto` on the loads of which some pay and others do not."""
    chunks = CHUNKS if dedup == "on" else CHUNKS[:2]
    cases = [case for case in all_cases(world, dedup) if case.schedule == schedule and case.chunks in chunks]
    assert {case.load for case in cases} == set(LOADS)
    for seed, case in enumerate(cases):
        results = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_static_overlap_on_equals_off_and_the_oracle(world, schedule):
    cases = [case for case in all_cases(world, "static") if case.schedule == schedule and case.chunks in CHUNKS[::2]]
    assert {case.load for case in cases} == set(LOADS)
    for seed, case in enumerate(cases):
        results = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


@pytest.mark.parametrize("dedup", ["off", "on", "static"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_factors_on_gloo(world, dedup):
    cases = pairwise_cases(world, dedup)
    fields = [(case.world, case.schedule, case.chunks, case.dtype, case.load, case.dedup) for case in cases]
    by_rank = gloo_pool(world).run(run_on_gloo, fields, limit_s=150.0)
    for case, *results in zip(cases, *by_rank, strict=True):
        check_right(case, results)
