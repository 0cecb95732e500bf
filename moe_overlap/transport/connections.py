"""The connections of this process to the ranks of one group: what all transports on the group share.

Facts about gloo that shaped this (measured, torch 2.13): `Work.wait(timeout)` of a collective that times out leaves the
operation running, so waiting in short slices is free of side effects; a peer's death is an error within milliseconds
on the ranks that talk to it and nothing at all on the others; an operation that hangs cannot be aborted, but a receive
that times out closes every connection of its group, which ends all operations at once. Hence: wait in slices of 50 ms,
look for the peers' abort message between slices, and on any error write such a message, then close the connections.

The groups are our own (payload and control apart), built on the store of torch.distributed under a prefix of their
own: they are not entered in its global tables, have our limits, and can be replaced without the user's group. They are
made once for a group of ranks, however many layers there are: descriptors, threads, and on CUDA a communicator.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_overlap.agreement.cost import GATHERED_RANKS, Grid
from moe_overlap.config import SLOW_PEER_S
from moe_overlap.errors import ConfigError, MoeTransportError, PeerFailed, TransportTimeout
from moe_overlap.transport.control import (
    CLOSED,
    PEER_GONE,
    TIMED_OUT,
    Abort,
    ControlPlane,
    StoreLost,
    forget_own_store,
    own_store,
    ranks_text,
)
from moe_overlap.transport.endpoint import REOPENED, Life
from moe_overlap.transport.groups import LOOK_S, Groups
from moe_overlap.transport.where import Where

logger = logging.getLogger(__name__)

SLICE = timedelta(milliseconds=50)
DIAGNOSE_S = 0.6

# Groups that could not be ended cleanly; destroying one would block until its operations time out.
_parked: list[tuple[Groups, list[Any]]] = []
# The connections of each process group, by what they are for.
_of_group: weakref.WeakKeyDictionary[Any, dict[str, Connections]] = weakref.WeakKeyDictionary()
# How many were made for a name, on all its ranks alike: the next ones must not meet the keys of the last ones.
_made: dict[str, int] = {}


class Connections:
    """Made at the first use, by all ranks of the group. `life`: shared by the transports; an error poisons them all.

    Not for two threads at once: what they exchange would be paired by chance.
    """

    def __init__(self, group: Any, ranks: list[int], *, backend: str, lane: str) -> None:
        self.rank, self.world_size = ranks.index(dist.get_rank()), len(ranks)
        self.backend = backend
        # With so many ranks their messages go along rows and columns, for which there are groups.
        self.grid = Grid.of(self.world_size) if self.world_size > GATHERED_RANKS else Grid(1, self.world_size)
        self.life = Life(ranks=() if ranks == list(range(dist.get_world_size())) else tuple(ranks))
        self.limit_s = 0.0  # the longest of the transports
        self.transports = 0  # made so far: the members of the group make them in the same order
        self.position = 0
        self.control: ControlPlane | None = None
        self.groups: Groups | None = None
        self._store = dist.distributed_c10d._get_default_store()
        # Groups of the same ranks may have one name after another: old keys lead to addresses that are gone.
        name = f"{group.group_name}/{lane}"
        _made[name] = _made.get(name, 0) + 1
        self._prefix = f"moe_overlap/{name}/{_made[name]}"
        self._pending: set[Any] = set()
        self._slow_s = SLOW_PEER_S.read()
        self._warned = False
        self._in_use = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around everything that begins an operation. Raises ConfigError where another thread is in one."""
        if not self._in_use.acquire(blocking=False):
            text = "two threads that use layers of one group at the same time"
            self.close(text)
            raise ConfigError("transport", text, "one thread at a time, in the same order on all ranks")
        try:
            yield
        finally:
            self._in_use.release()

    def begin(self, make: Any, where: Where, limit_s: float) -> tuple[Any, int]:
        """(work, position) of the operation that `make(groups)` starts. `limit_s`: for connecting, the first time."""
        groups = self.groups or self._connect(limit_s)
        self.position += 1
        try:
            work = make(groups)
        except RuntimeError as error:
            raise self.diagnose(error, where, 0.0) from error
        self._pending.add(work)
        return work, self.position

    def close(self, reason: str) -> None:
        """Poison everything on these connections, and tell the peers. Never raises."""
        if self.life.cause is None:
            self.life.cause = RuntimeError(reason)
            self._end_groups(Abort(code=CLOSED, rank=self.rank, peer=-1, text=reason))

    def failed(self) -> bool:
        """Whether a rank has poisoned them, this one or a peer that this one has not heard of yet."""
        return self.life.cause is not None or (self.control is not None and self.control.read_abort() is not None)

    def reopen(self, limit_s: float) -> None:
        """Fresh groups under a new generation: collective, a barrier. PeerFailed when the store is gone."""
        self.close(REOPENED)
        self._end_groups(None)  # still there when the ranks agreed on the error
        if self.control is not None and self.control.lost is not None:
            forget_own_store(self._store)
        self.life.renew()
        self.position = 0
        self._connect(limit_s, again=True)

    def _connect(self, limit_s: float, *, again: bool = False) -> Groups:
        """All within about the limit: reach the store, meet there, connect; at least a quarter of it for each."""
        where = Where(action="connect")
        begin = time.perf_counter()

        def left_s() -> float:
            return max(limit_s - (time.perf_counter() - begin), limit_s / 4)

        try:
            own = own_store(self._store, limit_s)
            prefix = dist.PrefixStore(self._prefix, own)
            self.control = ControlPlane(prefix, rank=self.rank, world_size=self.world_size)
            self.life.generation = self.control.meet(self.life.generation, left_s(), again=again)
            self.groups = self._make_groups(where, begin, left_s())
        except MoeTransportError as error:
            self.life.poison(error)
            raise
        except StoreLost as error:
            text = f"the key-value store of torch.distributed is lost ({error})"
            raise self._failed(PeerFailed(text, rank=self.rank, action="connect"), None) from error
        except RuntimeError as error:
            raise self.diagnose(error, where, time.perf_counter() - begin) from error
        self.control.report(0, where)
        return self.groups

    def _make_groups(self, where: Where, begin: float, limit_s: float) -> Groups:
        """Connections to all peers. Raises naming those that are dead, or not known to be connecting or connected."""
        assert self.control is not None
        control = self.control
        met = time.perf_counter()
        reported = False

        def watch() -> None:
            nonlocal reported
            now = time.perf_counter()
            self._raise_peer_trouble(where, now - begin)
            if now - met >= limit_s / 2 and not reported:
                control.report(0, where)
                reported = True
            if now - met >= limit_s:
                raise self._timed_out(where, 0, now - begin)

        # A connection to the store for this alone: gloo keeps it to itself while it waits there for a peer's address.
        own = own_store(self._store, limit_s, "connect")
        store = dist.PrefixStore(f"{self._prefix}/{self.life.generation}", own)
        try:
            return Groups(
                store, rank=self.rank, world_size=self.world_size, timeout_s=self.limit_s, backend=self.backend,
                grid=self.grid, watch=watch,
            )  # fmt: skip
        except Exception as error:
            forget_own_store(self._store, "connect")
            if isinstance(error, MoeTransportError) or "connect" not in str(error).lower():
                raise
            # A peer on another machine refuses: who it is, the others' reports tell until the limit is reached.
            while True:
                watch()
                time.sleep(LOOK_S)

    def finish(self, work: Any, where: Where, position: int, limit_s: float) -> None:
        """Wait for `work` within the limit; raises what went wrong, after telling the peers."""
        begin = time.perf_counter()
        try:
            work.wait(SLICE)
        except RuntimeError:
            self._finish_slowly(work, where, position, begin, limit_s)
        self._pending.discard(work)

    def finish_on_stream(self, work: Any) -> None:
        """CUDA: the current stream waits, the host does not."""
        work.wait()
        self._pending.discard(work)

    def _finish_slowly(self, work: Any, where: Where, position: int, begin: float, limit_s: float) -> None:
        """Slice by slice: is it done, has a peer given up, is a peer dead, is the limit reached?"""
        assert self.control is not None
        report_s = min(self._slow_s, limit_s) / 2
        reported = False
        while True:
            if work.is_completed():
                try:
                    work.wait(SLICE)
                    return
                except RuntimeError as error:
                    raise self.diagnose(error, where, time.perf_counter() - begin) from error
            waited = time.perf_counter() - begin
            self._raise_peer_trouble(where, waited)
            if waited >= limit_s:
                raise self._timed_out(where, position, waited)
            if waited >= report_s and not reported:
                self.control.report(position, where)
                reported = True
            if waited >= self._slow_s and not self._warned:
                self._warned = True
                late = self.control.late(position)
                who = "; ".join(f"rank {peer} {doing}" for peer, doing in late) or "no rank known to be late"
                logger.warning("rank %d has waited %.1f s in %s: %s", self.rank, waited, where, who)
            try:
                work.wait(min(SLICE, timedelta(seconds=max(limit_s - waited, 0.001))))
                return
            except RuntimeError:
                continue

    def _raise_peer_trouble(self, where: Where, waited: float) -> None:
        """Raise what a peer's abort message says, or that a peer on this host is dead."""
        assert self.control is not None
        abort = self.control.read_abort()
        if abort is not None:
            raise self._failed(abort.error_on(self.rank, where, waited), abort)
        dead = self.control.suspects(("dead",))
        if dead:
            raise self._peer_gone(
                dead[0][0], f"the process of {ranks_text([p for p, _ in dead])} is dead", where, waited
            )

    def diagnose(self, error: RuntimeError, where: Where, waited: float) -> MoeTransportError:
        """The reason behind an error of the library, which itself names no rank: a peer's message or death."""
        if self.control is None:
            return self._failed(PeerFailed(_first_line(error), rank=self.rank, **where._asdict()), None)
        deadline = time.perf_counter() + DIAGNOSE_S
        try:
            while time.perf_counter() < deadline:
                self._raise_peer_trouble(where, waited)
                time.sleep(0.01)
        except MoeTransportError as known:
            return known
        text = _first_line(error)
        if "timed out" in text.lower() or "timeout" in text.lower():
            return self._timed_out(where, self.position, waited)
        stopped = self.control.suspects(("stopped",))
        peer = stopped[0][0] if stopped else None
        return self._peer_gone(peer, f"a connection was lost: {text}", where, waited)

    def _peer_gone(self, peer: int | None, text: str, where: Where, waited: float) -> MoeTransportError:
        error = PeerFailed(text, rank=self.rank, peer=peer, seconds=waited, **where._asdict())
        return self._failed(error, Abort(code=PEER_GONE, rank=self.rank, peer=-1 if peer is None else peer, text=text))

    def _timed_out(self, where: Where, position: int, waited: float) -> MoeTransportError:
        """The error of a wait that reached its limit: names the stopped peers of this host, else the late ones."""
        assert self.control is not None
        self.control.report(position, where)
        blamed = self.control.suspects() or self.control.late(position)
        peer = blamed[0][0] if blamed else None
        who = "; ".join(f"rank {rank}: {state}" for rank, state in blamed) or "no rank known to be late"
        text = f"{where} was not over within {waited:.3f} s ({who})"
        error = TransportTimeout(text, rank=self.rank, peer=peer, seconds=waited, **where._asdict())
        return self._failed(error, Abort(code=TIMED_OUT, rank=self.rank, peer=-1 if peer is None else peer, text=text))

    def _failed(self, error: MoeTransportError, abort: Abort | None) -> MoeTransportError:
        """Poison this transport with `error` and end its groups; the peers learn of it."""
        self.life.poison(error)
        self._end_groups(abort)
        return error

    def busy(self) -> bool:
        """Whether an operation is under way that nobody has waited for."""
        return any(not work.is_completed() for work in self._pending)

    def _end_groups(self, abort: Abort | None) -> None:
        groups, self.groups = self.groups, None
        if self.control is not None and abort is not None:
            self.control.abort(abort)
        if groups is None:
            return
        groups.break_off()
        deadline = time.perf_counter() + 0.5
        while any(not work.is_completed() for work in self._pending) and time.perf_counter() < deadline:
            time.sleep(0.002)
        unfinished = [work for work in self._pending if not work.is_completed()]
        if unfinished:
            _parked.append((groups, unfinished))
        self._pending.clear()
        _parked[:] = [entry for entry in _parked if any(not work.is_completed() for work in entry[1])]


def connections_of(group: Any, ranks: list[int], *, backend: str, lane: str = "") -> Connections:
    """The connections of `group`, a ProcessGroup. `lane`: those of one are never used by another, so that both may be
    under way in any order."""
    lanes = _of_group.setdefault(group, {})
    key = f"{lane}/{backend}"
    if key not in lanes:
        lanes[key] = Connections(group, ranks, backend=backend, lane=key)
    return lanes[key]


def end_all() -> None:
    """End the connections of all groups of this process, as before the end of torch.distributed. What was made on them
    is closed; what is made later connects anew. All ranks do this at the same point, or not at all."""
    for lanes in list(_of_group.values()):
        for one in lanes.values():
            one.close("all connections were ended")
            one.life.ended = True
    _of_group.clear()


@atexit.register
def _close_unfinished() -> None:
    """A process that ends with operations under way would wait for them until their limit: tell the peers instead."""
    for lanes in list(_of_group.values()):
        for one in lanes.values():
            if one.busy():
                one.close(f"the process of rank {one.rank} ended before it had waited for its exchanges")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
