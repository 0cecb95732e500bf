import dataclasses
import json

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.placement import LocalFirst, Placement, Weighted


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


@pytest.mark.parametrize(
    ("experts", "ranks", "by_rank"), [(6, 4, (2, 2, 1, 1)), (3, 3, (1, 1, 1)), (2, 4, (1, 1, 0, 0))]
)
def test_identity_spreads_what_does_not_divide(experts, ranks, by_rank):
    placement = Placement.identity(experts, ranks)
    assert placement.slots_by_rank == by_rank and placement.is_identity
    owned = [slot for rank in range(ranks) for slot in placement.slots_of_rank(rank)]
    assert owned == list(range(experts))
    assert [placement.rank_of_slot(slot) for slot in owned] == list(placement.home_ranks)
    if len(set(by_rank)) > 1:
        with pytest.raises(ConfigError, match="slots_by_rank"):
            _ = placement.slots_per_rank


def test_an_expert_s_slots_begin_with_its_home():
    placement = Placement.of_ranks([[0, 1], [1], [], [2, 0, 0]], homes=[3, 1, 3])
    assert placement.slot_to_expert == (0, 1, 1, 2, 0, 0) and placement.slots_by_rank == (2, 1, 0, 3)
    assert placement.slots_of_expert == ((4, 0, 5), (2, 1), (3,))
    assert placement.home_slots == (4, 2, 3) and placement.home_ranks == (3, 1, 3)
    assert placement.experts_of_ranks() == [[0, 1], [1], [], [2, 0, 0]]


def test_a_file_gives_the_placement_back():
    placement = Placement.of_ranks([[0, 1], [1], [2, 0]], homes=[2, 1, 2], epoch=3, selector=LocalFirst())
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    table = tuple((1,) * 4 + (rank + 1,) for rank in range(3))
    weighted = placement.with_selector(Weighted(table))
    assert Placement.from_json(weighted.to_json()) == weighted != placement
    assert len({placement.digest, weighted.digest, placement.with_homes([0, 0, 2]).digest}) == 3


GOOD = {"experts_of_ranks": [[0], [1]], "homes": [0, 1], "epoch": 0, "selector": "modulo"}


@pytest.mark.parametrize(
    "bad",
    [
        None, [], "x", {}, {**GOOD, "more": 1}, {**GOOD, "homes": None}, {**GOOD, "homes": [1, 0]},
        {**GOOD, "homes": [0]}, {**GOOD, "homes": [0, 1, 1]}, {**GOOD, "homes": [0, -1]}, {**GOOD, "homes": ["0", []]},
        {**GOOD, "homes": [False, True]},
        {**GOOD, "epoch": "1"}, {**GOOD, "epoch": True}, {**GOOD, "epoch": -1}, {**GOOD, "epoch": 2**40},
        {**GOOD, "selector": "random"}, {**GOOD, "selector": None}, {**GOOD, "selector": "weighted 1,1"},
        {**GOOD, "selector": "weighted 1,x;1,1"}, {**GOOD, "selector": "weighted -1,2;1,1"},
        {**GOOD, "experts_of_ranks": 5}, {**GOOD, "experts_of_ranks": [1, 2]}, {**GOOD, "experts_of_ranks": "ab"},
        {**GOOD, "experts_of_ranks": []}, {**GOOD, "experts_of_ranks": [[], []]},
        {**GOOD, "experts_of_ranks": [[0], [2]]},
        {**GOOD, "experts_of_ranks": [[0], [1.0]]}, {**GOOD, "experts_of_ranks": [[0], [10**12]]},
        {**GOOD, "experts_of_ranks": [[0], [None]]}, {**GOOD, "experts_of_ranks": [[False], [True]]},
    ],
)  # fmt: skip
def test_a_bad_file_is_a_config_error(bad):
    with pytest.raises(ConfigError):
        Placement.from_json(bad)


def test_it_is_frozen_and_comparable():
    assert Placement.identity(4, 2) == Placement.identity(4, 2)
    assert Placement.identity(4, 2) != Placement.identity(4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Placement.identity(4, 2).epoch = 3


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (lambda: Placement.identity(0, 1), "num_experts", 0),
        (lambda: Placement.identity(4, 0), "world_size", 0),
        (lambda: Placement(4, 5, 2, (0, 1, 2, 3, 0)), "num_slots", 5),
        (lambda: Placement(4, 4, 2, (0, 1, 2)), "slot_to_expert", (0, 1, 2)),
        (lambda: Placement(4, 4, 2, (0, 1, 2, 2)), "slot_to_expert", (0, 1, 2, 2)),
        (lambda: Placement(2, 2, 1, (0, 1), epoch=-1), "epoch", -1),
        (lambda: Placement(2, 2, 2, (0, 1), slots_by_rank=(1, 2)), "slots_by_rank", (1, 2)),
        (lambda: Placement(2, 2, 2, (0, 1), slots_by_rank=(3, -1)), "slots_by_rank", (3, -1)),
        (lambda: Placement(2, 3, 1, (0, 1, 0), home_slots=(1, 1)), "home_slots", (1, 1)),
        (lambda: Placement(2, 2, 1, (0, 1), selector="modulo"), "selector", "modulo"),
        (lambda: Placement.identity(4, 2).rank_of_slot(4), "slot", 4),
        (lambda: Placement.identity(4, 2).slots_of_rank(2), "rank", 2),
    ],
)
def test_bad_arguments_name_field_and_value(build, field, value):
    with pytest.raises(ConfigError) as caught:
        build()
    assert (caught.value.field, caught.value.value) == (field, value)
    assert caught.value.expected
