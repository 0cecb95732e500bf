"""Exact event simulation of a schedule: durations, lanes and dependencies in, start and end of every action out.

`simulate` runs the compiled simulator (`csrc/core/simulate.cpp`) where it is loaded and the reference below where it is
not; both give the same doubles and the same error texts. `implementation()` says which one it is and why.

Example: a dispatch on the wire (lane 1) under a backbone op (lane 0), then the experts that need the dispatch:

    >>> simulate_reference([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]])
    [(0.0, 2.0), (0.0, 1.5), (2.0, 3.0)]

and the same where the wire takes twice as long while compute is busy: 0.75 s of the dispatch move under the op of
1.5 s, the rest alone.

    >>> simulate_reference([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]], {1: 2.0})
    [(0.0, 2.75), (0.0, 1.5), (2.75, 3.75)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moe_overlap.native import native

Times = list[tuple[float, float]]
NO_SLOWDOWN: Mapping[int, float] = {}


def simulate(
    lane_of_action: Sequence[int],
    duration_s: Sequence[float],
    deps: Sequence[Sequence[int]],
    slowdown: Mapping[int, float] = NO_SLOWDOWN,
) -> Times:
    """Start and end in seconds of every action of a schedule.

    lane_of_action: the lane (any integer) of each action, in issue order. A lane runs its actions in issue order, one
    at a time. duration_s: seconds, finite and >= 0. deps: for each action the actions that must have ended before it
    starts; they may come later in issue order.

    slowdown: lane -> factor >= 1 by which its actions take longer while any other lane is busy (default: 1). Time
    advances from event to event (an action ends), between which every rate is constant, so this is exact too.

    An action starts at the latest of zero, the end of the previous action of its lane and the ends of its dependencies.
    Where every factor is 1 the result is that maximum and one sum, whatever the other lanes do.

    ValueError: lists of different lengths, a bad duration, dependency or factor, or a deadlock; the text of a deadlock
    names the first action in issue order that can never start.
    """
    planner = native.planner()
    if planner is None:
        return simulate_reference(lane_of_action, duration_s, deps, slowdown)
    times: Times = planner.simulate(lane_of_action, duration_s, deps, slowdown)
    return times


def implementation() -> tuple[str, str]:
    """(name, reason) of what `simulate` runs: "cpp" or "reference"."""
    part = native.part("planner")
    return ("cpp" if part.loaded else "reference"), part.reason


def simulate_reference(
    lane_of_action: Sequence[int],
    duration_s: Sequence[float],
    deps: Sequence[Sequence[int]],
    slowdown: Mapping[int, float] = NO_SLOWDOWN,
) -> Times:
    """`simulate` in plain Python: the definition the compiled one is tested against."""
    _check_arguments(lane_of_action, duration_s, deps, slowdown)
    successors, waiting = _graph(lane_of_action, deps)
    if all(factor == 1.0 for factor in slowdown.values()):
        times = _run(duration_s, successors, waiting)
    else:
        times = _run_with_slowdown(
            duration_s, [slowdown.get(lane, 1.0) for lane in lane_of_action], successors, waiting
        )
    if any(waiting):
        raise ValueError(_deadlock_text(lane_of_action, deps, waiting))
    return times


def _graph(lane_of_action: Sequence[int], deps: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """(successors of each action, how many predecessors it waits for): dependencies and the order of its lane."""
    count = len(lane_of_action)
    successors: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count
    last_of_lane: dict[int, int] = {}
    for action, lane in enumerate(lane_of_action):
        predecessors = list(deps[action])
        if lane in last_of_lane:
            predecessors.append(last_of_lane[lane])
        last_of_lane[lane] = action
        waiting[action] = len(predecessors)
        for predecessor in predecessors:
            successors[predecessor].append(action)
    return successors, waiting


def _run(duration_s: Sequence[float], successors: list[list[int]], waiting: list[int]) -> Times:
    """Full speed: a start is a maximum over predecessors, so any order that respects them gives the same numbers."""
    start_s = [0.0] * len(waiting)
    end_s = [0.0] * len(waiting)
    ready = [action for action, left in enumerate(waiting) if left == 0]
    while ready:
        action = ready.pop()
        end_s[action] = start_s[action] + duration_s[action]
        for successor in successors[action]:
            start_s[successor] = max(start_s[successor], end_s[action])
            waiting[successor] -= 1
            if waiting[successor] == 0:
                ready.append(successor)
    return list(zip(start_s, end_s, strict=True))


def _run_with_slowdown(
    duration_s: Sequence[float], factor: Sequence[float], successors: list[list[int]], waiting: list[int]
) -> Times:
    """Event by event. A lane's actions are chained, so at most one of each runs: two running are on two lanes."""
    start_s = [0.0] * len(waiting)
    end_s = [0.0] * len(waiting)
    left_s = list(duration_s)  # at full speed
    running = [action for action, left in enumerate(waiting) if left == 0]
    now_s = 0.0
    while running:
        ended = [action for action in running if left_s[action] == 0]
        if not ended:
            alone = len(running) == 1
            needs_s = [left_s[action] * (1.0 if alone else factor[action]) for action in running]
            step_s = min(needs_s)
            for action, need_s in zip(running, needs_s, strict=True):
                done_s = step_s if alone else step_s / factor[action]
                left_s[action] = 0.0 if need_s == step_s else max(left_s[action] - done_s, 0.0)
            now_s += step_s
            continue
        running = [action for action in running if left_s[action] != 0]
        for action in ended:
            end_s[action] = now_s
            for successor in successors[action]:
                waiting[successor] -= 1
                if waiting[successor] == 0:
                    start_s[successor] = now_s
                    running.append(successor)
    return list(zip(start_s, end_s, strict=True))


def _check_arguments(
    lane_of_action: Sequence[int],
    duration_s: Sequence[float],
    deps: Sequence[Sequence[int]],
    slowdown: Mapping[int, float],
) -> None:
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
    for lane, factor in sorted(slowdown.items()):
        if not math.isfinite(factor) or factor < 1:
            raise ValueError(f"slowdown of lane {lane}: expected a finite factor >= 1")


def _deadlock_text(lane_of_action: Sequence[int], deps: Sequence[Sequence[int]], waiting: Sequence[int]) -> str:
    # The first action that did not run waits for a dependency: its lane predecessor has a lower number, so it did run.
    stuck = next(action for action, left in enumerate(waiting) if left)
    cause = next(dep for dep in deps[stuck] if waiting[dep])
    return f"deadlock: action {stuck} (lane {lane_of_action[stuck]}) never starts, it waits for action {cause}"
