"""Ctrl-C as a question: a loop that can save its work asks whether to stop, and is not broken off in the middle. And
Ctrl-C at once, where a call would else keep it waiting."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
LISTEN_S = 0.5
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


def interruptible(work: Callable[[], T]) -> T:
    """What `work` returns or raises. It runs in a thread of its own, so that Ctrl-C is heard although `work` spends
    minutes in a call of compiled code: KeyboardInterrupt is raised here, and the thread ends with the process."""
    found: list[T] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=run, name="moe_overlap interruptible", daemon=True).start()
    while not over.wait(LISTEN_S):  # a signal that another thread took is heard between two waits, not in one
        pass
    if errors:
        raise errors[0]
    return found[0]
