"""What was executed when: one event per action, on the clock `time.perf_counter`, which processes of a machine share.

with record() as events:
    layer(x).sum().backward()
print([event.action for event in events])
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One executed action of one rank. Lane `wait` holds the time that the compute lane stood still for an exchange."""

    rank: int
    step: int
    phase: str
    action: str
    lane: str
    start_s: float
    end_s: float


_active = threading.local()


@contextmanager
def record() -> Iterator[list[TimelineEvent]]:
    """Collects the events of this thread's layers, forward and backward, in the order in which they ended."""
    events: list[TimelineEvent] = []
    outer = getattr(_active, "events", None)
    _active.events = events
    try:
        yield events
    finally:
        _active.events = outer


def emit(event: TimelineEvent) -> None:
    """Hand one event to the recorder of this thread, if there is one."""
    events = getattr(_active, "events", None)
    if events is not None:
        events.append(event)
