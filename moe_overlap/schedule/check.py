"""Validate, simulate and draw schedules. Pure integers and seconds; no tensor is touched.

Drawing: one column per step of unit length, one row per lane.

    chunked(3)  comp | P  .  E0 E1 E2 .  .  U
                wire | .  D0 D1 D2 C0 C1 C2 .
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import Action, Schedule, dependencies
from moe_overlap.schedule.builders import SchedulePair, parse_choice
from moe_overlap.schedule.simulate import simulate

LANES = ("comp", "wire", "copy")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a schedule, and with which of its actions (None: something is missing)."""

    message: str
    position: int | None = None


# Verbs of which a complete schedule has exactly one per chunk, and exactly one at all.
PER_CHUNK = {"forward": ("D", "E", "C"), "backward": ("Ct", "Ed", "Dt")}
ONCE = {"forward": ("P", "U"), "backward": ("Ut", "Pt")}
# Verbs of a deduplicated schedule, of which it has one each; others have none.
DISTINCT = {"forward": ("M", "O"), "backward": ("Mt", "Od")}
RETURNS = ("Wd", "Wg", "Wa")  # likewise, where copies of experts have gradients


def problems(schedule: Schedule, *, chunks: int, max_in_flight: int | None = None) -> list[Problem]:
    """Everything wrong with `schedule` for an exchange of `chunks` chunks; empty when it can run.

    `max_in_flight`: how many exchanges may be under way at once (a bound on buffer bytes in units of one chunk).
    """
    found: list[Problem] = []
    phases = {action.spec.phase for action in schedule}
    if len(phases) != 1:
        return [Problem("a schedule has actions of exactly one phase")]
    phase = phases.pop()
    seen: dict[Action, int] = {}
    for position, action in enumerate(schedule):
        if action in seen:
            found.append(Problem(f"{action} appears twice", position))
        seen.setdefault(action, position)
    for verb in PER_CHUNK[phase]:
        have = {action.index for action in seen if action.verb == verb}
        found += [Problem(f"{verb}{c} is missing") for c in range(chunks) if c not in have]
        found += [
            Problem(f"{verb}{c} has no chunk: there are {chunks}", seen[Action(verb, c)])
            for c in sorted(have)  # type: ignore[type-var]
            if c is not None and c >= chunks
        ]
    verbs = {action.verb for action in seen}
    found += [Problem(f"{verb} is missing") for verb in ONCE[phase] if verb not in verbs]
    if verbs & {*DISTINCT[phase], "Or"}:
        found += [Problem(f"{verb} is missing") for verb in DISTINCT[phase] if verb not in verbs]
    if "N" in verbs:
        begin = [action.verb for action in schedule.actions[: seen.get(Action("P"), 0)]]
        if begin[:1] != ["N"] or not set(begin[1:]) <= {"B", "S", "Wf", "Hf"}:
            found.append(Problem("N begins a schedule, and only ops stand between it and P", seen[Action("N")]))
    if verbs & set(RETURNS):
        found += [Problem(f"{verb} is missing") for verb in RETURNS if verb not in verbs]
    if phase == "backward":
        found += _weight_gradients(seen, chunks)
    for verb in ("B", "Bt", "Ew", "Wf", "Hf", "Hb", "Hg"):
        indices = sorted(action.index for action in seen if action.verb == verb and action.index is not None)
        if indices != list(range(len(indices))):
            found.append(Problem(f"{verb} has the indices {indices}, not 0 to {len(indices) - 1}"))
    for position, needs in enumerate(dependencies(schedule)):
        late = [need for need in needs if need >= position]
        if late:
            found.append(Problem(f"{schedule.actions[position]} runs before {schedule.actions[late[0]]}", position))
    if max_in_flight is not None:
        found += _too_many_in_flight(schedule, max_in_flight)
    return found


def _weight_gradients(seen: Mapping[Action, int], chunks: int) -> list[Problem]:
    """Every expert's weight gradient is made once: by Ew in any groups, or by one Eg for each chunk of experts."""
    have = {action.index: position for action, position in seen.items() if action.verb == "Eg"}
    if not have:
        return [] if any(action.verb == "Ew" for action in seen) else [Problem("Ew0 is missing: no weight gradient")]
    found = [Problem(f"Eg{c} is missing") for c in range(chunks) if c not in have]
    found += [Problem(f"Eg{c} has no chunk", at) for c, at in have.items() if c is None or c >= chunks]
    found += [Problem(f"{a} beside Eg", at) for a, at in seen.items() if a.verb == "Ew"]
    return found


def _too_many_in_flight(schedule: Schedule, limit: int) -> list[Problem]:
    """Exchanges are under way from their start to the first action that reads their result."""
    waiting: set[int] = set()
    found = []
    for position, (action, needs) in enumerate(zip(schedule, dependencies(schedule), strict=True)):
        waiting.difference_update(needs)
        if action.lane == "wire":
            waiting.add(position)
            if len(waiting) > limit:
                found.append(Problem(f"{action} is exchange number {len(waiting)} under way; the limit is {limit}",
                                     position))  # fmt: skip
    return found


def check(pair: SchedulePair, *, max_in_flight: int | None = None) -> None:
    """Raises ConfigError with the drawing and the offending action marked where `pair` cannot run."""
    halves = (("forward", pair.forward, pair.chunks), ("backward", pair.backward, pair.backward_chunks))
    for name, schedule, chunks in halves:
        found = problems(schedule, chunks=chunks, max_in_flight=max_in_flight)
        if found:
            marks = "\n".join(_mark(schedule, problem) for problem in found)
            raise ConfigError(f"schedule.{name}", schedule.text, f"a schedule that can run:\n{marks}")
    if pair.deduplicated != (pair.backward.count("Mt") > 0):
        raise ConfigError(
            "schedule.backward", pair.backward.text, "Mt and Od beside M and O of forward, or none of them"
        )
    if pair.deduplicated:
        text = "groups of experts in ascending order: a row comes with the first one and goes back with the last"
        _check_ascending(pair, ("E", "Ed"), text)
    if pair.backward.count("Eg") and pair.backward_by != "experts":
        raise ConfigError("schedule.backward", pair.backward.text, 'backward_by="experts" for Eg, which needs all rows')
    if "peers" in (pair.by, pair.backward_by):
        if pair.by != pair.backward_by:
            raise ConfigError("backward_by", pair.backward_by, f"{pair.by!r}, as forward: by peers rows lie otherwise")
        if pair.deduplicated:
            raise ConfigError("chunk_by", "peers", "'tokens' or 'experts' for rows that are deduplicated")
    ops = [a.text for a in pair.forward if a.verb in ("B", "S")]
    mirrored = [a.text.replace("t", "") for a in pair.backward if a.verb in ("Bt", "St")]
    if ops != mirrored[::-1]:
        raise ConfigError("schedule.backward", pair.backward.text, f"the backward of {ops} in reverse order")


def check_over_gateways(pair: SchedulePair) -> None:
    """Raises ConfigError for a pair that hierarchical exchanges cannot run."""
    _check_ascending(pair, ("C", "Dt"), "groups of experts in ascending order: gateways add up what came back so far")


def _check_ascending(pair: SchedulePair, verbs: tuple[str, str], expected: str) -> None:
    """Raises ConfigError where groups of experts stand in another order. verbs: of forward, of backward."""
    halves = ((pair.forward, pair.by), (pair.backward, pair.backward_by))
    for (schedule, by), verb in zip(halves, verbs, strict=True):
        order = [action.index or 0 for action in schedule if action.verb == verb]
        if by == "experts" and order != sorted(order):
            raise ConfigError("schedule", schedule.text, expected)


def layer_schedule(schedule: str | SchedulePair, *, shared: bool) -> SchedulePair:
    """The checked pair that a layer without backbone ops runs; `shared`: whether it has a shared expert.

    Raises ConfigError where the word or the pair names something else.
    """
    pair = parse_choice(schedule, shared=shared) if isinstance(schedule, str) else schedule
    if not isinstance(pair, SchedulePair):
        raise ConfigError("schedule", schedule, "a word such as 'chunked(2)', or a SchedulePair")
    check(pair)
    if pair.num_ops:
        raise ConfigError("schedule", pair.forward.text, "no backbone ops: those belong to a ShortcutBlock")
    if pair.has_shared != shared:
        raise ConfigError("schedule", pair.forward.text, f"{'one' if shared else 'no'} shared expert (S)")
    return pair


def _mark(schedule: Schedule, problem: Problem) -> str:
    words = [action.text for action in schedule]
    if problem.position is None:
        return "  " + " ".join(words) + f"   <-- {problem.message}"
    before = len(" ".join(words[: problem.position])) + (problem.position > 0)
    return "  " + " ".join(words) + "\n  " + " " * before + "^" * len(words[problem.position]) + f" {problem.message}"


def spans(
    schedule: Schedule, durations_s: Mapping[str, float] | float, *, joined: bool = False
) -> list[tuple[float, float]]:
    """(start_s, end_s) of every action by exact event simulation.

    `durations_s`: by action text (`D0`) or by verb (`D`); or one number for all. Lanes run their actions in issue
    order, one at a time. `joined`: every action after an exchange also waits for it (overlap off). An exchange that
    reads the result of another one (Wf1 that of Wf0) is started behind the wait for it, and so is what follows.
    """
    actions = schedule.actions
    if isinstance(durations_s, Mapping):
        seconds = [float(durations_s.get(a.text, durations_s.get(a.verb, 0.0))) for a in actions]
    else:
        seconds = [float(durations_s)] * len(actions)
    needs = [list(found) for found in dependencies(schedule)]
    waited: list[int] = []
    for position, action in enumerate(actions):
        if action.lane == "wire":
            waited += [need for need in needs[position] if actions[need].lane == "wire"]
        elif action.lane == "comp":
            needs[position] = sorted({*needs[position], *waited})
            waited = []
    if joined:
        last_wire: int | None = None
        for position, action in enumerate(actions):
            if last_wire is not None:
                needs[position] = sorted({*needs[position], last_wire})
            if action.lane != "comp":
                last_wire = position
    return simulate([LANES.index(a.lane) for a in actions], seconds, needs)


def makespan_s(schedule: Schedule, durations_s: Mapping[str, float] | float, *, joined: bool = False) -> float:
    """When the last action ends, in seconds from the start of the first."""
    return max((end for _, end in spans(schedule, durations_s, joined=joined)), default=0.0)


def draw(schedule: Schedule, *, joined: bool = False) -> str:
    """The schedule as lanes, one column per unit of time, as if every action took one unit."""
    cells: dict[tuple[str, int], str] = {}
    columns = 0
    for action, (start, end) in zip(schedule, spans(schedule, 1.0, joined=joined), strict=True):
        cells[action.lane, round(start)] = action.text
        columns = max(columns, round(end))
    widths = [max([1, *(len(cells[lane, c]) for lane in LANES if (lane, c) in cells)]) for c in range(columns)]
    return "\n".join(
        f"{lane} | " + " ".join(cells.get((lane, c), ".").ljust(widths[c]) for c in range(columns)).rstrip()
        for lane in LANES
        if lane in {"comp", "wire", *(action.lane for action in schedule)}
    )
