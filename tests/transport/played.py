"""A device's streams, played: what is put on one is done later, in an order drawn by a seed, as far as events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Passing:
    """One record of an event: whether its stream has come there, and when in the order of all that was done."""

    at: int | None = None


class PlayedEvent:
    """As torch.cuda.Event: waiting means the last record so far, and nothing where there is none."""

    def __init__(self) -> None:
        self.last: Passing | None = None
        self.of: object = None

    def record(self, stream: PlayedStream) -> None:
        self.last = passing = Passing()
        self.of = stream
        stream.put(lambda: setattr(passing, "at", stream.engine.tick()))

    @property
    def passed(self) -> bool:
        return self.last is None or self.last.at is not None

    def query(self) -> bool:
        return self.passed


class PlayedStream:
    """Does its actions in order, one at a time, when the engine has it go on."""

    def __init__(self, engine: PlayedEngine) -> None:
        self.engine = engine
        self.waited_for: list[PlayedEvent] = []
        self._queue: deque[tuple[Callable[[], object], Passing | None]] = deque()

    def put(self, action: Callable[[], object]) -> None:
        self._queue.append((action, None))
        self.engine.play_some()

    def wait_event(self, event: PlayedEvent) -> None:
        self.waited_for.append(event)
        if event.last is not None and not self.engine.deaf:
            self._queue.append((lambda: None, event.last))

    def step(self) -> bool:
        """Do the next action, unless it has to wait."""
        if not self._queue or (self._queue[0][1] is not None and self._queue[0][1].at is None):
            return False
        self._queue.popleft()[0]()
        return True


class CurrentStream:
    """The computing one, which is the host's: nothing on it is ever late, and it waits by having the others go on."""

    def __init__(self, engine: PlayedEngine) -> None:
        self.engine = engine

    def put(self, action: Callable[[], object]) -> None:
        action()

    def wait_event(self, event: PlayedEvent) -> None:
        while not event.passed:
            assert self.engine.play(), "nothing can go on"


class PlayedEngine:
    """Stands for `staged.Engine` on a CPU. `deaf`: its streams do not wait."""

    deaf = False

    def __init__(self, device: Any = None, *, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.kept: list[torch.Tensor] = []
        self.pinned_memory: dict[int, torch.Tensor] = {}  # kept, so that no other tensor lies there later
        self._random = random.Random(seed)
        self.streams: list[PlayedStream] = []
        self._current = CurrentStream(self)
        self._ticks = 0

    def pinned(self, num_bytes: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), 0xEE, dtype=torch.uint8)
        self.pinned_memory[memory.data_ptr()] = memory
        return memory

    def stream(self) -> PlayedStream:
        self.streams.append(PlayedStream(self))
        return self.streams[-1]

    def current(self) -> CurrentStream:
        return self._current

    def event(self, *, timing: bool = False) -> PlayedEvent:
        return PlayedEvent()

    def join(self, event: PlayedEvent) -> None:
        self._current.wait_event(event)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned_memory

    def capturing(self, stream: Any = None) -> bool:
        return False

    def copy(self, stream: PlayedStream, into: torch.Tensor, source: torch.Tensor) -> None:
        stream.put(lambda: into.copy_(source))

    def keep(self, tensor: torch.Tensor, stream: PlayedStream) -> None:
        self.kept.append(tensor)

    def tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def play(self) -> bool:
        """One step of one stream that can go on, drawn; whether there was any."""
        return any(stream.step() for stream in self._random.sample(self.streams, len(self.streams)))

    def play_some(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 3))):
            self.play()
