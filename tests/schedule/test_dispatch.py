"""The dispatcher: what it counts and announces, and what it refuses on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import block_counts_of_rows
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.errors import ConfigError, PlanMismatch
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.builders import serial
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport import VirtualRank, VirtualWorld

E, K = 6, 3


def dispatcher(me: VirtualRank, *, dedup: int = 1) -> Dispatcher:
    return Dispatcher(transport=me.transport(), placement=Placement.identity(E, me.world_size), hidden=4, ffn_hidden=8,
                      top_k=K, activation="swiglu", dtype=torch.float32, dedup=dedup)  # fmt: skip


def ids_of(rank: int, tokens: int = 30) -> torch.Tensor:
    """int32 [T, K] without repetition."""
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :K].to(torch.int32)


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
