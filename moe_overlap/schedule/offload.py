"""Experts in host memory, in the order of actions: when the weights of a chunk's experts come up, when gradients go
down.

The copies are actions of a lane of their own, `copy`: one in each direction may be under way beside compute and
beside an exchange. Their verbs are not those of copies of experts (Wf, Wg), which travel between ranks, on the wire,
all of them before any expert computes: these belong to one chunk, and the memory of the device is bounded because
those of the next chunks wait for those of earlier ones to be used up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import SLOTS, Action, Phase, Schedule
from moe_overlap.schedule.builders import SchedulePair

VERBS = ("Hf", "Hb", "Hg")


def held_experts(experts: int, chunks: int) -> int:
    """How many of a rank's experts are on the device at a time, in so many groups: two of the largest."""
    return min(SLOTS, chunks) * -(-experts // chunks)


def held_in_turns(experts: int, chunks: int) -> int:
    """The same where steps in other numbers of groups use the slots too: that of all experts serves as one of two."""
    return held_experts(experts, chunks) + (-(-experts // 2) if chunks == 1 else 0)


def held_by(experts: int, pair: SchedulePair) -> int:
    """The same of steps of one pair alone."""
    few, many = sorted((pair.chunks, pair.backward_chunks))
    return held_experts(experts, few) + (-(-experts // many) if few == 1 < many else 0)


def sensible_groups(experts: int, most: int) -> list[int]:
    """Numbers of groups of a rank's experts, up to `most`, of which no smaller one has as small a largest group.

    >>> sensible_groups(8, 16), sensible_groups(9, 4), sensible_groups(1, 16)
    ([1, 2, 3, 4, 8], [1, 2, 3], [1])
    """
    largest = [-(-experts // groups) for groups in range(1, min(most, experts) + 1)]
    return [groups for groups, size in enumerate(largest, 1) if size not in largest[: groups - 1]]


def check_cut(pair: SchedulePair) -> None:
    """Raises ConfigError for a pair whose chunks do not have experts of their own, or are not taken in order."""
    for chunks, by in ((pair.chunks, pair.by), (pair.backward_chunks, pair.backward_by)):
        if chunks > 1 and by != "experts":
            expected = 'one chunk, or chunks by experts, as in "chunked(4,experts)", beside expert_offload'
            raise ConfigError("schedule", f"{chunks} chunks by {by}", expected)
    for schedule, verb in ((pair.forward, "E"), (pair.backward, "Ed")):
        order = [action.index or 0 for action in schedule if action.verb == verb]
        if order != sorted(order):
            raise ConfigError("schedule", schedule.text, "experts in ascending order of chunks beside expert_offload")
    if pair.backward.count("Eg"):
        raise ConfigError(
            "schedule.backward", pair.backward.text, "weight gradients in Ew, not Eg, beside expert_offload"
        )
    if pair.deduplicated:
        raise ConfigError("dedup", "on", '"off" beside expert_offload')


@lru_cache(maxsize=64)
def with_host_experts(pair: SchedulePair) -> SchedulePair:
    """The same strategy with experts in host memory.

    The weights of the first SLOTS chunks are on their way before the rows are (Hf), in backward right after its first
    action (Hb); those of each later one set out when the experts of an earlier chunk have been computed, whose place
    they take. Weight gradients are made in as many groups as backward has chunks (Ew), and each goes down as soon as
    it is there (Hg). A pair that has these actions already stays as it is. Raises ConfigError for a cut that has not
    these groups.
    """
    if pair.forward.count("Hf"):
        return pair
    check_cut(pair)
    forward = half_with_host_experts(pair.forward, "forward", pair.chunks)
    backward = half_with_host_experts(pair.backward, "backward", pair.backward_chunks)
    return replace(pair, forward=forward, backward=backward)


def half_with_host_experts(schedule: Schedule, phase: Phase, chunks: int) -> Schedule:
    """One phase of it, in so many chunks."""
    if phase == "forward":
        return Schedule(tuple(_fetching(list(schedule), "E", "Hf", before="P")))
    found: list[Action] = []
    for action in _fetching(list(schedule), "Ed", "Hb", before=None):
        if action.verb != "Ew":
            found.append(action)
        elif action.index == 0:
            found += [Action(verb, group) for group in range(chunks) for verb in ("Ew", "Hg")]
    return Schedule(tuple(found))


def without_host_experts(pair: SchedulePair) -> SchedulePair:
    """The pair that a user gives, with one group of weight gradients."""
    if not pair.forward.count("Hf"):
        return pair
    forward = tuple(action for action in pair.forward if action.verb != "Hf")
    backward = tuple(action for action in pair.backward
                     if action.verb not in VERBS and (action.verb != "Ew" or action.index == 0))  # fmt: skip
    return replace(pair, forward=Schedule(forward), backward=Schedule(backward))


def _fetching(actions: list[Action], experts: str, fetch: str, before: str | None) -> list[Action]:
    """The actions with a `fetch` for each of `experts`. The first SLOTS stand before the action `before`, or behind
    the very first action that is of the layer (None: Ut)."""
    order = [action.index for action in actions if action.verb == experts]
    begin = actions.index(Action(before)) if before else actions.index(Action("Ut")) + 1
    found = [*actions[:begin], *(Action(fetch, c) for c in order[:SLOTS])]
    waiting = iter(order[SLOTS:])
    for action in actions[begin:]:
        found.append(action)
        if action.verb == experts:
            found += [Action(fetch, c) for c in (next(waiting, None),) if c is not None]
    return found
