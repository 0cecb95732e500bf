"""A played engine whose copies take time, on a clock that goes on where the host waits for them and nowhere else."""

from __future__ import annotations

from typing import Any

import torch

from tests.transport.played import PlayedEngine


class Clock:
    """Stands for the module `time`. Seconds since it was set to zero: those that were slept."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class TimedEvent:
    """When its stream came to it; in the past where it was never recorded."""

    at_s = 0.0

    def record(self, stream: Any) -> None:
        self.at_s = stream.at_s

    def query(self) -> bool:
        return True


class TimedStream:
    """Its copies are done at once, and are over when they would be."""

    at_s = 0.0

    def wait_event(self, event: TimedEvent) -> None:
        self.at_s = max(self.at_s, event.at_s)


class TimedCurrent:
    """The host's."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @property
    def at_s(self) -> float:
        return self.clock.now_s

    def wait_event(self, event: TimedEvent) -> None:
        self.clock.sleep(max(0.0, event.at_s - self.clock.now_s))


class TimedEngine(PlayedEngine):
    """down_s, up_s: seconds of a byte in each direction: the first stream is the one on which bytes go down."""

    def __init__(self, device: Any = None, *, clock: Clock, down_s: float, up_s: float = 0.0) -> None:
        super().__init__(device)
        self.timed: list[TimedStream] = []
        self._byte_s = (down_s, up_s)
        self._host = TimedCurrent(clock)

    def stream(self) -> Any:
        self.timed.append(TimedStream())
        return self.timed[-1]

    def current(self) -> Any:
        return self._host

    def event(self, *, timing: bool = False) -> Any:
        return TimedEvent()

    def copy(self, stream: Any, into: torch.Tensor, source: torch.Tensor) -> None:
        into.copy_(source)
        stream.at_s += into.numel() * self._byte_s[self.timed.index(stream)]
