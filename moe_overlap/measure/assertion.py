"""Overlap as a test: for the CI of a program whose layers are supposed to hide their exchanges.

with assert_overlap(min=0.6):
    model(x).sum().backward()
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moe_overlap.errors import ConfigError
from moe_overlap.measure.timeline import Overlap, overlap
from moe_overlap.schedule.recorder import TimelineEvent, record

MOST_NAMED = 4  # waits in the message


class OverlapTooLow(AssertionError):
    """Too little of the communication had compute beside it, or there was none. `found`: what was measured."""

    def __init__(self, text: str, found: Overlap) -> None:
        super().__init__(text)
        self.found = found


@dataclass
class Asserted:
    """What the block did; `found` is there when it has ended."""

    found: Overlap | None = None


@contextmanager
def assert_overlap(*, min: float) -> Iterator[Asserted]:
    """Raises OverlapTooLow unless, of the time that exchanges of this rank's layers were under way in the block, at
    least the share `min` (above 0, at most 1) had compute of these layers beside it: `timeline_overlap` of the block.

    Every rank measures itself: call it on all. The first steps of a program are not like the others (connections,
    allocations, with schedule="auto" the calibration), so run some before. A block of several steps varies less, and a
    busy machine still makes it vary: leave a margin. A block without exchanges raises too: one rank, or no layer.
    Errors of the block pass. ConfigError for another `min`.
    """
    if isinstance(min, bool) or not isinstance(min, (int, float)) or not (math.isfinite(min) and 0 < min <= 1):
        raise ConfigError("min", min, "a share of the communication, above 0 and at most 1")
    result = Asserted()
    with record() as events:
        yield result
    result.found = found = overlap(events)
    share = found.timeline_overlap
    if share is None:
        text = "no exchange was recorded: one rank, or no layer ran in this block and thread"
        raise OverlapTooLow(text, found)
    if share < min:
        text = f"{share:.1%} of {1e3 * found.comm_s:.3g} ms of communication had compute beside it, not {min:.1%}; "
        raise OverlapTooLow(text + _stood_still(events), found)


def _stood_still(events: list[TimelineEvent]) -> str:
    """Where this rank waited for longest."""
    waited: dict[str, float] = {}
    for event in events:
        if event.lane == "wait":
            waited[event.action] = waited.get(event.action, 0.0) + event.end_s - event.start_s
    longest = sorted(waited, key=lambda action: -waited[action])[:MOST_NAMED]
    named = ", ".join(f"{action} {1e3 * waited[action]:.3g} ms" for action in longest)
    return f"stood still longest for {named} (layer.explain() says why)"
