"""Copies from rank to rank: who has an expert when it is to be passed on, what the ports carry, how near the best."""

from __future__ import annotations

import random
from collections import Counter
from math import isqrt

import pytest

from moe_overlap.agreement.relays import INTER, INTRA, Hop, Order, direct_ports, relays_of


def one_expert(count, *, home=0, expert=0):
    """Copies of an expert on the next `count` ranks."""
    return tuple(Order(expert, home, home + 1 + i) for i in range(count))


def drawn(seed):
    """(copies, ranks of a node) of some experts on some ranks."""
    rng = random.Random(seed)
    ranks, size = rng.choice([4, 8, 16]), rng.choice([1, 2, 4])
    copies = []
    for expert in range(rng.randint(1, 12)):
        home = rng.randrange(ranks)
        others = [rank for rank in range(ranks) if rank != home]
        copies += [Order(expert, home, rank) for rank in rng.sample(others, rng.randint(0, ranks - 1))]
    rng.shuffle(copies)
    return tuple(copies), size


@pytest.mark.parametrize("seed", range(60))
def test_whoever_passes_an_expert_on_has_it_by_then(seed):
    copies, size = drawn(seed)
    found = relays_of(copies, size)
    if found is None:  # most are not: see the next test
        return
    has = {(one.expert, one.rank) for one, hop in zip(copies, found.hops, strict=True) if hop.group == 0}
    loads = Counter()
    for one, hop in zip(copies, found.hops, strict=True):
        assert hop.sender == one.home or (hop.group == 1 and (one.expert, hop.sender) in has)
        wire = INTRA if hop.sender // size == one.rank // size else INTER
        loads[hop.group, wire, "out", hop.sender] += 1
        loads[hop.group, wire, "in", one.rank] += 1
    for group in (0, 1):
        for wire in (INTER, INTRA):
            most = max((n for (g, w, _, _), n in loads.items() if (g, w) == (group, wire)), default=0)
            assert found.ports[group][wire] == most
    inter, intra = (sum(ports) for ports in zip(*found.ports, strict=True))
    assert (inter, intra) < direct_ports(copies, size)


def test_most_of_the_drawn_steps_have_relays():
    assert sum(relays_of(*drawn(seed)) is not None for seed in range(60)) > 30


@pytest.mark.parametrize("count", [3, 4, 7, 12, 15, 31, 63])
def test_one_expert_is_at_the_least_of_all_first_groups(count):
    found = relays_of(one_expert(count))
    least = min(first - (-(count - first) // (1 + first)) for first in range(count + 1))
    assert sum(ports[INTER] for ports in found.ports) == least
    root = isqrt(count + 1)
    if root * root == count + 1:
        assert least == 2 * (root - 1)


@pytest.mark.parametrize("copies", [(), one_expert(1), one_expert(2), (*one_expert(1), Order(1, 3, 0))])
def test_nothing_is_relayed_where_no_port_is_spared(copies):
    assert relays_of(copies) is None


def test_two_copies_each_of_several_experts_of_one_rank_are_relayed():
    copies = tuple(Order(expert, 0, rank) for expert in range(4) for rank in (1 + expert, 5 + expert))
    found = relays_of(copies)
    assert direct_ports(copies) == (8, 0) and found.ports == ((3, 0), (2, 0))


def test_the_rank_that_wants_most_is_a_bound():
    """Ten ranks get ten experts each: nobody can be spared anything."""
    copies = tuple(Order(expert, expert, rank) for expert in range(10) for rank in range(10, 20))
    assert direct_ports(copies) == (10, 0) and relays_of(copies) is None


def test_an_expert_crosses_to_each_node_once():
    copies = tuple(Order(0, 5, rank) for rank in range(16) if rank != 5)
    found = relays_of(copies, 4)
    assert direct_ports(copies, 4) == (12, 3) and found.ports == ((3, 0), (0, 3))
    hop_of = dict(zip(copies, found.hops, strict=True))
    assert hop_of[Order(0, 5, 1)] == Hop(0, 5) and hop_of[Order(0, 5, 2)] == Hop(1, 1)
    assert hop_of[Order(0, 5, 7)] == Hop(1, 5)


def test_all_experts_on_all_ranks_cross_nodes_by_different_ranks():
    copies = tuple(Order(expert, expert, rank) for expert in range(16) for rank in range(16) if rank != expert)
    found = relays_of(copies, 4)
    assert direct_ports(copies, 4)[INTER] == 12 and sum(ports[INTER] for ports in found.ports) == 3


def test_the_order_in_which_copies_are_given_changes_nothing():
    copies, size = drawn(3)
    found = dict(zip(copies, relays_of(copies, size).hops, strict=True))
    turned = copies[::-1]
    assert found == dict(zip(turned, relays_of(turned, size).hops, strict=True))


@pytest.mark.parametrize("extra", [Order(0, 0, 3), Order(0, 0, 0)])
def test_an_expert_twice_on_a_rank_is_not_relayed(extra):
    assert relays_of(one_expert(7)) is not None
    assert relays_of((*one_expert(7), extra)) is None
