"""Copies of experts that go from rank to rank: who sends which copy in which of two groups. Integers only.

Sent from its home alone, an expert with c copies is sent c times through one port. In two groups a rank that got a copy
in the first one passes it on in the second: with g copies in the first, the other c - g have 1 + g senders, and the
home's port is used g + (c - g) / (1 + g) times, least near g = sqrt(c + 1) - 1, where it is 2 (sqrt(c + 1) - 1).

Ports are shared by all experts of a step, so g is chosen for each expert by counting: the experts with most copies
first, each with the g of a few that adds least to the sum, over both groups, of what the busiest port sends or gets.
Ports between nodes count before those inside, as they are the slower ones; the first group therefore has one rank of
each other node at its head, which serves its node in the second. All ranks find the same, from what they agreed on; the
compiled form (csrc/core/relays.cpp) counts the same loads, for the decision of which copies there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

GROUPS = 2
INTER, INTRA = 0, 1
Ports = tuple[int, int]  # copies through the busiest port, that leave or enter a rank: between nodes, inside of them


class Order(NamedTuple):
    """A copy that is wanted: of an expert whose home is on another rank, on `rank`."""

    expert: int
    home: int
    rank: int


class Hop(NamedTuple):
    """How a copy comes: in which group, from which rank."""

    group: int
    sender: int


@dataclass(frozen=True, kw_only=True)
class Relays:
    """hops: of each copy, in the order in which they were given; ports: of each group."""

    hops: tuple[Hop, ...]
    ports: tuple[Ports, Ports]


@lru_cache(maxsize=64)
def relays_of(copies: tuple[Order, ...], ranks_per_node: int = 1) -> Relays | None:
    """Two groups for these copies; None where no busiest port gets less to do by them (between nodes first) than by
    `direct_ports`, and where an expert is twice on a rank."""
    by_expert: dict[int, list[Order]] = {}
    for one in copies:
        by_expert.setdefault(one.expert, []).append(one)
    twice = any(len({found[0].home, *(one.rank for one in found)}) <= len(found) for found in by_expert.values())
    direct = direct_ports(copies, ranks_per_node)
    most_wanted = max(Counter(one.rank for one in copies).values(), default=0)  # what a rank gets it gets in any form
    alone = all(len(found) < 2 for found in by_expert.values())
    if twice or alone or (ranks_per_node == 1 and most_wanted >= direct[INTER]):
        return None
    loads, hops = _Loads(ranks_per_node), dict[Order, Hop]()
    for expert in sorted(by_expert, key=lambda expert: (-len(by_expert[expert]), expert)):
        orders = _first_to_last(by_expert[expert], ranks_per_node)
        choices = [(_cost(loads, orders, first), first) for first in _firsts(orders, ranks_per_node)]
        _, first = min(choices)
        hops |= zip(orders, loads.sent(orders, first), strict=True)
    if loads.cost >= direct:
        return None
    return Relays(hops=tuple(hops[one] for one in copies), ports=(loads.ports(0), loads.ports(1)))


def direct_ports(copies: Sequence[Order], ranks_per_node: int = 1) -> Ports:
    """Where every copy comes from its home, in one group."""
    loads = _Loads(ranks_per_node)
    for one in copies:
        loads.add(0, one.home, one.rank)
    return loads.ports(0)


class _Loads:
    """Copies by (group, wire, whether they leave, rank), and the most of each group and wire."""

    def __init__(self, ranks_per_node: int) -> None:
        self.size = ranks_per_node
        self._of: Counter[tuple[int, int, bool, int]] = Counter()
        self._most = [[0, 0], [0, 0]]

    def ports(self, group: int) -> Ports:
        return self._most[group][INTER], self._most[group][INTRA]

    @property
    def cost(self) -> Ports:
        """Both groups, one after the other."""
        (inter, intra), (more_inter, more_intra) = self._most
        return inter + more_inter, intra + more_intra

    def wire(self, one: int, other: int) -> int:
        return INTRA if one // self.size == other // self.size else INTER

    def add(self, group: int, sender: int, rank: int) -> None:
        wire = self.wire(sender, rank)
        for leaves, port in ((True, sender), (False, rank)):
            self._of[group, wire, leaves, port] += 1
            self._most[group][wire] = max(self._most[group][wire], self._of[group, wire, leaves, port])

    def sent(self, orders: Sequence[Order], first: int) -> list[Hop]:
        """Add the copies of one expert: the first so many from its home in group 0, each other one in group 1 from the
        rank that has it by then and has least to do: of the same node, if there is one."""
        home, holders = orders[0].home, [orders[0].home]
        hops = []
        for number, one in enumerate(orders):
            hop = Hop(0, home)
            if number >= first:
                hop = Hop(1, min(holders, key=lambda rank: self._dear(rank, one.rank)))  # the first of those that tie
            self.add(hop.group, hop.sender, one.rank)
            hops.append(hop)
            if number < first:
                holders.append(one.rank)
        return hops

    def taken_back(self, hops: Sequence[tuple[Order, Hop]], most: list[list[int]]) -> None:
        """As before `hops` were added, when the most were these."""
        for one, hop in hops:
            wire = self.wire(hop.sender, one.rank)
            self._of[hop.group, wire, True, hop.sender] -= 1
            self._of[hop.group, wire, False, one.rank] -= 1
        self._most = most

    def _dear(self, sender: int, rank: int) -> tuple[bool, int]:
        wire = self.wire(sender, rank)
        return wire == INTER, self._of[1, wire, True, sender]


def _cost(loads: _Loads, orders: Sequence[Order], first: int) -> Ports:
    """What `loads` would cost with the copies of one expert more."""
    most = [list(row) for row in loads._most]
    hops = loads.sent(orders, first)
    cost = loads.cost
    loads.taken_back(list(zip(orders, hops, strict=True)), most)
    return cost


def _first_to_last(orders: Sequence[Order], ranks_per_node: int) -> list[Order]:
    """One rank of each other node, then the others, both in the order of a ring that begins at the home, so that homes
    begin with other ranks. In a node it is the first one from the place that the home has in its own."""
    home, own_node = orders[0].home, orders[0].home // ranks_per_node
    heads: dict[int, Order] = {}
    ring = sorted(orders, key=lambda one: (one.rank < home, one.rank))
    for one in sorted(ring, key=lambda one: (one.rank - home) % ranks_per_node):
        if one.rank // ranks_per_node != own_node:
            heads.setdefault(one.rank // ranks_per_node, one)
    first = set(heads.values())
    return [one for one in ring if one in first] + [one for one in ring if one not in first]


def _firsts(orders: Sequence[Order], ranks_per_node: int) -> list[int]:
    """How many copies of an expert may go in the first group: none, near the least of one expert alone, one for each
    other node, all of them. Ascending."""
    count, best = len(orders), isqrt(len(orders) + 1) - 1
    nodes = len({one.rank // ranks_per_node for one in orders} - {orders[0].home // ranks_per_node})
    return sorted({0, best, min(count, best + 1), nodes, count})
