"""Ranks that die, stop, fail or come late: every other rank raises a typed error that names them, in time."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.plan import ChunkPlan, RowLayout
from moe_overlap.errors import MoeTransportError, PeerFailed, RemoteAbort, TransportClosed, TransportTimeout
from moe_overlap.transport import ProcessGroupTransport, connections
from tests.ranks import Ended, Ranks, gloo_pool, mark
from tests.transport.worlds import F32, agreed, counts_of, exchange_all, header, received, record, rows_of

BIG = RowLayout(width=4096, dtype=torch.float32)
LIMIT_S = 8.0  # less than what a wait for the limit would take, more than a busy machine makes of it


def even_plan(transport: ProcessGroupTransport, rows: int, chunks: int, step: int = 0) -> ChunkPlan:
    counts = torch.full((BLOCKS, transport.world_size), rows // BLOCKS, dtype=torch.int64)
    return transport.agree(record(counts, step=step)).chunked(chunks)


def caught(error: MoeTransportError, begin: float) -> dict[str, Any]:
    about = {name: getattr(error, name) for name in ("rank", "peer", "step", "chunk", "action", "seconds")}
    return {"error": type(error).__name__, "text": str(error), "at": time.time(), "took": time.time() - begin, **about}


def exchange_until_error(timeout_s: float, idle_rank: int | None = None, before: str = "") -> dict[str, Any]:
    """Large chunks to and fro until something goes wrong; `idle_rank` sleeps instead before agree or an exchange."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=timeout_s)
    transport.open(header(dist.get_world_size()))
    plan = even_plan(transport, 256, 4)
    rows = torch.ones(plan.send_rows[0], BIG.width)
    begin = time.time()
    try:
        for step in range(1, 10_000):
            if step == 3:
                mark()
            if step == 3 and rank == idle_rank and before == "agree":
                time.sleep(60)
            plan = even_plan(transport, 256, 4, step)
            if step == 3 and rank == idle_rank and before == "exchange":
                time.sleep(60)
            begin = time.time()
            works = [transport.start(rows, plan, BIG, chunk, action=f"D{chunk}") for chunk in range(4)]
            for work in works:
                work.wait()
    except MoeTransportError as error:
        result = caught(error, begin)
    else:
        raise AssertionError("nothing went wrong")
    begin = time.time()
    with pytest.raises(TransportClosed) as closed:
        transport.agree(record(torch.zeros(BLOCKS, dist.get_world_size(), dtype=torch.int64)))
    assert isinstance(closed.value.__cause__, MoeTransportError)
    del transport, works
    assert time.time() - begin < LIMIT_S, "taking the transport down must not wait for dead operations"
    return result


def survivors_of(ended: list[Ended], victim: int) -> list[dict[str, Any]]:
    others = [one for rank, one in enumerate(ended) if rank != victim]
    assert all(isinstance(one.value, dict) for one in others), ended
    return [one.value for one in others]


@pytest.mark.parametrize(
    ("world", "victim", "before"), [(3, 2, ""), (3, 0, "agree"), (2, 0, "exchange"), (4, 1, "exchange")]
)
def test_sigkill_is_noticed_by_all_others(world: int, victim: int, before: str) -> None:
    """`before` = "": in the middle of large exchanges; else while the victim sits before agree or an exchange."""
    with Ranks(world) as ranks:
        ranks.start(exchange_until_error, 10.0, victim if before else None, before)
        ranks.wait_for_marks()
        time.sleep(0.3)
        killed = time.time()
        ranks.signal(victim, signal.SIGKILL)
        ended = ranks.wait(limit_s=20)
        assert ended[victim].exitcode == -signal.SIGKILL
        for one in survivors_of(ended, victim):
            assert one["error"] == "PeerFailed" and one["peer"] == victim, one
            assert -0.01 <= one["at"] - killed < LIMIT_S, one
            assert one["rank"] != victim and one["step"] is not None and one["action"] is not None


def test_sigstop_is_a_timeout_that_names_the_rank_and_the_revived_rank_learns_of_it() -> None:
    with Ranks(3) as ranks:
        ranks.start(exchange_until_error, 2.0)
        ranks.wait_for_marks()
        time.sleep(0.2)
        stopped = time.time()
        ranks.signal(1, signal.SIGSTOP)
        ended = ranks.wait(limit_s=20, ranks=[0, 2])
        for one in (ended[0].value, ended[1].value):
            assert one["error"] == "TransportTimeout" and one["peer"] == 1, one
            assert "stopped" in one["text"]
            assert 1.5 < one["at"] - stopped < 2.0 + LIMIT_S, one
        ranks.signal(1, signal.SIGCONT)
        revived = ranks.wait(limit_s=20, ranks=[1])[0].value
        assert revived["error"] == "RemoteAbort" and revived["peer"] in (0, 2), revived
        assert "gave up on this rank" in revived["text"]


def failing_expert() -> dict[str, Any]:
    """Rank 1 fails in the middle of a step, closes with its reason, then raises."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=20)
    transport.open(header(3))
    plan = even_plan(transport, 256, 4)
    rows = torch.ones(plan.send_rows[0], BIG.width)
    begin = time.time()
    try:
        works = [transport.start(rows, plan, BIG, chunk, action=f"D{chunk}") for chunk in range(2)]
        if rank == 1:
            raise FloatingPointError("expert 5 overflowed")
        works += [transport.start(rows, plan, BIG, chunk, action=f"D{chunk}") for chunk in range(2, 4)]
        for work in works:
            work.wait()
    except FloatingPointError as error:
        transport.close(f"{type(error).__name__}: {error}")
        return {"error": "own"}
    except MoeTransportError as error:
        return caught(error, begin)
    raise AssertionError("nothing went wrong")


def test_an_exception_on_one_rank_reaches_the_others_with_its_text() -> None:
    results = gloo_pool(3).run(failing_expert)
    for rank in (0, 2):
        assert results[rank]["error"] == "RemoteAbort" and results[rank]["peer"] == 1, results
        assert "FloatingPointError: expert 5 overflowed" in results[rank]["text"]
        assert results[rank]["took"] < LIMIT_S


def regroup_after_death() -> bool:
    """The survivors make a group of their own and go on."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=10)
    transport.open(header(3))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailed) as error:
        transport.agree(record(counts_of(rank, 3, 3, 0)))
    assert error.value.peer == 2
    pair = dist.new_group([0, 1], use_local_synchronization=True, timeout=timedelta(seconds=10))
    fresh = ProcessGroupTransport(pair, timeout_s=10)
    plan = agreed(fresh, slots=2, seed=0).chunked(2)
    got = exchange_all(fresh, plan, F32, wait_order=[1, 0])
    return all(torch.equal(got[c], received(rank, plan, c, F32)) for c in range(2))


def test_survivors_can_regroup() -> None:
    with Ranks(3) as ranks:
        ranks.start(regroup_after_death)
        ended = ranks.wait(limit_s=30)
        assert [one.value for one in ended[:2]] == [True, True], ended
        assert ended[2].exitcode == -signal.SIGKILL


def store_in_rank_0(port: int, number: int) -> list[dict[str, Any]]:
    """Rank 0 hosts the store and is killed or stopped: the wait ends, and reopen says that the store is gone."""
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=20))
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    transport = ProcessGroupTransport(timeout_s=2)
    plan = agreed(transport, slots=2, seed=0).chunked(1)
    if rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), number)
    begin = time.time()
    with pytest.raises((PeerFailed, TransportTimeout)) as first:
        transport.start(rows_of(rank, plan, 0, F32), plan, F32, action="D0").wait()
    result = [caught(first.value, begin)]
    begin = time.time()
    with pytest.raises(PeerFailed, match="store") as second:
        transport.reopen()
    return [*result, caught(second.value, begin)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_host_of_the_store_dies_or_stops(number: signal.Signals) -> None:
    probe = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    port = probe.port
    del probe
    with Ranks(2) as ranks:
        ranks.start(store_in_rank_0, port, int(number))
        ended = ranks.wait(limit_s=30, ranks=[1])
        assert ended[0].value is not None, ended
        first, second = ended[0].value
        assert first["error"] == ("PeerFailed" if number == signal.SIGKILL else "TransportTimeout"), first
        assert first["peer"] == 0 and first["took"] < 2 + LIMIT_S, first
        assert second["took"] < 2 + LIMIT_S, second


def late_peer() -> tuple[str, int]:
    """A wait that takes long warns once, naming the peer; the exchange then succeeds."""
    os.environ["MOE_OVERLAP_SLOW_PEER_S"] = "0.3"
    lines: list[str] = []
    store = dist.distributed_c10d._get_default_store()

    class Collect(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            lines.append(entry.getMessage())
            store.set("warned", "")

    logging.getLogger("moe_overlap").addHandler(Collect())
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=20)
    for step in range(2):
        plan = agreed(transport, slots=2, seed=0, step=step).chunked(2)
        if rank == 1 and step == 0:
            store.wait(["warned"])
            store.delete_key("warned")
        elif rank == 1:
            time.sleep(0.8)
        rows = rows_of(rank, plan, 1, F32)
        assert torch.equal(transport.start(rows, plan, F32, 1, action="D1").wait(), received(rank, plan, 1, F32))
    del os.environ["MOE_OVERLAP_SLOW_PEER_S"]
    return "\n".join(lines), len(lines)


def test_a_slow_peer_is_warned_about_once() -> None:
    (text, count), (_, other) = gloo_pool(2).run(late_peer)
    assert count == 1 and other == 0
    assert "D1 of step 0 (chunk 1)" in text and "rank 1" in text and "has waited 0." in text


def missing_at_open() -> str:
    transport = ProcessGroupTransport(timeout_s=0.5)
    dist.barrier()  # so that no rank begins much later than the other, however busy the machine is
    if dist.get_rank() == 1:
        dist.barrier()  # rank 0 has given up
        with pytest.raises(RemoteAbort):
            transport.open(header(2))
        return ""
    with pytest.raises(MoeTransportError, match="no sign of rank 1") as error:
        transport.open(header(2))
    dist.barrier()
    assert error.value.peer == 1 and error.value.action == "connect"
    return type(error.value).__name__


def test_a_rank_that_never_opens_is_named() -> None:
    assert gloo_pool(2).run(missing_at_open)[0] == "TransportTimeout"


def leaving_early() -> str:
    """Rank 1 ends with an exchange under way that rank 0 joins late: neither waits for the other."""
    rank = dist.get_rank()
    transport = ProcessGroupTransport(timeout_s=20)
    plan = agreed(transport, slots=2, seed=0).chunked(1)
    begin = time.time()
    if rank == 1:
        work = transport.start(rows_of(rank, plan, 0, F32), plan, F32, action="D0")
        time.sleep(0.1)
        connections._close_unfinished()  # what the end of the interpreter calls
        with pytest.raises(TransportClosed, match="ended before"):
            work.wait()
        del work, transport
        return f"{time.time() - begin:.3f}"
    time.sleep(0.5)
    with pytest.raises(RemoteAbort, match="rank 1 closed .* the process of rank 1 ended") as error:
        transport.start(rows_of(rank, plan, 0, F32), plan, F32, action="D0").wait()
    return str(error.value)


def test_the_end_of_a_process_waits_for_nobody() -> None:
    _, seconds = gloo_pool(2).run(leaving_early)
    assert float(seconds) < LIMIT_S


ORPHAN_SCRIPT = """
import sys, time
from tests.ranks import Ranks
from tests.transport.test_faults import sleep_long
if __name__ == "__main__":
    ranks = Ranks(2).__enter__()
    ranks.start(sleep_long)
    print(ranks.pid(0), ranks.pid(1), flush=True)
    time.sleep(60)
"""


def sleep_long() -> None:
    time.sleep(120)


def test_no_rank_outlives_its_parent(tmp_path: Any) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN_SCRIPT)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
