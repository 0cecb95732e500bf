"""One short function per published strategy: shape of the strategy in, a pair of schedules out.

`serial` is every framework's default; `chunked` is the pipeline of Tutel (MLSys'23), PipeMoE (INFOCOM'23) and, by
expert groups, EPS-MoE (arXiv 2410.12247), by peers, FasterMoE (PPoPP'22; `published.py` has more by name);
`shared_expert` hides exchanges under a shared expert (Megatron-Core); `shortcut` is ScMoE (ICML 2025, arXiv
2404.05019): the experts read an earlier activation, so that whole backbone ops run beside both exchanges.

`joined=True` keeps plan and order and waits for every exchange right after its start: overlap off. Results are equal
bit for bit either way; that is the library's central test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

from moe_overlap.agreement.loads import CHUNK_BY, Agreed, ChunkBy, pays
from moe_overlap.agreement.sizes import BLOCKS, digest
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import Action, Schedule
from moe_overlap.schedule.fetching import fetching


@dataclass(frozen=True, kw_only=True)
class SchedulePair:
    """The forward and the backward schedule of one layer call, and what they were built from.

    `chunks` and `by` say how the exchanges of forward are cut, `backward_chunks` and `backward_by` those of backward.
    """

    name: str
    forward: Schedule
    backward: Schedule
    chunks: int
    by: ChunkBy
    backward_chunks: int
    backward_by: ChunkBy
    slot: int | None = None
    joined: bool = False
    joined_copies: bool = False  # weights of copies and their gradients alone are waited for where they start
    relayed_copies: bool | None = None  # weights of copies go from rank to rank, in two groups; None: as the rule says

    @cached_property
    def digest(self) -> int:
        """Equal on all ranks that will issue the same exchanges in the same order."""
        cuts = (self.chunks, self.by, self.backward_chunks, self.backward_by)
        relayed = () if self.relayed_copies is None else (self.relayed_copies,)
        return digest(self.forward.text, self.backward.text, *cuts, *relayed)

    @property
    def num_ops(self) -> int:
        """Backbone ops that the schedule issues."""
        return self.forward.count("B")

    @property
    def has_shared(self) -> bool:
        return self.forward.count("S") > 0

    @cached_property
    def ahead(self) -> tuple[Action, ...]:
        """The user's ops that run while ranks agree: those between N and P."""
        if Action("N") not in self.forward.actions:
            return ()
        until_p = self.forward.actions[1 : self.forward.actions.index(Action("P"))]
        return tuple(action for action in until_p if action.verb not in ("Wf", "Hf"))

    @cached_property
    def deduplicated(self) -> bool:
        """Whether one row for each (token, rank) travels, with its ids and weights beside it."""
        return self.forward.count("M") > 0

    def pair_for(self, exchange: Agreed) -> SchedulePair:
        """The pair of one step: this one; where ranks agreed on what deduplication needs, it is deduplicated in the
        steps in which that pays."""
        if exchange.dedup and not self.deduplicated and pays(exchange):
            return split_own(deduplicate(self))
        return self

    def begins_backward(self, exchange: Agreed) -> None:
        """As `Schedules.begins_backward`."""

    def with_backward(self, other: SchedulePair) -> SchedulePair:
        """This pair's forward schedule with the backward schedule of `other`."""
        return replace(
            self, backward=other.backward, backward_chunks=other.backward_chunks, backward_by=other.backward_by
        )

    def join(self, joined: bool = True) -> SchedulePair:
        """The same schedules with every exchange joined right after its start (overlap off), or not."""
        return replace(self, joined=joined)


class Schedules(Protocol):
    """Which schedules a layer runs: one pair for all steps (`SchedulePair`), or one chosen from the agreed counts."""

    @property
    def digest(self) -> int:
        """Equal on all ranks that will run the same."""

    @property
    def chunks(self) -> int:
        """Chunks of the forward schedule; 0 where they are chosen from the counts."""

    @property
    def by(self) -> ChunkBy: ...

    @property
    def ahead(self) -> tuple[Action, ...]:
        """The user's ops that run while ranks agree: the same in every pair, and in the digest."""

    @property
    def joined(self) -> bool:
        """Whether the agreement is waited for at once, before these ops."""

    def pair_for(self, exchange: Any) -> SchedulePair:
        """The pair of one step, from what the ranks agreed on, an `ExchangePlan`. Called once for each step, on all
        ranks in one order: a choice may depend on the steps before, in which all ranks agreed too."""

    def begins_backward(self, exchange: Any) -> None:
        """The last backward of a step has begun, one that does not retain the graph, and its recompute, if there is
        one, is over. Never called where a graph is retained in vain."""


def _actions(verb: str, indices: range) -> list[Action]:
    return [Action(verb, index) for index in indices]


def _interleave(first: str, second: str, count: int) -> list[Action]:
    return [Action(verb, index) for index in range(count) for verb in (first, second)]


def _check_chunks(chunks: int, by: str, field: str = "chunks") -> None:
    if not isinstance(chunks, int) or isinstance(chunks, bool) or not 1 <= chunks <= BLOCKS:
        raise ConfigError(field, chunks, f"an integer from 1 to {BLOCKS}")
    if by not in CHUNK_BY:
        raise ConfigError("chunk_by", by, f"one of {CHUNK_BY}")


def _forward(before: list[Action], after: list[Action], chunks: int) -> Schedule:
    """`before`: ops issued between the dispatches and the experts; `after`: between the combines and U."""
    parts = [Action("P"), *_actions("D", range(chunks)), *before, *_interleave("E", "C", chunks), *after, Action("U")]
    return Schedule(tuple(parts))


def _backward(before: list[Action], after: list[Action], chunks: int, *, defer: bool = True) -> Schedule:
    """`before`: ops between the first exchanges and the experts; `after`: ops under the second exchanges.

    `defer`: the weight gradients after the start of the last exchange, so that they run beside it; else before.
    """
    *parts, last = [Action("Ut"), *_actions("Ct", range(chunks)), *before, *_interleave("Ed", "Dt", chunks)]
    grads = [last, Action("Ew", 0)] if defer else [Action("Ew", 0), last]
    return Schedule((*parts, *grads, *after, Action("Pt")))


def serial(*, shared: bool = False) -> SchedulePair:
    """One chunk, nothing beside the exchanges: they are joined where they start."""
    tail = [Action("S")] if shared else []
    head = [Action("St")] if shared else []
    forward, backward = _forward([], [], 1), _backward([], [], 1)
    return SchedulePair(
        name="serial",
        forward=Schedule((*forward, *tail)),
        backward=Schedule((*head, *backward)),
        chunks=1,
        by="tokens",
        backward_chunks=1,
        backward_by="tokens",
        joined=True,
    )


def chunked(
    chunks: int,
    by: ChunkBy = "tokens",
    *,
    shared: bool = False,
    backward_chunks: int | None = None,
    defer_weight_grads: bool = True,
) -> SchedulePair:
    """All dispatches, then expert and combine of each chunk in turn: T(r) = max{2ra, 2a + re, (r+1)a + e}.

    `backward_chunks`: chunks of the backward schedule, the same by default. `defer_weight_grads=False`: the weight
    gradients before the last exchange of backward instead of beside it (what most frameworks do).
    """
    back = chunks if backward_chunks is None else backward_chunks
    _check_chunks(chunks, by)
    _check_chunks(back, by, "backward_chunks")
    return SchedulePair(
        name="chunked",
        forward=_forward([Action("S")] if shared else [], [], chunks),
        backward=_backward([Action("St")] if shared else [], [], back, defer=defer_weight_grads),
        chunks=chunks,
        by=by,
        backward_chunks=back,
        backward_by=by,
    )


def shared_expert(slot: int = 1, *, chunks: int = 1, by: ChunkBy = "tokens") -> SchedulePair:
    """The shared expert under the dispatch (slot 1) or under the combine (slot 0); the other way round in backward."""
    _check_chunks(chunks, by)
    if slot not in (0, 1):
        raise ConfigError("slot", slot, "0 (shared expert under the combine) or 1 (under the dispatch)")
    s, st = [Action("S")], [Action("St")]
    return SchedulePair(
        name="shared_expert",
        forward=_forward(s, [], chunks) if slot else _forward([], s, chunks),
        backward=_backward([], st, chunks) if slot else _backward(st, [], chunks),
        chunks=chunks,
        by=by,
        backward_chunks=chunks,
        backward_by=by,
        slot=slot,
    )


def window(
    num_ops: int,
    slot: int,
    *,
    chunks: int = 1,
    by: ChunkBy = "tokens",
    backward_slot: int | None = None,
    backward_chunks: int | None = None,
) -> SchedulePair:
    """`num_ops` backbone ops beside the exchanges, `slot` (the paper's K - 1) of them issued before the experts.

    `backward_slot` is the same number for the backward schedule, counted in forward order: of the ops' backwards,
    those of ops `backward_slot`.. run before the experts' and the rest after. It defaults to `slot`: the mirror.
    `backward_chunks` defaults to `chunks`.
    """
    chunks_back = chunks if backward_chunks is None else backward_chunks
    _check_chunks(chunks, by)
    _check_chunks(chunks_back, by, "backward_chunks")
    back = slot if backward_slot is None else backward_slot
    for name, value in (("slot", slot), ("backward_slot", back)):
        if not isinstance(value, int) or not 0 <= value <= num_ops:
            raise ConfigError(name, value, f"an integer from 0 to {num_ops}, the number of backbone ops after the tap")
    return SchedulePair(
        name="shortcut",
        forward=_forward(_actions("B", range(slot)), _actions("B", range(slot, num_ops)), chunks),
        backward=_backward(
            _actions("Bt", range(num_ops - 1, back - 1, -1)), _actions("Bt", range(back - 1, -1, -1)), chunks_back
        ),
        chunks=chunks,
        by=by,
        backward_chunks=chunks_back,
        backward_by=by,
        slot=slot,
    )


def tap_of_position(position: int, num_backbone: int = 4) -> int:
    """Backbone ops before the point that feeds the experts, for the paper's Pos-1, 2, 3.

    Of a block pair [attention, MLP, attention, shared expert]: Pos-1 reads after the MLP, Pos-2 between attention and
    MLP, Pos-3 before the first attention (ScMoE, section 3.1).
    """
    if position not in (1, 2, 3) or num_backbone < 4 - position:
        raise ConfigError("position", position, "1, 2 or 3 (ScMoE's Pos-1, Pos-2, Pos-3)")
    return num_backbone - 1 - position


def shortcut(
    position: int,
    slot: int,
    *,
    chunks: int = 1,
    by: ChunkBy = "tokens",
    backward_slot: int | None = None,
    backward_chunks: int | None = None,
    num_backbone: int = 4,
) -> SchedulePair:
    """ScMoE's Pos-1/2/3 over a block pair of `num_backbone` ops, `slot` of the ops after the tap before the experts."""
    num_ops = num_backbone - tap_of_position(position, num_backbone)
    return window(num_ops, slot, chunks=chunks, by=by, backward_slot=backward_slot, backward_chunks=backward_chunks)


@lru_cache(maxsize=64)
def deduplicate(pair: SchedulePair) -> SchedulePair:
    """The same strategy with one row for each (token, rank).

    Ids and weights of the rows (M) go ahead of them, and their gradients (Mt) ahead of the last rows back. The rows
    that stay on their rank are computed first, under the dispatches (O), and their gradients likewise (Od): the order
    of FasterMoE (PPoPP'22), whose local experts run first.
    """
    if pair.deduplicated:
        return pair
    if pair.by == "peers":
        raise NotImplementedError("dedup beside a cut by peers: one row for each (token, rank) in such chunks")
    forward, backward = list(pair.forward), list(pair.backward)
    forward.insert(_last(forward, "D") + 1, Action("O"))
    forward.insert(forward.index(Action("P")) + 1, Action("M"))
    backward.insert(_last(backward, "Dt"), Action("Mt"))
    backward.insert(_last(backward, "Ct") + 1, Action("Od"))
    return replace(pair, forward=Schedule(tuple(forward)), backward=Schedule(tuple(backward)))


@lru_cache(maxsize=64)
def split_own(pair: SchedulePair) -> SchedulePair:
    """A deduplicated pair that leaves one half of the experts' own rows to be computed under the last combine (Or).

    Forward has nothing else there, and the halves are parted by experts, so no matmul gets smaller. In backward the
    weight gradients fill that place.
    """
    forward = list(pair.forward)
    forward.insert(_last(forward, "C") + 1, Action("Or"))
    return replace(pair, forward=Schedule(tuple(forward)))


@lru_cache(maxsize=64)
def with_copies(pair: SchedulePair, fetches: int, returns: bool) -> SchedulePair:
    """The same strategy in a step that has copies of experts.

    `fetches` groups of weights are fetched (`fetching`). `returns`: the gradients of the copies are made first (Wd),
    once the rows that stay are done (Od), and on their way home (Wg) beside the weight gradients of the homes (Ew),
    which add them up last (Wa).
    """
    backward = list(pair.backward)
    if returns:
        begin = max(place for place, action in enumerate(backward) if action.verb in ("Dt", "Od")) + 1
        backward[begin:begin] = [Action("Wd"), Action("Wg")]
        backward.append(Action("Wa"))
    return replace(pair, forward=fetching(pair.forward, fetches), backward=Schedule(tuple(backward)))


def _last(actions: list[Action], verb: str) -> int:
    return max(position for position, action in enumerate(actions) if action.verb == verb)


def first_ops(verb: str, count: int) -> tuple[Action, ...]:
    """The first backbone ops (verb "B"), or the shared expert ("S")."""
    return tuple(_actions("B", range(count))) if verb == "B" else (Action("S"),) * count


@lru_cache(maxsize=64, typed=True)  # True and 1.0 are refused, whatever was asked for before
def agree_ahead(pair: SchedulePair, ops: int = 1) -> SchedulePair:
    """The same strategy with the first `ops` of the user's ops (B, S) under the agreement on the counts (N).

    What does not need the counts may run there, and is the user's: P and all that follows reads them. The rows that
    stay (O) do too: their place among the others in the experts' buffer follows from the counts. Backward is the same.
    """
    mine = [action for action in pair.forward if action.verb in ("B", "S")]
    if not isinstance(ops, int) or isinstance(ops, bool) or not 0 <= ops <= len(mine):
        raise ConfigError("ahead", ops, f"an integer from 0 to {len(mine)}, the ops beside the exchanges")
    rest = [action for action in pair.forward if action != Action("N") and action not in mine[:ops]]
    head = [Action("N"), *mine[:ops]] if ops else []
    return replace(pair, forward=Schedule((*head, *rest)))


_CHOICE = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*")


def parse_choice(text: str, *, shared: bool = False) -> SchedulePair:
    """The pair that a user's word names: serial, chunked(4), chunked(4,experts), chunked(4,peers), shared_expert,
    shared_expert(0), or shared_expert(ahead), which runs the shared expert while ranks agree.

    `shared` says whether the layer has a shared expert. Raises ConfigError for any other text; "auto" is no pair but a
    choice that MoELayer and ShortcutBlock make at every step.
    """
    expected = (
        "auto (of a MoELayer or a ShortcutBlock, which measure), serial, chunked(r), chunked(r,experts) or "
        "chunked(r,peers) with r from 1 to 16, shared_expert, shared_expert(slot) or shared_expert(ahead)"
    )
    match = _CHOICE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError("schedule", text, expected)
    name, inside = match.groups()
    words = [word.strip() for word in inside.split(",")] if inside else []
    if name == "serial" and not words:
        return serial(shared=shared)
    if name == "chunked" and words and words[0].isdecimal() and len(words) <= 2:
        by = words[1] if len(words) == 2 else "tokens"
        if by in CHUNK_BY:
            return chunked(int(words[0]), by, shared=shared)
    if name == "shared_expert" and len(words) <= 1 and all(word in ("0", "1", "ahead") for word in words):
        if not shared:
            raise ConfigError("schedule", text, "a layer with a shared expert (shared_expert_size) for this schedule")
        if words == ["ahead"]:
            return agree_ahead(shared_expert())
        return shared_expert(int(words[0]) if words else 1)
    raise ConfigError("schedule", text, expected)
