"""Virtual ranks: right answers in every interleaving, and every mistake found at once."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import RowLayout
from moe_overlap.errors import (
    ConfigError,
    MoeTransportError,
    PlanMismatch,
    RemoteAbort,
    TransportClosed,
    TransportTimeout,
)
from moe_overlap.transport import VirtualRank, VirtualWorld
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, header, received, record, rows_of

LAYOUTS = [F32, RowLayout(width=5, dtype=torch.bfloat16), RowLayout(width=1, dtype=torch.float64)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("by", ["tokens", "experts"])
def test_exchange_is_the_reference_permutation(world: int, by: str) -> None:
    def rank_main(me: VirtualRank, seed: int) -> None:
        layout, chunks = LAYOUTS[seed % 3], (1, 2, 3, 16)[seed % 4]
        transport = me.transport()
        plan = agreed(transport, slots=2 * world, seed=seed).chunked(chunks, by=by)
        order = random.Random(seed + me.rank).sample(range(chunks), chunks)
        got = exchange_all(transport, plan, layout, wait_order=order, use_out=seed % 2 == 0)
        for chunk in range(chunks):
            assert torch.equal(got[chunk], received(me.rank, plan, chunk, layout))
            back = transport.start(got[chunk], plan, layout, chunk, reverse=True, action=f"C{chunk}").wait()
            assert torch.equal(back, rows_of(me.rank, plan, chunk, layout))
        assert transport.stats.exchanges == 2 * chunks and transport.stats.agreements == 1

    for seed in range(12):
        VirtualWorld(world, seed=seed).run(partial(rank_main, seed=seed))


def test_same_seed_same_interleaving_and_seeds_differ() -> None:
    def trace(seed: int) -> list[int]:
        order: list[int] = []

        def rank_main(me: VirtualRank) -> None:
            transport = me.transport()
            for step in range(4):
                plan = agreed(transport, slots=3, seed=step, step=step).chunked(2)
                exchange_all(transport, plan, F32, wait_order=[1, 0])
                order.append(me.rank)

        VirtualWorld(3, seed=seed).run(rank_main)
        return order

    traces = [trace(seed) for seed in range(6)]
    assert [trace(seed) for seed in range(6)] == traces
    assert len({tuple(order) for order in traces}) > 1


def test_only_one_rank_runs_at_a_time() -> None:
    running: list[int] = []

    def rank_main(me: VirtualRank) -> None:
        for _ in range(20):
            running.append(me.rank)
            time.sleep(0.0002)
            assert running == [me.rank]
            running.clear()
            me.barrier()

    VirtualWorld(4, seed=3).run(rank_main)


def test_deadlock_is_an_error_at_once_that_says_who_waits_for_whom() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=3, seed=0, step=7).chunked(1)
        if me.rank != 1:
            transport.start(rows_of(me.rank, plan, 0, F32), plan, F32, action="D0").wait()

    begin = time.monotonic()
    with pytest.raises(TransportTimeout) as caught:
        VirtualWorld(3).run(rank_main)
    assert time.monotonic() - begin < 100.0
    assert "rank 0 waits in dispatch D0 of step 7 (chunk 0) for rank 1" in str(caught.value)
    assert "rank 1 returned" in str(caught.value)
    assert (caught.value.peer, caught.value.step, caught.value.chunk, caught.value.action) == (1, 7, 0, "D0")


def test_first_error_is_raised_and_the_others_learn_of_it() -> None:
    seen: dict[int, BaseException] = {}

    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=3, seed=0).chunked(1)
        if me.rank == 2:
            raise KeyError("broken expert")
        try:
            transport.start(rows_of(me.rank, plan, 0, F32), plan, F32).wait()
        except RemoteAbort as error:
            seen[me.rank] = error
            raise

    with pytest.raises(KeyError, match="broken expert"):
        VirtualWorld(3, seed=1).run(rank_main)
    assert sorted(seen) == [0, 1]
    assert all("broken expert" in str(error) and error.peer == 2 for error in seen.values())


def test_barrier_learns_of_an_error() -> None:
    def rank_main(me: VirtualRank) -> None:
        if me.rank == 0:
            raise ValueError("first")
        with pytest.raises(RemoteAbort, match="first"):
            me.barrier()

    with pytest.raises(ValueError, match="first"):
        VirtualWorld(2).run(rank_main)


def test_both_sides_must_mean_the_same_exchange() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=2, seed=0, step=3)
        chunk_plan = plan.chunked(2 if me.rank == 0 else 4)
        rows = rows_of(me.rank, chunk_plan, 0, F32)
        with pytest.raises(PlanMismatch, match="chunk|rows"):
            transport.start(rows, chunk_plan, F32, 0).wait()
        with pytest.raises(TransportClosed) as closed:
            transport.agree(record(counts_of(me.rank, 2, 2, 0), step=4))
        assert isinstance(closed.value.__cause__, PlanMismatch)

    VirtualWorld(2).run(rank_main)


def test_both_sides_must_agree_on_row_counts() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=2, seed=0)
        if me.rank == 1:
            plan.counts.received[0, 0, 0] += 1
        chunk_plan = plan.chunked(1)
        with pytest.raises(PlanMismatch, match="rank 0 sends .* rows to rank 1, which expects"):
            transport.start(rows_of(me.rank, chunk_plan, 0, F32), chunk_plan, F32).wait()

    VirtualWorld(2).run(rank_main)


def test_changing_a_send_buffer_under_way_is_found() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=2, seed=0).chunked(1)
        rows = rows_of(me.rank, plan, 0, F32)
        work = transport.start(rows, plan, F32)
        if me.rank == 0:
            rows[0] += 1
            with pytest.raises(MoeTransportError, match="changed between start and wait"):
                work.wait()
        else:
            assert torch.equal(work.wait(), received(1, plan, 0, F32))

    VirtualWorld(2, seed=5).run(rank_main)


def test_nothing_can_be_read_before_it_arrives() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=2, seed=0).chunked(1)
        out = torch.zeros(plan.recv_rows[0], 3)
        work = transport.start(rows_of(me.rank, plan, 0, F32), plan, F32, out=out)
        assert out.isnan().all()
        assert work.wait() is out and not out.isnan().any()

    VirtualWorld(2).run(rank_main)


def test_close_tells_the_peers_and_reopen_gives_the_right_answer() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=3, seed=0).chunked(2)
        works = [transport.start(rows_of(me.rank, plan, c, F32), plan, F32, c) for c in range(2)]
        me.barrier()
        if me.rank == 1:
            transport.close("expert 5 is broken")
            with pytest.raises(TransportClosed):
                works[0].wait()
        else:
            with pytest.raises((RemoteAbort, TransportClosed)):
                works[0].wait()
                works[1].wait()
                transport.agree(record(counts_of(me.rank, 3, 3, 0), step=1))
        transport.reopen()
        plan = agreed(transport, slots=3, seed=2, step=0).chunked(2)
        got = exchange_all(transport, plan, F32, wait_order=[1, 0])
        assert all(torch.equal(got[c], received(me.rank, plan, c, F32)) for c in range(2))

    for seed in range(10):
        VirtualWorld(3, seed=seed).run(rank_main)


def test_refusal_is_raised_on_all_ranks_and_the_transport_stays_usable() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        transport.open(header(2))
        counts = counts_of(me.rank, 2, 2, 0)
        with pytest.raises(ConfigError, match="refused on rank 1") as caught:
            transport.agree(record(counts, step=0, status=5 if me.rank == 1 else 0, status_value=9))
        assert (caught.value.field, caught.value.value) == ("topk_ids", 9)
        assert transport.agree(record(counts, step=0)).step == 0

    VirtualWorld(2).run(rank_main)


def test_mismatches_are_found_on_all_ranks() -> None:
    def rank_main(me: VirtualRank) -> None:
        changes = {"chunks": 2} if me.rank == 1 else {}
        transport = me.transport()
        transport.open(header(3))
        with pytest.raises(PlanMismatch, match="chunks"):
            transport.agree(record(counts_of(me.rank, 3, 3, 0), **changes))
        transport = me.transport()
        with pytest.raises(PlanMismatch, match="configuration"):
            transport.open(header(3, hidden=64 if me.rank == 1 else 32))
        transport = me.transport()
        transport.open(header(3))
        with pytest.raises(ConfigError, match="open for"):
            transport.open(header(6))

    VirtualWorld(3).run(rank_main)


def test_several_transports_outlive_a_run() -> None:
    world = VirtualWorld(2, seed=4)

    def first(me: VirtualRank) -> tuple:
        pair = me.transport(), me.transport()
        assert pair[0] is not pair[1]
        plans = [agreed(transport, slots=2, seed=3).chunked(1) for transport in pair]
        return pair, plans, pair[0].start(rows_of(me.rank, plans[0], 0, F32), plans[0], F32)

    kept = world.run(first)

    def second(me: VirtualRank) -> None:
        transports, plans, work = kept[me.rank]
        assert torch.equal(work.wait(), received(me.rank, plans[0], 0, F32))
        for transport, plan in zip(transports, plans, strict=True):
            got = exchange_all(transport, plan, F32, wait_order=[0])
            assert torch.equal(got[0], received(me.rank, plan, 0, F32))

    world.run(second)
    with pytest.raises(ConfigError, match="inside VirtualWorld.run"):
        exchange_all(kept[0][0][0], kept[0][1][0], F32, wait_order=[0])


def test_torch_state_of_the_caller_is_carried() -> None:
    def rank_main(me: VirtualRank) -> tuple:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    world = VirtualWorld(2)
    assert world.run(rank_main) == [(True, False, False)] * 2
    with torch.no_grad():
        assert world.run(rank_main) == [(False, False, False)] * 2
    with torch.inference_mode():
        assert world.run(rank_main) == [(False, True, False)] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert world.run(rank_main) == [(True, False, True)] * 2
        product = world.run(lambda me: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        assert product == [torch.bfloat16] * 2


def test_backward_waits_like_forward() -> None:
    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, transport, plan):
            ctx.transport, ctx.plan = transport, plan
            return transport.start(rows, plan, F32).wait()

        @staticmethod
        def backward(ctx, grad):
            return ctx.transport.start(grad.contiguous(), ctx.plan, F32, reverse=True, action="Dt").wait(), None, None

    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=4, seed=0).chunked(1)
        rows = rows_of(me.rank, plan, 0, F32).requires_grad_()
        out = Exchange.apply(rows, transport, plan)
        (out * out).sum().backward()
        assert torch.equal(rows.grad, 2 * rows)

    for seed in range(5):
        VirtualWorld(4, seed=seed).run(rank_main)


def test_all_reduce_sums_in_rank_order() -> None:
    def rank_main(me: VirtualRank) -> None:
        values = [1e8, 1.0, -1e8]
        tensor = torch.full((4,), values[me.rank])
        assert me.transport().all_reduce(tensor).wait() is tensor
        expected = torch.tensor(values[0]) + torch.tensor(values[1]) + torch.tensor(values[2])
        assert torch.equal(tensor, expected.expand(4))
        with pytest.raises(PlanMismatch, match="different tensors"):
            me.transport().all_reduce(torch.ones(2 + me.rank))

    VirtualWorld(3).run(rank_main)


def test_polling_ends() -> None:
    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        plan = agreed(transport, slots=2, seed=0).chunked(1)
        work = transport.start(rows_of(me.rank, plan, 0, F32), plan, F32)
        while not work.done():
            pass
        assert work.interval() is None
        work.wait()
        assert work.interval() is not None

    VirtualWorld(2).run(rank_main)


def test_real_time_limit_names_the_rank_that_holds_the_baton() -> None:
    def rank_main(me: VirtualRank) -> None:
        if me.rank == 1:
            time.sleep(1.0)
        me.barrier()

    before = threading.active_count()
    with pytest.raises(TransportTimeout, match="while rank 1 was running"):
        VirtualWorld(2).run(rank_main, timeout_s=0.2)
    assert threading.active_count() == before


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="world_size = 0"):
        VirtualWorld(0)

    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        with pytest.raises(ConfigError, match=r"open\(header\)"):
            transport.agree(record(counts_of(0, 1, 1, 0)))
        transport.reopen()
        plan = agreed(transport, slots=1, seed=0).chunked(1)
        with pytest.raises(ConfigError, match="rows = .*float64"):
            transport.start(torch.zeros(plan.send_rows[0], 3, dtype=torch.float64), plan, F32)
        transport.reopen()
        transport.open(header(1))
        with pytest.raises(ConfigError, match="chunk = 3"):
            transport.start(torch.zeros(plan.send_rows[0], 3), plan, F32, 3)
        transport.reopen()
        transport.open(header(1))
        with pytest.raises(ConfigError, match="record.counts"):
            transport.agree(record(torch.zeros(BLOCKS, 2, dtype=torch.int64)))

    VirtualWorld(1).run(rank_main)


def test_who_closes_after_an_error_that_all_ranks_raise_takes_it_from_nobody() -> None:
    """As over a network: the connections have to stay until all have heard what they disagree about."""

    def rank_main(me: VirtualRank) -> None:
        transport = me.transport()
        with pytest.raises(PlanMismatch):
            transport.open(header(2 + me.rank % 2))
        transport.close("a second reason")

    for seed in range(10):
        VirtualWorld(3, seed=seed).run(rank_main)
