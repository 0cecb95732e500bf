"""Interval sets and the overlap of timelines, against brute force on a grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_overlap.measure.timeline import TimelineEvent, busy, intersection, length, overlap, union

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


def cells(intervals) -> set[int]:
    """The unit cells [i, i + 1) that the intervals cover."""
    return {i for start, end in intervals for i in range(int(start), int(end))}


@given(INTERVALS)
def test_union_covers_the_same_points_once(intervals):
    merged = union(intervals)
    assert cells(merged) == cells(intervals)
    assert length(merged) == len(cells(intervals))
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:], strict=False)), "disjoint, ascending, not touching"


@given(INTERVALS, INTERVALS)
def test_intersection_is_the_common_points(a, b):
    common = intersection(union(a), union(b))
    assert cells(common) == cells(a) & cells(b)
    assert length(common) == len(cells(a) & cells(b))


def event(lane: str, start_s: float, end_s: float, action: str = "D0") -> TimelineEvent:
    return TimelineEvent(0, 1, "forward", action, lane, start_s, end_s)


@pytest.mark.parametrize(
    ("wire", "comp", "hidden", "exposed"),
    [
        ([(0, 2)], [(2, 5)], 0, 2),  # touching is not overlapping
        ([(0, 10)], [(2, 3), (4, 6)], 3, 7),  # nested
        ([(0, 4), (2, 6)], [(1, 5)], 4, 2),  # exchanges in flight together count once
        ([(0, 3)], [(0, 1), (0, 3)], 3, 0),  # compute lanes that nest
        ([], [(0, 3)], 0, 0),
        ([(1, 2)], [], 0, 1),
    ],
)
def test_overlap(wire, comp, hidden, exposed):
    found = overlap([event("wire", *pair) for pair in wire] + [event("comp", *pair, "E0") for pair in comp])
    assert (found.hidden_s, found.exposed_s) == (hidden, exposed)
    assert found.timeline_overlap == (hidden / (hidden + exposed) if wire else None)


def test_time_spent_waiting_is_neither_compute_nor_communication():
    events = [event("wire", 0, 4), event("wait", 1, 4), event("comp", 0, 1, "B0")]
    assert overlap(events).exposed_s == 3
    assert busy(events, "wait") == [(1, 4)]
