"""The equality matrix with experts in other slots, uneven numbers of them on the ranks, and copies on other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.equality import PLACEMENTS, WORLDS, check_right, pairwise_cases, run_both
from tests.ranks import virtual_world

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
