"""The ranks of a torch.distributed group: gloo on the CPU, NCCL on CUDA.

Facts about gloo that shaped this (measured, torch 2.13): `Work.wait(timeout)` of a collective that times out leaves the
operation running, so waiting in short slices is free of side effects; a peer's death is an error within milliseconds
on the ranks that talk to it and nothing at all on the others; an operation that hangs cannot be aborted, but a receive
that times out closes every connection of its group, which ends all operations at once. Hence: wait in slices of 50 ms,
look for the peers' abort message between slices, and on any error write such a message, then close the connections.

The groups are our own (payload and control apart), built on the store of torch.distributed under a prefix of their
own: they are not entered in its global tables, have our limits, and can be replaced without the user's group.
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_overlap.config import SLOW_PEER_S
from moe_overlap.errors import MoeTransportError, PeerFailed, TransportTimeout
from moe_overlap.transport.base import Work
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
from moe_overlap.transport.endpoint import Endpoint
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.groups import Groups, device_of, resolve_group
from moe_overlap.transport.where import Where

logger = logging.getLogger(__name__)

SLICE = timedelta(milliseconds=50)
DIAGNOSE_S = 0.6
GLOO_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)

# Transports made on a group so far: its members make them in the same order, so the number names them.
_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
# Groups that could not be ended cleanly; destroying one would block until its operations time out.
_parked: list[tuple[Groups, list[Any]]] = []
_alive: weakref.WeakSet[ProcessGroupTransport] = weakref.WeakSet()


class GroupWork:
    """An exchange under way in a process group."""

    def __init__(
        self, transport: ProcessGroupTransport, work: Any, where: Where, rows: torch.Tensor, out: torch.Tensor
    ) -> None:
        self._transport = transport
        self._work = work
        self._where = where
        self._rows: torch.Tensor | None = rows  # kept alive until the bytes have left
        self._out = out
        self._position = transport._position
        self._start_s = time.perf_counter()
        self._end_s: float | None = None

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """The received rows. `timeout_s` may shorten the transport's limit. CUDA: the current stream waits."""
        if self._end_s is None:
            if self._transport.backend == "gloo":
                self._transport._finish(self._work, self._where, self._position, timeout_s)
            else:
                self._transport._finish_on_stream(self._work)
            self._end_s = time.perf_counter()
            self._rows = None
        return self._out

    def done(self) -> bool:
        return self._end_s is not None or bool(self._work.is_completed())

    def interval(self) -> tuple[float, float] | None:
        """From the start to the end of the wait: the bytes were under way at most so long."""
        return None if self._end_s is None else (self._start_s, self._end_s)


class ProcessGroupTransport(Endpoint):
    """All-to-All over `group`: None (all ranks), a ProcessGroup or a one-dimensional DeviceMesh.

    Collective over the ranks of the group in `open` and `reopen`, not in the constructor; several transports on one
    group are told apart by the order in which they are made. `timeout_s` (default MOE_OVERLAP_TIMEOUT_S) bounds every
    wait. `device` defaults to what the group's backend is for: the CPU for gloo, the current CUDA device for NCCL.
    On CUDA `wait` orders the current stream and the host does not wait, so there the NCCL watchdog bounds the
    exchanges, with twice `timeout_s`; records and headers travel on the host in either case.

    Raises ConfigError for a group that is closed or that this rank is not in, when torch.distributed is not
    initialised, and for CUDA tensors on gloo.
    """

    name = "process_group"

    def __init__(
        self,
        group: Any = None,
        *,
        timeout_s: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        resolved, ranks = resolve_group(group)
        super().__init__(rank=ranks.index(dist.get_rank()), world_size=len(ranks), timeout_s=timeout_s)
        self.group = resolved
        self.global_ranks = tuple(ranks)
        self.device = device_of(resolved, device)
        self._device_type = self.device.type
        self.backend = "gloo" if self.device.type == "cpu" else "nccl"
        self.name = f"process_group({self.backend})"
        number = _made[resolved] = _made.get(resolved, 0) + 1
        self._prefix = f"moe_overlap/{resolved.group_name}/{number}"
        self._store = dist.distributed_c10d._get_default_store()
        self._generation = 0
        self._control: ControlPlane | None = None
        self._groups: Groups | None = None
        self._pending: set[Any] = set()
        self._position = 0
        self._slow_s = SLOW_PEER_S.read()
        self._warned = False
        _alive.add(self)
        self._options = dist.AllToAllOptions()
        if hasattr(self._options, "asyncOp"):
            self._options.asyncOp = True

    def gather(self, words: torch.Tensor, where: Where) -> torch.Tensor:
        self._require_usable()
        groups = self._groups or self._connect()
        table = torch.empty(self.world_size, words.numel(), dtype=torch.int64)
        self._position += 1
        self._count_words(words, where)
        try:
            work = groups.control.allgather([list(table.unbind(0))], [words])
        except RuntimeError as error:
            raise self._diagnose(error, where, 0.0) from error
        self._pending.add(work)
        self._finish(work, where, self._position, None)
        return table

    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        rows, where = exchange.rows, exchange.where()
        send, recv = exchange.counts()
        self._count_rows(exchange, send)
        groups = self._groups or self._connect()
        moved, into = (rows, out) if rows.dtype in GLOO_DTYPES else (rows.view(torch.uint8), out.view(torch.uint8))
        self._position += 1
        try:
            work = groups.payload.alltoall_base(into, moved, recv, send, self._options)
        except RuntimeError as error:
            raise self._diagnose(error, where, 0.0) from error
        self._pending.add(work)
        return GroupWork(self, work, where, rows, out)

    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        groups = self._groups or self._connect()
        self._position += 1
        try:
            work = groups.payload.allreduce([tensor])
        except RuntimeError as error:
            raise self._diagnose(error, where, 0.0) from error
        self._pending.add(work)
        return GroupWork(self, work, where, tensor, tensor)

    def close(self, reason: str) -> None:
        if self._cause is None:
            self._poison(RuntimeError(reason))
            self._end_groups(Abort(code=CLOSED, rank=self.rank, peer=-1, text=reason))

    def reopen(self) -> None:
        """Fresh groups under a new generation; call `open` again afterwards. PeerFailed when the store is gone."""
        self.close("the transport was reopened")
        self._end_groups(None)  # still there when the ranks agreed on the error
        if self._control is not None and self._control.lost is not None:
            forget_own_store(self._store)
        self._generation += 1
        self._position = 0
        super().reopen()
        self._connect()

    def _connect(self) -> Groups:
        """All within about the limit: reach the store, meet there, connect; at least a quarter of it for each."""
        where = Where(action="connect")
        begin = time.perf_counter()
        try:
            own = own_store(self._store, self.timeout_s)
            prefix = f"{self._prefix}/{self._generation}"
            self._control = ControlPlane(dist.PrefixStore(prefix, own), rank=self.rank, world_size=self.world_size)
            self._control.meet(self._left_s(begin))
            self._groups = self._make_groups(prefix, where, begin)
        except MoeTransportError as error:
            self._poison(error)
            raise
        except StoreLost as error:
            text = f"the key-value store of torch.distributed is lost ({error})"
            raise self._failed(PeerFailed(text, rank=self.rank, action="connect"), None) from error
        except RuntimeError as error:
            raise self._diagnose(error, where, time.perf_counter() - begin) from error
        self._control.report(0, where)
        return self._groups

    def _left_s(self, begin: float) -> float:
        return max(self.timeout_s - (time.perf_counter() - begin), self.timeout_s / 4)

    def _make_groups(self, prefix: str, where: Where, begin: float) -> Groups:
        """Connections to all peers. Raises naming those that are dead, or not known to be connecting or connected."""
        assert self._control is not None
        control = self._control
        met = time.perf_counter()
        limit_s = self._left_s(begin)
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
        store = dist.PrefixStore(prefix, own_store(self._store, limit_s, "connect"))
        try:
            return Groups(
                store,
                rank=self.rank,
                world_size=self.world_size,
                timeout_s=self.timeout_s,
                backend=self.backend,
                watch=watch,
            )
        except Exception:
            forget_own_store(self._store, "connect")
            raise

    def _finish(self, work: Any, where: Where, position: int, timeout_s: float | None) -> None:
        """Wait for `work` within the limit; raises what went wrong, after telling the peers."""
        if self._cause is not None:
            self._require_usable()
        begin = time.perf_counter()
        try:
            work.wait(SLICE)
        except RuntimeError:
            self._finish_slowly(work, where, position, begin, timeout_s)
        self._pending.discard(work)

    def _finish_on_stream(self, work: Any) -> None:
        """CUDA: the current stream waits, the host does not."""
        self._require_usable()
        work.wait()
        self._pending.discard(work)

    def _finish_slowly(self, work: Any, where: Where, position: int, begin: float, timeout_s: float | None) -> None:
        """Slice by slice: is it done, has a peer given up, is a peer dead, is the limit reached?"""
        assert self._control is not None
        limit_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        report_s = min(self._slow_s, limit_s) / 2
        reported = False
        while True:
            if work.is_completed():
                try:
                    work.wait(SLICE)
                    return
                except RuntimeError as error:
                    raise self._diagnose(error, where, time.perf_counter() - begin) from error
            waited = time.perf_counter() - begin
            self._raise_peer_trouble(where, waited)
            if waited >= limit_s:
                raise self._timed_out(where, position, waited)
            if waited >= report_s and not reported:
                self._control.report(position, where)
                reported = True
            if waited >= self._slow_s and not self._warned:
                self._warned = True
                late = self._control.late(position)
                who = "; ".join(f"rank {peer} {doing}" for peer, doing in late) or "no rank known to be late"
                logger.warning("rank %d has waited %.1f s in %s: %s", self.rank, waited, where, who)
            try:
                work.wait(min(SLICE, timedelta(seconds=max(limit_s - waited, 0.001))))
                return
            except RuntimeError:
                continue

    def _raise_peer_trouble(self, where: Where, waited: float) -> None:
        """Raise what a peer's abort message says, or that a peer on this host is dead."""
        assert self._control is not None
        abort = self._control.read_abort()
        if abort is not None:
            raise self._failed(abort.error_on(self.rank, where, waited), abort)
        dead = self._control.suspects(("dead",))
        if dead:
            raise self._peer_gone(
                dead[0][0], f"the process of {ranks_text([p for p, _ in dead])} is dead", where, waited
            )

    def _diagnose(self, error: RuntimeError, where: Where, waited: float) -> MoeTransportError:
        """The reason behind an error of the library, which itself names no rank: a peer's message or death."""
        if self._control is None:
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
            return self._timed_out(where, self._position, waited)
        stopped = self._control.suspects(("stopped",))
        peer = stopped[0][0] if stopped else None
        return self._peer_gone(peer, f"a connection was lost: {text}", where, waited)

    def _peer_gone(self, peer: int | None, text: str, where: Where, waited: float) -> MoeTransportError:
        error = PeerFailed(text, rank=self.rank, peer=peer, seconds=waited, **where._asdict())
        return self._failed(error, Abort(code=PEER_GONE, rank=self.rank, peer=-1 if peer is None else peer, text=text))

    def _timed_out(self, where: Where, position: int, waited: float) -> MoeTransportError:
        """The error of a wait that reached its limit: names the stopped peers of this host, else the late ones."""
        assert self._control is not None
        self._control.report(position, where)
        blamed = self._control.suspects() or self._control.late(position)
        peer = blamed[0][0] if blamed else None
        who = "; ".join(f"rank {rank}: {state}" for rank, state in blamed) or "no rank known to be late"
        text = f"{where} was not over within {waited:.3f} s ({who})"
        error = TransportTimeout(text, rank=self.rank, peer=peer, seconds=waited, **where._asdict())
        return self._failed(error, Abort(code=TIMED_OUT, rank=self.rank, peer=-1 if peer is None else peer, text=text))

    def _failed(self, error: MoeTransportError, abort: Abort | None) -> MoeTransportError:
        """Poison this transport with `error` and end its groups; the peers learn of it."""
        self._poison(error)
        self._end_groups(abort)
        return error

    def _end_groups(self, abort: Abort | None) -> None:
        groups, self._groups = self._groups, None
        if self._control is not None and abort is not None:
            self._control.abort(abort)
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


@atexit.register
def _close_unfinished() -> None:
    """A process that ends with operations under way would wait for them until their limit: tell the peers instead."""
    for transport in list(_alive):
        if any(not work.is_completed() for work in transport._pending):
            transport.close(f"the process of rank {transport.rank} ended before it had waited for its exchanges")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
