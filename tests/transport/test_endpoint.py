"""What the transports that move bytes share: who is poisoned by what, what is counted, what an error says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from moe_overlap.agreement.message import HEAD_WORDS
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch, TransportClosed, TransportTimeout
from moe_overlap.transport import LocalTransport, ProcessGroupTransport, VirtualRank, VirtualTransport, VirtualWorld
from moe_overlap.transport.base import Transport
from moe_overlap.transport.endpoint import checked_timeout
from moe_overlap.transport.exchange import Exchange
from tests.ranks import gloo_pool
from tests.transport.worlds import F32, agreed, counts_of, header, plan_of, record, rows_of

PLAN = plan_of(1, 2, 0).chunked(2)
ROWS = rows_of(0, PLAN, 1, F32)
MISTAKES: dict[str, Callable[[Transport], object]] = {
    "chunk = 2: expected an integer from 0 to 1": lambda one: one.start(ROWS, PLAN, F32, 2),
    "rows = 'contiguous torch.float64": lambda one: one.start(ROWS.double(), PLAN, F32, 1),
    "rows = 'non-contiguous torch.float32": lambda one: one.start(
        torch.zeros(len(ROWS), 6)[:, ::2], PLAN, F32, 1, out=torch.empty(99, 3)
    ),
    "out = 'contiguous torch.float32": lambda one: one.start(ROWS, PLAN, F32, 1, out=torch.empty(99, 3)),
    "record.counts": lambda one: one.agree(record(counts_of(0, 1, 3, 0))),
}


def in_each_world(rank_main: Callable[[Callable[[], Transport]], None]) -> None:
    """Of one rank: alone, and as a virtual one."""
    rank_main(LocalTransport)
    VirtualWorld(1).run(lambda me: rank_main(me.transport))


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_an_argument_poisons_and_is_not_counted(text: str) -> None:
    def rank_main(make: Callable[[], Transport]) -> None:
        transport = make()
        transport.open(header(2))
        with pytest.raises(ConfigError) as caught:
            MISTAKES[text](transport)
        assert str(caught.value).startswith(text)
        for call in (
            lambda: transport.start(ROWS, PLAN, F32, 9),
            lambda: transport.agree(record(counts_of(0, 1, 2, 0))),
            lambda: transport.open(header(2)),
            lambda: transport.all_reduce(torch.ones(1)),
        ):
            with pytest.raises(TransportClosed) as closed:
                call()
            assert str(closed.value.__cause__) == str(caught.value)
        assert transport.stats.exchanges == transport.stats.agreements == 0
        transport.reopen()
        assert agreed(transport, slots=2, seed=0).step == 0
        assert torch.equal(transport.start(ROWS, PLAN, F32, 1).wait(), ROWS)
        assert transport.stats.exchanges == transport.stats.agreements == 1

    in_each_world(rank_main)


def test_a_record_before_open_is_refused() -> None:
    def rank_main(make: Callable[[], Transport]) -> None:
        transport = make()
        with pytest.raises(ConfigError, match=f"transport = '{transport.name}': .* that open.header. was called on"):
            transport.agree(record(counts_of(0, 1, 2, 0)))
        with pytest.raises(TransportClosed):
            transport.open(header(2))

    in_each_world(rank_main)


def test_another_header_is_refused_and_poisons_nobody() -> None:
    def rank_main(make: Callable[[], Transport]) -> None:
        transport = make()
        assert transport.open(header(2)) and not transport.open(header(2))
        with pytest.raises(ConfigError, match="the header this transport is open for"):
            transport.open(header(4))
        assert not transport.open(header(2))

    in_each_world(rank_main)


def test_counts_that_cannot_be_poison_all_but_a_rank_alone() -> None:
    def rank_main(make: Callable[[], Transport]) -> None:
        transport = make()
        transport.open(header(2))
        with pytest.raises(PlanMismatch, match="impossible row count"):
            transport.agree(record(counts_of(0, 1, 2, 0) - 1))
        assert transport.stats.agreements == 1
        if isinstance(transport, VirtualTransport):
            with pytest.raises(TransportClosed):
                transport.agree(record(counts_of(0, 1, 2, 0)))
        else:
            assert transport.agree(record(counts_of(0, 1, 2, 0))).step == 0

    in_each_world(rank_main)


def test_virtual_ranks_count_what_arrived() -> None:
    transports: dict[int, VirtualTransport] = {}

    def rank_main(me: VirtualRank) -> None:
        transports[me.rank] = transport = me.transport()
        transport.open(header(2))
        if me.rank == 0:
            transport.agree(record(counts_of(0, 2, 2, 0)))

    with pytest.raises(TransportTimeout):
        VirtualWorld(2).run(rank_main)
    assert transports[0].stats == transports[1].stats
    assert (transports[0].stats.agreements, transports[0].stats.meta_bytes) == (0, (HEAD_WORDS + 64) * 8)


def test_every_rank_names_the_same_odd_header() -> None:
    peers: dict[int, int | None] = {}

    def rank_main(me: VirtualRank) -> None:
        with pytest.raises(
            PlanMismatch,
            match=r"^rank 2 opened this transport for another configuration than rank 0 \(hidden: 32 and 64\)",
        ) as caught:
            me.transport().open(header(3, hidden=64 if me.rank == 2 else 32))
        assert (caught.value.rank, caught.value.action) == (me.rank, "open")
        peers[me.rank] = caught.value.peer

    VirtualWorld(3).run(rank_main)
    assert peers == {0: 2, 1: 2, 2: 0}


def group_counts() -> None:
    """A network counts what it is about to send; rows that stay are exchanges without payload."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=20)
    plan = agreed(transport, slots=4, seed=0).chunked(2)
    for chunk in range(2):
        transport.start(rows_of(rank, plan, chunk, F32), plan, F32, chunk).wait()
    sent = sum(sum(row) - row[rank] for row in plan.send_counts)
    words = 2 * (HEAD_WORDS + 64)  # a record of four experts has room in it
    stats = transport.stats
    assert (stats.exchanges, stats.agreements) == (2, 1)
    assert (stats.payload_bytes, stats.meta_bytes) == (sent * F32.row_bytes, words * 8)
    transport.close("enough")
    with pytest.raises(MoeTransportError):
        transport.start(rows_of(rank, plan, 0, F32), plan, F32)
    assert stats.exchanges == 2
    transport.reopen()


def test_a_group_counts_what_it_sends() -> None:
    gloo_pool(2).run(group_counts)


def test_the_adjoint_swaps_the_lists() -> None:
    plan = plan_of(3, 3, 0, rank=1, step=6).chunked(2)
    there = Exchange(ROWS, plan, F32, 1, False, None, "D1")
    back = there._replace(reverse=True, action="C1")
    assert there.counts() == (plan.send_counts[1], plan.recv_counts[1])
    assert back.counts() == there.counts()[::-1] and there.counts()[0] != there.counts()[1]
    assert str(back.where()) == "combine C1 of step 6 (chunk 1)"


def test_the_first_cause_stays() -> None:
    def rank_main(transport: Callable[[], Transport]) -> None:
        one = transport()
        one.open(header(2))
        one.close("the first")
        one.close("the second")
        with pytest.raises(TransportClosed, match="the first") as caught:
            one.open(header(2))
        assert str(caught.value.__cause__) == "the first"

    in_each_world(rank_main)


BAD_LIMITS = [0, -1.0, 1e-320, 1e-4, 1e8, 1e30, 10**400, float("nan"), float("inf"), True, "1", [1.0]]


@pytest.mark.parametrize("bad", BAD_LIMITS, ids=lambda bad: str(bad)[:8])
def test_a_limit_that_no_wait_can_have(bad: object) -> None:
    """1e30 was an OverflowError in the first exchange."""
    with pytest.raises(ConfigError, match="timeout_s"):
        checked_timeout(bad)  # type: ignore[arg-type]
    assert checked_timeout(1e7) == 1e7 and checked_timeout(1e-3) == 1e-3
