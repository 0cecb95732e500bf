"""A wire for one GPU: every exchange goes down to pinned host memory and up again, by the copy engines.

One card has nobody to exchange rows with, and a copy on the card runs on the multiprocessors that the experts need.
PCIe is a real wire beside them: the rows of an exchange leave on one stream and come back on another, in pieces, so
that a piece goes up while the next one goes down. Both streams take exchanges in the order in which they were started,
like the two directions of a link. What comes back are the bits that left, so results are those of `local`.

Order is kept by events alone: the host waits for nothing, and a place in pinned memory is written again only after the
copy out of it (`Wire.send`). So an exchange can be captured in a CUDA graph: both streams fork from the captured one,
and are joined to it again where the exchange is waited for. Graphs and steps of one wire share its places, so they run
one after another, on one stream or on such as wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.errors import ConfigError
from moe_overlap.transport.base import Work
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.named_device import as_device
from moe_overlap.transport.where import Where

PIECE_BYTES = 8 << 20
"""About 0.15 ms of PCIe 5: a few times what the host needs to say what is to be copied."""
PLACES = 4
"""Pieces that may be between their way down and their way up."""

in_graphs: list[torch.Tensor] = []
"""Memory that CUDA graphs have the addresses of. A graph tells nobody when it is gone, so this stays to the end."""


class Engine:
    """What a wire asks of a CUDA device. Raises ConfigError where there is none."""

    def __init__(self, device: torch.device | str | None) -> None:
        wanted = as_device("cuda" if device is None else device)
        if wanted.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError("device", str(wanted), "a CUDA device, whose copy engines are the wire")
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise ConfigError("device", str(wanted), f"one of the {torch.cuda.device_count()} CUDA device(s)")
        self.device = torch.device("cuda", index)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] of the host. torch frees it when the copies from and to it are over."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def event(self, *, timing: bool = False) -> Any:
        return torch.cuda.Event(enable_timing=timing)

    def join(self, event: Any) -> None:
        """The host waits until the event has passed."""
        event.synchronize()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def capturing(self, stream: Any = None) -> bool:
        """Whether a stream (None: the current one) is captured into a graph."""
        if stream is None:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(stream):
            return torch.cuda.is_current_stream_capturing()

    def copy(self, stream: Any, into: torch.Tensor, source: torch.Tensor) -> None:
        """Between the device and pinned memory, on `stream`; returns at once."""
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """The tensor's memory is not given out again before `stream` has done what it was told so far."""
        tensor.record_stream(stream)


class Wire:
    """Two streams and PLACES pieces of pinned memory between them."""

    def __init__(self, engine: Engine, piece_bytes: int) -> None:
        self.engine = engine
        self.piece_bytes = piece_bytes
        self._down, self._up = engine.stream(), engine.stream()
        self._places = [engine.pinned(piece_bytes) for _ in range(PLACES)]
        self._captured = self._in_graphs = False
        self._not_taken: set[Any] = set()  # ends of exchanges in the graph that is captured, until they are waited for
        self._begin_anew()
        self._next = 0

    def _begin_anew(self) -> None:
        self._filled = [self.engine.event() for _ in range(PLACES)]
        self._emptied = [self.engine.event() for _ in range(PLACES)]  # nobody waits for one that was never recorded

    def _enter(self) -> bool:
        """Whether the coming exchange is captured in a graph. The first of a capture, and the first behind one, wait
        for no place: events do not reach into a graph or out of it, and the streams on which graphs are replayed are
        waited for by `ready`. It is a first one where no other is under way, all of which a capture joins; whether the
        wire's own stream is captured does not say so alone, as torch gives each stream to several."""
        captured = self.engine.capturing()
        if captured != self._captured or (captured and (not self._not_taken or not self.engine.capturing(self._down))):
            self._not_taken.clear()
            if captured and not self._in_graphs:
                self._in_graphs = True
                in_graphs.extend(self._places)
            self._captured = captured
            self._begin_anew()
        return captured

    def send(self, into: torch.Tensor, source: torch.Tensor, share: float, *, timing: bool) -> tuple[Any, Any]:
        """Send `source`, uint8 [n], to `into`, `share` times. Returns (begin, end), events on the wire.

        All of n arrives; where `share` is less than 1, what is beyond it is copied on the current stream instead.
        """
        engine, down, up, captured = self.engine, self._down, self._up, self._enter()
        ready, begin, end = engine.event(), engine.event(timing=timing), engine.event(timing=timing)
        current = engine.current()
        ready.record(current)  # `source` is there, and whoever had the memory of `into` before is done with it
        down.wait_event(ready)
        begin.record(down)
        up.wait_event(begin)  # and so for `ready`: whoever waits for `up` has joined both, whatever is sent
        for first, last in pieces(source.numel(), share, self.piece_bytes):
            place = self._next
            self._next = (place + 1) % PLACES
            held = self._places[place][: last - first]
            down.wait_event(self._emptied[place])
            engine.copy(down, held, source[first:last])
            self._filled[place].record(down)
            up.wait_event(self._filled[place])
            engine.copy(up, into[first:last], held)
            self._emptied[place].record(up)
        stays = on_wire(source.numel(), min(share, 1.0))
        if stays < source.numel():
            into[stays:].copy_(source[stays:])
            copied = engine.event()
            copied.record(current)
            up.wait_event(copied)
        end.record(up)
        if captured:  # memory goes back to the graph's pool when the work lets go of it
            self._not_taken.add(end)
        else:
            engine.keep(source, down)
            engine.keep(into, up)
        return begin, end

    def take(self, end: Any) -> None:
        """The current stream waits for an exchange."""
        self.engine.current().wait_event(end)
        self._not_taken.discard(end)


def on_wire(num_bytes: int, share: float) -> int:
    """How many bytes travel where `num_bytes` are to be sent `share` times."""
    return round(num_bytes * share)


def pieces(num_bytes: int, share: float, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, last) of each piece of [0, num_bytes), gone through `share` times, in order.

    >>> list(pieces(10, 1.5, 4))
    [(0, 4), (4, 8), (8, 10), (0, 4), (4, 5)]
    """
    left = on_wire(num_bytes, share)
    while left > 0:
        round_bytes = min(left, num_bytes)
        for first in range(0, round_bytes, piece_bytes):
            yield first, min(first + piece_bytes, round_bytes)
        left -= round_bytes


class StagedWork:
    """An exchange on the wire. When its bytes were under way, the host does not know: see `StagedTransport.journal`.
    captured: in a CUDA graph, whose pool has the memory of `source` again after `wait`."""

    def __init__(
        self, transport: StagedTransport, source: torch.Tensor, out: torch.Tensor, end: Any, where: Where,
        *, captured: bool,
    ) -> None:  # fmt: skip
        self._transport, self._out, self._end, self._where = transport, out, end, where
        self._source: torch.Tensor | None = source
        self._generation = transport.life.generation
        self._captured = captured

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """The rows. The current stream waits, the host does not, whatever the limit. TransportClosed after `close`."""
        if self._source is not None:
            self._transport._require_begun_in(self._generation, self._where)
        self._transport.wire.take(self._end)
        self._source = None
        return self._out

    def done(self) -> bool:
        """ConfigError in a CUDA graph: what is captured has not run."""
        if self._captured:
            raise ConfigError("done", "an exchange in a CUDA graph", "wait(): a graph cannot be asked how far it is")
        void = self._source is not None and self._transport._is_void(self._generation)
        return void or bool(self._end.query())

    def interval(self) -> tuple[float, float] | None:
        return None


class StagedTransport(LocalTransport):
    """A single rank whose exchanges travel over PCIe and back. Results are those of LocalTransport, bit for bit.

    share: how many times the bytes of an exchange travel. Of W ranks with equal loads each sends (W - 1) / W of its
    rows to others: 7 / 8 gives one card the bytes of one of eight, and the rest is copied on the device. More than 1
    stands for a slower link. piece_bytes: an exchange is cut into pieces of so many, PLACES of which are pinned.
    `stats.payload_bytes` counts what travelled. `journal`: where it is a list, every exchange appends (action, begin,
    end), CUDA events with times of when the wire began and ended with it.

    Exchanges can be captured in a CUDA graph (`torch.cuda.graph`, `make_graphed_callables`; fixed shapes, so a layer of
    `mode="static"`): `stats` count a capture and no replay, replays have no limit but their caller's, and of one
    transport graphs and steps run one after another. Raises ConfigError without a CUDA device, for numbers that cannot
    be, and for a journal in a graph, whose events have no times.
    """

    name = "staged"
    loopback = True  # see `link.nodes_of`

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        share: float = 1.0,
        piece_bytes: int = PIECE_BYTES,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(timeout_s=timeout_s)
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not math.isfinite(share) or not 0.0 <= share <= 1000.0:
            raise ConfigError("share", share, "a number from 0 to 1000: how many times the bytes travel")
        if isinstance(piece_bytes, bool) or not isinstance(piece_bytes, int) or not 1 <= piece_bytes <= 1 << 30:
            raise ConfigError("piece_bytes", piece_bytes, "an integer from 1 to 2**30")
        engine = Engine(device)
        self.device = engine.device
        self.share = float(share)
        self.wire = Wire(engine, piece_bytes)
        self.journal: list[tuple[str, Any, Any]] | None = None

    @property
    def link(self) -> str:
        """The wire in words: of two with one text and one device an exchange takes the same time."""
        return f"pinned memory, {self.share:g} times, in pieces of {self.wire.piece_bytes} bytes"

    def _stays(self, plan: ChunkPlan, chunk: int) -> bool:
        return False

    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        rows = exchange.rows
        for name, tensor in (("rows.device", rows), ("out.device", out)):
            if tensor.device != self.device:
                raise self._refusing(ConfigError(name, str(tensor.device), f"{self.device}, the device of the wire"))
        timing = self.journal is not None
        captured = self.wire.engine.capturing()
        if captured and timing:
            expected = "None while a CUDA graph is captured, whose events have no times"
            raise self._refusing(ConfigError("journal", "a list", expected))
        source, into = (tensor.detach().view(-1).view(torch.uint8) for tensor in (rows, out))
        begin, end = self.wire.send(into, source, self.share, timing=timing)
        if self.journal is not None:
            self.journal.append((exchange.action, begin, end))
        self.stats.exchanges += 1
        self.stats.payload_bytes += on_wire(source.numel(), self.share)
        return StagedWork(self, source, out, end, exchange.where(), captured=captured)
