"""What a layer does and why, in text: its schedules, their simulated times, what computes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from moe_overlap.planned import Planned, PlannedSchedule
from moe_overlap.planning.explain import explain as explain_window
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.check import draw, makespan_s
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.stats import LastStep
from moe_overlap.transport.base import Transport


def measured_durations(events: Sequence[TimelineEvent], phase: str) -> dict[str, float]:
    """Median seconds by action text, of one phase: compute actions and exchanges, not the waits for them."""
    seconds: dict[str, list[float]] = {}
    for event in events:
        if event.phase == phase and event.lane != "wait":
            seconds.setdefault(event.action, []).append(event.end_s - event.start_s)
    return {action: median(values) for action, values in seconds.items()}


def explain(
    pair: SchedulePair,
    events: Sequence[TimelineEvent],
    transport: Transport,
    *,
    computes: Sequence[str],
    last: LastStep | None = None,
) -> str:
    """A page of text; see `MoELayer.explain`. `computes`: the registry's lines; `last`: the step that ran `pair`."""
    lines = [
        f"schedule {pair.name}: {pair.chunks} chunk(s) by {pair.by}"
        + ("" if pair.slot is None else f", slot {pair.slot}")
        + (", every exchange joined (overlap off)" if pair.joined else ", overlap on"),
        f"transport {transport.name}: rank {transport.rank} of {transport.world_size}",
    ]
    for name, schedule in (("forward", pair.forward), ("backward", pair.backward)):
        lines += ["", f"{name}: {schedule.text}", draw(schedule, joined=pair.joined)]
        lines.append(_times(schedule, measured_durations(events, name), joined=pair.joined))
    if last is not None and last.plan is not None and isinstance(last.schedule, PlannedSchedule):
        lines += _planned(last.schedule, last.schedule.planned(last.plan.exchange), events)
    return "\n".join([*lines, "", "what computes:", *(f"  {line}" for line in computes)])


def _planned(schedule: PlannedSchedule, planned: Planned, events: Sequence[TimelineEvent]) -> list[str]:
    """Why the planner chose this: one section a phase, with what the last step took on this rank."""
    lines = ["", f"chosen by the planner from a cost model {schedule.model.source}"]
    for phase, window in planned.windows.items():
        text = explain_window(window, planned.candidates[phase], measured_s=window_s(events, phase))
        lines += ["", f"-- {phase} --", text]
    return lines


def window_s(events: Sequence[TimelineEvent], phase: str) -> float | None:
    """Seconds from the start of the first action of a phase to the end of the last; None where none ran."""
    found = [event for event in events if event.phase == phase and event.action != "N"]
    if not found:
        return None
    return max(event.end_s for event in found) - min(event.start_s for event in found)


def _times(schedule: Schedule, durations_s: dict[str, float], *, joined: bool) -> str:
    missing = [action.text for action in schedule if action.text not in durations_s]
    if missing:
        how = "run this phase once; on CUDA inside moe_overlap.measure.timeline.record()"
        return f"no times: {' '.join(missing)} not measured yet ({how})"
    known = {action.text: durations_s[action.text] for action in schedule}
    off = makespan_s(schedule, known, joined=True) * 1e3
    on = makespan_s(schedule, known) * 1e3
    table = "  ".join(f"{action} {seconds * 1e3:.3f}" for action, seconds in known.items())
    chosen = f"{off:.3f} ms as configured (joined)" if joined else f"{on:.3f} ms as configured (overlapped)"
    compared = f"joined {off:.3f} ms, overlapped {on:.3f} ms"
    return f"simulated from the last measured durations: {chosen}; {compared}\n  ms: {table}"
