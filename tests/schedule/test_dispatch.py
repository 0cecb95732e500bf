"""The dispatcher: what it counts and announces, and what it refuses on all ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from moe_overlap.agreement import counts as counting
from moe_overlap.agreement.counts import BLOCKS, block_counts, block_counts_of_rows
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.errors import ConfigError, PlanMismatch, RemoteAbort
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule import dispatch
from moe_overlap.schedule.builders import serial
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport import VirtualRank, VirtualWorld
from moe_overlap.transport.closing import closing_on_error

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
            for known, said in ((plan.counts, counts), (plan.first, first), (plan.last, last)):
                assert known.table is not None and np.array_equal(known.table[source], said), rank


def test_the_rows_for_each_node_are_agreed_on() -> None:
    def rank_main(me: VirtualRank) -> ExchangePlan:
        ids = ids_of(me.rank, experts=8)
        ids[0] = torch.tensor([-1, 7, -1])
        return planned(dispatcher(me, experts=8, ranks_per_node=2, hierarchical=True), ids)

    for plan in VirtualWorld(4).run(rank_main):
        known = plan.node_rows
        assert known is not None and plan.ranks_per_node == 2
        for source in range(4):
            ids = ids_of(source, experts=8)
            ids[0] = torch.tensor([-1, 7, -1])
            other = 1 - source // 2
            gateway = slice(2 * (2 * other + source % 2), 2 * (2 * other + source % 2) + 2)
            for block in range(BLOCKS):
                part = ids[block * 30 // BLOCKS : (block + 1) * 30 // BLOCKS].tolist()
                places = [[one % 2 for one in row if one >= 0 and one // 4 == other] for row in part]
                for way, end in enumerate((min, max)):
                    table = known.across[way].table
                    assert table is not None
                    found = [end(row) for row in places if row]
                    assert table[source, block, gateway].tolist() == [found.count(0), found.count(1)]
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
    assert rows - plain == 2 * 16 * E * 4


def test_counts_of_experts_travel_and_counts_of_slots_follow() -> None:
    moved = (3, 0, 5, 1, 4, 2)

    def rank_main(me: VirtualRank) -> ExchangePlan:
        one = dispatcher(me, dedup=0)
        one.placement = Placement(E, E, me.world_size, moved, epoch=1)
        return planned(one, ids_of(me.rank))

    for plan in VirtualWorld(3).run(rank_main):
        for source in range(3):
            assert plan.counts.table is not None
            assert np.array_equal(plan.counts.table[source][:, np.argsort(moved)], block_counts(ids_of(source), E))


def test_too_many_rows_of_a_block_are_refused_on_all_ranks() -> None:
    def rank_main(me: VirtualRank) -> None:
        one, ids = dispatcher(me, dedup=0), torch.zeros(16 * (6 + me.rank), 1, dtype=torch.int32)
        with pytest.raises(ConfigError, match="x.shape.0. = 7: expected fewer tokens" if me.rank else "rank 1"):
            planned(one, ids)
        assert planned(one, ids[: 16 * 6]).rows_per_rank == (16 * 12, 0)

    with patch.object(counting, "MOST", 6), patch.object(dispatch, "MOST", 6):
        VirtualWorld(2).run(rank_main)


def test_work_between_begin_and_finish() -> None:
    """Of another layer, on all ranks alike; an error in it closes the transport."""

    def rank_main(me: VirtualRank) -> None:
        one, other, ids = dispatcher(me), dispatcher(me), ids_of(me.rank)
        begun = one.begin(ids, torch.zeros(len(ids), 4), serial())
        work = torch.ones(8, 8) @ torch.ones(8, 8)
        assert planned(other, ids).step == 1
        plan = one.finish(begun)
        assert plan.step == 1 and plan.counts.sent.sum() == ids.numel() and work[0, 0] == 8
        begun = one.begin(ids, torch.zeros(len(ids), 4), serial())
        me.barrier()
        if me.rank == 0:
            with pytest.raises(ZeroDivisionError), closing_on_error(one.transport, "B0"):
                1 / 0  # noqa: B018
        else:
            with pytest.raises(RemoteAbort, match="rank 0, B0: ZeroDivisionError"):
                while True:  # the step that was begun may have been agreed on
                    one.finish(begun)
                    begun = one.begin(ids, torch.zeros(len(ids), 4), serial())

    VirtualWorld(2).run(rank_main)
