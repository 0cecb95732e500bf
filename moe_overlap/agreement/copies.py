"""Copies of experts, as integers: which ones a step has to fetch, and how many go from rank to rank.

A copy is weights alone; the parameters, their optimizer state and the sum of the gradients are at the expert's home.
A rank's copy is valid for (expert, version of its home's weights). Every rank says the version of its weights in the
record of the step, so all ranks know alike which copies of which ranks are not valid any more: those are fetched (Wf),
and where there are none nothing is. They come from their homes, or, relayed, in two groups from rank to rank
(`relays.py`). The gradients of all copies return in every backward (Wg), home directly: that is where they are added,
in the order of the ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan
from moe_overlap.agreement.relays import GROUPS, Hop, Order, Relays, relays_of
from moe_overlap.agreement.seats import Copy

Wanted = tuple[tuple[Copy, ...], ...]  # by rank, in the order of its seats


COUNTED = "_moe_overlap_counted"  # an attribute of parameters, see `trust`: how often they were stepped
GATHERED = "_moe_overlap_gathered"  # of what FSDP2 gathers shards into: their state, see `gathered`
_starts = itertools.count(0, 1 << 32)  # apart, as another parameter may come to lie where one was


def trust(parameters: Iterable[object]) -> None:
    """Parameters of which torch's version counter, and `count_steps`, tell every change. The mark lies on the tensor: a
    reference elsewhere would keep what was replaced, and a weak one forbids torch to swap tensors."""
    for one in parameters:
        setattr(one, COUNTED, next(_starts))


def gathered(sharded: Any, whole: Any) -> None:
    """FSDP2 has put `whole`, a parameter that it fills without counting, in the place of `sharded`, a DTensor whose
    shards it has gathered into it. What is in it stays until it is gathered anew, whatever becomes of the shards: so
    what tells of its values is the shard of this rank as it is now. Those of other ranks change in the same steps."""
    trust(one for one in (sharded, whole) if not hasattr(one, COUNTED))
    local = sharded.to_local()
    known = not (sharded.is_inference() or local.is_inference())
    state = (getattr(sharded, COUNTED), sharded._version, local.data_ptr(), local._version)
    setattr(whole, GATHERED, state if known else None)


def state_of(weight: Any) -> tuple[int, ...] | None:
    """What changes with the values of an expert weight; None where nothing tells of them."""
    if not hasattr(weight, COUNTED) or weight.is_inference():
        return None
    own = (getattr(weight, COUNTED), weight._version)
    if not hasattr(weight, GATHERED):
        return (weight.data_ptr(), *own)
    shard: tuple[int, ...] | None = getattr(weight, GATHERED)
    return None if shard is None else (*shard, *own)


def count_steps(parameters: Iterable[object]) -> None:
    """An optimizer has stepped: fused ones (torch 2.13.0) write parameters without raising their version."""
    for one in parameters:
        if hasattr(one, COUNTED):
            setattr(one, COUNTED, getattr(one, COUNTED) + 1)


@dataclass(frozen=True, kw_only=True)
class CopyPlan(ChunkPlan):
    """The exchange of the weights of `wanted` copies: in one group, all from their homes, whose adjoint is that of
    their gradients, or in two, where a rank that got a copy in the first passes it on in the second. hops: by rank and
    copy, how it comes.

    A row is one expert. Send order of a rank: group, rank of the copy, then as that rank has them. Receive order:
    group, sender, then the order of the copies' seats, which is (home, expert).
    """

    wanted: Wanted
    hops: tuple[tuple[Hop, ...], ...]

    def group(self, rank: int, chunk: int) -> tuple[Copy, ...]:
        """The copies of `rank` in a group, as they arrive."""
        return tuple(one for _, one in self._arrivals[chunk][rank])

    def sent_experts(self, chunk: int) -> tuple[int, ...]:
        """The experts of the rows that this rank sends."""
        arrivals = self._arrivals[chunk]
        return tuple(one.expert for found in arrivals for sender, one in found if sender == self.rank)

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = self.rows(chunk)
        send, recv = tuple(rows[self.rank].tolist()), tuple(rows[:, self.rank].tolist())
        return (recv, send) if reverse else (send, recv)

    def rows(self, chunk: int) -> np.ndarray:
        """int64 [W, W]: copies of a group, from sender to rank."""
        found: np.ndarray = self._rows[chunk]
        return found

    @cached_property
    def stays_local(self) -> tuple[bool, ...]:
        return tuple(int(rows.sum() - np.trace(rows)) == 0 for rows in self._rows)

    @cached_property
    def _rows(self) -> np.ndarray:
        """int64 [C, W, W]."""
        rows = np.zeros((self.chunks, self.world_size, self.world_size), dtype=np.int64)
        for chunk, arrivals in enumerate(self._arrivals):
            for rank, found in enumerate(arrivals):
                for sender, _ in found:
                    rows[chunk, sender, rank] += 1
        return rows

    @cached_property
    def _arrivals(self) -> list[list[list[tuple[int, Copy]]]]:
        """[C][W]: (sender, copy) of the rows that a rank gets, in their order."""
        found: list[list[list[tuple[int, Copy]]]] = [[] for _ in range(self.chunks)]
        for wanted, hops in zip(self.wanted, self.hops, strict=True):
            for chunk, arrivals in enumerate(found):
                mine = [(hop.sender, one) for one, hop in zip(wanted, hops, strict=True) if hop.group == chunk]
                arrivals.append(sorted(mine, key=lambda pair: pair[0]))
        return found


def copy_plan(exchange: ExchangePlan, wanted: Wanted, *, relayed: bool = False) -> CopyPlan:
    """Of a step. relayed: in two groups, where that makes less of the busiest port's work."""
    found = relays_of_copies(wanted, exchange.ranks_per_node) if relayed else None
    hops = [[Hop(0, one.home) for one in copies] for copies in wanted]
    if found is not None:
        every = iter(found.hops)
        hops = [[next(every) for _ in copies] for copies in wanted]
    nothing = np.zeros(0, dtype=np.int64)
    return CopyPlan(exchange=exchange, chunks=1 if found is None else GROUPS, by="tokens", sent=nothing,
                    received=nothing, wanted=wanted, hops=tuple(map(tuple, hops)))  # fmt: skip


def relays_of_copies(wanted: Wanted, ranks_per_node: int) -> Relays | None:
    """`relays_of` the copies of all ranks, rank by rank; ranks_per_node: 0 where it is not known."""
    orders = tuple(Order(one.expert, one.home, rank) for rank, copies in enumerate(wanted) for one in copies)
    return relays_of(orders, ranks_per_node or 1)


class CopyBook:
    """Which copies are valid on which rank: the same on all ranks, as it follows from what they have agreed on."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No copy is valid: after a failure, whoever has got what."""
        self._held: list[dict[int, int]] = []  # by rank: expert -> the version of the home's weights
        self._kind: object = None

    def wanted(self, exchange: ExchangePlan, kind: object) -> Wanted:
        """The copies that a step has to fetch, by rank. kind: what weights are besides their version (their dtype)."""
        assert exchange.seats is not None
        held = self._held if kind == self._kind and self._held else [{}] * exchange.world_size
        versions = exchange.weight_versions
        return tuple(
            tuple(one for one in copies if known.get(one.expert) != versions[one.home])
            for known, copies in zip(held, exchange.seats.copies, strict=True)
        )

    def hold(self, exchange: ExchangePlan, kind: object) -> None:
        """A step has fetched what it wanted: the copies of its placement are valid, and no others."""
        assert exchange.seats is not None
        versions = exchange.weight_versions
        self._kind = kind
        self._held = [{one.expert: versions[one.home] for one in copies} for copies in exchange.seats.copies]
