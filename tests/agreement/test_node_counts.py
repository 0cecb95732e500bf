"""(token, node) pairs in both forms of the agreement: the same integers, the closed form's bytes, the same errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_overlap.agreement.cost import agreement_cost
from moe_overlap.agreement.counts import BLOCKS, block_counts_of_rows
from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.agreement.node_plan import NodePlan, rows_plan
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.record import StepRecord
from moe_overlap.errors import ConfigError, PlanMismatch
from moe_overlap.transport import VirtualRank, VirtualWorld
from tests.strategies import make_routing
from tests.transport.worlds import header, record

WORLDS = [(4, 2), (6, 2), (6, 3), (8, 4)]  # ranks, ranks of a node
LOCAL = 2
CUTS: tuple[tuple[int, ChunkBy], ...] = ((1, "tokens"), (3, "tokens"), (16, "tokens"), (1, "experts"), (2, "experts"))


def ids_of(rank: int, world: int) -> torch.Tensor:
    return make_routing("with_unused", (5, 40, 0, 17, 33, 9, 21, 64)[rank], world * LOCAL, 5, seed=rank)[0]


def said(rank: int, world: int, node: int) -> StepRecord:
    counts, first, last, node_rows = block_counts_of_rows(ids_of(rank, world), world * LOCAL, world, world // node)
    one = record(counts, first=first, last=last, dedup=1, ranks_per_node=node, hierarchical=1)
    return replace(one, node_rows=node_rows)


def opened(me: VirtualRank, world: int, node: int, gathered_ranks: int) -> Any:
    transport = me.transport()
    transport.gathered_ranks = gathered_ranks
    transport.open(header(world * LOCAL, dedup=1, nodes=world // node))
    return transport


def derived(plan: ExchangePlan) -> list[Any]:
    """The integers of the plan's exchanges, cut in several ways."""
    known = plan.node_rows
    assert known is not None
    found: list[Any] = []
    for counts in (*known.across, *known.inside):
        loads = counts.loads(None)
        found += [counts.sent.tolist(), counts.received.tolist(), counts.totals.tolist(), loads.most.tolist(),
                  loads.blocks.tolist(), loads.slots.tolist()]  # fmt: skip
    for chunks, by in CUTS:
        cut = rows_plan(plan, chunks, by)
        assert isinstance(cut, NodePlan)
        for c in range(chunks):
            found += [part.counts(c, reverse=back) for part in (cut, cut.inside) for back in (False, True)]
            places = (cut.gateway_chunks(), cut.arrived_to_pass_on(c), cut.in_flat_order(c), cut.to_gateways(c),
                      cut.homewards(c))  # fmt: skip
            found.append([one.tolist() for one in places])
    return found


@pytest.mark.parametrize(("world", "node"), WORLDS)
def test_both_forms_know_the_same_and_send_what_the_closed_form_says(world: int, node: int) -> None:
    def rank_main(me: VirtualRank) -> None:
        plans = []
        for gathered_ranks in (64, 1):
            transport = opened(me, world, node, gathered_ranks)
            before = transport.stats.meta_bytes
            plans.append(transport.agree(said(me.rank, world, node)))
            cost = agreement_cost(ranks=world, experts=world * LOCAL, dedup=1, nodes=world // node,
                                  gathered_ranks=gathered_ranks, rank=me.rank)  # fmt: skip
            assert transport.stats.meta_bytes - before == cost.bytes
        assert derived(plans[0]) == derived(plans[1])

    VirtualWorld(world).run(rank_main)


@pytest.mark.parametrize(("world", "node"), WORLDS)
def test_every_row_goes_to_its_node_once_and_to_its_ranks_from_there(world: int, node: int) -> None:
    """Rows of each pair of ranks, counted from the tokens' choices."""
    rank_of = [[{s // LOCAL for s in row if s >= 0} for row in ids_of(rank, world).tolist()] for rank in range(world)]

    def rank_main(me: VirtualRank) -> NodePlan:
        plan = rows_plan(opened(me, world, node, 64).agree(said(me.rank, world, node)), 1)
        assert isinstance(plan, NodePlan)
        return plan

    plans = VirtualWorld(world).run(rank_main)
    for source in range(world):
        for target in range(world):
            across = 0
            if source // node == target // node and source != target:
                across = sum(target in ranks for ranks in rank_of[source])
            elif source % node == target % node and source != target:
                across = sum(any(rank // node == target // node for rank in ranks) for ranks in rank_of[source])
            inside = 0
            if source // node == target // node:
                senders = [rank for rank in range(world) if rank % node == source % node and rank != source]
                inside = sum(target in ranks for sender in senders for ranks in rank_of[sender])
            for part, rows in ((0, across), (1, inside)):
                out, into = (plans[rank] if part == 0 else plans[rank].inside for rank in (source, target))
                assert out.counts(0)[0][target] == into.counts(0)[1][source] == rows
                assert into.counts(0, reverse=True)[0][source] == out.counts(0, reverse=True)[1][target] == rows


@pytest.mark.parametrize("gathered_ranks", [64, 1])
def test_pairs_that_cannot_be_are_refused_on_all_ranks(gathered_ranks: int) -> None:
    def rank_main(me: VirtualRank) -> None:
        one = said(me.rank, 4, 2)
        if me.rank == 1:
            assert one.node_rows is not None
            one.node_rows[:, 3, 3] += 99
        with pytest.raises(PlanMismatch, match="rank 1 announced an impossible row count"):
            opened(me, 4, 2, gathered_ranks).agree(one)

    VirtualWorld(4).run(rank_main)


def test_a_record_without_them_is_refused_where_the_header_has_them() -> None:
    def rank_main(me: VirtualRank) -> None:
        for wrong in (None, torch.zeros(2, BLOCKS, 6, dtype=torch.int64)):
            with pytest.raises(ConfigError, match="record.node_rows.*the 2 nodes"):
                opened(me, 4, 2, 64).agree(replace(said(me.rank, 4, 2), node_rows=wrong))

    VirtualWorld(4).run(rank_main)
