"""What a layer does and why, in text: its schedules, their simulated times, what computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.auto.calibrate import step_shape
from moe_overlap.auto.parallelism import ParallelismSwitch
from moe_overlap.auto.planned import Planned, PlannedSchedule
from moe_overlap.auto.replicate import ReplicationRule
from moe_overlap.layer.stats import LastStep
from moe_overlap.planning.copied import CONSIDERED
from moe_overlap.planning.copy_costs import GRADIENT_BYTES, break_even, break_even_text
from moe_overlap.planning.explain import explain as explain_window
from moe_overlap.planning.explain import in_ms, name_of
from moe_overlap.planning.search import joined_form, search
from moe_overlap.schedule.actions import Action, Phase, Schedule
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.check import draw, makespan_s
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.weights import row_width
from moe_overlap.schedule.words import imports_of, legend, overlaps, python_of
from moe_overlap.transport.base import Transport
from moe_overlap.transport.link import rows_travel

FIRST = ("P", "Ut")  # the action with which a phase begins
FAR = 2.0  # times the rows of the calibration: a step beyond that is said to be extrapolated


def measured_durations(events: Sequence[TimelineEvent], phase: str) -> dict[str, float]:
    """Mean seconds by action text, of one phase, which may have run several times: compute actions and exchanges, both
    parts of hierarchical ones, not the waits for them."""
    seconds: dict[str, float] = {}
    mine = [event for event in events if event.phase == phase and event.lane != "wait"]
    runs = max(1, sum(event.action in FIRST for event in mine))
    for event in mine:
        seconds[event.action] = seconds.get(event.action, 0.0) + (event.end_s - event.start_s) / runs
    return seconds


def explain(
    pair: SchedulePair,
    events: Sequence[TimelineEvent],
    transport: Transport,
    *,
    computes: Sequence[str],
    last: LastStep | None = None,
) -> str:
    """A page of text; see `MoELayer.explain`. `computes`: the registry's lines; `last`: the step that ran `pair`."""
    planned = last is not None and last.plan is not None and isinstance(last.schedule, PlannedSchedule)
    line = python_of(pair)
    lines = [
        answer(pair, transport, planned=planned, off=_is_off(pair, last)),
        f"To run exactly this in every step: {line}",
        *imports_of(line),
        "",
        *legend(pair),
        "",
        f"schedule {pair.name}: {pair.chunks} chunk(s) by {pair.by}"
        + ("" if pair.slot is None else f", slot {pair.slot}")
        + (", every exchange joined (overlap off)" if pair.joined else ""),
        f"transport {transport.name}: rank {transport.rank} of {transport.world_size}",
    ]
    for name, schedule in (("forward", pair.forward), ("backward", pair.backward)):
        lines += ["", f"{name}: {schedule.text}", draw(schedule, joined=pair.joined)]
        if last is not None and last.lanes is None:
            lines.append("no times: one rank runs its ops in a row, and does not time them")
        else:
            lines.append(_times(schedule, measured_durations(events, name), joined=pair.joined))
    if last is not None and last.plan is not None and isinstance(last.schedule, PlannedSchedule):
        lines += _planned(last.schedule, last.plan.exchange, events)
    return "\n".join([*lines, "", "what computes:", *(f"  {line}" for line in computes)])


def copies_text(dispatcher: Dispatcher, weights_of: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """The memory of a rank's copies of experts; where a rule makes them, what it decided on in the last step, and from
    how many rows on a copy pays. Nothing where there are none."""
    kept = len(dispatcher.seats.copies[dispatcher.transport.rank])
    rule = dispatcher.rule if isinstance(dispatcher.rule, ReplicationRule | ParallelismSwitch) else None
    spare = 0 if rule is None else rule.slots_for_copies(dispatcher.placement)
    if rule is None and not dispatcher.seats.has_copies:
        return []
    w_in, w_out = weights_of()
    size, width = w_in.element_size(), row_width(w_in, w_out)
    slots = f"{kept} kept" + (f", {spare} for copies of one step, at most" if spare else "")
    mib, grad_mib = width * size / 2**20, width * GRADIENT_BYTES / 2**20
    lines = [
        "",
        "copies of experts:",
        f"  slots on this rank: {slots}, {mib:.3g} MiB of weights each, {(kept + spare) * mib:.3g} MiB together; what "
        f"one step alone uses is shared by all layers; {grad_mib:.3g} MiB of gradient each while they go home",
    ]
    if rule is None:
        return lines
    phases = (rule.phases or rule.priced) if isinstance(rule, ReplicationRule) else rule.phases
    if not phases:
        return [*lines, "  no prices yet: the first call with rows measures them"]
    found = break_even(phases, row_bytes=w_out.shape[1] * size, expert_params=width, param_bytes=size)
    lines += [f"  {line}" for line in break_even_text(found)]
    told = rule.told()
    return [*lines, f"  last step: {told}"] if told else lines


def _is_off(pair: SchedulePair, last: LastStep | None) -> bool:
    """Whether every exchange is joined by overlap=False, and not because that is the schedule, or predicted best."""
    if last is not None and last.plan is not None and isinstance(last.schedule, PlannedSchedule):
        return not last.schedule.overlap
    return pair.joined and pair.name != "serial"


def answer(pair: SchedulePair, transport: Transport, *, planned: bool, off: bool) -> str:
    """The first sentence: whether communication is hidden, where, by whose choice; and what to do where it is not. off:
    it is not, by overlap=False."""
    who = f"as the schedule {pair.name!r} says"
    if planned:
        who = 'in the order that schedule="auto" would overlap' if off else 'as schedule="auto" predicts to be fastest'
    travel = rows_travel(transport)
    if pair.forward.count("Hf") and not travel:
        how = "waited for where they start" if pair.joined else "beside compute"
        begin = "One rank, overlap is off (overlap=False)" if off else "One rank"
        return f"{begin}: the weights of its experts come up from host memory, {how}, {who}."
    if not travel:
        return "One rank exchanges nothing, so there is nothing to overlap: ops run in a row."
    used = [phase for phase in ("forward", "backward") if overlaps(pair, phase)]
    ranks = "one rank, over its wire to itself" if transport.world_size == 1 else f"{transport.world_size} ranks"
    where = f"on {ranks}, {who}"
    if not used and pair.joined and off:
        return f"Overlap is off (overlap=False): every exchange is waited for where it starts, {where}."
    if not used:
        advice = "" if planned else '; schedule="auto" measures and uses overlap where that pays'
        return f"Nothing is overlapped: every exchange is waited for where it starts, {where}{advice}."
    if len(used) == 2:
        return f"Exchanges run beside compute in forward and in backward, {where}."
    return f"Exchanges run beside compute in {used[0]} only, {where}."


def _planned(schedule: PlannedSchedule, exchange: ExchangePlan, events: Sequence[TimelineEvent]) -> list[str]:
    """Why the planner chose this: one section a phase, with what the last step took on this rank."""
    planned, budget = schedule.planned(exchange), schedule.max_in_flight_bytes
    lines = ["", f"chosen by the planner from a cost model {schedule.model.source}", *_deduplication(schedule, planned)]
    lines += _searches(schedule, planned)
    if not schedule.overlap:
        lines.append("overlap=False: every exchange of what was chosen is joined where it starts")
    if schedule.ahead:
        ops = " ".join(action.text for action in schedule.ahead)
        lines.append(f"while ranks agree ({in_ms(schedule.model.agree_s)} in the calibration): {ops}, fixed before "
                     "the plan and in no window of forward")  # fmt: skip
    shape = step_shape(exchange.chunked(1, "tokens"), row_bytes=schedule.row_bytes, nodes=schedule.nodes)
    measured = schedule.model.measured_rows
    if measured and shape.slots_rows > FAR * measured:
        lines.append(f"WARNING: the cost model was measured on {measured:g} rows (T * K of the busiest rank); this "
                     f"step had {shape.slots_rows}, so its times are extrapolated")  # fmt: skip
    pair = planned.pair
    schedules: dict[Phase, Schedule] = {"forward": after_agreement(pair.forward), "backward": pair.backward}
    for phase, window in planned.windows.items():
        best = planned.best(phase)
        chosen = next(one for one in planned.candidates[phase] if (one.order, one.joined) == (best.order, best.joined))
        text = explain_window(
            window,
            search(window, max_in_flight_bytes=budget),
            chosen=chosen if schedule.overlap else joined_form(window, chosen),
            measured_s=window_s(events, schedules[phase], phase),
            max_in_flight_bytes=budget,
        )
        lines += ["", f"-- {phase} --", text]
        if phase in planned.copied:
            how = "from rank to rank, in two groups" if best.relayed else "from their homes, in one group"
            lines.append(f"\nThe figures above are without copies of experts. With copies, sent {how}, this schedule "
                         f"is predicted to take {in_ms(best.predicted_s)}, the least of the first {CONSIDERED} "
                         "candidates.")  # fmt: skip
        outside_s = planned.outside_s[phase]
        lines.append(f"\nOutside this window, in none of these figures: {in_ms(outside_s)} in the calibration.")
    return lines


def _searches(schedule: PlannedSchedule, planned: Planned) -> list[str]:
    """How often steps were searched for, what that took, and whether this one was."""
    tally = schedule.tally
    if schedule.hit_rate is None:
        return []
    each = f", {in_ms(1e-6 * tally['search_us'] / tally['searched'])} each" if tally["searched"] else ""
    lines = [
        f"searched in {tally['searched']} of {tally['steps']} steps{each} ({schedule.hit_rate:.1%} hits); the others "
        "had counts like those of an earlier step, or ran its schedule as a search would have cost more than it could "
        f"gain ({tally['taken over']} kinds of counts)"
    ]
    if planned.could_gain_s is not None:
        lines.append(f"this one was not searched for: it runs what a step of another kind ran; a search could gain "
                     f"{in_ms(planned.could_gain_s)} a step at most, and costs {in_ms(schedule.search_s)}")  # fmt: skip
    return lines


def _deduplication(schedule: PlannedSchedule, planned: Planned) -> list[str]:
    """Which of the plain and the deduplicated plan runs, by how much, and what the other one is."""
    if schedule.dedup == "off":
        return []
    runs = "deduplicated: one row for each (token, rank)" if planned.pair.deduplicated else "not deduplicated"
    if schedule.dedup == "on":
        return [f'dedup="on": {runs}, predicted {in_ms(planned.predicted_s)} with what lies outside the windows']
    other = planned.other
    if other is None:
        return [f'dedup="auto": {runs}; the other way does not keep within max_in_flight_bytes']
    less = f"{in_ms(other.predicted_s - planned.predicted_s)} less" if other.predicted_s else "the same"
    lines = [f'dedup="auto": {runs}, predicted {in_ms(planned.predicted_s)} with what lies outside the windows, '
             f"{less} than {'plain' if planned.pair.deduplicated else 'deduplicated'}:"]  # fmt: skip
    for phase, window in other.windows.items():
        best = other.best(phase)
        lines.append(f"  {phase}: {name_of(best, window)}, {in_ms(best.predicted_s + other.outside_s[phase])}: "
                     f"{best.order}")  # fmt: skip
    return lines


def after_agreement(schedule: Schedule) -> Schedule:
    """What stands in the planner's window: without N, and the ops beside it."""
    actions = schedule.actions
    return Schedule(actions[actions.index(Action("P")) :]) if actions[0].verb == "N" else schedule


def window_s(events: Sequence[TimelineEvent], schedule: Schedule, phase: Phase) -> float | None:
    """Seconds of the last run of a phase, from the start of its first action to the end of its last.

    None where it has not run, or not all of `schedule` did (no input that needs a gradient, a backward of a part).
    """
    mine = [event for event in events if event.phase == phase and event.action != "N"]
    starts = [event.start_s for event in mine if event.action == schedule.actions[0].text]
    last = [event for event in mine if starts and event.start_s >= starts[-1]]
    if not {action.text for action in schedule} <= {event.action for event in last}:
        return None
    return max(event.end_s for event in last) - starts[-1]


def _times(schedule: Schedule, durations_s: dict[str, float], *, joined: bool) -> str:
    missing = [action.text for action in schedule if action.text not in durations_s]
    note = ""
    if missing and durations_s and all(text.startswith("Dt") for text in missing):
        note = f"{' '.join(missing)} did not run: x needs no gradient; it counts as 0\n"
    elif missing:
        how = "run this phase once; on CUDA inside moe_overlap.measure.timeline.record()"
        return f"no times: {' '.join(missing)} not measured yet ({how})"
    known = {action.text: durations_s.get(action.text, 0.0) for action in schedule}
    off = makespan_s(schedule, known, joined=True) * 1e3
    on = makespan_s(schedule, known) * 1e3
    table = "  ".join(f"{action} {seconds * 1e3:.3f}" for action, seconds in known.items())
    chosen = f"{off:.3f} ms as configured (joined)" if joined else f"{on:.3f} ms as configured (overlapped)"
    compared = f"joined {off:.3f} ms, overlapped {on:.3f} ms"
    return f"{note}simulated from the last measured durations: {chosen}; {compared}\n  ms: {table}"
