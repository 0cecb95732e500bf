"""Actions: the words a schedule is written in.

A schedule is a list of actions in issue order. What an action reads, writes and occupies stands once, in `VERBS`;
validation, simulation, drawing and the executor are generic over that table, so that a new strategy adds verbs and a
builder, never a branch.

Text form: the verb, then its index: `P D0 D1 E0 C0 E1 C1 U`. `Schedule.parse` is the exact inverse of `Schedule.text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from moe_overlap.errors import ConfigError

Phase = Literal["forward", "backward"]
Scope = Literal["one", "same", "all"]
Duration = Literal["exchange", "experts", "weight_grad", "weights", "backbone", "fixed"]


@dataclass(frozen=True)
class Resource:
    """A value that passes between actions. `scope`: it exists once, once per index (this action's), or all of them.

    `shift` is added to the action's index: backbone op i writes hidden[i + 1], which op i + 1 reads.
    """

    name: str
    scope: Scope = "one"
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class VerbSpec:
    """What a verb means: its lane, what it reads and writes, and how its duration grows ("weights": by experts that are
    copied, each with the bytes of its weights, which is also the memory that it takes)."""

    verb: str
    phase: Phase
    lane: str
    indexed: bool
    reads: tuple[Resource, ...]
    writes: tuple[Resource, ...]
    duration: Duration
    meaning: str


def _one(name: str) -> Resource:
    return Resource(name)


def _same(name: str, shift: int = 0) -> Resource:
    return Resource(name, "same", shift)


def _all(name: str) -> Resource:
    return Resource(name, "all")


def _spec(
    verb: str,
    phase: Phase,
    lane: str,
    reads: tuple[Resource, ...],
    writes: tuple[Resource, ...],
    duration: Duration,
    meaning: str,
) -> VerbSpec:
    indexed = any(resource.scope == "same" for resource in reads + writes)
    return VerbSpec(verb=verb, phase=phase, lane=lane, indexed=indexed, reads=reads, writes=writes,
                    duration=duration, meaning=meaning)  # fmt: skip


COMP, WIRE, COPY = "comp", "wire", "copy"
SLOTS = 2
"""Experts in host memory: groups of them on the device at once, one that computes and one that travels."""

VERBS: dict[str, VerbSpec] = {
    spec.verb: spec
    for spec in (
        # Forward. A schedule without N agrees before it begins, so that nothing there writes what P reads.
        _spec("N", "forward", WIRE, (_one("x"),), (_one("counts"),), "fixed", "agree on the counts of the step"),
        _spec(
            "P", "forward", COMP, (_one("x"), _one("counts")), (_one("send"),), "fixed", "permute rows into send order"
        ),
        _spec("D", "forward", WIRE, (_one("send"),), (_same("recv"),), "exchange", "dispatch a chunk"),
        _spec("M", "forward", WIRE, (_one("send"),), (_one("meta"),), "fixed", "ids and weights of the rows"),
        # A rank passes on in the second group what it got in the first.
        _spec(
            "Wf",
            "forward",
            WIRE,
            (_one("counts"), _same("copies", -1)),
            (_same("copies"),),
            "weights",
            "fetch weights for copies",
        ),  # fmt: skip
        # Experts in host memory; `freed`: a place on the device is free again.
        _spec("Hf", "forward", COPY, (_same("freed", -SLOTS),), (_same("loaded"),), "weights", "weights from the host"),
        _spec(
            "O",
            "forward",
            COMP,
            (_one("send"), _all("copies")),
            (_one("own"),),
            "experts",
            "experts on the rows that stay",
        ),  # fmt: skip
        _spec(
            "Or", "forward", COMP, (_one("own"),), (_one("rest"),), "experts", "the other half of the experts on them"
        ),
        _spec(
            "E",
            "forward",
            COMP,
            (_same("recv"), _one("meta"), _all("copies"), _same("loaded")),
            (_same("out"), _same("freed")),
            "experts",
            "experts on a chunk",
        ),  # fmt: skip
        _spec("C", "forward", WIRE, (_same("out"),), (_same("back"),), "exchange", "combine a chunk"),
        _spec(
            "U",
            "forward",
            COMP,
            (_all("back"), _one("own"), _one("rest")),
            (_one("routed"),),
            "fixed",
            "weigh and sum the rows of a token",
        ),
        _spec("B", "forward", COMP, (_same("hidden"),), (_same("hidden", 1),), "backbone", "backbone op"),
        _spec("S", "forward", COMP, (_one("x"),), (_one("shared"),), "backbone", "shared expert"),
        # Backward.
        _spec("Ut", "backward", COMP, (_one("dy"),), (_one("dback"),), "fixed", "gradient of U: rows and weights"),
        _spec("Ct", "backward", WIRE, (_one("dback"),), (_same("dout"),), "exchange", "adjoint of combine"),
        _spec(
            "Hb",
            "backward",
            COPY,
            (_one("dback"), _same("dfreed", -SLOTS)),
            (_same("dloaded"),),
            "weights",
            "weights from the host",
        ),
        _spec("Od", "backward", COMP, (_one("dback"),), (_one("down"),), "experts", "O, its input gradient"),
        _spec(
            "Ed",
            "backward",
            COMP,
            (_same("dout"), _same("dloaded")),
            (_same("din"), _same("dfreed")),
            "experts",
            "input gradient of the experts",
        ),
        _spec("Mt", "backward", WIRE, (_all("din"),), (_one("dmeta"),), "fixed", "gradients of the weights of M"),
        _spec("Dt", "backward", WIRE, (_same("din"),), (_same("dsend"),), "exchange", "adjoint of dispatch"),
        _spec(
            "Ew",
            "backward",
            COMP,
            (_all("din"), _one("down"), _same("dstored", -SLOTS)),
            (_same("dweight"),),
            "weight_grad",
            "weight gradient of a group",
        ),
        _spec("Hg", "backward", COPY, (_same("dweight"),), (_same("dstored"),), "weights", "gradients to the host"),
        _spec(
            "Eg",
            "backward",
            COMP,
            (_same("din"), _one("down")),
            (_same("dweight"),),
            "weight_grad",
            "weight gradient of a chunk of experts",
        ),  # fmt: skip
        _spec(
            "Wd",
            "backward",
            COMP,
            (_all("din"), _one("down")),
            (_one("dcopies"),),
            "weight_grad",
            "weight gradients of copies",
        ),  # fmt: skip
        _spec("Wg", "backward", WIRE, (_one("dcopies"),), (_one("dhome"),), "weights", "gradients of copies go home"),
        _spec(
            "Wa",
            "backward",
            COMP,
            (_one("dhome"), _all("dweight")),
            (_one("dw"),),
            "fixed",
            "add them to those of the home",
        ),  # fmt: skip
        _spec(
            "Pt",
            "backward",
            COMP,
            (_all("dsend"), _one("down"), _one("dmeta")),
            (_one("dx"),),
            "fixed",
            "gradient of P: sum over the choices",
        ),
        _spec("Bt", "backward", COMP, (_same("dhidden", 1),), (_same("dhidden"),), "backbone", "backbone op, backward"),
        _spec("St", "backward", COMP, (_one("dy"),), (_one("dshared"),), "backbone", "shared expert, backward"),
    )
}

# What a drawing has beside the verbs.
SIGNS = "a number is a chunk, an op or a group of experts; comp and wire are the two lanes, a dot is an idle one"

_TEXT = re.compile(r"([A-Z][a-z]?)(\d+)?")


@dataclass(frozen=True)
class Action:
    """One entry of a schedule. `index` is a chunk, a backbone op or a weight-gradient group, by the verb."""

    verb: str
    index: int | None = None
    # What every step asks of it. number: the index; 0 where the verb has none, as for what there is once.
    text: str = field(init=False, compare=False, repr=False)
    number: int = field(init=False, compare=False, repr=False)
    lane: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ConfigError("action", self.verb, "a verb among " + " ".join(VERBS))
        if self.spec.indexed != (self.index is not None) or (self.index is not None and self.index < 0):
            expected = f"{self.verb} {'with an index, as in ' + self.verb + '0' if self.spec.indexed else 'alone'}"
            raise ConfigError("action", f"{self.verb}{'' if self.index is None else self.index}", expected)
        text = self.verb if self.index is None else f"{self.verb}{self.index}"
        for name, value in (("text", text), ("number", self.index or 0), ("lane", self.spec.lane)):
            object.__setattr__(self, name, value)

    @property
    def spec(self) -> VerbSpec:
        return VERBS[self.verb]

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    @classmethod
    @lru_cache(maxsize=1024)  # a word is met in many schedules
    def parse(cls, text: str) -> Action:
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ConfigError("action", text, "a verb and an index, such as D0")
        verb, index = match.groups()
        action = cls(verb, None if index is None else int(index))
        if action.text != text:
            raise ConfigError("action", text, f"{action.text} (no leading zeros)")
        return action


@dataclass(frozen=True)
class Schedule:
    """Actions in issue order, of one phase."""

    actions: tuple[Action, ...]

    @cached_property
    def text(self) -> str:
        return " ".join(action.text for action in self.actions)

    def __hash__(self) -> int:
        return hash(self.text)  # made once: every step looks up what was planned for its schedule

    @classmethod
    def parse(cls, text: str) -> Schedule:
        return cls(tuple(Action.parse(word) for word in text.split()))

    def __iter__(self) -> Iterator[Action]:
        return iter(self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    def __str__(self) -> str:
        return self.text

    def count(self, verb: str) -> int:
        return sum(action.verb == verb for action in self.actions)


@lru_cache(maxsize=512)
def dependencies(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """For each action the positions of the actions whose results it reads, in ascending order.

    A resource that no action of the schedule writes is an input (x, the incoming gradient, hidden[0]). Positions may
    lie after the action itself: such a schedule cannot run, and `check` says so.
    """
    writers: dict[str, dict[int | None, int]] = {}
    for position, action in enumerate(schedule):
        for resource in action.spec.writes:
            index = None if resource.scope == "one" else (action.index or 0) + resource.shift
            writers.setdefault(resource.name, {})[index] = position
    needs: list[tuple[int, ...]] = []
    for action in schedule:
        found: set[int] = set()
        for resource in action.spec.reads:
            written = writers.get(resource.name, {})
            if resource.scope == "same":
                index = (action.index or 0) + resource.shift
                found.update(p for i, p in written.items() if i == index)
            else:
                found.update(written.values())
        needs.append(tuple(sorted(found)))
    return tuple(needs)
