"""The plan of a step of fixed shapes: what follows from a number of tokens and a capacity alone, before any routing.

A rank's tokens are cut into segments, the coarsest ones of which the chunks of forward and of backward are made. Every
(source rank, segment, slot) has the same number of rows on all ranks, so that the `ExchangePlan` is one whose counts
happen to be capacities, and all else follows from it as ever. Rows that no choice uses are zeros.

Letters: W ranks, P slots, e slots a rank, S segments, C chunks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import ChunkBy, Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan
from moe_overlap.errors import ConfigError

NO_DROP = "no_drop"
Capacity = float | str
Cut = tuple[int, ChunkBy]


def segments_of(cuts: Sequence[Cut]) -> tuple[int, ...]:
    """The first block of each segment: where a chunk of tokens begins in one of the cuts. ConfigError for a cut by
    peers, whose rows lie otherwise."""
    if any(by == "peers" for _, by in cuts):
        raise ConfigError("chunk_by", "peers", "'tokens' or 'experts' with mode=\"static\"")
    begins = {0}
    for chunks, by in cuts:
        begins |= {BLOCKS * c // chunks for c in range(chunks if by == "tokens" else 1)}
    return tuple(sorted(begins))


@dataclass(frozen=True, eq=False, kw_only=True)
class StaticLayout:
    """Where the rows of every step lie that has these numbers. capacity: a factor (a slot has room for so many times
    its mean share of a segment's choices, rounded up), or "no_drop" (for all of them). segments: see `segments_of`.
    kept: what others derive from it once and keep, such as tensors on a device."""

    rank: int
    world_size: int
    num_slots: int
    tokens: int
    top_k: int
    capacity: Capacity
    segments: tuple[int, ...]
    kept: dict[object, Any] = field(default_factory=dict)

    @cached_property
    def segment_tokens(self) -> np.ndarray:
        """int64 [S]: tokens of each segment."""
        begins = [b * self.tokens // BLOCKS for b in (*self.segments, BLOCKS)]
        return np.diff(np.array(begins, dtype=np.int64))

    @cached_property
    def token_segments(self) -> np.ndarray:
        """int32 [T]: the segment of each token."""
        return np.repeat(np.arange(len(self.segments), dtype=np.int32), self.segment_tokens)

    @cached_property
    def capacities(self) -> np.ndarray:
        """int64 [S]: rows that each slot has for the choices of a segment of one rank."""
        choices = self.segment_tokens * self.top_k
        if isinstance(self.capacity, str):
            return choices
        shares = [math.ceil(min(n, self.capacity * n / self.num_slots)) for n in choices.tolist()]
        return np.array(shares, dtype=np.int64)

    @cached_property
    def counts(self) -> Counts:
        """All rows of a segment stand at its first block."""
        table = np.zeros((self.world_size, BLOCKS, self.num_slots), dtype=np.int64)
        table[:, list(self.segments)] = self.capacities[None, :, None]
        return Counts.of(table, self.rank)

    @property
    def send_rows(self) -> int:
        """Rows that a rank sends, which is also how many its experts receive."""
        return int(self.capacities.sum()) * self.num_slots

    def chunked(self, exchange: ExchangePlan, chunks: int, by: ChunkBy) -> ChunkPlan:
        """The plan of a cut, made once: a step's is that with its own `exchange`."""
        if (chunks, by) not in self.kept:
            sent, received = exchange.cut_counts(chunks, by)
            self.kept[chunks, by] = StaticChunks(exchange=exchange, chunks=chunks, by=by, sent=sent, received=received)
        plan = copy.copy(self.kept[chunks, by])  # with what it has derived so far
        object.__setattr__(plan, "exchange", exchange)
        return plan


@dataclass(frozen=True, kw_only=True)
class StaticExchange(ExchangePlan):
    """One step of a `StaticLayout`. On the device of the routing, of each choice: key_TK, int32 [T, K], segment * P +
    slot, -1 unused; place_TK, int32 [T, K], how many choices of the same key come before it."""

    layout: StaticLayout
    key_TK: torch.Tensor
    place_TK: torch.Tensor

    def chunked(self, chunks: int, by: ChunkBy = "tokens") -> ChunkPlan:
        return self.layout.chunked(self, chunks, by)


@dataclass(frozen=True, kw_only=True)
class StaticChunks(ChunkPlan):
    """The exchange of a `StaticExchange` in C chunks."""

    @property
    def layout(self) -> StaticLayout:
        assert isinstance(self.exchange, StaticExchange)
        return self.exchange.layout

    def first_rows(self) -> np.ndarray:
        """int32 [S, P]: where the rows of each segment for each slot begin in the send buffer (send order: chunk, slot,
        token)."""
        counts = np.zeros((self.chunks, self.exchange.num_slots, len(self.layout.segments)), dtype=np.int64)
        chunk_SP = self._chunk_of()
        segments, slots = np.indices(chunk_SP.shape)
        counts[chunk_SP, slots, segments] = self.layout.capacities[:, None]
        begins = (counts.reshape(-1).cumsum() - counts.reshape(-1)).reshape(counts.shape)
        found: np.ndarray = begins[chunk_SP, slots, segments].astype(np.int32)
        return found

    def _chunk_of(self) -> np.ndarray:
        """int64 [S, P]: the chunk of each segment's rows for each slot."""
        shape = len(self.layout.segments), self.exchange.num_slots
        size = BLOCKS if self.by == "tokens" else self.local_slots
        begins = [size * c // self.chunks for c in range(self.chunks)]
        if self.by == "tokens":
            return np.broadcast_to((np.searchsorted(begins, self.layout.segments, side="right") - 1)[:, None], shape)
        local = np.arange(self.exchange.num_slots) % self.local_slots
        return np.broadcast_to(np.searchsorted(begins, local, side="right") - 1, shape)


def word_plan(rank: int, world_size: int) -> ChunkPlan:
    """The exchange of one row from each rank to each, of no step yet."""
    counts = np.zeros((world_size, BLOCKS, world_size), dtype=np.int64)
    counts[:, 0] = 1
    exchange = ExchangePlan(rank=rank, world_size=world_size, step=0, phase="forward", grad_enabled=False,
                            x_requires_grad=False, counts=Counts.of(counts, rank))  # fmt: skip
    return exchange.chunked(1)
