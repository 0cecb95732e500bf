"""What churn control counts and keeps, on drawn placements."""

import numpy as np
import pytest

from moe_overlap.native import native
from moe_overlap.placement import Placement, churn


def drawn_ranks(rng, experts=7, ranks=4):
    """The experts of each rank: all of them once, and some copies, twice on a rank too."""
    slots = rng.permutation([*range(experts), *rng.integers(0, experts, int(rng.integers(0, 8)))]).tolist()
    cuts = [0, *sorted(rng.integers(0, len(slots) + 1, ranks - 1).tolist()), len(slots)]
    return [slots[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def drawn(rng):
    """A placement whose homes are any of an expert's slots."""
    made = Placement.of_ranks(drawn_ranks(rng))
    homes = [int(rng.choice(made.rank_of_slots[list(slots)])) for slots in made.slots_of_expert]
    return made.with_homes(homes)


@pytest.mark.parametrize("seed", range(200))
def test_the_moves_that_a_budget_is_spent_on_are_those_of_the_migration_plan(seed):
    rng = np.random.default_rng(seed)
    current, wanted = drawn(rng), drawn_ranks(rng)
    old, now = (churn._table(one, 7) for one in (current.experts_of_ranks(), wanted))
    plan = current.diff(churn._like(wanted, current, None))
    assert churn.moves(now, old, np.array(current.home_ranks)) == plan.moves


@pytest.mark.skipif(native.planner() is None, reason="no compiled part")
@pytest.mark.parametrize("node_size", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(50))
def test_what_is_kept_is_the_same_compiled_and_in_python(seed, node_size):
    rng = np.random.default_rng(seed)
    current, wanted = drawn(rng), drawn_ranks(rng)
    if seed % 2:  # what is wanted is there, on other ranks with as many slots
        current = Placement.of_ranks(rng.permutation([*range(7), *rng.integers(0, 7, 5)]).reshape(4, 3).tolist())
        wanted = [current.experts_of_ranks()[rank] for rank in rng.permutation(4)]
    assert churn.kept(wanted, current, node_size) == churn.kept_reference(wanted, current, node_size)
    if seed % 2 and node_size == 4:
        assert current.diff(churn._like(wanted, current, None, 4)).is_empty


@pytest.mark.skipif(native.planner() is None, reason="no compiled part")
@pytest.mark.parametrize("bad", [
    ([0, 1], [1, 1], [0, 1], [1, 1], [0, 1, 1], 0), ([0, 5], [1, 1], [0, 1], [1, 1], [0, 1], 0),
    ([0, 1], [1, 1], [0, 1], [2], [0, 1], 0), ([0, 1], [1, 1], [0, 1], [1, 1], [0, 1], 3),
    ([0, 1], [1, 2], [0, 1], [1, 1], [0, 1], 0), ([0, 1], [1, 1], [0, 1], [1, 1], [0, 1], -1),
])  # fmt: skip
def test_the_binding_checks_its_maps(bad):
    with pytest.raises(ValueError, match="kept"):
        native.planner().kept(*bad)
