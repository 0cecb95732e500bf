"""Counts by slot follow from counts by expert alone, and are those of the slots that tokens are given."""

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS, block_counts
from moe_overlap.errors import ConfigError
from moe_overlap.placement import LocalFirst, Modulo, Placement, Weighted


def drawn(rng: np.random.Generator) -> Placement:
    """Any placement: uneven slots, ranks without any, replicas, one of the three selectors."""
    experts, ranks = int(rng.integers(1, 9)), int(rng.integers(1, 6))
    slots = rng.permutation([*range(experts), *rng.integers(0, experts, int(rng.integers(0, 9)))]).tolist()
    cuts = np.sort(rng.integers(0, len(slots) + 1, ranks - 1)).tolist()
    by_rank = [slots[a:b] for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True)]
    placement = Placement.of_ranks(by_rank)
    homes = [int(rng.choice(placement.rank_of_slots[list(own)])) for own in placement.slots_of_expert]
    weights = tuple(tuple(int(n) for n in rng.integers(1, 1000, len(slots))) for _ in range(ranks))
    return placement.with_homes(homes).with_selector([Modulo(), LocalFirst(), Weighted(weights)][rng.integers(3)])


@pytest.mark.parametrize("seed", range(60))
def test_every_choice_goes_to_a_slot_of_its_expert_as_the_counts_say(seed):
    rng = np.random.default_rng(seed)
    placement, shape = drawn(rng), (int(rng.integers(0, 90)), int(rng.integers(1, 4)))
    dtype = [torch.int32, torch.int64][seed % 2]
    counts = []
    for source in range(placement.world_size):
        ids = torch.from_numpy(rng.integers(-1, placement.num_experts, shape)).to(dtype)
        slots = placement.to_physical(ids, source=source, blocks=BLOCKS)
        assert slots.shape == ids.shape and slots.dtype == dtype and torch.equal(slots < 0, ids < 0)
        assert torch.equal(torch.tensor(placement.slot_to_expert)[slots[ids >= 0].long()], ids[ids >= 0].long())
        counts.append((block_counts(ids, placement.num_experts), block_counts(slots, placement.num_slots)))
        for expert, own in enumerate(placement.slots_of_expert):  # runs in token order: first the home's
            for block in range(BLOCKS):
                rows = slice(block * shape[0] // BLOCKS, (block + 1) * shape[0] // BLOCKS)
                taken = [own.index(int(slot)) for slot in slots[rows][ids[rows] == expert]]
                assert taken == sorted(taken)
    logical, physical = (torch.stack(one).numpy() for one in zip(*counts, strict=True))
    assert np.array_equal(placement.physical_counts(logical, range(placement.world_size)), physical)
    order = rng.permutation(placement.world_size).tolist()
    assert np.array_equal(placement.physical_counts(logical[order], order), physical[order])
    for one in physical:
        back = placement.logical_counts(torch.from_numpy(one))
        assert torch.equal(back, torch.from_numpy(logical[physical.tolist().index(one.tolist())]))


def spread(selector, counts):
    """int64 [P] of four ranks with a slot of expert 0 each, rank 0 two, and expert 1 on rank 1."""
    placement = Placement.of_ranks([[0, 0], [0, 1], [0], []], selector=selector)
    return placement.physical_counts(counts, range(4))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000])
def test_modulo_gives_every_slot_the_same_and_the_odd_ones_go_round(count):
    counts = np.zeros((4, BLOCKS, 2), dtype=np.int64)
    counts[:, :, 0] = count
    by_slot = spread(Modulo(), counts)
    each = by_slot[:, :, [0, 1, 2, 4]]
    assert (each.sum(axis=2) == count).all() and (abs(each - count / 4) < 1).all()
    total = each.sum(axis=(0, 1))
    assert abs(total - total.mean()).max() <= 2  # of 64 blocks


def test_local_first_keeps_what_it_can_and_shares_the_rest_fairly():
    counts = np.zeros((4, BLOCKS, 2), dtype=np.int64)
    counts[:, :, 0], counts[:, :, 1] = 8, 3
    by_slot = spread(LocalFirst(), counts).sum(axis=1)
    assert by_slot[:, [0, 1, 2, 4]].tolist() == [[64, 64, 0, 0], [0, 0, 128, 0], [0, 0, 0, 128], [32, 32, 32, 32]]
    assert (by_slot[:, 3] == 3 * BLOCKS).all()


def test_weighted_is_its_table():
    table = ((1, 0, 0, 1, 0), (0, 3, 1, 1, 0), (0, 0, 0, 1, 5), (2, 2, 2, 1, 2))
    counts = np.full((4, BLOCKS, 2), 8, dtype=np.int64)
    by_slot = spread(Weighted(table), counts).sum(axis=1)
    assert by_slot.tolist() == [
        [128, 0, 0, 128, 0], [0, 96, 32, 128, 0], [0, 0, 0, 128, 128], [32, 32, 32, 128, 32]
    ]  # fmt: skip


def test_the_largest_counts_and_shares_do_not_overflow():
    most = 2**31 - 1
    weighted = Weighted(((2**23, 2**23 - 1, 1),) * 3)
    placement = Placement(1, 3, 3, (0, 0, 0), selector=weighted)
    by_slot = placement.physical_counts(np.full((3, BLOCKS, 1), most), range(3))
    assert (by_slot.sum(axis=2) == most).all() and (by_slot >= 0).all()
    assert abs(by_slot[..., 2] - most / 2**24).max() < 1 and abs(by_slot[..., 0] - most / 2).max() < 1


def test_what_a_choice_needs_is_asked_for():
    placement = Placement.of_ranks([[0], [0]])
    ids = torch.zeros(4, 1, dtype=torch.int32)
    for given in ({}, {"source": 0}, {"blocks": 16}, {"source": 2, "blocks": 16}, {"source": 0, "blocks": 0}):
        with pytest.raises(ConfigError):
            placement.to_physical(ids, **given)


@pytest.mark.parametrize(
    "table", [3, (1, 2), ((1, 2),), ((1,), (1,)), ((1, -1), (1, 1)), ((0, 0), (1, 1)), ((1.0, 1), (1, 1)),
              ((2**24 + 1, 1), (1, 1)), ((2**24, 1), (1, 1)), ((True, 1), (1, 1))]
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(table):
    with pytest.raises(ConfigError):
        Placement(1, 2, 2, (0, 0), selector=Weighted(table))
