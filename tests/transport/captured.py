"""A played engine whose streams can be captured into a graph, which refuses what CUDA refuses there.

What is captured is played at once as well, so that a layer can go on with real numbers; `replay` then does the graph's
copies again, in an order drawn by a seed, as far as their dependencies allow. Refused are: to ask an event of a graph,
or to wait for it on the host; to wait, in a graph, for what was recorded outside, and the other way round; work on a
stream that has not joined the capture; to allocate pinned memory; and streams that were not joined to the first one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from tests.transport.played import CurrentStream, PlayedEngine, PlayedEvent, PlayedStream


class CudaRefuses(RuntimeError):
    """As an error of the CUDA runtime."""


class Graph:
    """Actions, each with those it needs, by their numbers."""

    def __init__(self) -> None:
        self.actions: list[tuple[Callable[[], object], frozenset[int]]] = []

    def add(self, action: Callable[[], object], needs: frozenset[int]) -> int:
        self.actions.append((action, needs))
        return len(self.actions) - 1

    def behind(self, tips: frozenset[int]) -> set[int]:
        """What is over when `tips` are."""
        found: set[int] = set()
        left = list(tips)
        while left:
            number = left.pop()
            if number not in found:
                found.add(number)
                left.extend(self.actions[number][1])
        return found

    def replay(self, seed: int) -> None:
        drawn, done = random.Random(seed), set[int]()
        left = list(range(len(self.actions)))
        while left:
            number = drawn.choice([one for one in left if self.actions[one][1] <= done])
            self.actions[number][0]()
            done.add(number)
            left.remove(number)


class CapturedEvent(PlayedEvent):
    """Knows the graph that it was recorded in."""

    def __init__(self, engine: CapturedEngine) -> None:
        super().__init__()
        self.engine = engine
        self.graph: Graph | None = None
        self.tips: frozenset[int] = frozenset()

    def record(self, stream: Any) -> None:
        self.graph, self.tips = stream.graph, stream.tips
        self.engine.recording = True
        super().record(stream)
        self.engine.recording = False

    def query(self) -> bool:
        if self.graph is not None:
            raise CudaRefuses("an event of a graph cannot be asked")
        return super().query()


class _Captured:
    """What both kinds of streams do in a capture."""

    engine: CapturedEngine
    graph: Graph | None = None
    tips: frozenset[int] = frozenset()

    def put(self, action: Callable[[], object]) -> None:
        if not self.engine.recording:
            if self.graph is not self.engine.graph:
                raise CudaRefuses("work beside the capture, on a stream that has not joined it")
            if self.graph is not None:
                self.tips = frozenset({self.graph.add(action, self.tips)})
        super().put(action)  # type: ignore[misc]

    def wait_event(self, event: CapturedEvent) -> None:
        if event.last is not None and event.graph is not self.graph:
            if self.graph is not None or event.graph is not self.engine.graph:
                raise CudaRefuses("an event of another graph, or of none")
            self.graph, self.tips = event.graph, frozenset()
        if event.last is not None and not (self.engine.deaf and isinstance(self, PlayedStream)):
            self.tips |= event.tips
        super().wait_event(event)  # type: ignore[misc]


class CapturedStream(_Captured, PlayedStream):
    pass


class CapturedCurrent(_Captured, CurrentStream):
    pass


class CapturedEngine(PlayedEngine):
    """`begin` and `end` stand around a capture."""

    def __init__(self, device: Any = None, *, seed: int = 0) -> None:
        super().__init__(device, seed=seed)
        self.graph: Graph | None = None
        self.recording = False
        self._current = CapturedCurrent(self)

    def begin(self) -> None:
        self.graph = self._current.graph = Graph()

    def end(self) -> Graph:
        """The graph. Raises CudaRefuses where a stream was not joined."""
        graph, joined = self.graph, self._current.tips
        assert graph is not None
        self.graph = None
        for stream in (self._current, *self.streams):
            stream.graph, stream.tips = None, frozenset()
        if graph.behind(joined) != set(range(len(graph.actions))):
            raise CudaRefuses("a stream of the graph was not joined to the one that was captured")
        return graph

    def stream(self) -> CapturedStream:
        self.streams.append(CapturedStream(self))
        return self.streams[-1]

    def event(self, *, timing: bool = False) -> CapturedEvent:
        return CapturedEvent(self)

    def capturing(self, stream: Any = None) -> bool:
        return (stream or self._current).graph is not None

    def pinned(self, num_bytes: int) -> torch.Tensor:
        if self.graph is not None:
            raise CudaRefuses("pinned memory cannot be allocated during a capture")
        return super().pinned(num_bytes)

    def join(self, event: PlayedEvent) -> None:
        if self.graph is not None:
            raise CudaRefuses("the host cannot wait during a capture")
        super().join(event)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        assert self.graph is None, "the pool of a graph would not have this memory again before its end"
        super().keep(tensor, stream)
