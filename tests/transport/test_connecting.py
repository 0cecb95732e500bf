"""The limit holds while connections are made: gloo would wait five times its own, and would name nobody."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_overlap.errors import MoeTransportError, PeerFailed, TransportTimeout
from moe_overlap.transport import ProcessGroupTransport, control, groups
from tests.ranks import Ended, Ranks, gloo_pool, mark
from tests.transport.worlds import F32, agreed, exchange_all, received

TIMEOUT_S = 2.0
MARGIN_S = 6.0  # of a busy machine; five times gloo's limit were 20 s


class Registering(dist.Store):
    """A store in which this rank does something right after gloo has set its address there."""

    def __init__(self, store: dist.Store, then: Any) -> None:
        super().__init__()
        self._store, self._then = store, then

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)
        self._then()

    def get(self, key: str) -> bytes:
        return bytes(self._store.get(key))

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        self._store.wait(keys, timeout)


def misbehave(how: str) -> None:
    mark()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def reach_the_store() -> None:
    """Beforehand, as connecting to it stalls for some seconds now and then, which is not what is looked at here."""
    store = dist.distributed_c10d._get_default_store()
    for use in ("control", "connect"):
        control.own_store(store, 60.0, use)


def connect(victim: int, when: str, how: str, far: bool) -> dict[str, Any]:
    """Open a transport; `victim` misbehaves before or after it has told gloo's address, in one of the two groups."""
    reach_the_store()
    if far:
        control._host_name = f"host of rank {dist.get_rank()}"  # no look at each other's processes
    if dist.get_rank() == victim and how == "sleep":
        groups.watched = lambda make, watch: misbehave(how)
    elif dist.get_rank() == victim:
        real = dist.ProcessGroupGloo
        made = []

        def gloo(store: dist.Store, *args: Any) -> Any:
            made.append(store)
            if len(made) == (2 if "payload" in when else 1):
                if "before" in when:
                    misbehave(how)
                store = Registering(store, lambda: misbehave(how))
            return real(store, *args)

        groups.dist = type("Patched", (), {**vars(dist), "ProcessGroupGloo": staticmethod(gloo)})  # type: ignore[assignment]
    else:
        mark()
    transport = ProcessGroupTransport(timeout_s=TIMEOUT_S)
    begin = time.perf_counter()
    with pytest.raises((PeerFailed, TransportTimeout)) as error:
        agreed(transport, slots=dist.get_world_size(), seed=0)
    took = time.perf_counter() - begin
    return {"error": type(error.value).__name__, "peer": error.value.peer, "text": str(error.value), "took": took}


def survivors(world: int, victim: int, *args: Any) -> list[Ended]:
    with Ranks(world) as ranks:
        ranks.start(connect, victim, *args)
        ranks.wait_for_marks()
        return ranks.wait(limit_s=40, ranks=[rank for rank in range(world) if rank != victim])


@pytest.mark.parametrize(
    ("world", "victim", "when", "how", "far"),
    [
        (2, 1, "after", "kill", False),
        (3, 0, "before", "kill", False),
        (3, 2, "after payload", "kill", False),
        (2, 0, "after", "stop", False),
        (3, 1, "before payload", "stop", False),
        (2, 1, "before", "sleep", False),
        (2, 1, "after", "kill", True),
        (3, 0, "before payload", "kill", True),
    ],
)
def test_who_ends_or_hangs_while_connecting_is_named_in_time(
    world: int, victim: int, when: str, how: str, far: bool
) -> None:
    ended = survivors(world, victim, when, how, far)
    for one in ended:
        assert isinstance(one.value, dict), one
        assert one.value["peer"] == victim, one
        assert f"rank {victim}" in one.value["text"]
        assert one.value["took"] < TIMEOUT_S + MARGIN_S, one
        if how == "kill" and not far:
            assert one.value["error"] == "PeerFailed" and "is dead" in one.value["text"], one
        else:
            assert one.value["error"] == "TransportTimeout" and " 0.000 s" not in one.value["text"], one
    # The others may hear it from the first of them, however late they came.
    first = [one for one in ended if " reports: " not in one.value["text"]]
    assert first and (how == "kill" and not far or all(one.value["took"] > 0.9 * TIMEOUT_S for one in first)), ended


def connect_late() -> bool:
    """Rank 1 comes to gloo's connecting after rank 0 has given up; reopened on both, the transport works."""
    reach_the_store()
    transport = ProcessGroupTransport(timeout_s=1.5)
    rank, real = dist.get_rank(), groups.watched

    def late(make: Any, watch: Any) -> Any:
        groups.watched = real
        time.sleep(2.1)
        return real(make, watch)

    if rank == 1:
        groups.watched = late
    with pytest.raises(MoeTransportError) as error:
        agreed(transport, slots=2, seed=0)
    assert error.value.peer == 1 - rank, error.value
    transport.timeout_s = 60.0  # now both come, however busy the machine is
    transport.reopen()
    plan = agreed(transport, slots=2, seed=0).chunked(2)
    got = exchange_all(transport, plan, F32, wait_order=[1, 0])
    return all(torch.equal(got[c], received(rank, plan, c, F32)) for c in range(2))


def test_a_transport_that_could_not_connect_can_be_reopened() -> None:
    assert gloo_pool(2).run(connect_late) == [True, True]
