"""The two forms of the agreement, all counts gathered or each sent to whom it concerns: the same plans and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_overlap import MoELayer
from moe_overlap.agreement.agree import Exchanged
from moe_overlap.agreement.cost import Grid, agreement_cost
from moe_overlap.agreement.counts import BLOCKS, block_counts, block_counts_of_rows
from moe_overlap.agreement.distinct import distinct_plan, pays
from moe_overlap.agreement.loads import Counts, of_rank, of_table
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan
from moe_overlap.agreement.record import StepRecord, compare
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.calibrate import step_shape
from moe_overlap.auto.kinds import step_kind
from moe_overlap.errors import ConfigError, PlanMismatch, RemoteAbort, TransportClosed
from moe_overlap.placement.placement import Placement
from moe_overlap.transport import ProcessGroupTransport, VirtualRank, VirtualWorld, connections
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error
from tests.ranks import gloo_pool
from tests.tolerances import same_bits
from tests.transport.worlds import F32, header, record

Make = Callable[[], Any]
CUTS = [(chunks, by) for by in ("tokens", "experts") for chunks in (1, 2, 3, 5, 16)]


def said(rank: int, world: int, local: int, *, dedup: int = 0, seed: int = 0, **changes: Any) -> StepRecord:
    """The record of a rank whose tokens chose slots at random: many on some ranks, none on others."""
    slots, tokens = world * local, (0, 40, 7, 100, 16, 33)[(rank + seed) % 6]
    generator = torch.Generator().manual_seed(100 * seed + rank)
    ids = torch.rand(tokens, slots, generator=generator).argsort(dim=1)[:, : min(3, slots)].to(torch.int32)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -1, ids).to(torch.int32)
    if dedup == 1:
        counts, first, last = block_counts_of_rows(ids, slots, world)
        one = record(counts, first=first, last=last, dedup=1)
    else:
        one = record(block_counts(ids, slots), dedup=dedup)
    return replace(one, **changes)


def both(make: Make, slots: int, *, dedup: int = 0) -> tuple[Any, Any]:
    """A transport that gathers and one that exchanges, both open."""
    gathering, exchanging = make(), make()
    exchanging.gathered_ranks = 1
    for one in (gathering, exchanging):
        one.open(header(slots, dedup=dedup))
    return gathering, exchanging


def of_chunks(plan: ChunkPlan) -> list[Any]:
    counts = [plan.counts(c, reverse=reverse) for c in range(plan.chunks) for reverse in (False, True)]
    rows = [[one.tolist() for one in plan.expert_rows(c)] for c in range(plan.chunks)]
    return [counts, rows, plan.stays_local, plan.expert_offs.tolist()]


def derived(plan: ExchangePlan, nodes: tuple[int, ...] | None) -> list[Any]:
    """Everything that a rank takes from a plan."""
    found: list[Any] = [plan.rows_per_rank, plan.x_requires_grad, plan.grad_enabled, plan.phase, plan.step, plan.dedup]
    for table in (plan.counts, plan.first, plan.last):
        if table is not None:
            found += [table.sent.tolist(), table.received.tolist(), table.totals.tolist()]
            found += [table.most_sent, table.rows_away]
    for chunks, by in CUTS:
        cut = plan.chunked(chunks, by)  # type: ignore[arg-type]
        orders = [cut.buffer_order(c).tolist() for c in range(chunks)]
        shapes = [step_shape(cut, row_bytes=6, nodes=nodes, joined=joined) for joined in (False, True)]
        found += [of_chunks(cut), orders, shapes]
        if plan.dedup == 1:
            found.append(of_chunks(distinct_plan(plan, chunks, by)))  # type: ignore[arg-type]
    return [*found, step_kind(plan, row_bytes=6, nodes=nodes), pays(plan) if plan.dedup == 1 else None]


def same_plans(make: Make, rank: int, world: int, dedup: int) -> None:
    local = 3
    gathering, exchanging = both(make, world * local, dedup=dedup)
    nodes_of_ranks = [None, tuple(rank // 2 for rank in range(world))]
    order = [(7 * i + 3) % (world * local) for i in range(world * local)]
    moved = Placement(world * local, world * local, world, tuple(int(i) for i in np.argsort(np.argsort(order))))
    for seed in range(6):
        nodes = nodes_of_ranks[seed % 2]
        # With another placement the histograms of rows would not fit these counts.
        seats = seats_of(moved) if seed > 2 and dedup != 1 else None
        one = said(rank, world, local, dedup=dedup, seed=seed, nodes=nodes, seats=seats, step=seed)
        plans = [transport.agree(one) for transport in (gathering, exchanging)]
        assert plans[0].counts.table is not None and plans[1].counts.table is None
        wanted, got = (derived(plan, nodes) for plan in plans)
        assert wanted == got, seed


@pytest.mark.parametrize("dedup", [0, 1])
@pytest.mark.parametrize("world", [2, 3, 4, 5, 6])
def test_both_forms_come_to_the_same(world: int, dedup: int) -> None:
    VirtualWorld(world, seed=world).run(lambda me: same_plans(me.transport, me.rank, world, dedup))


def same_plans_of_group(dedup: int) -> None:
    same_plans(partial(ProcessGroupTransport, timeout_s=20), dist.get_rank(), dist.get_world_size(), dedup)


@pytest.mark.parametrize("dedup", [0, 1])
def test_both_forms_come_to_the_same_over_gloo(dedup: int) -> None:
    gloo_pool(2).run(same_plans_of_group, dedup)


def test_the_reduced_loads_are_those_of_the_whole_table() -> None:
    world, local = 5, 4
    table = np.random.default_rng(0).integers(0, 9, (world, BLOCKS, world * local))
    for nodes in (None, (0, 0, 1, 2, 2)):
        whole, ranks = of_table(table, nodes), []
        for rank in range(world):
            mine = Counts.of(table, rank)
            ranks.append(of_rank(mine.sent, mine.received, rank=rank, nodes=nodes))
        assert np.array_equal(whole.most, np.max([one.most for one in ranks], axis=0))
        for name in ("blocks", "slots"):
            assert np.array_equal(getattr(whole, name), np.sum([getattr(one, name) for one in ranks], axis=0))


def test_other_nodes_than_those_agreed_with_are_refused() -> None:
    def rank_main(me: VirtualRank) -> None:
        _, exchanging = both(me.transport, 4)
        plan = exchanging.agree(said(me.rank, 2, 2, nodes=(0, 0)))
        assert plan.counts.loads((0, 0)).nodes == (0, 0)
        with pytest.raises(ConfigError, match="nodes"):
            plan.counts.loads(None)

    VirtualWorld(2).run(rank_main)


MISMATCHES: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"step": 9}, PlanMismatch), ({"schedule_digest": 9}, PlanMismatch), ({"router_state": 9}, PlanMismatch),
    ({"placement_epoch": 9}, PlanMismatch), ({"dedup": 2}, PlanMismatch),
    ({"status": 1, "status_value": 5}, ConfigError), ({"status": 6, "counts": torch.zeros(BLOCKS, 6)}, ConfigError),
]  # fmt: skip


@pytest.mark.parametrize("changes, kind", MISMATCHES, ids=lambda value: str(value)[:20])
def test_both_forms_refuse_alike(changes: dict[str, Any], kind: type[Exception]) -> None:
    """The same text on all ranks, and as often usable after it."""
    if "counts" in changes:
        changes = changes | {"counts": changes["counts"].to(torch.int64)}

    def rank_main(me: VirtualRank) -> list[str]:
        texts = []
        for transport in both(me.transport, 6):
            good = said(me.rank, 3, 2)
            with pytest.raises(kind) as caught:
                transport.agree(replace(good, **changes) if me.rank == 1 else good)
            assert getattr(caught.value, "rank", me.rank) == me.rank
            texts.append(str(caught.value))
            if kind is ConfigError:
                assert transport.agree(good).step == 0
            else:
                with pytest.raises(TransportClosed):
                    transport.agree(good)
        return texts

    texts = VirtualWorld(3).run(rank_main)
    assert all(gathered == exchanged for gathered, exchanged in texts)


HOSTILE = {"negative": (0, -1), "no choice for a row": (1, 1), "never ends": (2, 1)}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("slot", [0, 4])
def test_both_forms_refuse_what_cannot_be_on_all_ranks(name: str, slot: int) -> None:
    """A count that is wrong for one rank alone: the others, which have not heard it, raise as well."""
    table, change = HOSTILE[name]

    def rank_main(me: VirtualRank) -> list[str]:
        texts = []
        for transport in both(me.transport, 6, dedup=1):
            one = said(me.rank, 3, 2, dedup=1)
            if me.rank:  # the first of both is named
                for each in one.tables[:1] if table == 0 else one.tables:
                    each[3, slot] = 0
                one.tables[table][3, slot] = change
            with pytest.raises(PlanMismatch, match="rank 1 announced an impossible row count") as caught:
                transport.agree(one)
            texts.append(str(caught.value))
        return texts

    texts = VirtualWorld(3).run(rank_main)
    assert all(gathered == exchanged for gathered, exchanged in texts)


def other_forms() -> None:
    transport = ProcessGroupTransport(timeout_s=20)
    transport.gathered_ranks = 1 + dist.get_rank()
    with pytest.raises(PlanMismatch, match="rank 1 opened this transport for another configuration"):
        transport.open(header(2))


def test_ranks_of_different_forms_do_not_open() -> None:
    gloo_pool(2).run(other_forms)


@pytest.mark.parametrize("gathered_ranks", [1, 64])
@pytest.mark.parametrize("world, local, dedup", [(1, 3, 0), (2, 5, 0), (4, 5, 1), (4, 1, 1), (6, 20, 1), (3, 40, 0)])
def test_bytes_and_messages_are_the_closed_form(world: int, local: int, dedup: int, gathered_ranks: int) -> None:
    def rank_main(me: VirtualRank) -> int:
        transport = me.transport()
        transport.gathered_ranks = gathered_ranks
        transport.open(header(world * local, dedup=int(dedup == 1)))
        before, messages = transport.stats.meta_bytes, []
        for name in ("_swap", "_send"):
            setattr(transport, name, _counting(getattr(transport, name), messages, world))
        transport.agree(said(me.rank, world, local, dedup=dedup))
        cost = agreement_cost(ranks=world, experts=world * local, dedup=dedup, gathered_ranks=gathered_ranks,
                              rank=me.rank)  # fmt: skip
        assert transport.stats.meta_bytes - before == cost.bytes == cost.bytes_to(set(range(world)) - {me.rank})
        assert (sum(messages), len(messages)) == (cost.messages, len(cost.rounds))
        return cost.bytes

    assert len(set(VirtualWorld(world).run(rank_main))) == 1


def _counting(call: Any, messages: list[int], world: int) -> Any:
    def counted(words: torch.Tensor, *args: Any) -> Any:
        messages.append(len(args[0]) - 1 if isinstance(args[0], range) else world - 1)
        return call(words, *args)

    return counted


def bytes_of_group(gathered_ranks: int) -> None:
    """On a grid of 2 x 2: the groups for its rows and columns are there when that many ranks are many."""
    world, rank = dist.get_world_size(), dist.get_rank()
    with patch.object(connections, "GATHERED_RANKS", gathered_ranks):
        make = partial(ProcessGroupTransport, timeout_s=20, lane=f"grid {gathered_ranks}")
        transports = both(make, 3 * world)
    for transport, limit in zip(transports, (64, 1), strict=True):
        before = transport.stats.meta_bytes
        transport.agree(said(rank, world, 3))
        cost = agreement_cost(ranks=world, experts=3 * world, gathered_ranks=limit, grid=transport._grid,
                              capacity=transport.life.capacity, rank=rank)  # fmt: skip
        assert transport.stats.meta_bytes - before == cost.bytes
        assert cost.messages == (3 if limit == 64 else 12 if gathered_ranks == 64 else 8)
    same_plans(make, rank, world, 1)
    for transport in transports:
        transport.close("enough")
    transports[1].reopen()
    transports[1].open(header(3 * world))
    assert transports[1].agree(said(rank, world, 3)).step == 0


@pytest.mark.parametrize("gathered_ranks", [1, 64])
def test_bytes_over_gloo_are_the_closed_form(gathered_ranks: int) -> None:
    gloo_pool(4).run(bytes_of_group, gathered_ranks)


def test_the_agreement_of_4096_ranks_is_under_a_millisecond() -> None:
    """By the model, at a microsecond a message; the first version took 43 ms for its bytes alone."""
    cost = agreement_cost(ranks=4096, experts=4096)
    assert (cost.messages, len(cost.rounds)) == (8 * 63, 8)
    assert cost.seconds(latency_s=10e-6, message_s=1e-6, bytes_per_s=50e9) < 1e-3
    with_rows = agreement_cost(ranks=4096, experts=4096, dedup=1)
    assert with_rows.seconds(latency_s=10e-6, message_s=1e-6, bytes_per_s=50e9) < 1e-3
    assert 4096 * BLOCKS * 4096 * 8 / 50e9 == pytest.approx(43e-3, rel=0.01)
    gathered = agreement_cost(ranks=4096, experts=4096, gathered_ranks=4096)
    assert gathered.bytes == pytest.approx(4096 * BLOCKS * 4096 * 4, rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2, 7, 12, 36, 4096])
def test_rows_and_columns_of_the_grid_part_the_ranks(ranks: int) -> None:
    grid = Grid.of(ranks)
    assert grid.rows <= grid.columns and grid.rows * grid.columns == ranks
    for rank in (0, ranks // 2, ranks - 1):
        row, column = grid.row(rank), grid.column(rank)
        assert rank in row and rank in column and len(row) == grid.columns and len(column) == grid.rows
        assert all(grid.row(other) == row for other in row) and all(grid.column(other) == column for other in column)


def test_other_work_may_be_done_before_the_plan_is_waited_for() -> None:
    def rank_main(me: VirtualRank) -> None:
        for transport, other in zip(both(me.transport, 4), both(me.transport, 4), strict=True):
            one = said(me.rank, 2, 2)
            asked = transport.begin_agree(one)
            plan = other.agree(said(me.rank, 2, 2, seed=1)).chunked(1)  # another layer, on connections of its own
            rows = torch.zeros(plan.send_rows[0], 3)
            other.start(rows, plan, F32).wait()
            assert asked.wait().counts.sent.tolist() == one.counts.tolist()

    VirtualWorld(2).run(rank_main)


def test_an_error_before_the_plan_closes_the_transport() -> None:
    def rank_main(me: VirtualRank) -> None:
        for transport in both(me.transport, 4):
            asked = transport.begin_agree(said(me.rank, 2, 2))
            me.barrier()
            if me.rank == 0:
                with pytest.raises(ZeroDivisionError), closing_on_error(transport, "B0"):
                    1 / 0  # noqa: B018
                with pytest.raises(TransportClosed):
                    asked.wait()
            else:
                with pytest.raises(RemoteAbort, match="ZeroDivisionError"):
                    while True:  # this step may have been agreed on already
                        asked.wait()
                        asked = transport.begin_agree(said(me.rank, 2, 2))

    VirtualWorld(2).run(rank_main)


def test_nothing_is_said_between_the_messages_of_an_exchanged_agreement() -> None:
    def rank_main(me: VirtualRank) -> None:
        _, transport = both(me.transport, 4)
        transport.begin_agree(said(me.rank, 2, 2))
        me.barrier()
        with pytest.raises(ConfigError, match="a step whose plan nobody has waited for"):
            transport.all_reduce(torch.ones(1))
        transport.reopen()
        transport.open(header(4))
        assert transport.agree(said(me.rank, 2, 2)).step == 0

    VirtualWorld(2).run(rank_main)


def test_a_count_that_does_not_fit_is_refused() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport: Transport = me.transport()
        transport.open(header(2))
        counts = torch.zeros(BLOCKS, 2, dtype=torch.int64)
        counts[0, 1] = 2**31 - 1
        assert transport.agree(record(counts)).rows_per_rank == (2**31 - 1,)
        counts[0, 1] += 1
        with pytest.raises(ConfigError, match="record.counts = 2147483648"):
            transport.agree(record(counts))

    VirtualWorld(1).run(rank_main)


def test_the_parts_are_the_counts_of_the_slots_of_each_rank() -> None:
    records = [said(rank, 2, 3, dedup=1, seed=2) for rank in range(2)]
    column = compare(torch.stack([one.named_fields for one in records]), rank=0)
    parts = Exchanged(records[1], column, rank=1).parts()
    assert parts.dtype == torch.int32 and parts.shape == (2, 3 * BLOCKS * 3)
    for table, part in zip(records[1].tables, parts[0].reshape(3, BLOCKS, 3), strict=True):
        assert torch.equal(table[:, :3].to(torch.int32), part)


@pytest.mark.parametrize("options", [{"schedule": "serial"}, {"schedule": "chunked(4)"}, {"dedup": "on"}], ids=str)
def test_a_layer_computes_the_same_bits(options: dict[str, Any]) -> None:
    """Forward, backward and a recompute in it; statistics too."""

    def rank_main(me: VirtualRank) -> None:
        seen = []
        for gathered_ranks in (64, 1):
            transport = me.transport()
            transport.gathered_ranks = gathered_ranks
            torch.manual_seed(0)
            layer = MoELayer(8, 12, 8, 3, transport=transport, **options)
            x = torch.randn(9 + me.rank, 8, generator=torch.Generator().manual_seed(me.rank)).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=False)
            (y * y).sum().backward()
            stats = layer.stats()
            assert (layer.last_exchange.counts.table is None) == (gathered_ranks == 1)
            assert x.grad is not None
            seen.append([y, x.grad, *(p.grad for p in layer.parameters()), stats.tokens_per_expert, stats.overload])
        for gathered, exchanged in zip(*seen, strict=True):
            same_bits(torch.as_tensor(gathered), torch.as_tensor(exchanged))

    VirtualWorld(4).run(rank_main)
