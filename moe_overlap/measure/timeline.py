"""From executed actions to overlap: unions and intersections of intervals. Seconds throughout.

    C = union of the intervals during which an exchange of this rank was under way (lane "wire")
    P = union of the intervals during which this rank computed (lane "comp")
    timeline_overlap = |C and P| / |C|        exposed = |C without P|

Intervals are half open, so touching ones do not overlap. Time between two actions belongs to neither, which counts it
as exposed while an exchange is under way: the strict reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_overlap.schedule.recorder import TimelineEvent, record

__all__ = ["Interval", "Overlap", "TimelineEvent", "busy", "intersection", "length", "overlap", "record", "union"]

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One step of one rank, in seconds. `comm_s` = hidden_s + exposed_s."""

    comm_s: float
    compute_s: float
    hidden_s: float

    @property
    def exposed_s(self) -> float:
        """Communication with no compute under it."""
        return self.comm_s - self.hidden_s

    @property
    def timeline_overlap(self) -> float | None:
        """Share of the communication that had compute under it; None where there was no communication."""
        return self.hidden_s / self.comm_s if self.comm_s > 0 else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in ascending order; empty and reversed ones vanish.

    >>> union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (2.0, 2.5)])
    [(0.0, 2.5), (3.0, 4.0)]
    """
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The points in both; `a` and `b` as `union` gives them.

    >>> intersection([(0.0, 2.0), (3.0, 5.0)], [(1.0, 4.0)])
    [(1.0, 2.0), (3.0, 4.0)]
    """
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Sum of the lengths of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def busy(events: Iterable[TimelineEvent], lane: str) -> list[Interval]:
    """The union of the events of one lane."""
    return union((event.start_s, event.end_s) for event in events if event.lane == lane)


def overlap(events: Sequence[TimelineEvent]) -> Overlap:
    """What overlapped in the events of one rank."""
    comm, compute = busy(events, "wire"), busy(events, "comp")
    return Overlap(comm_s=length(comm), compute_s=length(compute), hidden_s=length(intersection(comm, compute)))
