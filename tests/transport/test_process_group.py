"""Process groups (gloo): right answers, agreement, clear refusals. Faults are in test_faults.py."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_overlap.agreement.plan import RowLayout
from moe_overlap.errors import ConfigError, PlanMismatch, RemoteAbort, TransportClosed, TransportTimeout
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.ranks import gloo_pool
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, header, received, record, rows_of

LAYOUTS = [F32, RowLayout(width=5, dtype=torch.bfloat16), RowLayout(width=1, dtype=torch.float64),
           RowLayout(width=4, dtype=torch.int16), RowLayout(width=16, dtype=torch.float8_e4m3fn)]  # fmt: skip


def permutations(world: int, seeds: list[int]) -> None:
    transport = ProcessGroupTransport(timeout_s=20)
    for step, seed in enumerate(seeds):
        layout, chunks, by = LAYOUTS[seed % 5], (1, 2, 3, 16)[seed % 4], ("tokens", "experts")[seed // 4 % 2]
        plan = agreed(transport, slots=2 * world, seed=seed, step=step).chunked(chunks, by=by)
        order = random.Random(seed + transport.rank).sample(range(chunks), chunks)
        got = exchange_all(transport, plan, layout, wait_order=order, use_out=seed % 2 == 0)
        for chunk in range(chunks):
            assert same(got[chunk], received(transport.rank, plan, chunk, layout)), (seed, chunk)
            back = transport.start(got[chunk], plan, layout, chunk, reverse=True, action=f"C{chunk}").wait()
            assert same(back, rows_of(transport.rank, plan, chunk, layout)), (seed, chunk)
    assert transport.stats.agreements == len(seeds)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_exchange_is_the_reference_permutation(world: int) -> None:
    gloo_pool(world).run(permutations, world, list(range(40 if world < 4 else 20)))


def lifetimes() -> None:
    """Works keep their buffers alive; several are under way at once; a dropped work disturbs nobody."""
    transport = ProcessGroupTransport(timeout_s=20)
    wide = RowLayout(width=2048, dtype=torch.float32)
    plan = agreed(transport, slots=4, seed=3).chunked(4)
    for _ in range(5):
        works = [
            transport.start(rows_of(transport.rank, plan, c, wide), plan, wide, c, action=f"D{c}") for c in range(4)
        ]
        junk = [torch.full_like(rows_of(transport.rank, plan, c, wide), float("nan")) for c in range(4)]
        for chunk in (3, 0, 2):  # chunk 1 is never waited for
            assert torch.equal(works[chunk].wait(), received(transport.rank, plan, chunk, wide))
            interval = works[chunk].interval()
            assert works[chunk].done() and (interval is None or interval[0] <= interval[1])
        del junk


def test_works_keep_their_buffers_and_are_waited_for_in_any_order() -> None:
    gloo_pool(2).run(lifetimes)


AGREED = ("step", "phase", "grad_enabled", "chunks", "chunk_by", "dtype", "hidden", "top_k", "placement_epoch",
          "config_digest", "schedule_digest")  # fmt: skip


def mismatches() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    transport = ProcessGroupTransport(timeout_s=20)
    counts = counts_of(rank, world, 4, 0)
    for name in AGREED:
        transport.open(header(4))
        with pytest.raises(PlanMismatch, match=name) as caught:
            transport.agree(record(counts, **{name: 7 if rank == world - 1 else 0}))
        assert (caught.value.rank, caught.value.action) == (rank, "N")
        assert caught.value.peer == (world - 1 if rank == 0 else 0 if rank == world - 1 else world - 1)
        with pytest.raises(TransportClosed) as closed:
            transport.agree(record(counts))
        assert closed.value.__cause__ is caught.value
        transport.reopen()
    for field in ("hidden", "ffn_hidden", "weight_dtype"):
        with pytest.raises(PlanMismatch, match="another configuration"):
            transport.open(header(4, **{field: 8 + rank}))
        transport.reopen()
    transport.open(header(4))
    with pytest.raises(PlanMismatch, match="impossible row count"):
        transport.agree(record(counts - int(rank == 1)))
    transport.reopen()
    assert agreed(transport, slots=4, seed=0).counts.received.shape == (world, 16, 4 // world)


@pytest.mark.parametrize("world", [2, 4])
def test_every_mismatch_is_raised_on_all_ranks_and_reopen_repairs(world: int) -> None:
    gloo_pool(world).run(mismatches)


def refusals() -> None:
    """A refusal that travels in the record leaves the transport usable; the other mistakes are told to the peers."""
    rank, world = dist.get_rank(), dist.get_world_size()
    transport = ProcessGroupTransport(timeout_s=20)
    transport.open(header(4))
    counts = counts_of(rank, world, 4, 0)
    for step in range(3):
        with pytest.raises(ConfigError, match="refused on rank 1") as caught:
            transport.agree(record(counts, step=step, status=2 if rank == 1 else 0, status_value=17))
        assert (caught.value.field, caught.value.value) == ("x.shape[-1]", 17)
        plan = transport.agree(record(counts, step=step)).chunked(2)
        got = exchange_all(transport, plan, F32, wait_order=[0, 1])
        assert all(torch.equal(got[c], received(rank, plan, c, F32)) for c in range(2))
    rows = rows_of(rank, plan, 0, F32)
    if rank == 1:
        with pytest.raises(ConfigError, match="rows = .*float64"):
            transport.start(rows.double(), plan, F32, action="D0")
        with pytest.raises(TransportClosed):
            transport.start(rows, plan, F32, action="D0")
    else:
        with pytest.raises(RemoteAbort, match="rank 1 closed the transport: rows = .*float64") as abort:
            transport.start(rows, plan, F32, action="D0").wait()
        assert (abort.value.rank, abort.value.peer, abort.value.step, abort.value.chunk) == (rank, 1, 2, 0)
        assert abort.value.action == "D0"
    transport.reopen()
    assert agreed(transport, slots=4, seed=0).step == 0


@pytest.mark.parametrize("world", [2, 4])
def test_refusals_reach_all_ranks(world: int) -> None:
    gloo_pool(world).run(refusals)


def bad_groups() -> None:
    rank = dist.get_rank()
    part = dist.new_group([0])
    if rank == 0:
        transport = ProcessGroupTransport(part)
        assert (transport.rank, transport.world_size, transport.name) == (0, 1, "process_group(gloo)")
        assert agreed(transport, slots=2, seed=0).world_size == 1
    else:
        with pytest.raises(ConfigError, match="member"):
            ProcessGroupTransport(part)
    pair = dist.new_group([1, 0])
    assert ProcessGroupTransport(pair).rank == dist.get_process_group_ranks(pair).index(rank)
    dist.destroy_process_group(pair)
    with pytest.raises(ConfigError, match="not destroyed"):
        ProcessGroupTransport(pair)
    mesh = dist.init_device_mesh("cpu", (2,))
    assert agreed(ProcessGroupTransport(mesh), slots=2, seed=0).world_size == 2
    with pytest.raises(ConfigError, match="one dimension"):
        ProcessGroupTransport(dist.init_device_mesh("cpu", (1, 2)))
    with pytest.raises(ConfigError, match="cuda"):
        ProcessGroupTransport(device="cuda")
    for bad in (0, -1.0, float("nan"), float("inf"), "3", True):
        with pytest.raises(ConfigError, match="timeout_s"):
            ProcessGroupTransport(timeout_s=bad)  # type: ignore[arg-type]
    transport = ProcessGroupTransport()
    plan = agreed(transport, slots=2, seed=0).chunked(1)
    with pytest.raises(ConfigError, match="rows.device"):
        transport.start(torch.empty(plan.send_rows[0], 3, device="meta"), plan, F32)


def test_bad_groups_are_named() -> None:
    gloo_pool(2).run(bad_groups)


def noted() -> None:
    """Four ranks of the job in two groups: what an error of a group says of ranks, a note translates."""
    rank = dist.get_rank()
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    transport = ProcessGroupTransport(pairs[rank % 2], timeout_s=20)
    transport.open(header(2))
    with pytest.raises(PlanMismatch) as caught:
        transport.agree(record(counts_of(transport.rank, 2, 2, 0), chunks=2 + transport.rank))
    ranks = "0, 2" if rank % 2 == 0 else "1, 3"
    assert caught.value.rank == rank // 2
    assert caught.value.__notes__ == [f"the ranks of this group, from 0, are ranks {ranks} of the job"]
    transport.reopen()
    transport.open(header(2))
    if rank < 2:
        transport.close("enough")
    else:
        with pytest.raises(RemoteAbort) as heard:
            transport.agree(record(counts_of(transport.rank, 2, 2, 0)))
        assert heard.value.peer == 0 and ranks in heard.value.__notes__[0]
    whole = ProcessGroupTransport(timeout_s=20)
    with pytest.raises(PlanMismatch) as plain:
        whole.open(header(4, hidden=8 + rank))
    assert not hasattr(plain.value, "__notes__")


def test_errors_of_a_group_say_which_ranks_of_the_job_it_has() -> None:
    gloo_pool(4).run(noted)


def test_torch_distributed_must_be_initialised() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        ProcessGroupTransport()


def silent_chunks() -> dict[str, Any]:
    """Rows that all stay at home move no byte and wait for nobody."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=20)
    transport.open(header(2))
    counts = torch.zeros(16, 2, dtype=torch.int64)
    counts[3, rank] = 5
    plan = transport.agree(record(counts)).chunked(4)
    assert plan.stays_local == (True,) * 4
    sent = transport.stats.payload_bytes
    for chunk in range(4):
        if rank == 1:
            time.sleep(0.01)
        rows = rows_of(rank, plan, chunk, F32)
        assert torch.equal(transport.start(rows, plan, F32, chunk).wait(), rows)
    assert transport.stats.payload_bytes == sent == 0
    return vars(transport.stats)


def test_chunks_that_stay_local_are_not_exchanged() -> None:
    first, second = gloo_pool(2).run(silent_chunks)
    assert first == second and first["exchanges"] == 4


def skipped_call() -> None:
    """Rank 1 leaves out a step; rank 0 names it, where it waits and where rank 1 is."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=1.0)
    plan = agreed(transport, slots=2, seed=0, step=4).chunked(2)
    if rank == 1:
        dist.barrier()  # rank 0 has given up
        with pytest.raises(RemoteAbort, match="gave up on this rank"):
            transport.agree(record(counts_of(rank, 2, 2, 0), step=5))
        return
    begin = time.perf_counter()
    with pytest.raises(TransportTimeout, match="D1 of step 4") as caught:
        transport.start(rows_of(rank, plan, 1, F32), plan, F32, 1, action="D1").wait()
    assert time.perf_counter() - begin >= 1.0
    dist.barrier()
    assert (caught.value.peer, caught.value.step, caught.value.chunk) == (1, 4, 1)
    assert caught.value.seconds is not None and caught.value.seconds >= 1.0


def test_a_skipped_call_is_a_timeout_that_names_it() -> None:
    gloo_pool(2).run(skipped_call)


def closing() -> None:
    """close() ends the waits of the peers with its reason; after reopen() the answers are right."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    transport = ProcessGroupTransport(timeout_s=10.0)
    for attempt in range(3):
        plan = agreed(transport, slots=world, seed=0).chunked(2)
        if rank == attempt % world:
            transport.close(f"expert {attempt} is broken")
            transport.close("a second reason")
            with pytest.raises(TransportClosed, match=f"expert {attempt}"):
                transport.agree(record(counts_of(rank, world, world, 0)))
        else:
            with pytest.raises(RemoteAbort, match=f"rank {attempt % world} closed .*expert {attempt} is broken"):
                exchange_all(transport, plan, F32, wait_order=[1, 0])
                transport.agree(record(counts_of(rank, world, world, 0), step=1))
        transport.reopen()
    plan = agreed(transport, slots=world, seed=2).chunked(2)
    got = exchange_all(transport, plan, F32, wait_order=[1, 0])
    assert all(torch.equal(got[c], received(rank, plan, c, F32)) for c in range(2))


@pytest.mark.parametrize("world", [2, 4])
def test_close_reaches_the_peers_and_reopen_repairs(world: int) -> None:
    gloo_pool(world).run(closing)
