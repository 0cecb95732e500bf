"""W ranks in one process: one thread each, taking turns (see `baton`), with every message checked on both sides.

What it checks and a real network does not: that both sides of an exchange mean the same step, chunk, layout and row
counts, that a send buffer is left alone until its Work was waited for, and that nobody reads what has not arrived
(buffers hold 0xFF bytes, NaN in every float dtype, until the delivery, which happens at a time drawn by the seed).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch, RemoteAbort, TransportClosed
from moe_overlap.transport.base import Work
from moe_overlap.transport.baton import Baton, Waiting
from moe_overlap.transport.channel import Channel, Meeting, Parcel
from moe_overlap.transport.endpoint import Endpoint
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.where import Where
from moe_overlap.transport.work import DoneWork


class VirtualWork:
    """An exchange between virtual ranks."""

    def __init__(self, transport: VirtualTransport, meeting: Meeting, where: Where) -> None:
        self._transport = transport
        self._meeting = meeting
        self._where = where
        self._generation = transport.life.generation
        self._start_s = time.perf_counter()
        self._end_s: float | None = None

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """The received rows. Time here is not real: a deadlock raises at once, a limit is never reached."""
        parcel: Parcel = self._meeting.brought[self._transport.rank]
        if self._end_s is None:
            self._transport._require_begun_in(self._generation, self._where)
            self._transport._join(self._meeting, self._where)
            if not _same_bytes(parcel.rows, parcel.sent):
                self._transport._fail(
                    MoeTransportError(
                        "the rows were changed between start and wait",
                        rank=self._transport.rank,
                        **self._where._asdict(),
                    )
                )
            self._end_s = time.perf_counter()
        return parcel.out

    def done(self) -> bool:
        """Gives other ranks a turn, so that a loop around it ends."""
        if not self._is_over:
            self._transport._take_turns(self._where)
        return self._is_over

    @property
    def _is_over(self) -> bool:
        transport = self._transport
        served = self._end_s is not None or transport.rank in self._meeting.served
        return served or transport._is_void(self._generation) or transport._channel.abort is not None

    def interval(self) -> tuple[float, float] | None:
        return None if self._end_s is None else (self._start_s, self._end_s)


class VirtualWords:
    """A message under way between virtual ranks."""

    def __init__(self, transport: VirtualTransport, meeting: Meeting, message: torch.Tensor, where: Where) -> None:
        self._transport, self._meeting, self._message, self._where = transport, meeting, message, where

    def wait(self) -> torch.Tensor:
        transport = self._transport
        transport._join(self._meeting, self._where)
        transport._count_words(self._message, self._where)
        return torch.stack([self._meeting.brought[peer] for peer in range(transport.world_size)])


class VirtualParts:
    """Words under way from each virtual rank to each."""

    def __init__(self, transport: VirtualTransport, meeting: Meeting, parts: torch.Tensor, where: Where) -> None:
        self._transport, self._meeting, self._parts, self._where = transport, meeting, parts, where

    def wait(self) -> torch.Tensor:
        transport = self._transport
        transport._join(self._meeting, self._where)
        transport._count_parts(self._parts)
        members = self._meeting.members
        mine = members.index(transport.rank)
        return torch.stack([self._meeting.brought[peer][mine] for peer in members])


class VirtualTransport(Endpoint):
    """One rank's end of a channel of a VirtualWorld. Usable only inside `VirtualWorld.run`, by its own rank."""

    name = "virtual"

    def __init__(self, channel: Channel, *, rank: int, timeout_s: float | None = None) -> None:
        super().__init__(rank=rank, world_size=channel.world.world_size, timeout_s=timeout_s)
        self._channel = channel

    def _send(self, message: torch.Tensor, where: Where) -> VirtualWords:
        self._require_turn()
        self._raise_abort(where)
        return VirtualWords(self, self._channel.bring("control", self.rank, message), message, where)

    def _swap(self, parts: torch.Tensor, ranks: range, where: Where) -> VirtualParts:
        self._require_turn()
        self._raise_abort(where)
        return VirtualParts(self, self._channel.bring(f"parts of {ranks}", self.rank, parts, ranks), parts, where)

    def _require_startable(self) -> None:
        self._require_turn()
        super()._require_startable()

    def _stays(self, plan: ChunkPlan, chunk: int) -> bool:
        return False  # what stays is looked at like all other rows

    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        rows, plan, layout, chunk, reverse, _, action = exchange
        where = exchange.where()
        self._raise_abort(where)
        send, recv = exchange.counts()
        # .data: a network writes without telling autograd's version counters, and so do we
        out.data.view(torch.uint8).fill_(0xFF)
        parcel = Parcel(
            meaning=(action, plan.exchange.step, plan.exchange.phase, chunk, plan.chunks, plan.by, reverse, layout),
            send=send,
            recv=recv,
            rows=rows.data,
            sent=rows.data.clone(),
            out=out,
        )
        self._count_rows(exchange, send)
        return VirtualWork(self, self._channel.bring("exchange", self.rank, parcel), where)

    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        """In rank order."""
        meeting = self._meet("all_reduce", tensor.data.clone(), where)
        parts = [meeting.brought[peer] for peer in range(self.world_size)]
        if any(part.shape != tensor.shape or part.dtype != tensor.dtype for part in parts):
            raise self._poisoned(PlanMismatch("the ranks reduce different tensors", rank=self.rank, **where._asdict()))
        tensor.data.copy_(sum(parts[1:], parts[0]))
        return DoneWork(tensor)

    def close(self, reason: str) -> None:
        told = self.life.cause is not None  # or the peers raise it alike
        super().close(reason)
        if not told and self._channel.abort is None:
            self._channel.abort = (self.rank, reason)

    def _renew(self) -> None:
        """All ranks come here; then the channel is as new. A peer that never comes is a TransportTimeout."""
        self._require_turn()
        meeting = self._channel.bring("reopen", self.rank, None)
        self._channel.world.baton.wait(self.rank, self._waiting(meeting, Where(action="reopen")))
        super()._renew()

    def _meet(self, kind: str, what: Any, where: Where) -> Meeting:
        self._require_turn()
        self._raise_abort(where)
        meeting = self._channel.bring(kind, self.rank, what)
        self._join(meeting, where)
        return meeting

    def _join(self, meeting: Meeting, where: Where) -> None:
        """Wait until `meeting` has served this rank; raises what became of it instead."""
        self._require_usable()
        self._require_turn()
        waiting = self._waiting(meeting, where)
        ready = waiting.ready
        aborted = replace(waiting, ready=lambda: ready() or self._channel.abort is not None)
        try:
            self._channel.world.baton.wait(self.rank, aborted)
        except MoeTransportError as error:
            self._fail(error)
        if self.rank not in meeting.served:
            self._raise_abort(where)
        if meeting.mismatch is not None:
            peer = meeting.odd_one if meeting.odd_one != self.rank else 0
            raise self._poisoned(PlanMismatch(meeting.mismatch, rank=self.rank, peer=peer, **where._asdict()))

    def _waiting(self, meeting: Meeting, where: Where) -> Waiting:
        return Waiting(
            where=where,
            ready=lambda: self.rank in meeting.served,
            waits_for=lambda: [peer for peer in meeting.members if peer not in meeting.brought],
        )

    def _take_turns(self, where: Where) -> None:
        self._require_turn()
        self._channel.world.baton.wait(self.rank, Waiting(where=where, ready=lambda: True, waits_for=list))

    def _require_turn(self) -> None:
        if not self._channel.world.baton_holds(self.rank):
            raise ConfigError("transport", self.name, f"a call from inside VirtualWorld.run, by rank {self.rank}")

    def _raise_abort(self, where: Where) -> None:
        if self._channel.abort is not None:
            peer, reason = self._channel.abort
            raise self._poisoned(
                RemoteAbort(f"rank {peer} closed the transport: {reason}", rank=self.rank, peer=peer, **where._asdict())
            )

    def _fail(self, error: MoeTransportError) -> None:
        """Poison this end, tell the peers, raise."""
        self.close(str(error))
        self.life.cause = error
        raise error


@dataclass(frozen=True, kw_only=True)
class VirtualRank:
    """What the function of `VirtualWorld.run` gets: who it is, and how to reach the others."""

    world: VirtualWorld
    rank: int

    @property
    def world_size(self) -> int:
        return self.world.world_size

    def transport(self) -> VirtualTransport:
        """The next transport of this rank; ranks are matched by the order of their calls."""
        return self.world.transport(self.rank, self.world._next_key(self.rank))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.world.transport(self.rank, _OfRun(run=self.world._runs, call=0))._meet(
            "barrier", None, Where(action="barrier")
        )


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    """Key of the transports that ranks make in one run; a later run cannot ask for them again."""

    run: int
    call: int


class VirtualWorld:
    """`world_size` ranks in this process. The same seed gives the same interleaving.

    Example: two ranks that add up their numbers of rows::

        def rank_main(me):
            transport = me.transport()
            ...
            return transport.agree(record).rows_per_rank

        first, second = VirtualWorld(2, seed=7).run(rank_main)
    """

    def __init__(self, world_size: int, seed: int = 0) -> None:
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
            raise ConfigError("world_size", world_size, "an integer of at least 1")
        self.world_size = world_size
        self._seed = seed
        self._runs = 0
        self._baton: Baton | None = None
        self._all_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._channels: dict[object, Channel] = {}
        self._transports: dict[tuple[int, object], VirtualTransport] = {}
        self._calls = [0] * world_size

    @property
    def baton(self) -> Baton:
        if self._baton is None:
            raise ConfigError("VirtualWorld", "not running", "a call from inside VirtualWorld.run")
        return self._baton

    def baton_holds(self, rank: int) -> bool:
        return self._baton is not None and self._baton.holds(rank)

    def transport(self, rank: int, key: object) -> VirtualTransport:
        """The transport of `rank` that all ranks know as `key`; it outlives a run and serves the next one too."""
        if (rank, key) not in self._transports:
            channel = self._channels.get(key) or self._channels.setdefault(key, Channel(self))
            self._all_channels.add(channel)
            self._transports[rank, key] = VirtualTransport(channel, rank=rank)
        return self._transports[rank, key]

    def _next_key(self, rank: int) -> object:
        self._calls[rank] += 1
        return _OfRun(run=self._runs, call=self._calls[rank])

    def run(self, fn: Callable[[VirtualRank], Any], *, timeout_s: float = 60.0) -> list[Any]:
        """Call `fn` once per rank and return the results in rank order.

        The threads run under the caller's grad mode, inference mode and autocast state, and each begins with the random
        numbers of the caller, so that all of them make the same weights. Raises the first error that a
        rank ended with (its peers get RemoteAbort), and TransportTimeout when real time runs out.
        """
        if self._baton is not None:
            raise ConfigError("VirtualWorld.run", "called inside a run", "one run at a time")
        self._runs += 1
        self._calls = [0] * self.world_size
        self._channels = {key: value for key, value in self._channels.items() if not isinstance(key, _OfRun)}
        self._transports = {key: value for key, value in self._transports.items() if not isinstance(key[1], _OfRun)}
        self._baton = baton = Baton(self.world_size, seed=self._seed * 1_000_003 + self._runs)
        state = _TorchState()

        def body(rank: int) -> Callable[[], Any]:
            return lambda: state.call(lambda: fn(VirtualRank(world=self, rank=rank)))

        try:
            results = baton.run(
                [body(rank) for rank in range(self.world_size)], on_error=self._tell_all, timeout_s=timeout_s
            )
        finally:
            self._baton = None
        if baton.raised:
            rank, error = _first_of(baton.raised)
            error.add_note(f"raised by virtual rank {rank} of {self.world_size}")
            raise error
        return results

    def _tell_all(self, rank: int, error: BaseException) -> None:
        for channel in list(self._all_channels):
            if channel.abort is None:
                channel.abort = (rank, f"{type(error).__name__}: {error}")


def _first_of(raised: Sequence[tuple[int, BaseException]]) -> tuple[int, BaseException]:
    """The earliest error that is not the echo of another one."""
    originals = [pair for pair in raised if not isinstance(pair[1], (RemoteAbort, TransportClosed))]
    return originals[0] if originals else raised[0]


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class _TorchState:
    """The thread-local settings of torch that a new thread does not inherit, and the random numbers."""

    def __init__(self) -> None:
        self._random = torch.get_rng_state()
        self._random_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        kinds = ("cpu", "cuda")
        self._autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        self._cache = torch.is_autocast_cache_enabled()

    def call(self, fn: Callable[[], Any]) -> Any:
        torch.set_rng_state(self._random)
        torch.cuda.set_rng_state_all(self._random_cuda)
        torch.set_autocast_cache_enabled(self._cache)
        for kind, dtype, enabled in self._autocast:
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
        # backward must stay in this thread: a device thread of autograd, shared by all ranks, would block them all
        with torch.autograd.set_multithreading_enabled(False):
            with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
                return fn()
