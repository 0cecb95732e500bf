import dataclasses

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement


def test_identity_divides_experts_into_contiguous_groups():
    placement = Placement.identity(8, 4)
    assert (placement.num_experts, placement.num_slots, placement.slots_per_rank, placement.epoch) == (8, 8, 2, 0)
    assert [list(placement.slots_of_rank(rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [placement.rank_of_slot(slot) for slot in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert placement.is_identity


def test_identity_returns_the_ids_themselves():
    ids_TK = torch.tensor([[0, -1], [3, 2]], dtype=torch.int32)
    assert Placement.identity(4, 2).to_physical(ids_TK) is ids_TK


def test_a_permutation_maps_every_expert_to_its_slot_and_keeps_unused():
    placement = Placement(4, 4, 2, (2, 0, 3, 1), epoch=1)
    ids_TK = torch.tensor([[0, 1], [2, 3], [-1, 2]], dtype=torch.int32)
    slots_TK = placement.to_physical(ids_TK)
    assert slots_TK.tolist() == [[1, 3], [0, 2], [-1, 0]]
    assert slots_TK.dtype == torch.int32
    assert not placement.is_identity
    back = torch.tensor(placement.slot_to_expert)[slots_TK.clamp_min(0).long()]
    assert torch.equal(back[ids_TK >= 0], ids_TK[ids_TK >= 0].long())


def test_replicas_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="replicated"):
        Placement(2, 4, 2, (0, 1, 0, 1)).to_physical(torch.tensor([[0]], dtype=torch.int32))


def test_it_is_frozen_and_comparable():
    assert Placement.identity(4, 2) == Placement.identity(4, 2)
    assert Placement.identity(4, 2) != Placement.identity(4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Placement.identity(4, 2).epoch = 3


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (lambda: Placement.identity(6, 4), "num_experts", 6),
        (lambda: Placement.identity(0, 1), "num_experts", 0),
        (lambda: Placement.identity(4, 0), "world_size", 0),
        (lambda: Placement(4, 5, 2, (0, 1, 2, 3, 0)), "num_slots", 5),
        (lambda: Placement(4, 4, 2, (0, 1, 2)), "slot_to_expert", (0, 1, 2)),
        (lambda: Placement(4, 4, 2, (0, 1, 2, 2)), "slot_to_expert", (0, 1, 2, 2)),
        (lambda: Placement(2, 2, 1, (0, 1), epoch=-1), "epoch", -1),
        (lambda: Placement.identity(4, 2).rank_of_slot(4), "slot", 4),
        (lambda: Placement.identity(4, 2).slots_of_rank(2), "rank", 2),
    ],
)
def test_bad_arguments_name_field_and_value(build, field, value):
    with pytest.raises(ConfigError) as caught:
        build()
    assert (caught.value.field, caught.value.value) == (field, value)
    assert caught.value.expected
