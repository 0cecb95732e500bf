"""Exact event simulation of a schedule: durations, lanes and dependencies in, start and end of every action out.

`simulate` runs the compiled simulator (`csrc/core/simulate.cpp`) where it is loaded and the reference below where it is
not; both give the same doubles and the same error texts. `implementation()` says which one it is and why.

Example: a dispatch on the wire (lane 1) under a backbone op (lane 0), then the experts that need the dispatch:

    >>> simulate_reference([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]])
    [(0.0, 2.0), (0.0, 1.5), (2.0, 3.0)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_overlap import _native

Times = list[tuple[float, float]]


def simulate(lane_of_action: Sequence[int], duration_s: Sequence[float], deps: Sequence[Sequence[int]]) -> Times:
    """Start and end in seconds of every action of a schedule.

    lane_of_action: the lane (any integer) of each action, in issue order. A lane runs its actions in issue order, one
    at a time. duration_s: seconds, finite and >= 0. deps: for each action the actions that must have ended before it
    starts; they may come later in issue order.

    An action starts at the latest of zero, the end of the previous action of its lane and the ends of its dependencies.

    ValueError: lists of different lengths, a bad duration or dependency, or a deadlock; the text of a deadlock names
    the first action in issue order that can never start.
    """
    planner = _native.planner()
    if planner is None:
        return simulate_reference(lane_of_action, duration_s, deps)
    times: Times = planner.simulate(lane_of_action, duration_s, deps)
    return times


def implementation() -> tuple[str, str]:
    """(name, reason) of what `simulate` runs: "cpp" or "reference"."""
    part = _native.part("planner")
    return ("cpp" if part.loaded else "reference"), part.reason


def simulate_reference(
    lane_of_action: Sequence[int], duration_s: Sequence[float], deps: Sequence[Sequence[int]]
) -> Times:
    """`simulate` in plain Python: the definition the compiled one is tested against."""
    _check_arguments(lane_of_action, duration_s, deps)
    count = len(lane_of_action)
    successors: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count  # predecessors that have not ended
    last_of_lane: dict[int, int] = {}
    for action, lane in enumerate(lane_of_action):
        predecessors = list(deps[action])
        if lane in last_of_lane:
            predecessors.append(last_of_lane[lane])
        last_of_lane[lane] = action
        waiting[action] = len(predecessors)
        for predecessor in predecessors:
            successors[predecessor].append(action)

    start_s = [0.0] * count
    end_s = [0.0] * count
    ready = [action for action in range(count) if waiting[action] == 0]
    done = 0
    while ready:
        action = ready.pop()
        done += 1
        end_s[action] = start_s[action] + duration_s[action]
        for successor in successors[action]:
            start_s[successor] = max(start_s[successor], end_s[action])
            waiting[successor] -= 1
            if waiting[successor] == 0:
                ready.append(successor)
    if done != count:
        raise ValueError(_deadlock_text(lane_of_action, deps, waiting))
    return list(zip(start_s, end_s, strict=True))


def _check_arguments(lane_of_action: Sequence[int], duration_s: Sequence[float], deps: Sequence[Sequence[int]]) -> None:
    count = len(lane_of_action)
    if len(duration_s) != count or len(deps) != count:
        raise ValueError(
            "lane_of_action, duration_s and deps must have one entry for each action, "
            f"got {count}, {len(duration_s)} and {len(deps)}"
        )
    for action in range(count):
        if not math.isfinite(duration_s[action]) or duration_s[action] < 0:
            raise ValueError(f"duration_s of action {action}: expected a finite number of seconds >= 0")
        for dep in deps[action]:
            if not 0 <= dep < count:
                raise ValueError(f"action {action} depends on action {dep}: expected 0 to {count - 1}")


def _deadlock_text(lane_of_action: Sequence[int], deps: Sequence[Sequence[int]], waiting: Sequence[int]) -> str:
    # The first action that did not run waits for a dependency: its lane predecessor has a lower number, so it did run.
    stuck = next(action for action, left in enumerate(waiting) if left)
    cause = next(dep for dep in deps[stuck] if waiting[dep])
    return f"deadlock: action {stuck} (lane {lane_of_action[stuck]}) never starts, it waits for action {cause}"
