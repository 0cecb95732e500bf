"""What travels from one placement to another."""

import numpy as np
import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.placement import Move, Placement


def test_homes_copies_and_relabels_are_told_apart():
    old = Placement.of_ranks([[0, 1], [2, 3]], epoch=4)
    new = Placement.of_ranks([[1, 2], [3, 0], []][:2], homes=[1, 0, 0, 1], epoch=5)
    plan = old.diff(new)
    assert plan.home_moves == (Move(2, 2, 1, 1, 0), Move(0, 0, 3, 0, 1)) and plan.copies == ()
    assert plan.relabels == (Move(1, 1, 0, 0, 0), Move(3, 3, 2, 1, 1))
    assert (plan.old_epoch, plan.new_epoch, plan.moves, plan.is_empty) == (4, 5, 2, False)
    assert plan.link_bytes(10, 30).tolist() == [[0, 40], [40, 0]]


def test_a_copy_comes_from_home_once_for_each_rank():
    old = Placement.of_ranks([[0, 1], [2]])
    new = Placement.of_ranks([[0, 1, 1], [2, 0, 0, 1]])
    plan = old.diff(new)
    assert plan.copies == (Move(0, 0, 4, 0, 1), Move(1, 1, 6, 0, 1)) and plan.home_moves == ()
    # Second slots on a rank get what is there already, or what came with the first.
    assert plan.relabels == (Move(1, 1, 2, 0, 0), Move(2, 2, 3, 1, 1))
    assert plan.link_bytes(10, 30).tolist() == [[0, 20], [0, 0]]


def test_a_home_that_moves_to_a_copy_takes_its_state_along():
    old = Placement.of_ranks([[0, 1], [2, 0]])
    plan = old.diff(old.with_homes([1, 0, 1]))
    assert plan.home_moves == (Move(0, 0, 3, 0, 1),) and plan.copies == () and plan.relabels == ()


def test_nothing_travels_to_an_equal_one():
    old = Placement.of_ranks([[0, 1], [2, 0]])
    plan = old.diff(Placement.of_ranks([[0, 1], [2, 0]], epoch=9))
    assert plan.is_empty and not plan.relabels and not plan.link_bytes(5).any()


@pytest.mark.parametrize("seed", range(40))
def test_after_the_moves_every_slot_has_its_expert(seed):
    """Played back on sets: what each rank has, and which experts it owns."""
    rng = np.random.default_rng(seed)
    old, new = (drawn(rng) for _ in range(2))
    plan = old.diff(new)
    has = [set(experts) for experts in old.experts_of_ranks()]
    owner = list(old.home_ranks)
    for move in (*plan.home_moves, *plan.copies):
        assert move.expert in has[move.from_rank] and old.slot_to_expert[move.from_slot] == move.expert
        assert new.rank_of_slot(move.to_slot) == move.to_rank != move.from_rank
        has[move.to_rank].add(move.expert)
    for move in plan.home_moves:
        owner[move.expert] = move.to_rank
    assert tuple(owner) == new.home_ranks
    assert all(set(experts) <= found for experts, found in zip(new.experts_of_ranks(), has, strict=True))
    wanted = {(rank, expert) for rank, experts in enumerate(new.experts_of_ranks()) for expert in experts}
    known = {(rank, expert) for rank, experts in enumerate(old.experts_of_ranks()) for expert in experts}
    homes = {(rank, expert) for expert, rank in enumerate(new.home_ranks) if rank != old.home_ranks[expert]}
    assert plan.moves == len((wanted - known) | homes)


def drawn(rng):
    slots = rng.permutation([*range(5), *rng.integers(0, 5, int(rng.integers(0, 5)))]).tolist()
    cuts = sorted(rng.integers(0, len(slots) + 1, 2).tolist())
    return Placement.of_ranks([slots[: cuts[0]], slots[cuts[0] : cuts[1]], slots[cuts[1] :]])


@pytest.mark.parametrize(
    ("new", "field"), [(Placement.identity(4, 4), "world_size"), (Placement.identity(6, 2), "num_experts")]
)
def test_other_experts_or_ranks_are_refused(new, field):
    with pytest.raises(ConfigError) as caught:
        Placement.identity(4, 2).diff(new)
    assert caught.value.field == field
