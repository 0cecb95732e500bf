"""`reopen()` of every transport: it closes first, what had begun is void, and the fresh transport is not hurt by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from moe_overlap.agreement.record import BackwardRecord
from moe_overlap.errors import RemoteAbort, TransportClosed
from moe_overlap.transport import (
    EmulatedLinkTransport,
    LocalTransport,
    NoCommTransport,
    ProcessGroupTransport,
    StagedTransport,
    Transport,
    VirtualWorld,
    staged,
)
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.work import DoneWork
from tests.ranks import gloo_pool
from tests.transport.played import PlayedEngine
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, received, record, rows_of

BACKWARD = BackwardRecord(step=0, run=0, digest=7)


def reopened(transport: Transport, barrier: Callable[[], object]) -> None:
    """One exchange that was waited for, one that was not, an announcement and an agreement; then rank 0 reopens."""
    rank, slots = transport.rank, 2 * transport.world_size
    plan = agreed(transport, slots=slots, seed=3).chunked(2)
    first, second = (transport.start(rows_of(rank, plan, c, F32), plan, F32, c, action=f"D{c}") for c in range(2))
    rows = first.wait()
    announced = transport.begin_backward(BACKWARD)
    asked = transport.begin_agree(record(counts_of(rank, transport.world_size, slots, 3), step=1))
    barrier()
    if rank != 0:
        with pytest.raises(RemoteAbort, match="rank 0 closed .*the transport was reopened"):
            transport.all_reduce(torch.ones(2)).wait()  # to which rank 0 does not come
        assert first.done() and second.done(), "to wait would raise at once"
    transport.reopen()
    assert first.done() and second.done()
    for void in (announced, asked) if isinstance(second, DoneWork) else (second, announced, asked):
        with pytest.raises(TransportClosed, match="the transport was reopened since this began") as caught:
            void.wait()
        assert caught.value.rank == rank and caught.value.action in ("D1", "Ut", "N")
    assert first.wait() is rows
    plan = agreed(transport, slots=slots, seed=2).chunked(2)
    got = exchange_all(transport, plan, F32, wait_order=[1, 0])
    assert all(torch.equal(got[c], received(rank, plan, c, F32)) for c in range(2))


def of_one_rank(make: Callable[[], Transport]) -> None:
    reopened(make(), lambda: None)


def of_a_group(kind: str) -> None:
    group = ProcessGroupTransport(timeout_s=20.0)
    if kind == "emulated":
        link = LinkSpec.parse("800mbit:1ms")
        assert link is not None
        topology = NodeTopology(world_size=dist.get_world_size(), ranks_per_node=1)
        reopened(EmulatedLinkTransport(group, link, topology), dist.barrier)
    else:
        reopened(group, dist.barrier)


def test_of_local_and_around_it() -> None:
    of_one_rank(LocalTransport)
    of_one_rank(lambda: NoCommTransport(LocalTransport()))


@pytest.mark.parametrize("seed", range(5))
def test_of_staged(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "Engine", partial(PlayedEngine, seed=seed))
    of_one_rank(partial(StagedTransport, piece_bytes=7))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_of_virtual(world: int) -> None:
    for seed in range(10):
        VirtualWorld(world, seed=seed).run(lambda me: reopened(me.transport(), me.barrier))


@pytest.mark.parametrize("kind", ["process group", "emulated"])
@pytest.mark.parametrize("world", [2, 3])
def test_of_a_group(kind: str, world: int) -> None:
    gloo_pool(world).run(of_a_group, kind)
