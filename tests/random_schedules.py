"""Random schedules, and what they do to rows followed one by one: both without the package's own table of verbs.

`random_pair` draws an order from rules written out here; `follow` walks a pair with sets of rows in the place of
tensors and says what is wrong with its result, if anything. So `check` is held against a second opinion.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from moe_overlap.schedule.actions import VERBS, Action, Schedule
from moe_overlap.schedule.builders import SchedulePair

ROWS = 2  # followed in each chunk


class Wrong(Exception):
    """A schedule that does not do its work; the text says where."""


@dataclass(frozen=True)
class Shape:
    """What a random pair is made of. ops: backbone ops; filled: Eg instead of `groups` Ew."""

    chunks: int
    backward_chunks: int
    by: str
    backward_by: str
    dedup: bool
    rest: bool
    ops: int
    shared: bool
    agrees: bool
    groups: int
    filled: bool
    fetches: int = 0
    returns: bool = False


def random_shape(chance: random.Random, *, copies: bool, most_chunks: int = 5) -> Shape:
    dedup = chance.random() < 0.4
    cuts = ("tokens", "experts") if dedup else ("tokens", "experts", "peers")
    by = chance.choice(cuts)
    backward_by = by if by == "peers" else chance.choice(("tokens", "experts"))
    ops = chance.choice((0, 0, 1, 2, 3))
    return Shape(
        chunks=chance.randint(1, most_chunks), backward_chunks=chance.randint(1, most_chunks), by=by,
        backward_by=backward_by, dedup=dedup, rest=dedup and chance.random() < 0.5, ops=ops,
        shared=not ops and chance.random() < 0.5, agrees=chance.random() < 0.3, groups=chance.randint(1, 3),
        filled=backward_by == "experts" and chance.random() < 0.5,
        fetches=chance.randint(1, 2) if copies and chance.random() < 0.3 else 0,
        returns=copies and chance.random() < 0.3,
    )  # fmt: skip


def _shuffled(chance: random.Random, edges: dict[str, set[str]]) -> list[str]:
    """The keys in a random order in which each comes after all of its set."""
    left = {word: set(before) for word, before in edges.items()}
    order = []
    while left:
        word = chance.choice([word for word, before in left.items() if not before])
        order.append(word)
        del left[word]
        for before in left.values():
            before.discard(word)
    return order


def _forward(chance: random.Random, s: Shape) -> list[str]:
    fetched = {f"Wf{g}" for g in range(s.fetches)}
    chunks = range(s.chunks)
    edges: dict[str, set[str]] = {"P": set(), **{f"Wf{g}": {f"Wf{g - 1}"} if g else set() for g in range(s.fetches)}}
    edges |= {f"D{c}": {"P"} for c in chunks}
    edges |= {f"E{c}": {f"D{c}", *fetched} for c in chunks}
    edges |= {f"C{c}": {f"E{c}"} for c in chunks}
    edges["U"] = {f"C{c}" for c in chunks}
    if s.dedup:
        edges |= {"M": {"P"}, "O": {"P", *fetched}}
        edges["U"] |= {"O"}
        for c in chunks:
            edges[f"E{c}"] |= {"M", *([f"E{c - 1}"] if c and s.by == "experts" else [])}
    if s.rest:
        edges["Or"] = {"O"}
        edges["U"] |= {"Or"}
    edges |= {f"B{i}": {f"B{i - 1}"} if i else set() for i in range(s.ops)}
    edges |= {"S": set()} if s.shared else {}
    if not s.agrees:
        return _shuffled(chance, edges)
    early = [f"B{i}" for i in range(chance.randint(0, s.ops))] + ["S"] * (s.shared and chance.random() < 0.5)
    for word in [*fetched, *early]:
        edges["P"] |= {word}
    for word in edges.keys() - {*fetched, *early, "P"}:
        edges[word] |= {"P"}
    return ["N", *_shuffled(chance, edges)]


def _backward(chance: random.Random, s: Shape) -> list[str]:
    chunks = range(s.backward_chunks)
    done = {f"Ed{c}" for c in chunks} | ({"Od"} if s.dedup else set())
    edges: dict[str, set[str]] = {"Ut": set()}
    edges |= {f"Ct{c}": {"Ut"} for c in chunks}
    edges |= {f"Ed{c}": {f"Ct{c}"} for c in chunks}
    edges |= {f"Dt{c}": {f"Ed{c}"} for c in chunks}
    edges["Pt"] = {f"Dt{c}" for c in chunks}
    if s.dedup:
        edges |= {"Od": {"Ut"}, "Mt": done - {"Od"}}
        edges["Pt"] |= {"Od", "Mt"}
        for c in chunks[1:] if s.backward_by == "experts" else ():
            edges[f"Ed{c}"] |= {f"Ed{c - 1}"}
    own = {"Od"} if s.dedup else set()
    weighed = {f"Eg{c}": {f"Ed{c}", *own} for c in chunks} if s.filled else {f"Ew{g}": done for g in range(s.groups)}
    edges |= {word: set(before) for word, before in weighed.items()}
    if s.returns:
        edges |= {"Wd": set(done), "Wg": {"Wd"}, "Wa": {"Wg", *weighed}}
    edges |= {f"Bt{i}": {f"Bt{i + 1}"} if i + 1 < s.ops else set() for i in range(s.ops)}
    edges |= {"St": set()} if s.shared else {}
    return _shuffled(chance, edges)


def random_pair(chance: random.Random, s: Shape) -> SchedulePair:
    forward, backward = (Schedule.parse(" ".join(words(chance, s))) for words in (_forward, _backward))
    return SchedulePair(name="random", forward=forward, backward=backward, chunks=s.chunks, by=s.by,
                        backward_chunks=s.backward_chunks, backward_by=s.backward_by)  # fmt: skip


def mutated(chance: random.Random, schedule: Schedule) -> Schedule:
    """One action left out, doubled, moved, of another number, or another verb."""
    actions = list(schedule.actions)
    at = chance.randrange(len(actions))
    action = actions[at]
    how = chance.choice(("out", "double", "move", "move", "move", "number", "verb"))
    if how in ("out", "move"):
        del actions[at]
    if how in ("double", "move"):
        actions.insert(chance.randrange(len(actions) + 1), action)
    if how == "number" and action.index is not None:
        actions[at] = Action(action.verb, max(0, action.index + chance.choice((-1, 1))))
    if how == "verb":
        kind = action.spec.phase, action.spec.indexed
        # Without those of experts in host memory, which have tests of their own.
        like = [v.verb for v in VERBS.values() if (v.phase, v.indexed) == kind and v.lane != "copy"]
        actions[at] = Action(chance.choice(like), action.index)
    return Schedule(tuple(actions))


# ---------------------------------------------------------------- the second opinion


class _Walk:
    """One schedule, followed. `done`: the actions so far; `rows[c]`: the path of each row of chunk c."""

    def __init__(self, schedule: Schedule, chunks: int, by: str, *, head: str, distinct: Iterable[str]) -> None:
        self.words = [action.text for action in schedule]
        self.count = {verb: schedule.count(verb) for verb in VERBS}
        self.by, self.chunks = by, chunks
        self.dedup = any(self.count[verb] for verb in distinct)
        self.rows = [[(head,)] * ROWS for _ in range(chunks)]
        self.done: set[str] = set()

    def need(self, *words: str) -> None:
        for word in words:
            if word not in self.done:
                raise Wrong(f"{word} is not there yet")

    def extend(self, verb: str, chunk: int, after: str) -> None:
        """The rows of a chunk go one step further on their path."""
        if chunk >= self.chunks:
            raise Wrong(f"no chunk {chunk}")
        for i, path in enumerate(self.rows[chunk]):
            if path[-1] != after:
                raise Wrong(f"a row of chunk {chunk} that was at {path[-1]} and not at {after}")
            self.rows[chunk][i] = (*path, verb)

    def all_of(self, verb: str, last: str) -> None:
        """Every row is at `last`, and all have `verb` before them."""
        for paths in self.rows:
            if any(path[-1] != last or path.count(verb) != 1 for path in paths):
                raise Wrong(f"a row that did not come to {last}")

    def numbered(self, verb: str) -> None:
        """The numbers of a verb are those from 0."""
        for index in range(self.count[verb]):
            self.need(f"{verb}{index}")

    def earlier(self, verb: str, chunk: int) -> None:
        """A distinct row may have come with the group of any earlier one of its experts."""
        if self.dedup and self.by == "experts":
            self.need(*(f"{verb}{c}" for c in range(chunk)))

    def run(self) -> None:
        for word in self.words:
            if word in self.done:
                raise Wrong(f"{word} twice")
            action = Action.parse(word)
            getattr(self, action.verb)(action.index)
            self.done.add(word)


class _Forward(_Walk):
    def N(self, _: None) -> None:
        rest = self.words[: self.words.index("P")] if "P" in self.words else self.words
        if self.done or any(word[0] not in "NBSW" for word in rest):
            raise Wrong("what needs the counts is before N, or stands beside it")

    def P(self, _: None) -> None:
        if self.count["N"]:
            self.need("N")
        for c in range(self.chunks):
            self.extend("P", c, "x")

    def M(self, _: None) -> None:
        self.need("P")

    def Wf(self, group: int) -> None:
        self.need(*(["N"] if self.count["N"] else []), *([f"Wf{group - 1}"] if group else []))

    def D(self, c: int) -> None:
        self.extend("D", c, "P")

    def O(self, _: None) -> None:  # noqa: E743
        self.need("P")
        self.numbered("Wf")

    def Or(self, _: None) -> None:
        self.need("O")

    def E(self, c: int) -> None:
        self.numbered("Wf")
        if self.dedup:
            self.need("M")
        self.extend("E", c, "D")
        self.earlier("E", c)

    def C(self, c: int) -> None:
        self.extend("C", c, "E")

    def U(self, _: None) -> None:
        self.all_of("E", "C")
        if self.dedup:
            self.need("O", "M", *(["Or"] if self.count["Or"] else []))

    def B(self, i: int) -> None:
        self.need(*([f"B{i - 1}"] if i else []))

    def S(self, _: None) -> None:
        pass


class _Backward(_Walk):
    def Ut(self, _: None) -> None:
        for c in range(self.chunks):
            self.extend("Ut", c, "dy")

    def Ct(self, c: int) -> None:
        self.extend("Ct", c, "Ut")

    def Od(self, _: None) -> None:
        self.need("Ut")

    def Ed(self, c: int) -> None:
        self.extend("Ed", c, "Ct")
        self.earlier("Ed", c)

    def Mt(self, _: None) -> None:
        self.need(*(f"Ed{c}" for c in range(self.chunks)))

    def Dt(self, c: int) -> None:
        self.extend("Dt", c, "Ed")

    def Ew(self, _: int) -> None:
        self.need(*(f"Ed{c}" for c in range(self.chunks)), *(["Od"] if self.dedup else []))
        if self.count["Eg"]:
            raise Wrong("weight gradients made twice")

    def Eg(self, c: int) -> None:
        if self.by != "experts" or c >= self.chunks:
            raise Wrong("not all rows of these experts")
        self.need(f"Ed{c}", *(["Od"] if self.dedup else []))

    def Wd(self, _: None) -> None:
        self.need(*(f"Ed{c}" for c in range(self.chunks)), *(["Od"] if self.dedup else []))

    def Wg(self, _: None) -> None:
        self.need("Wd")

    def Wa(self, _: None) -> None:
        self.need("Wg")
        self.weighed()

    def Pt(self, _: None) -> None:
        self.all_of("Ed", "Dt")
        if self.dedup:
            self.need("Od", "Mt")

    def Bt(self, i: int) -> None:
        self.need(*([f"Bt{i + 1}"] if i + 1 < self.count["Bt"] else []))

    def St(self, _: None) -> None:
        pass

    def weighed(self) -> None:
        """Every expert has its weight gradient."""
        if self.count["Eg"]:
            self.need(*(f"Eg{c}" for c in range(self.chunks)))
        else:
            self.need("Ew0")
            self.numbered("Ew")


def follow(pair: SchedulePair) -> None:
    """Raises Wrong where either half does not bring every row through its expert and back, once, and every gradient."""
    forward = _Forward(pair.forward, pair.chunks, pair.by, head="x", distinct=("M", "O", "Or"))
    forward.run()
    forward.need("U")
    for verb in ("B", "Wf"):
        forward.numbered(verb)
    backward = _Backward(pair.backward, pair.backward_chunks, pair.backward_by, head="dy", distinct=("Mt", "Od"))
    backward.run()
    backward.need("Pt")
    backward.weighed()
    if any(backward.count[verb] for verb in ("Wd", "Wg", "Wa")):
        backward.need("Wa")
    if forward.dedup != backward.dedup:
        raise Wrong("one half is deduplicated")
    ops = [word for word in forward.words if word[0] in "BS"]
    if [word.replace("t", "") for word in backward.words if word[:2] in ("Bt", "St")] != ops[::-1]:
        raise Wrong("the ops of backward are not those of forward in reverse")
