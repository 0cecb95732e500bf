"""What was executed when: one event per action, on the clock `time.perf_counter`, which processes of a machine share.

with record() as events:
    layer(x).sum().backward()
print([event.action for event in events])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One executed action of one rank. Lane `wait` holds the time that the compute lane stood still for an exchange.

    Of exchanges also `issued_s`, when this rank handed it to the transport, which may be long before its bytes move,
    and `last_sender`, the rank whose rows came last, where the transport can tell."""

    rank: int
    step: int
    phase: str
    action: str
    lane: str
    start_s: float
    end_s: float
    issued_s: float | None = None
    last_sender: int | None = None


@dataclass(eq=False)
class Recording:
    """The events of one `record()`, and those of a stream, whose time is known when the stream has passed them."""

    events: list[TimelineEvent] = field(default_factory=list)
    pending: list[Callable[[], TimelineEvent]] = field(default_factory=list)
    open: bool = True


_active = threading.local()


@contextmanager
def record() -> Iterator[list[TimelineEvent]]:
    """Collects the events of this thread's layers, forward and backward, in the order in which they ended.

    Those of CUDA steps, which are timed nowhere else, are in the list when the context ends, which waits for them.
    """
    mine, outer = Recording(), recording()
    _active.recording = mine
    try:
        yield mine.events
        mine.events += [read() for read in mine.pending]
    finally:
        mine.open = False
        mine.pending.clear()  # each holds its step's lanes
        _active.recording = outer


def recording() -> Recording | None:
    """The recorder of this thread."""
    found: Recording | None = getattr(_active, "recording", None)
    return found


def emit(event: TimelineEvent) -> None:
    """Hand one event to the recorder of this thread, if there is one."""
    found = recording()
    if found is not None:
        found.events.append(event)
