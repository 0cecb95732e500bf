"""The backward schedule as a total order of autograd nodes. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moe_overlap.schedule.actions import Action, dependencies
from moe_overlap.schedule.builders import SchedulePair


@dataclass(frozen=True)
class Node:
    """One autograd node of a step, named by what its backward does: an action, or half of an exchange."""

    action: Action
    half: str = ""  # "start" or "wait" of an exchange

    def __str__(self) -> str:
        return f"{self.action}{'.' + self.half if self.half else ''}"


@lru_cache(maxsize=512)
def backward_groups(pair: SchedulePair) -> tuple[list[Node], ...]:
    """The step's nodes in the order of the backward schedule, cut at the backwards of the user's ops.

    Group 0 runs before the first of them, the last group after the last. Waits stand just before the first reader.
    """
    groups: list[list[Node]] = [[]]
    waited: set[int] = set()
    actions = pair.backward.actions
    for action, needs in zip(actions, dependencies(pair.backward), strict=True):
        for need in needs:
            if actions[need].lane == "wire" and need not in waited:
                waited.add(need)
                groups[-1].append(Node(actions[need], "wait"))
        if action.verb in ("Bt", "St"):
            groups.append([])
        elif action.lane == "wire":
            groups[-1].append(Node(action, "start"))
        else:
            groups[-1].append(Node(action))
    return tuple(groups)


def split_tail(group: list[Node], most: int) -> tuple[list[Node], list[Node]]:
    """(head, tail) of the last group: the tail begins at the first wait for a Dt and can let the router go first.

    It has at most the last `most` nodes.
    """
    for position, node in enumerate(group):
        if node.action.verb == "Dt" and node.half == "wait":
            cut = max(position, len(group) - most)
            return group[:cut], group[cut:]
    return group, []
