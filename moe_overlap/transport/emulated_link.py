"""A slower link between nodes, emulated around another transport, so that overlap can be measured on one machine.

The model. Every rank has one link to the ranks of other nodes, of the same rate in both directions at once; all
transports of its process with equal link and topology share it. A message set (all rows of one exchange, one control
record to every peer) that is given at time t begins at max(t, end of the previous one), occupies the sender's link for
bytes / rate, and arrives `latency` after its last byte left. What a rank gets occupies its own link in the other
direction: from the first sender's begin, or the end of what it got before, for bytes / rate. A receive is ready at the
maximum over both, and not before this rank's own bytes have left. Ranks of one node talk at the speed of the inner
transport. Not modelled: that a receiver's full link holds its senders up, what control records take of it, packets,
protocol overhead, loss. An exchange that the inner transport ends later than the model is as late as it really was.

The bytes move at once through the inner transport; `wait` then sleeps until the model's time, so the core is free
meanwhile and no helper thread exists. Departure times are left on a board in memory that the ranks share, before the
bytes are sent, on the clock of time.perf_counter, which all processes of one Linux machine share. So all ranks must run
on one machine. Anything measured this way is labelled "emulated RATE:LATENCY".
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from moe_overlap.agreement.cost import agreement_cost
from moe_overlap.agreement.header import Header
from moe_overlap.agreement.message import HEAD_WORDS
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.record import BackwardRecord, StepRecord, digest
from moe_overlap.errors import ConfigError, MoeTransportError, TransportTimeout
from moe_overlap.transport.base import Agreement, Announcement, Work
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.process_group import ProcessGroupTransport
from moe_overlap.transport.where import Where
from moe_overlap.transport.wrapper import Wrapper

SPIN_NS = 150_000  # a sleep ends about 0.1 ms late, so the last 0.15 ms are spent looking at the clock
BOARD_SLOTS = 1024


@dataclass(frozen=True, kw_only=True)
class _Departure:
    """A message set on this rank's link: operation number, first byte, last byte, arrival."""

    number: int
    begin_ns: int
    left_ns: int
    arrival_ns: int


class _Port:
    """The link of this process to other nodes: until when it sends and gets, on the time.perf_counter_ns clock."""

    sends_ns = 0
    gets_ns = 0


_ports: dict[tuple[LinkSpec, NodeTopology], _Port] = {}


class _Board:
    """int64 [BOARD_SLOTS, W, 3] in memory shared by all ranks: (operation number + 1, begin, arrival) of each rank."""

    def __init__(self, descriptor: int, world_size: int) -> None:
        size = BOARD_SLOTS * world_size * 3 * 8
        self._memory = mmap.mmap(descriptor, size)
        self._cells = np.frombuffer(self._memory, dtype=np.int64).reshape(BOARD_SLOTS, world_size, 3)

    def write(self, rank: int, departure: _Departure) -> None:
        cell = self._cells[departure.number % BOARD_SLOTS, rank]
        cell[1] = departure.begin_ns
        cell[2] = departure.arrival_ns
        cell[0] = departure.number + 1

    def has(self, rank: int, number: int) -> bool:
        """Whether that operation of `rank` can be read."""
        return int(self._cells[number % BOARD_SLOTS, rank, 0]) == number + 1

    def read(self, rank: int, number: int) -> tuple[int, int]:
        """(begin, arrival) of that operation of `rank`, which must have sent it."""
        written, begin_ns, arrival_ns = (int(word) for word in self._cells[number % BOARD_SLOTS, rank])
        if written != number + 1:
            raise MoeTransportError(
                f"the link board holds operation {written - 1} instead of {number}: more than {BOARD_SLOTS} "
                "exchanges in flight, or ranks that issue them in different orders",
                peer=rank,
            )
        return begin_ns, arrival_ns


class EmulatedWork:
    """An exchange under way on the emulated link."""

    def __init__(
        self,
        transport: EmulatedLinkTransport,
        inner: Work,
        where: Where,
        departure: _Departure,
        senders: tuple[int, ...],
        num_bytes: int,
        extra_ns: int = 0,
    ) -> None:
        """num_bytes: that this rank gets from other nodes."""
        self._transport = transport
        self._inner = inner
        self._where = where
        self._departure = departure
        self._senders = senders
        self._num_bytes = num_bytes
        self._extra_ns = extra_ns
        self._generation = transport.inner.life.generation
        transport._unsettled.append(self)
        self._interval_ns: tuple[int, int] | None = None
        self._waited = False

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """The received rows, not before the link has brought them. TransportTimeout when that is past the limit."""
        out = self._inner.wait(timeout_s)
        if not self._waited:
            self._transport._sleep_until(self._times()[1], self._where, timeout_s)
            self._waited = True
        return out

    def done(self) -> bool:
        if not self._waited and self._transport.inner._is_void(self._generation):
            return True
        return self._inner.done() and time.perf_counter_ns() >= self._times()[1]

    def interval(self) -> tuple[float, float] | None:
        """(start_s, end_s) on the emulated wire, once waited for."""
        if not self._waited:
            return None
        begin_ns, end_ns = self._times()
        return begin_ns / 1e9, end_ns / 1e9

    def last_sender(self) -> int:
        """The rank whose bytes were last on their link."""
        board, mine = self._transport._board, self._departure
        assert board is not None
        arrivals = [(board.read(sender, mine.number)[1], sender) for sender in self._senders]
        return max([(mine.left_ns, self._transport.rank), *arrivals])[1]

    def _times(self) -> tuple[int, int]:
        """(begin, end) of the wire time, known once the inner exchange is over."""
        if self._interval_ns is None:
            self._transport._settle_before(self)
            self.settle()
        assert self._interval_ns is not None
        return self._interval_ns

    @property
    def departed(self) -> bool:
        """Whether all senders have said when their bytes leave."""
        board = self._transport._board
        return board is not None and all(board.has(sender, self._departure.number) for sender in self._senders)

    def settle(self) -> None:
        """Put what arrives on this rank's link: in the order of the exchanges, as each adds to when the next one is
        there."""
        board, mine = self._transport._board, self._departure
        assert board is not None
        theirs = [board.read(sender, mine.number) for sender in self._senders]
        first_ns = min((begin for begin, _ in theirs), default=mine.begin_ns)
        sends = mine.left_ns > mine.begin_ns
        ends = [arrival for _, arrival in theirs] + [mine.left_ns]
        if self._num_bytes:
            ends.append(self._transport._get(self._num_bytes, first_ns))
        self._interval_ns = mine.begin_ns if sends else first_ns, max(ends) + self._extra_ns


@dataclass(eq=False)
class _DelayedPlan:
    """The record of a step, which the link brings, in so many rounds."""

    transport: EmulatedLinkTransport
    inner: Agreement
    departure: _Departure
    where: Where
    rounds: int
    end_ns: int | None = None
    sender: int | None = None

    def wait(self) -> ExchangePlan:
        plan = self.inner.wait()
        self.end_ns, self.sender = self.transport._arrived(self.departure, self.where, self.rounds)
        return plan

    def last_sender(self) -> int | None:
        """The rank whose message was last on its link, once waited for."""
        return self.sender

    def interval(self) -> tuple[float, float] | None:
        """On the emulated wire."""
        return None if self.end_ns is None else (self.departure.begin_ns / 1e9, self.end_ns / 1e9)


@dataclass(frozen=True, eq=False, kw_only=False)
class _Delayed:
    """The announcement of a backward, which the link brings."""

    transport: EmulatedLinkTransport
    inner: Announcement
    departure: _Departure
    where: Where

    def wait(self) -> None:
        self.inner.wait()
        self.transport._arrived(self.departure, self.where, 1)


class EmulatedLinkTransport(Wrapper):
    """`inner` behind an emulated link between the nodes of `topology` (see the module text for the model).

    Records, headers apart, and dense gradients (`dense_all_reduce`, or `pay` for another way of sending them) use the
    same link as the rows. `stats` are the inner transport's.
    """

    inner: ProcessGroupTransport

    def __init__(self, inner: ProcessGroupTransport, link: LinkSpec, topology: NodeTopology) -> None:
        if not isinstance(inner, ProcessGroupTransport) or inner.device.type != "cpu":
            raise ConfigError("inner", getattr(inner, "name", inner), "a ProcessGroupTransport on the CPU")
        if topology.world_size != inner.world_size:
            raise ConfigError("topology.world_size", topology.world_size, f"the {inner.world_size} ranks of the group")
        super().__init__(inner)
        self.name = f"emulated {link}"
        self.link = link
        self.topology = topology
        self._off_node = topology.off_node(inner.rank)
        self._board: _Board | None = None
        self._number = 0
        self._header: Header | None = None
        self._port = _ports.setdefault((link, topology), _Port())
        self._unsettled: deque[EmulatedWork] = deque(maxlen=BOARD_SLOTS)

    def open(self, header: Header) -> bool:
        opened = super().open(header)
        self._header = header
        if self._board is None:
            self._board = _share_board(self.inner, digest(self.link, self.topology))
        return opened

    def agree(self, record: StepRecord) -> ExchangePlan:
        return self.begin_agree(record).wait()

    def begin_agree(self, record: StepRecord) -> Agreement:
        if self._board is None or self._header is None:
            return super().begin_agree(record)  # which says that open is missing
        header, inner = self._header, self.inner
        cost = agreement_cost(
            ranks=self.world_size, experts=header.num_experts, slots=header.num_slots, dedup=header.dedup,
            nodes=header.nodes, gathered_ranks=inner.gathered_ranks, grid=inner._grid,
            capacity=inner.life.capacity, rank=self.rank,
        )  # fmt: skip
        departure = self._depart(cost.bytes_to(self._off_node))
        return _DelayedPlan(
            self, super().begin_agree(record), departure, Where(action="N", step=record.step), len(cost.rounds)
        )

    def begin_backward(self, record: BackwardRecord) -> Announcement:
        if self._board is None:
            return super().begin_backward(record)
        departure = self._depart((HEAD_WORDS + self.inner.life.capacity) * 8 * len(self._off_node))
        return _Delayed(self, super().begin_backward(record), departure, Where(action="Ut", step=record.step))

    def _arrived(self, departure: _Departure, where: Where, rounds: int) -> tuple[int, int]:
        """Sleep until the messages of all ranks have come over the link, one latency in every arrival and one more for
        each further round; returns that time, in ns, and the rank that was last."""
        assert self._board is not None
        arrivals = {peer: self._board.read(peer, departure.number)[1] for peer in self._off_node}
        extra_ns = int((rounds - 1) * self.link.latency_s * 1e9) if self._off_node else 0
        last_ns, sender = max((ns, peer) for peer, ns in ({self.rank: departure.left_ns} | arrivals).items())
        self._sleep_until(last_ns + extra_ns, where, None)
        return last_ns + extra_ns, sender

    def _start(self, exchange: Exchange) -> Work:
        plan, chunk = exchange.plan, exchange.chunk
        if self._board is None or not 0 <= chunk < plan.chunks or plan.stays_local[chunk]:
            return super()._start(exchange)
        send, recv = exchange.counts()
        departure = self._depart(sum(send[peer] for peer in self._off_node) * exchange.layout.row_bytes)
        work = super()._start(exchange)
        senders = tuple(peer for peer in self._off_node if recv[peer])
        arriving = sum(recv[peer] for peer in senders) * exchange.layout.row_bytes
        return EmulatedWork(self, work, exchange.where(), departure, senders, arriving)

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        """Sum of `tensor` over the ranks, in place, paying as a ring: 2 (W-1) steps of latency + bytes / W / rate.

        The ring runs through the ranks in order: a rank pays when the next one is on another node, all wait for those.
        """
        if self._board is None:
            raise ConfigError("transport", self.name, "a transport that open(header) was called on")
        steps = 2 * (self.world_size - 1)
        node_of, ranks = self.topology.node_of, range(self.world_size)
        paying = [rank for rank in ranks if node_of(rank) != node_of((rank + 1) % self.world_size)]
        share = tensor.nbytes * steps // self.world_size
        departure = self._depart(share if self.rank in paying else 0)
        work = super().all_reduce(tensor, action=action)
        arriving = share if (self.rank - 1) % self.world_size in paying else 0
        # One latency is in every arrival; the ring waits for one more at each further step.
        extra_ns = int((steps - 1) * self.link.latency_s * 1e9) if paying else 0
        senders = tuple(rank for rank in paying if rank != self.rank)
        return EmulatedWork(self, work, Where(action=action), departure, senders, arriving, extra_ns)

    def dense_all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> torch.Tensor:
        """`all_reduce`, waited for: how the gradients of the dense parameters are summed over the link."""
        return self.all_reduce(tensor, action=action).wait()

    def pay(self, num_bytes: int) -> float:
        """Put `num_bytes` for other nodes on this rank's link; when they arrive, on the time.perf_counter clock."""
        return self._put(num_bytes)[2] / 1e9

    def reopen(self) -> None:
        super().reopen()
        self._board = None
        self._number = 0
        self._unsettled.clear()

    def _depart(self, num_bytes: int) -> _Departure:
        """Put a message set on this rank's link and its times on the board, before any byte of it moves."""
        assert self._board is not None
        begin_ns, left_ns, arrival_ns = self._put(num_bytes)
        departure = _Departure(number=self._number, begin_ns=begin_ns, left_ns=left_ns, arrival_ns=arrival_ns)
        self._board.write(self.rank, departure)
        self._number += 1
        return departure

    def _put(self, num_bytes: int) -> tuple[int, int, int]:
        """(first byte, last byte, arrival) of `num_bytes` given to the link now."""
        now_ns = time.perf_counter_ns()
        if num_bytes == 0:
            return now_ns, now_ns, now_ns
        begin_ns = max(now_ns, self._port.sends_ns)
        left_ns = self._port.sends_ns = begin_ns + int(num_bytes / self.link.bytes_per_s * 1e9)
        return begin_ns, left_ns, left_ns + int(self.link.latency_s * 1e9)

    def _get(self, num_bytes: int, first_ns: int) -> int:
        """When `num_bytes`, the first of which left at `first_ns`, are here."""
        self._port.gets_ns = max(first_ns, self._port.gets_ns) + int(num_bytes / self.link.bytes_per_s * 1e9)
        return self._port.gets_ns + int(self.link.latency_s * 1e9)

    def _settle_before(self, work: EmulatedWork) -> None:
        """Settle the exchanges that were started before this one, but for those whose senders have not all come."""
        later = []
        while self._unsettled and (one := self._unsettled.popleft()) is not work:
            if one.departed:
                one.settle()
            else:
                later.append(one)
        self._unsettled.extendleft(reversed(later))

    def _sleep_until(self, ready_ns: int, where: Where, timeout_s: float | None) -> None:
        left_ns = ready_ns - time.perf_counter_ns()
        limit_s = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        if left_ns > limit_s * 1e9:
            text = f"the emulated link needs another {left_ns / 1e9:.3f} s for {where}, more than the limit"
            self.close(text)
            raise TransportTimeout(text, rank=self.rank, seconds=limit_s, **where._asdict())
        if left_ns > SPIN_NS:
            time.sleep((left_ns - SPIN_NS) / 1e9)
        while time.perf_counter_ns() < ready_ns:
            pass


def _share_board(inner: ProcessGroupTransport, link: int) -> _Board:
    """The board of all ranks. Collective. Raises ConfigError alike on all ranks when they do not share a machine, or
    have other links."""
    where = Where(action="open")
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    token, descriptor, made = secrets.randbits(62), -1, 0
    path = _board_path(directory, token)
    if inner.rank == 0:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.ftruncate(descriptor, BOARD_SLOTS * inner.world_size * 3 * 8)
            made = 1
        except OSError:
            made = 0
    try:
        said = inner.gather(torch.tensor([token, made, link], dtype=torch.int64), where)
        other = (said[:, 2] != said[0, 2]).nonzero()
        if len(other):
            raise ConfigError("link", f"another one on rank {int(other[0])} than on rank 0", "one link for all ranks")
        words = said[0]
        if inner.rank != 0 and int(words[1]):
            try:
                descriptor = os.open(_board_path(directory, int(words[0])), os.O_RDWR | os.O_NOFOLLOW)
            except OSError:
                descriptor = -1
        opened = inner.gather(torch.tensor([int(descriptor >= 0)], dtype=torch.int64), where)
        if not bool(opened.all()):
            without = [rank for rank, ok in enumerate(opened.flatten().tolist()) if not ok]
            raise ConfigError("link", f"ranks {without} cannot open {directory}", "ranks of one machine")
        return _Board(descriptor, inner.world_size)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if inner.rank == 0 and made:
            os.unlink(path)


def _board_path(directory: str, token: int) -> str:
    return os.path.join(directory, f"moe_overlap-link-{token:016x}")
