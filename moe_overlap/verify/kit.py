"""What every check works with: the values and tokens of a run, sides to compare, and where findings are noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_overlap.verify.adapter import Adapter, State, size_of
from moe_overlap.verify.compare import describe
from moe_overlap.verify.sides import TOKENS, Result, Side, Tokens, built, tokens_for


def new_group(world: dist.ProcessGroup, size: int, timeout_s: float) -> dist.ProcessGroup:
    """A gloo group of the first ranks of `world`, all of which call this; no wait in it is longer than `timeout_s`. The
    other ranks get a group too, of themselves: torch numbers groups, and wants the same number of them on every rank.

    Where `world` is all ranks of the job, all of them make both: a group that its members alone make is named after
    them, and a second one of that name, after the first was destroyed, finds the first one's addresses (torch 2.13.0).
    """
    ranks = dist.get_process_group_ranks(world)
    parts = [part for part in (ranks[:size], ranks[size:]) if part]
    mine = parts[0] if world.rank() < size else parts[1]
    limit = timedelta(seconds=timeout_s)
    if world.size() < dist.get_world_size():
        return dist.new_group(mine, timeout=limit, backend="gloo", use_local_synchronization=True)
    made = [dist.new_group(part, timeout=limit, backend="gloo") for part in parts]
    return made[parts.index(mine)]


def break_off(group: dist.ProcessGroup) -> None:
    """Close all connections of a gloo group, so that ranks which wait in it for this one raise at once. A receive that
    runs out of time does this; whether it found somebody does not matter."""
    for peer in range(group.size()):
        if peer != group.rank():
            try:
                group.recv([torch.empty(1)], peer, 0).wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    return


Factory = Callable[[], Adapter]
KINDS = ("router", "experts", "shared", "other", "buffer")
TRAINED = KINDS[:-1]
CALLED = {
    "router": "the router",
    "experts": "the experts",
    "shared": "the shared part",
    "other": "the other parameters",
    "buffer": "the buffers",
}


@dataclass(kw_only=True)
class Setup:
    """What the checks of one run share. state, seed and kinds are found by the first check."""

    factory: Factory
    dtype: torch.dtype
    precision: torch.dtype  # as nearly as which dtype allows results have to agree
    same_tokens: bool
    timeout_s: float
    state: State = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Note:
    """A finding of this rank. `key` joins those of several ranks to one line; `topic` is what went wrong: "output",
    "input", a kind of parameter, or the key."""

    key: str
    what: str
    how: str
    look: str
    topic: str


class Kit:
    """One check's view of the run, with a group of its own, so that no check meets what another one left behind."""

    def __init__(self, setup: Setup, world: dist.ProcessGroup) -> None:
        self.setup = setup
        self.world = world
        self.group = group = new_group(world, world.size(), setup.timeout_s)
        self._groups = [group]
        self.rank, self.ranks = group.rank(), group.size()
        self.notes: list[Note] = []

    # ------------------------------------------------------------------------------------ sides and tokens

    def many(self) -> Side:
        """A fresh module on all ranks, with the run's values."""
        return self.side(self.group)

    def one(self) -> Side:
        """A fresh module of this rank alone, which computes all ranks' tokens."""
        return self.side(None)

    def side(self, group: dist.ProcessGroup | None, *, load: bool = True) -> Side:
        """A fresh module on the ranks of a group, which together compute the tokens of all."""
        adapter = built(self.setup.factory, group, self.setup.dtype)
        if load:
            adapter.load_full(self.setup.state)
        share = 1.0 if self.setup.same_tokens else size_of(group) / self.ranks
        return Side(adapter=adapter, share=share)

    def subgroup(self, size: int) -> dist.ProcessGroup:
        """Of the first ranks, on which alone it is of use; all ranks call this."""
        group = new_group(self.world, size, self.setup.timeout_s)
        self._groups.append(group)
        return group

    def close(self) -> None:
        """Give the groups back."""
        for group in self._groups:
            dist.destroy_process_group(group)

    def tokens(self, counts: Sequence[int] | None = None, *, batch: int = 0) -> list[Tokens]:
        """All ranks' tokens. batch: another number, other tokens."""
        counts = [TOKENS] * self.ranks if counts is None else counts
        hidden = self.setup.factory().hidden
        seed = self.setup.seed + 100 * batch
        return tokens_for(counts, hidden, self.setup.dtype, seed=seed, same=self.setup.same_tokens)

    def share_of(self, tokens: Sequence[Tokens], side: Side) -> list[Tokens]:
        """What this rank computes of all ranks' tokens on a side: all on one rank, its own on n; and on fewer than n
        ranks every m-th. None without tokens, but on n ranks."""
        if self.setup.same_tokens:
            return [tokens[0]]
        group = side.adapter.group
        size = size_of(group)
        if size == self.ranks:
            return [tokens[self.rank]]
        mine = [one for one in tokens if len(one.x)] if group is None else list(tokens[group.rank() :: size])
        if len(tokens) % size:  # as many calls on every rank
            return [Tokens(torch.cat([one.x for one in mine]), torch.cat([one.c for one in mine]))]
        return mine

    def own(self, results: Sequence[torch.Tensor], tokens: Sequence[Tokens]) -> torch.Tensor:
        """Of the results of `one` for all ranks' tokens those for this rank's."""
        if self.setup.same_tokens:
            return results[0]
        if not len(tokens[self.rank].x):
            return tokens[self.rank].x
        return results[sum(len(one.x) > 0 for one in tokens[: self.rank])]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Over the ranks. Collective."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.ranks

    def agreed(self, right: bool) -> bool:
        """Whether it is so on every rank. Collective."""
        return float(self.mean(torch.tensor(float(right)))) == 1.0

    # ------------------------------------------------------------------------------------ findings

    def note(self, key: str, what: str, how: str, look: str, *, topic: str = "") -> None:
        self.notes.append(Note(key, what, how, look, topic or key))

    def compare(
        self,
        what: str,
        got: torch.Tensor,
        want: torch.Tensor,
        look: str,
        *,
        topic: str = "",
        ranks: int | None = None,
    ) -> bool:
        """Note how `got` of n ranks differs from `want` of one; whether it does not. ranks: 1 where the number of ranks
        explains nothing."""
        top_k = self.setup.factory().top_k if ranks is None else 0
        how = describe(got, want, dtype=self.setup.precision, ranks=ranks or self.ranks, top_k=top_k)
        if how is not None:
            self.note(what, what, how, look, topic=topic)
        return how is None

    def compare_kinds(
        self,
        what: str,
        got: State,
        want: State,
        look: dict[str, str],
        *,
        parts: Callable[[], Sequence[State]] = tuple,
        kinds: Sequence[str] = KINDS,
        ranks: int | None = None,
    ) -> bool:
        """`compare` for all tensors, one finding for each kind: that of its first tensor which differs."""
        right = True
        for kind in kinds:
            names = [name for name in self.setup.state if self.setup.kinds[name] == kind and name in want]
            lines: list[tuple[str, str]] = []
            for name in names:
                how: str | None = "is not there" if name not in got else self._how(name, got[name], want[name], ranks)
                if how is not None and name in got:
                    some = [part[name] for part in parts() if name in part]
                    how = self._how(name, got[name], want[name], ranks, some)
                if how is not None:
                    lines.append((name, how))
            if lines:
                right = False
                others = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
                where = f"{CALLED[kind]} ({lines[0][0]}{others})"
                self.note(f"{what} {kind}", f"{what} of {where}", lines[0][1], look[kind], topic=kind)
        return right

    def _how(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        ranks: int | None = None,
        parts: Sequence[torch.Tensor] = (),
    ) -> str | None:
        top_k = self.setup.factory().top_k if ranks is None else 0
        return describe(got, want, dtype=self.setup.precision, ranks=ranks or self.ranks, top_k=top_k,
                        parts=parts, experts=self.setup.kinds[name] == "experts")  # fmt: skip

    def compare_results(self, got: Result, one: Result, tokens: Sequence[Tokens], *, what: str = "") -> bool:
        """Outputs and input gradients of this rank."""
        want, grad = (self.own(found, tokens) for found in (one.outputs, one.input_grads))
        right = self.compare(f"{what}the output", got.outputs[0], want, LOOK_OUTPUT, topic="output")
        what = f"{what}the gradient of the input"
        return self.compare(what, got.input_grads[0], grad, LOOK_GRADS["input"], topic="input") and right


LOOK_OUTPUT = (
    "the order in which rows come back, dropped tokens, and the routing weights, which belong once to each row"
)
_DENSE = "what averages the gradients of replicated parameters over the ranks, and whether it does so once"
LOOK_GRADS = {
    "input": "the backward of dispatch (a token sums the gradients of its K rows) and the router's",
    "router": "the gradient of the routing weights of tokens whose experts are on other ranks; " + _DENSE,
    "experts": "who divides by the number of ranks: sums over all ranks' tokens want 1/EP once, and no average",
    "shared": _DENSE,
    "other": _DENSE,
    "buffer": "what changes buffers",
}
