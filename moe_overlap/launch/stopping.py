"""Ctrl-C as a question: a loop that can save its work asks whether to stop, and is not broken off in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """`asked`: whether an interrupt has come since `stopping` began."""

    asked: bool = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """While the block runs, the first SIGINT sets `asked` and a second one raises KeyboardInterrupt.

    Outside of the main thread signals do not arrive, and nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
