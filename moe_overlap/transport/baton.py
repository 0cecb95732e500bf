"""Threads that take turns: only the one that holds the baton runs, and a seed decides who gets it next.

Plain blocking code of several ranks runs in one process in a fixed order. A thread gives the baton away only where it
waits; then one of all possible events (a rank that can go on, a message that can be delivered) is drawn by the seed.
When no event is possible and ranks are waiting, they would wait forever: each gets a TransportTimeout at once.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_overlap.errors import TransportTimeout
from moe_overlap.transport.where import Where


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why a rank does not run: `ready` says whether it can go on, `waits_for` which ranks it needs."""

    where: Where
    ready: Callable[[], bool]
    waits_for: Callable[[], Sequence[int]]


class Baton:
    """One run of `world_size` threads. Every method but `run` is called by the thread that holds the baton."""

    def __init__(self, world_size: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._gates = [threading.Semaphore(0) for _ in range(world_size)]
        self._waiting: list[Waiting | None] = [None] * world_size
        self._failed: list[BaseException | None] = [None] * world_size
        self._live = list(range(world_size))
        self._threads: list[threading.Thread] = []
        self._deliveries: list[Callable[[], None]] = []
        self._over = threading.Event()
        self._expired: str | None = None
        self._holder = 0
        self.raised: list[tuple[int, BaseException]] = []

    def deliver_later(self, delivery: Callable[[], None]) -> None:
        """`delivery` becomes one of the events the seed draws from."""
        self._deliveries.append(delivery)

    def holds(self, rank: int) -> bool:
        return threading.current_thread() is self._threads[rank]

    def wait(self, rank: int, waiting: Waiting) -> None:
        """Give the baton away; return once it is back and `waiting.ready()`. Raises TransportTimeout on a deadlock."""
        self._waiting[rank] = waiting
        following = self._draw()
        if following != rank:
            self._gates[following].release()
            self._gates[rank].acquire()
        if self._expired is not None:
            raise TransportTimeout(self._expired, rank=rank, **waiting.where._asdict())
        self._holder = rank
        self._waiting[rank] = None
        failed, self._failed[rank] = self._failed[rank], None
        if failed is not None:
            raise failed

    def _draw(self) -> int:
        """Draw events until it is a rank's turn."""
        while True:
            runnable = [rank for rank in self._live if self._can_go_on(rank)]
            number = len(runnable) + len(self._deliveries)
            if number == 0:
                self._break_deadlock()
                continue
            drawn = self._random.randrange(number)
            if drawn < len(runnable):
                return runnable[drawn]
            self._deliveries.pop(drawn - len(runnable))()

    def _can_go_on(self, rank: int) -> bool:
        waiting = self._waiting[rank]
        return waiting is None or self._failed[rank] is not None or waiting.ready()

    def _break_deadlock(self) -> None:
        blocked = [(rank, waiting) for rank in self._live if (waiting := self._waiting[rank]) is not None]
        ended = [rank for rank in range(len(self._gates)) if rank not in self._live]
        lines = [f"rank {rank} waits in {waiting.where} for {_ranks(waiting.waits_for())}" for rank, waiting in blocked]
        if ended:
            lines.append(f"{_ranks(ended)} returned")
        for rank, waiting in blocked:
            peer = next(iter(waiting.waits_for()), None)
            self._failed[rank] = TransportTimeout(
                "deadlock, nobody can go on: " + "; ".join(lines),
                rank=rank,
                peer=peer,
                seconds=0.0,
                **waiting.where._asdict(),
            )

    def _end(self, rank: int) -> None:
        self._live.remove(rank)
        if self._live:
            self._gates[self._draw()].release()
            return
        while self._deliveries:  # for Works that a later run waits for
            self._deliveries.pop()()
        self._over.set()

    def run(
        self, bodies: Sequence[Callable[[], Any]], *, on_error: Callable[[int, BaseException], None], timeout_s: float
    ) -> list[Any]:
        """Run one body per rank to the end and return their results.

        Raises the first error of a body (`on_error` has told the other ranks before they go on), or TransportTimeout
        when the bodies need more than `timeout_s` of real time.
        """
        results: list[Any] = [None] * len(bodies)

        def main(rank: int) -> None:
            self._gates[rank].acquire()
            self._holder = rank
            try:
                if self._expired is None:
                    results[rank] = bodies[rank]()
            except BaseException as error:  # a rank may also end by a test framework's own outcome class
                self.raised.append((rank, error))
                if self._expired is None:
                    on_error(rank, error)
            if self._expired is None:
                self._end(rank)

        self._threads = [
            threading.Thread(target=main, args=(rank,), name=f"virtual rank {rank}", daemon=True)
            for rank in range(len(bodies))
        ]
        for thread in self._threads:
            thread.start()
        self._gates[self._draw()].release()
        try:
            over = self._over.wait(timeout_s)
        except BaseException:
            self._wake_all("the run of virtual ranks was interrupted")
            raise
        if not over:
            holder = self._holder
            stack = _stack_of(self._threads[holder])
            text = f"the run of virtual ranks took longer than {timeout_s} s while rank {holder} was running"
            self._wake_all(text)
            raise TransportTimeout(f"{text}\n{stack}", rank=holder, seconds=timeout_s)
        for thread in self._threads:
            thread.join()
        return results

    def _wake_all(self, text: str) -> None:
        """Every rank that waits, now or later, ends with `text`; one that never waits again cannot be ended."""
        self._expired = text
        for gate in self._gates:
            gate.release()
        deadline = time.monotonic() + 2.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _stack_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)[-6:]) if frame is not None else ""


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)
