"""Ctrl-C as a question: a loop that can save its work asks whether to stop, and is not broken off in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP = signal.SIGUSR1  # a parent's question: as the first SIGINT, however often it comes


@dataclass
class Stop:
    """`asked`: whether an interrupt, or STOP, has come since `stopping` began; `interrupted`: whether a SIGINT has."""

    asked: bool = False
    interrupted: bool = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """While the block runs, the first SIGINT sets `asked` and a second one raises KeyboardInterrupt; STOP sets `asked`.

    Outside of the main thread signals do not arrive, and nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = stop.interrupted or number == signal.SIGINT
        stop.asked = True

    before = [(number, signal.signal(number, note)) for number in (signal.SIGINT, STOP)]
    try:
        yield stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)
