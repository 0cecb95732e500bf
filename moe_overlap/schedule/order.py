"""The order in which a step does things: the actions of a schedule, exchanges as two halves. No tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from moe_overlap.schedule.actions import Action, Schedule, dependencies
from moe_overlap.schedule.builders import SchedulePair

OPS = ("B", "S", "Bt", "St")
"""What is the user's: modules beside the exchanges, and their backwards."""


class Half(NamedTuple):
    """An action, or half of an exchange."""

    action: Action
    half: str = ""  # "start" or "wait" of an exchange

    def __str__(self) -> str:
        return f"{self.action}{'.' + self.half if self.half else ''}"


Stretch = tuple[Half, ...]
"""What is done without the user's ops between."""


@lru_cache(maxsize=512)
def halves(schedule: Schedule, begin: int = 0) -> Stretch:
    """From action `begin` on; each exchange is waited for just before the first action that reads what it brings.

    What stands before `begin` is over, and nobody waits for it.
    """
    actions, found = schedule.actions, []
    waited = set(range(begin))
    for action, needs in list(zip(actions, dependencies(schedule), strict=True))[begin:]:
        # M first: what is passed on to other ranks of a node follows from it.
        for need in sorted(needs, key=lambda need: actions[need].verb != "M"):
            if actions[need].lane == "wire" and need not in waited:
                waited.add(need)
                found.append(Half(actions[need], "wait"))
        found.append(Half(action, "start" if action.lane == "wire" else ""))
    return tuple(found)


@lru_cache(maxsize=512)
def backward_stretches(pair: SchedulePair) -> tuple[Stretch, ...]:
    """The backward schedule, cut at the backwards of the user's ops, and once more for the router's.

    Stretch 0 runs before the first of them. The last one runs after the router's backward too: it begins at the first
    wait for a Dt behind all user's ops, which may so be hidden. Stretches may be empty.
    """
    stretches: list[list[Half]] = [[]]
    for half in halves(pair.backward):
        if half.action.verb in OPS:
            stretches.append([])
        else:
            stretches[-1].append(half)
    last = stretches.pop()
    waits = [place for place, half in enumerate(last) if half.action.verb == "Dt" and half.half == "wait"]
    cut = waits[0] if waits else len(last)
    return (*map(tuple, stretches), tuple(last[:cut]), tuple(last[cut:]))
