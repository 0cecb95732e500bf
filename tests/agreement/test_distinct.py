"""The integers of deduplicated steps against rows that are really laid out, one list entry a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS, block_counts_of_rows
from moe_overlap.agreement.distinct import PAYS_BELOW, DistinctPlan, distinct_plan, pays
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from tests.strategies import make_routing

CUTS = [(c, by) for by in ("tokens", "experts") for c in (1, 2, 3, 8, 16)]


def exchange_of(ids_by_rank: list[torch.Tensor], slots: int, rank: int) -> ExchangePlan:
    world = len(ids_by_rank)
    tables = [block_counts_of_rows(ids, slots, world) for ids in ids_by_rank]
    counts, first, last = (np.stack([table[i].numpy() for table in tables]) for i in range(3))
    return ExchangePlan(rank=rank, world_size=world, step=1, phase="forward", grad_enabled=True, x_requires_grad=True,
                        counts=Counts.of(counts, rank), dedup=1, first=Counts.of(first, rank),
                        last=Counts.of(last, rank))  # fmt: skip


def chunk_of(plan: DistinctPlan, tokens: int, token: int, slot: int) -> int:
    """The chunk that a choice belongs to."""
    if plan.by == "experts":
        ends = [plan.local_slots * (c + 1) // plan.chunks for c in range(plan.chunks)]
        return next(c for c, end in enumerate(ends) if slot % plan.local_slots < end)
    block = next(b for b in range(BLOCKS) if b * tokens // BLOCKS <= token < (b + 1) * tokens // BLOCKS)
    return next(c for c in range(plan.chunks) if block < BLOCKS * (c + 1) // plan.chunks)


@pytest.mark.parametrize("kind", ["uniform", "with_unused", "one_expert", "nobody"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("chunks", "by"), CUTS)
def test_rows_go_with_the_first_chunk_and_come_back_with_the_last(chunks, by, world, kind):
    slots, local = 8 * world, 8
    ids = [make_routing(kind, (5, 40, 0, 17)[rank], slots, 5, seed=rank)[0] for rank in range(world)]
    plans = [distinct_plan(exchange_of(ids, slots, rank), chunks, by) for rank in range(world)]
    for source in range(world):
        tokens = len(ids[source])
        for target in range(world):
            there = [sorted(s for s in row if s >= 0 and s // local == target) for row in ids[source].tolist()]
            rows = [(t, found) for t, found in enumerate(there) if found]
            plan, other = plans[source], plans[target]
            if source == target:
                assert plan.own_rows == len(rows)
                assert all(not plan.counts(c, reverse=r)[0][source] for c in range(chunks) for r in (False, True))
                continue
            for chunk in range(chunks):
                first = [t for t, found in rows if chunk_of(plan, tokens, t, found[0]) == chunk]
                last = [t for t, found in rows if chunk_of(plan, tokens, t, found[-1]) == chunk]
                assert plan.counts(chunk)[0][target] == other.counts(chunk)[1][source] == len(first)
                assert plan.counts(chunk, reverse=True)[1][target] == len(last)
                assert other.counts(chunk, reverse=True)[0][source] == len(last)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("chunks", "by"), CUTS)
def test_ranges_of_the_experts_rows_cover_them_once(chunks, by, world):
    slots = 8 * world
    ids = [make_routing("uniform", (5, 40, 17)[rank], slots, 5, seed=rank)[0] for rank in range(world)]
    for rank in range(world):
        plan = distinct_plan(exchange_of(ids, slots, rank), chunks, by)
        own = [plan.own_expert_rows(first, last) for first, last in ((0, 3), (3, 8))]
        ranges = [*own, *(plan.expert_rows(c) for c in range(chunks))]
        covered = np.zeros(plan.expert_total, dtype=int)
        for starts, ends in ranges:
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                covered[start:end] += 1
        assert (covered == 1).all()
        whole = torch.cat(ids).reshape(-1)
        mine = [int((whole == slot).sum()) for slot in range(8 * rank, 8 * rank + 8)]
        assert plan.expert_offs.tolist() == np.cumsum(mine).tolist()


def test_distinct_order_of_the_docstring():
    first = np.zeros((2, BLOCKS, 2), dtype=np.int64)
    first[0, 0, 0], first[1, 0, 0], first[1, 1, 0] = 1, 2, 1

    def plan_of(first: np.ndarray, world: int) -> DistinctPlan:
        rows = Counts.of(first, 0)
        exchange = ExchangePlan(rank=0, world_size=world, step=1, phase="forward", grad_enabled=True,
                                x_requires_grad=True, counts=rows, dedup=1, first=rows, last=rows)  # fmt: skip
        return distinct_plan(exchange, 1)

    assert plan_of(first, 2).distinct_order.tolist() == [1, 2, 3]
    wider = np.zeros((3, BLOCKS, 3), dtype=np.int64)
    wider[:2, :, 0], wider[2, 0, 0] = first[:, :, 0], 1
    assert plan_of(wider, 3).distinct_order.tolist() == [1, 2, 4, 3]


def test_payload_of_two_ranks_is_the_closed_form():
    """k of E distinct experts over 2 ranks: a token reaches the other one with 1 - C(E/2, k) / C(E, k)."""
    ids = [make_routing("uniform", 20000, 32, 8, seed=rank)[0] for rank in range(2)]
    plan = distinct_plan(exchange_of(ids, 32, 0), 1)
    assert plan.outgoing_rows / 20000 == pytest.approx(0.99878, rel=1e-3)  # 1 - C(16, 8) / C(32, 8)


def test_it_pays_where_tokens_choose_several_experts_of_a_rank():
    def exchange(top_k: int, kind: str = "uniform") -> ExchangePlan:
        return exchange_of([make_routing(kind, 4000, 32, top_k, seed=rank)[0] for rank in range(2)], 32, 0)

    assert PAYS_BELOW == 2 / 3
    assert pays(exchange(8)) and pays(exchange(4))
    assert not pays(exchange(2)) and not pays(exchange(1)) and not pays(exchange(8, "nobody"))
