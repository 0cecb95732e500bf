"""The equality matrix with experts in other slots, uneven numbers of them on the ranks, and copies on other ranks."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest

from tests.equality import DTYPES, PLACEMENTS, WORLDS, Case, check_right, pairwise_cases, run_both, run_on_gloo
from tests.ranks import gloo_pool, virtual_world

MOVED = [name for name in PLACEMENTS if name != "identity"]


@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_overlap_on_equals_off_and_the_oracle(world, shift, dedup):
    """Each case of the matrix with two of the placements, every second turn with copies that go from rank to rank."""
    for seed, plain in enumerate(pairwise_cases(world, dedup)):
        turn, place = divmod(seed + shift, len(MOVED))
        case = replace(plain, placement=MOVED[place], relayed=turn % 2 == 1)
        results = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        check_right(case, results)


def test_copies_from_rank_to_rank_on_gloo():
    cases = [
        Case(4, schedule, 3, dtype, "uneven", dedup, placement=placement, relayed=True)
        for (schedule, dtype), dedup in zip(
            [("chunked-tokens", DTYPES[0]), ("chunked-experts", DTYPES[1]), ("shortcut-pos3", DTYPES[2])],
            ["off", "on", "on"],
            strict=True,
        )
        for placement in ("copied", "local", "decided")
    ]
    by_rank = gloo_pool(4).run(run_on_gloo, [astuple(case) for case in cases], limit_s=150.0)
    for case, *results in zip(cases, *by_rank, strict=True):
        check_right(case, results)
