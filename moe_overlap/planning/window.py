"""The problem that the planner solves: one window, which is one phase of one layer call.

Two lanes, compute and wire. Both phases have the same structure:

    forward    P    D_c    E_c    C_c    U     beside B_i, or S
    backward   Ut   Ct_c   Ed_c   Dt_c   Pt    beside Bt_i, or St, and Ew_g after the last Ed
               head first  experts second tail

A deduplicated step has its ids and weights (M, Mt) and the rows that stay (O, Od) besides. M goes right in front of the
first exchange and Mt of the last one; O and Od need nothing but the head, as the ops, of which they are the first:

    forward    P    M D_c   E_c    C_c      U     beside O and B_i, or S
    backward   Ut   Ct_c    Ed_c   Mt Dt_c  Pt    beside Od and Bt_i, or St

In forward one half of the experts may be left for the time after the last chunk's (Or), where a schedule without other
ops has nothing else to put beside the last combine. Then O is the other half: a window of its own (`forms`).

Where experts are in host memory, their copies are actions of a lane of their own (`schedule/offload.py`). Where they
stand follows from the rest, so they are no choice of the search; chunks are taken in their own order:

    forward    Hf_c for each E_c          backward    Hb_c for each Ed_c, and Hg_c after each Ew_c, one for each chunk

Every duration is in seconds, finite and >= 0. Everything here raises ConfigError for what is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from moe_overlap.agreement.loads import CHUNK_BY, ChunkBy
from moe_overlap.agreement.sizes import BLOCKS
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import Phase

OpVerb = Literal["B", "S"]
MOST_SLOWDOWN = 1e6  # what nothing real reaches, and with which durations still fit a float


def _check_seconds(field: str, *values: float) -> None:
    for value in values:
        if not 0 <= value < math.inf:
            raise ConfigError(field, value, "a finite number of seconds >= 0")


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """By what factor (>= 1) work on a lane takes longer while the other lane is busy too."""

    compute: float = 1.0
    wire: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute", "wire"):
            factor = getattr(self, name)
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not number or not 1 <= factor <= MOST_SLOWDOWN:
                raise ConfigError(f"slowdown.{name}", factor, f"a factor from 1 to {MOST_SLOWDOWN:.0e}")


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """The durations for one way of cutting the exchange, in seconds, one per chunk.

    `deferred_s`: one per weight-gradient group in backward; in forward none, or that of Or. `chunk_bytes`: what one
    exchange of each chunk holds in buffers; empty where nobody asks. `fetch_s`: of Hf (Hb), `return_s`: of Hg, where
    experts are in host memory; empty where they are not. `kept_bytes`: what is held beside the buffers for as long as
    the window lasts, whatever the schedule.
    """

    chunks: int
    by: ChunkBy
    first_s: tuple[float, ...]
    experts_s: tuple[float, ...]
    second_s: tuple[float, ...]
    deferred_s: tuple[float, ...] = ()
    chunk_bytes: tuple[int, ...] = ()
    fetch_s: tuple[float, ...] = ()
    return_s: tuple[float, ...] = ()
    kept_bytes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= BLOCKS:
            raise ConfigError("chunking.chunks", self.chunks, f"an integer from 1 to {BLOCKS}")
        if self.by not in CHUNK_BY:
            raise ConfigError("chunking.by", self.by, f"one of {CHUNK_BY}")
        for name in ("first_s", "experts_s", "second_s", "chunk_bytes", "fetch_s", "return_s"):
            values = getattr(self, name)
            if len(values) != self.chunks and (values or name in ("first_s", "experts_s", "second_s")):
                raise ConfigError(f"chunking.{name}", values, f"{self.chunks} values, one per chunk")
        for name in ("first_s", "experts_s", "second_s", "deferred_s", "fetch_s", "return_s"):
            _check_seconds(f"chunking.{name}", *getattr(self, name))
        if any(held < 0 for held in self.chunk_bytes):
            raise ConfigError("chunking.chunk_bytes", self.chunk_bytes, "bytes >= 0")
        if self.kept_bytes < 0:
            raise ConfigError("chunking.kept_bytes", self.kept_bytes, "bytes >= 0")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A phase with the ways in which its exchange can be cut.

    `op_verb`: whether `ops_s` are backbone ops (B, backward Bt) or the shared expert (S, St), in execution order.
    `issue_s`: compute-lane time of starting an exchange, and again of waiting for it. `metadata_s`: of M (backward Mt),
    where the step is deduplicated; the first of `ops_s` is then that of O (Od). None: it is not. `halves_s`: of O and
    of Or, where the rows that stay are computed in two parts (forward alone). None: they are not.
    """

    phase: Phase
    op_verb: OpVerb = "B"
    head_s: float
    tail_s: float
    ops_s: tuple[float, ...] = ()
    metadata_s: float | None = None
    halves_s: tuple[float, float] | None = None
    issue_s: float = 0.0
    slowdown: Slowdown = Slowdown()
    chunkings: tuple[Chunking, ...]

    def __post_init__(self) -> None:
        if self.phase not in ("forward", "backward"):
            raise ConfigError("window.phase", self.phase, "forward or backward")
        if self.op_verb not in ("B", "S"):
            raise ConfigError("window.op_verb", self.op_verb, "B (backbone ops) or S (the shared expert)")
        if self.metadata_s is not None:
            _check_seconds("window.metadata_s", self.metadata_s)
            if not self.ops_s:
                raise ConfigError("window.ops_s", self.ops_s, "the seconds of O (Od) first, where metadata_s is given")
        if self.halves_s is not None:
            _check_seconds("window.halves_s", *self.halves_s)
            if not self.deduplicated or self.phase == "backward" or len(self.halves_s) != 2:
                raise ConfigError("window.halves_s", self.halves_s, "two durations in a deduplicated forward, or None")
        if self.op_verb == "S" and len(self.user_ops_s) > 1:
            raise ConfigError("window.ops_s", self.ops_s, "at most one duration: there is one shared expert")
        for name in ("head_s", "tail_s", "issue_s"):
            _check_seconds(f"window.{name}", getattr(self, name))
        _check_seconds("window.ops_s", *self.ops_s)
        cuts = [(chunking.chunks, chunking.by) for chunking in self.chunkings]
        if not cuts or len(set(cuts)) != len(cuts):
            raise ConfigError("window.chunkings", cuts, "at least one, each (chunks, by) once")
        for chunking in self.chunkings:
            wrong = (self.phase == "backward") != bool(chunking.deferred_s)
            if wrong and not (self.deduplicated and len(chunking.deferred_s) == 1):  # Or
                expected = "one duration per weight-gradient group, at least one, in backward; none in forward"
                raise ConfigError("chunking.deferred_s", chunking.deferred_s, expected)
            self._check_copies(chunking)

    def _check_copies(self, chunking: Chunking) -> None:
        if bool(chunking.fetch_s) != self.in_host_memory:
            raise ConfigError("chunking.fetch_s", chunking.fetch_s, "seconds in every cut of a window, or in none")
        if not self.in_host_memory:
            return
        if self.deduplicated:
            raise ConfigError("window.metadata_s", self.metadata_s, "None where experts are in host memory")
        if chunking.chunks > 1 and chunking.by != "experts":
            raise ConfigError("chunking.by", chunking.by, "'experts' where these are in host memory")
        groups = chunking.chunks if self.phase == "backward" else 0
        if (len(chunking.deferred_s), len(chunking.return_s)) != (groups, groups):
            expected = f"{groups} durations, as of deferred_s, where experts are in host memory"
            raise ConfigError("chunking.return_s", chunking.return_s, expected)

    @property
    def in_host_memory(self) -> bool:
        """Whether weights come up for each chunk."""
        return bool(self.chunkings[0].fetch_s)

    @property
    def deduplicated(self) -> bool:
        return self.metadata_s is not None

    @property
    def user_ops_s(self) -> tuple[float, ...]:
        """`ops_s` without O (Od)."""
        return self.ops_s[1:] if self.deduplicated else self.ops_s

    @property
    def forms(self) -> tuple[Window, ...]:
        """This window, and where the rows that stay may be computed in two parts, the one in which they are."""
        return (self,) if self.halves_s is None else (self, self._halved)

    @cached_property
    def _halved(self) -> Window:
        assert self.halves_s is not None
        first_s, rest_s = self.halves_s
        cuts = tuple(replace(chunking, deferred_s=(rest_s,)) for chunking in self.chunkings)
        return replace(self, halves_s=None, ops_s=(first_s, *self.user_ops_s), chunkings=cuts)

    def form_of(self, actions: str) -> Window:
        """The one of `forms` that a schedule with these actions, words of a text, is of."""
        return self._halved if self.halves_s is not None and "Or" in actions.split() else self

    def chunking(self, chunks: int, by: ChunkBy) -> Chunking:
        """The durations of this cut. ConfigError where the window does not have it."""
        for chunking in self.chunkings:
            if (chunking.chunks, chunking.by) == (chunks, by):
                return chunking
        cuts = [(chunking.chunks, chunking.by) for chunking in self.chunkings]
        raise ConfigError("chunks, by", (chunks, by), f"a cut of this window: {cuts}")
