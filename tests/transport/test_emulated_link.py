"""The emulated link: never earlier than its model says, the core free meanwhile, the numbers of the inner transport."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.header import HEADER_WORDS
from moe_overlap.agreement.message import HEAD_WORDS
from moe_overlap.agreement.plan import ExchangePlan, RowLayout
from moe_overlap.errors import ConfigError, TransportTimeout
from moe_overlap.transport import (
    CommCpu,
    EmulatedLinkTransport,
    LinkSpec,
    LocalTransport,
    NoCommTransport,
    NodeTopology,
    ProcessGroupTransport,
)
from tests.ranks import gloo_pool
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, header, received, record, rows_of

ATTEMPTS = 20  # of which one has to be quick: the machine may be busy


def emulated(text: str, ranks_per_node: int = 1, timeout_s: float = 20.0) -> EmulatedLinkTransport:
    link = LinkSpec.parse(text)
    assert link is not None
    topology = NodeTopology(world_size=dist.get_world_size(), ranks_per_node=ranks_per_node)
    return EmulatedLinkTransport(ProcessGroupTransport(timeout_s=timeout_s), link, topology)


def equal_plan(transport: EmulatedLinkTransport, rows: int, step: int = 0) -> ExchangePlan:
    """Every rank sends `rows` rows to every rank."""
    transport.open(header(transport.world_size))
    counts = torch.zeros(BLOCKS, transport.world_size, dtype=torch.int64)
    for block in range(BLOCKS):
        counts[block] = rows * (block + 1) // BLOCKS - rows * block // BLOCKS
    return transport.agree(record(counts, step=step))


def timing(num_bytes: int, text: str, repeats: int) -> list[dict[str, float]]:
    """Begin and end on the clock that all ranks share, wire interval, CPU seconds of this thread and of the others."""
    transport = emulated(text)
    layout = RowLayout(width=1024, dtype=torch.float32)
    rows = num_bytes // layout.row_bytes
    plan = equal_plan(transport, rows).chunked(1)
    data = torch.ones(2 * rows, 1024)
    result = []
    for _ in range(repeats):
        dist.barrier()
        thread_s = time.thread_time()
        with CommCpu() as cpu:
            begin = time.perf_counter()
            work = transport.start(data, plan, layout, action="D0")
            out = work.wait()
            end = time.perf_counter()
        wire = work.interval()
        assert wire is not None and wire[0] >= begin and wire[1] <= end
        assert torch.equal(out, data)
        result.append({"begin": begin, "end": end, "wire": wire[1] - wire[0], "own_cpu": time.thread_time() - thread_s,
                       "comm_cpu": cpu.seconds})  # fmt: skip
    return result


def test_never_earlier_than_the_model_and_the_core_is_free() -> None:
    link = LinkSpec.parse("200mbit:200us")
    assert link is not None
    model_s = link.seconds(1 << 20)
    for _ in range(ATTEMPTS):
        pairs = list(zip(*gloo_pool(2).run(timing, 1 << 20, str(link), 5), strict=True))
        for pair in pairs:
            assert all(
                mine["end"] >= other["begin"] + model_s - 1e-6 for mine in pair for other in pair if mine is not other
            )
            assert all(mine["wire"] >= model_s - link.latency_s - 1e-6 for mine in pair)
        best_s = min(max(one["end"] for one in pair) - max(one["begin"] for one in pair) for pair in pairs)
        own_s = min(one["own_cpu"] for pair in pairs for one in pair)
        if best_s < 1.5 * model_s and own_s < 0.3 * model_s:
            return
    pytest.fail(f"never near the model's {model_s:.3f} s: {best_s:.3f} s, of them {own_s:.3f} s on the core")


def queueing() -> dict[str, list[float]]:
    transport = emulated("80mbit:1ms")  # 10 MB per second
    layout = RowLayout(width=1000, dtype=torch.float32)
    plan = equal_plan(transport, 64).chunked(4)  # 4 x 16 rows x 4000 bytes = 6.4 ms each
    rows = torch.ones(32, 1000)
    dist.barrier()
    times: dict[str, list[float]] = {"given": [], "ready": [], "wire": []}
    works = []
    for chunk in range(4):
        times["given"].append(time.perf_counter())
        works.append(transport.start(rows, plan, layout, chunk, action=f"D{chunk}"))
    for work in works:
        work.wait()
        times["ready"].append(time.perf_counter())
        wire = work.interval()
        assert wire is not None
        times["wire"].append(wire[0])
    return times


def test_chunks_queue_on_the_link() -> None:
    for _ in range(ATTEMPTS):
        both = gloo_pool(2).run(queueing)
        for mine, other in (both, both[::-1]):
            for chunk in range(4):
                assert mine["ready"][chunk] >= other["given"][0] + (chunk + 1) * 6.4e-3 + 1e-3 - 1e-6
            for chunk in range(3):
                assert mine["wire"][chunk + 1] >= mine["wire"][chunk] + 6.4e-3 - 1e-6
        if all(mine["given"][3] - mine["given"][0] < 4 * 6.4e-3 for mine in both):
            return
    pytest.fail("start must return at once")


def two_transports() -> None:
    """Two layers of one process share its link."""
    layout = RowLayout(width=1000, dtype=torch.float32)
    pair = [emulated("80mbit:1ms"), emulated("80mbit:1ms")]
    plans = [equal_plan(transport, 16).chunked(1) for transport in pair]  # 64 kB to the peer: 6.4 ms
    dist.barrier()
    works = [one.start(torch.ones(32, 1000), plan, layout) for one, plan in zip(pair, plans, strict=True)]
    for work in works:
        work.wait()
    first, second = (work.interval() for work in works)
    assert first is not None and second is not None and second[0] >= first[0] + 6.4e-3 - 1e-6
    assert pair[0].pay(0) <= time.perf_counter() + 1e-3


def test_transports_of_one_process_share_its_link() -> None:
    gloo_pool(2).run(two_transports)


def nodes() -> None:
    """Ranks of one node talk at full speed; only what leaves the node pays."""
    rank = dist.get_rank()
    layout = RowLayout(width=1000, dtype=torch.float32)
    transport = emulated("8mbit:1ms", ranks_per_node=2)  # 1 MB per second
    plan = equal_plan(transport, 4).chunked(1)  # 16000 bytes per pair: 32 ms for two peers off node
    rows = torch.full((16, 1000), float(rank))
    work = transport.start(rows, plan, layout)
    out = work.wait()
    wire = work.interval()
    assert wire is not None and wire[1] - wire[0] >= 0.032 - 1e-6
    assert out[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    counts = torch.zeros(BLOCKS, 4, dtype=torch.int64)
    counts[0, rank ^ 1] = 4  # only to the other rank of this node
    plan = transport.agree(record(counts, step=1)).chunked(1)
    taken_s = []
    for _ in range(ATTEMPTS):
        work = transport.start(rows[:4], plan, layout)
        work.wait()
        wire = work.interval()
        assert wire is not None
        taken_s.append(wire[1] - wire[0])
    assert min(taken_s) < 1e-3


def test_only_bytes_that_leave_the_node_pay() -> None:
    gloo_pool(4).run(nodes)


def incast() -> list[tuple[float, float]]:
    """All ranks send to rank 0 alone, twice: the wire intervals."""
    layout = RowLayout(width=1000, dtype=torch.float32)
    transport = emulated("80mbit:1ms")  # 10 MB per second
    transport.open(header(4))
    counts = torch.zeros(BLOCKS, 4, dtype=torch.int64)
    counts[0, 0] = 8  # 32 kB: 3.2 ms of a sender's link, three times as long on that of rank 0
    plan = transport.agree(record(counts)).chunked(1)
    works = [transport.start(torch.ones(8, 1000), plan, layout, action=f"D{number}") for number in range(2)]
    for work in reversed(works):  # in whatever order they are waited for
        work.wait()
    found = [work.interval() for work in works]
    return [wire for wire in found if wire is not None]


def test_what_comes_from_several_ranks_queues_at_the_receiver() -> None:
    receiver, *senders = gloo_pool(4).run(incast)
    gets_s = 0.0
    for number in range(2):
        begins = [wires[number][0] for wires in senders]
        for wires in senders:  # a sender waits for its own bytes alone
            assert wires[number][1] == pytest.approx(wires[number][0] + 3.2e-3, abs=1e-6)
        gets_s = max(gets_s, min(begins)) + 3 * 3.2e-3
        end_s = max(gets_s, max(begins) + 3.2e-3) + 1e-3
        assert receiver[number] == pytest.approx((min(begins), end_s), abs=1e-6)


def everything_pays() -> None:
    """Records and dense gradients use the link; a link too slow for the limit is an error; reopen repairs."""
    transport = emulated("800kbit:10ms")  # 100 kB per second
    transport.open(header(2))
    begin = time.perf_counter()
    transport.agree(record(counts_of(transport.rank, 2, 2, 0)))
    record_bytes = (HEAD_WORDS + HEADER_WORDS) * 8
    assert time.perf_counter() - begin >= record_bytes / 1e5
    grad = torch.full((1000,), 1.0 + transport.rank)
    begin = time.perf_counter()
    assert torch.equal(transport.dense_all_reduce(grad), torch.full((1000,), 3.0))
    assert time.perf_counter() - begin >= 2 * 4000 / 2 / 1e5 + 0.010
    begin = time.perf_counter()
    assert transport.pay(1000) >= begin + 0.02 and transport.pay(1000) >= begin + 0.03
    slow = emulated("8kbit:1ms", timeout_s=1.0)
    layout = RowLayout(width=1000, dtype=torch.float32)
    plan = None
    slow.inner.open(header(2))
    plan = slow.inner.agree(record(torch.ones(BLOCKS, 2, dtype=torch.int64))).chunked(1)
    slow.open(header(2))
    with pytest.raises(TransportTimeout, match="the emulated link needs"):
        slow.start(torch.ones(32, 1000), plan, layout).wait()
    transport.reopen()
    transport.open(header(2))
    plan = agreed(transport, slots=2, seed=0).chunked(2)
    got = exchange_all(transport, plan, F32, wait_order=[1, 0])
    assert all(torch.equal(got[c], received(transport.rank, plan, c, F32)) for c in range(2))


def test_control_and_dense_gradients_pay_too() -> None:
    gloo_pool(2).run(everything_pays)


def rounds_pay() -> float:
    """Seconds of an agreement of four rounds."""
    transport = emulated("80mbit:10ms")
    transport.inner.gathered_ranks = 1
    transport.open(header(2))
    begin = time.perf_counter()
    transport.agree(record(counts_of(transport.rank, 2, 2, 0)))
    return time.perf_counter() - begin


def test_each_round_of_an_agreement_waits_for_the_one_before() -> None:
    """The rank that comes later may find the other's first message there."""
    taken_s = gloo_pool(2).run(rounds_pay)
    assert min(taken_s) >= 3 * 0.010 and max(taken_s) >= 4 * 0.010


def nocomm() -> None:
    """Right shapes, no bytes."""
    transport = NoCommTransport(emulated("100gbit"))
    assert transport.name == "nocomm"
    transport.open(header(2))
    for seed in range(6):
        plan = transport.agree(record(counts_of(transport.rank, 2, 2, seed), step=seed)).chunked(2)
        for chunk in range(2):
            rows = rows_of(transport.rank, plan, chunk, F32)
            out = transport.start(rows, plan, F32, chunk).wait()
            assert out.shape == received(transport.rank, plan, chunk, F32).shape and out.isfinite().all()
            back = transport.start(out, plan, F32, chunk, reverse=True).wait()
            assert back.shape == rows.shape
    assert transport.stats.payload_bytes == 0 and transport.stats.exchanges == 24


def test_nocomm_keeps_shapes_and_sends_nothing() -> None:
    gloo_pool(2).run(nocomm)


def refusals() -> None:
    inner = ProcessGroupTransport()
    link = LinkSpec(bytes_per_s=1e6)
    with pytest.raises(ConfigError, match="world_size"):
        EmulatedLinkTransport(inner, link, NodeTopology(world_size=3))
    with pytest.raises(ConfigError, match="inner"):
        EmulatedLinkTransport(LocalTransport(), link, NodeTopology(world_size=1))  # type: ignore[arg-type]
    transport = EmulatedLinkTransport(inner, link, NodeTopology(world_size=2))
    assert transport.name == "emulated 8mbit:0us"
    with pytest.raises(ConfigError, match="open"):
        transport.all_reduce(torch.ones(1))


def test_bad_arguments_are_named() -> None:
    gloo_pool(2).run(refusals)
