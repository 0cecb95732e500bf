"""The dispatcher: what it counts and announces, and what it refuses on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS, block_counts_of_rows
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.errors import ConfigError, PlanMismatch
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.builders import serial
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport import VirtualRank, VirtualWorld

E, K = 6, 3


def dispatcher(me: VirtualRank, *, dedup: int = 1, experts: int = E, **options: Any) -> Dispatcher:
    placement = Placement.identity(experts, me.world_size)
    return Dispatcher(transport=me.transport(), placement=placement, hidden=4, ffn_hidden=8, top_k=K,
                      activation="swiglu", dtype=torch.float32, dedup=dedup, **options)  # fmt: skip


def ids_of(rank: int, tokens: int = 30, experts: int = E) -> torch.Tensor:
    """int32 [T, K] without repetition."""
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :K].to(torch.int32)


def planned(one: Dispatcher, ids_TK: torch.Tensor) -> ExchangePlan:
    return one.plan(ids_TK, torch.zeros(len(ids_TK), 4), serial())


def test_the_rows_of_deduplication_are_agreed_on() -> None:
    def rank_main(me: VirtualRank) -> ExchangePlan:
        return planned(dispatcher(me), ids_of(me.rank))

    for rank, plan in enumerate(VirtualWorld(3).run(rank_main)):
        assert plan.dedup == 1 and plan.first is not None and plan.last is not None
        for source in range(3):
            counts, first, last = block_counts_of_rows(ids_of(source), E, 3)
            assert np.array_equal(plan.counts[source], counts), rank
            assert np.array_equal(plan.first[source], first) and np.array_equal(plan.last[source], last)


def test_the_rows_for_each_node_are_agreed_on() -> None:
    def rank_main(me: VirtualRank) -> ExchangePlan:
        ids = ids_of(me.rank, experts=8)
        ids[0] = torch.tensor([-1, 7, -1])
        return planned(dispatcher(me, experts=8, ranks_per_node=2, hierarchical=True), ids)

    for plan in VirtualWorld(4).run(rank_main):
        assert plan.node_rows is not None and plan.node_rows.shape == (4, BLOCKS, 2) and plan.ranks_per_node == 2
        for source in range(4):
            ids = ids_of(source, experts=8)
            ids[0] = torch.tensor([-1, 7, -1])
            for block in range(BLOCKS):
                part = ids[block * 30 // BLOCKS : (block + 1) * 30 // BLOCKS]
                found = [int(((part >= 0) & (part // 4 == node)).any(dim=1).sum()) for node in range(2)]
                assert plan.node_rows[source, block].tolist() == found
        assert plan.off_node([1, 2, 4, 8]) == (12 if plan.rank < 2 else 3)


def test_repeated_ids_are_refused_on_all_ranks_and_the_transport_stays_usable() -> None:
    def rank_main(me: VirtualRank) -> str:
        one, ids = dispatcher(me), ids_of(me.rank)
        repeating = ids.clone()
        if me.rank == 1:
            repeating[7, 2] = repeating[7, 0]
        with pytest.raises(ConfigError, match="topk_ids.*twice") as caught:
            planned(one, repeating)
        assert planned(one, ids).dedup == 1
        plain = dispatcher(me, dedup=0)
        assert planned(plain, repeating).dedup == 0
        return str(caught.value)

    peer, refusing = VirtualWorld(2).run(rank_main)
    assert "refused on rank 1" in peer and "refused" not in refusing


def test_ranks_that_deduplicate_in_other_ways_are_told() -> None:
    def rank_main(me: VirtualRank) -> None:
        one = dispatcher(me, dedup=2 * me.rank)
        with pytest.raises(PlanMismatch, match="about dedup: rank 0 has 0, rank 1 has 2"):
            planned(one, ids_of(me.rank))

    VirtualWorld(2).run(rank_main)


def test_the_records_of_others_have_no_room_for_it() -> None:
    """So a layer that never deduplicates sends no more words for it."""

    def rank_main(me: VirtualRank) -> tuple[int, int]:
        sizes = []
        for dedup in (0, 1):
            one = dispatcher(me, dedup=dedup)
            planned(one, ids_of(me.rank))
            before = one.transport.stats.meta_bytes
            planned(one, ids_of(me.rank))
            sizes.append(one.transport.stats.meta_bytes - before)
        return sizes[0], sizes[1]

    plain, rows = VirtualWorld(2).run(rank_main)[0]
    assert rows - plain == 2 * 16 * E * 8
