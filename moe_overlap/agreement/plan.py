"""The integers that follow from the agreed counts: who sends how many rows where, in which order, for any cut.

From the gathered counts (see `counts.py`) every rank derives the same `ExchangePlan`, and from that, by a pure
function, the `ChunkPlan` of any chunk count r in 1..16: chunk c of r = blocks [16c//r, 16(c+1)//r), or, by expert
groups, the local slots [e*c//r, e*(c+1)//r) of every rank, or, by peers, what goes to the ranks that are
[W*c//r, W*(c+1)//r) further on (in a ring): own rows first.

Slots are seats here (`seats.py`), as many on each rank. Letters: W ranks, P slots, e slots a rank, C chunks, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import CHUNK_BY, ChunkBy, Counts
from moe_overlap.agreement.node_counts import NodeCounts
from moe_overlap.agreement.seats import Seats
from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What one row of an exchange carries: `width` elements of `dtype`. `metadata`: it goes beside a row; `weights`: it
    is the weights of one expert, or their gradients."""

    width: int
    dtype: torch.dtype
    metadata: bool = False
    weights: bool = False

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """The counts of one step, agreed on by all ranks.

    `counts`: (token, k) choices of block b of rank w that fall on slot p, as far as this rank knows (see `Counts`).
    `x_requires_grad` is the OR over the ranks: whether the exchanges of the input gradient run in backward. `dedup`:
    see `DEDUP` in `record.py`; with "on", `first` and `last` count the rows of block b of rank w, one for each (token,
    rank) pair, at the lowest and at the highest slot that the token chose on that rank (None until the second gather of
    a step whose seats were chosen from its counts). `ranks_per_node`: so many ranks
    in a row share a node, 0 where that is not known; `node_rows`: the (token, node) pairs, where a row crosses to each
    node once. `seats`: where the experts are in this step (None: expert i in slot i); `copies_kept`: those of
    the layer, whose copies outlive the step while they are valid; `copies_relayed`: the rule of the step wants copies
    to go from rank to rank; `weight_versions`: of each rank's
    expert weights, numbers that change with them; `weights_require_grad`: whether any rank's gradients are wanted.
    """

    rank: int
    world_size: int
    step: int
    phase: str
    grad_enabled: bool
    x_requires_grad: bool
    counts: Counts
    dedup: int = 0
    first: Counts | None = None
    last: Counts | None = None
    ranks_per_node: int = 0
    node_rows: NodeCounts | None = None
    seats: Seats | None = None
    copies_kept: bool = True
    copies_relayed: bool = False
    weight_versions: tuple[int, ...] = ()
    weights_require_grad: bool = False

    @property
    def num_slots(self) -> int:
        return int(self.counts.sent.shape[1])

    def off_node(self, rows: Sequence[int]) -> int:
        """Of `rows` [W], for each rank, those for ranks of other nodes than this one's; 0 where nodes are not known."""
        size = self.ranks_per_node or self.world_size
        begin = self.rank // size * size
        return sum(rows) - sum(rows[begin : begin + size])

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """int64 [E] on the CPU: choices of all ranks, over all slots of an expert."""
        totals = torch.from_numpy(self.counts.totals)
        return totals if self.seats is None else self.seats.by_expert(totals)

    @property
    def rows_per_rank(self) -> tuple[int, ...]:
        """Rows that each rank's experts receive in this step, [W]."""
        return tuple(int(n) for n in self.counts.totals.reshape(self.world_size, -1).sum(axis=1))

    def chunked(self, chunks: int, by: ChunkBy = "tokens") -> ChunkPlan:
        """The exchange cut into `chunks` (1..16) by token blocks, groups of each rank's slots, or distance of ranks."""
        sent, received = self.cut_counts(chunks, by)
        return ChunkPlan(exchange=self, chunks=chunks, by=by, sent=sent, received=received)

    def cut_counts(self, chunks: int, by: ChunkBy) -> tuple[np.ndarray, np.ndarray]:
        """`sent` and `received` of a `ChunkPlan`. Raises ConfigError for a cut that does not exist."""
        if not isinstance(chunks, int) or not 1 <= chunks <= BLOCKS:
            raise ConfigError("chunks", chunks, f"an integer from 1 to {BLOCKS}")
        if by not in CHUNK_BY:
            raise ConfigError("chunk_by", by, f"one of {CHUNK_BY}")
        local = self.num_slots // self.world_size
        sent = np.zeros((chunks, self.num_slots), dtype=np.int64)
        received = np.zeros((chunks, self.world_size, local), dtype=np.int64)
        for c in range(chunks):
            if by == "tokens":
                blocks = slice(BLOCKS * c // chunks, BLOCKS * (c + 1) // chunks)
                sent[c] = self.counts.sent[blocks].sum(axis=0)
                received[c] = self.counts.received[:, blocks].sum(axis=1)
            elif by == "peers":
                to = (self.rank + _distances(c, chunks, self.world_size)) % self.world_size
                source = _sources(c, chunks, self.rank, self.world_size)
                sent[c].reshape(self.world_size, local)[to] = self.counts.sent.sum(axis=0).reshape(-1, local)[to]
                received[c][source] = self.counts.received.sum(axis=1)[source]
            else:
                group = slice(local * c // chunks, local * (c + 1) // chunks)
                to = self.counts.sent.sum(axis=0).reshape(self.world_size, local)
                sent[c].reshape(self.world_size, local)[:, group] = to[:, group]
                received[c][:, group] = self.counts.received.sum(axis=1)[:, group]
        return sent, received


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One step's exchange in C chunks. `sent` is int64 [C, P]: rows of chunk c that this rank sends to slot p.
    `received` is int64 [C, W, e]: rows of chunk c from rank w for this rank's slot j.

    Send order of a rank: chunk, slot, token, k. Receive order of a chunk: source rank, slot, token, k. The experts'
    buffer holds all chunks: slot, token block, source rank, token, k. The rows of one expert are one contiguous range
    in it (its weight gradient is one matmul), those of one chunk within them too, and the order is the same for every
    way of cutting the exchange by tokens or experts: forward and backward may be cut differently. By peers the block
    comes after the source rank, and source ranks in the order in which their chunks arrive; both halves are cut so.
    """

    exchange: ExchangePlan
    chunks: int
    by: ChunkBy
    sent: np.ndarray
    received: np.ndarray

    def cut(self, chunks: int, by: ChunkBy) -> ChunkPlan:
        """The same exchange cut in another way."""
        return self if (chunks, by) == (self.chunks, self.by) else self.exchange.chunked(chunks, by)

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def world_size(self) -> int:
        return self.exchange.world_size

    @property
    def local_slots(self) -> int:
        return self.exchange.num_slots // self.world_size

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rows to each rank, rows from each rank), [W] both, of an exchange of a chunk; `reverse`: of its adjoint."""
        send, recv = self.send_counts[chunk], self.recv_counts[chunk]
        return (recv, send) if reverse else (send, recv)

    @cached_property
    def send_counts(self) -> tuple[tuple[int, ...], ...]:
        """Rows that this rank sends to each rank, [C][W]."""
        mine = self.sent.reshape(self.chunks, self.world_size, self.local_slots).sum(axis=2)
        return tuple(map(tuple, mine.tolist()))

    @cached_property
    def recv_counts(self) -> tuple[tuple[int, ...], ...]:
        """Rows that this rank receives from each rank, [C][W]."""
        return tuple(map(tuple, self.received.sum(axis=2).tolist()))

    @cached_property
    def send_rows(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.send_counts)

    @cached_property
    def recv_rows(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.recv_counts)

    @cached_property
    def stays_local(self) -> tuple[bool, ...]:
        """Whether no row of a chunk goes to another rank, on any rank, [C]: then there is nothing to exchange."""
        return tuple(bool(stays) for stays in self.exchange.counts.stays(self.chunks, self.by))

    @cached_property
    def in_order(self) -> bool:
        """Whether rows lie in the experts' buffer as they are sent, all chunks: one rank's, not cut by tokens."""
        return self.world_size == 1 and (self.chunks == 1 or self.by == "experts")

    @cached_property
    def send_offsets(self) -> tuple[int, ...]:
        """First row of each chunk in the send buffer, [C + 1]."""
        return tuple(accumulate(self.send_rows, initial=0))

    @cached_property
    def _segments(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [e, BLOCKS, W] twice: rows of each block of each rank for this rank's slots; where each begins in the
        experts' buffer."""
        counts = self.exchange.counts.received.transpose(2, 1, 0)
        if self.by == "peers":
            sources = (self.rank - np.arange(self.world_size)) % self.world_size
            near = counts[:, :, sources].transpose(0, 2, 1)  # [e, distance, BLOCKS]
            ends = np.cumsum(near.reshape(-1)).reshape(near.shape)
            begins = np.empty_like(counts)
            begins[:, :, sources] = (ends - near).transpose(0, 2, 1)
            return counts, begins
        ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
        return counts, ends - counts

    def _part_of(self, chunk: int) -> tuple[slice, slice]:
        """(slots, blocks) of a chunk of a cut by tokens or experts."""
        return _part(chunk, self.chunks, self.by, self.local_slots)

    @cached_property
    def expert_offs(self) -> torch.Tensor:
        """int32 [e]: inclusive ends of each local expert's rows over all chunks."""
        return torch.from_numpy(np.cumsum(self.received.sum(axis=(0, 1))).astype(np.int32))

    def expert_rows(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts, ends) int32 [e]: the rows of `chunk` of each local expert in the experts' buffer."""
        starts, ends = self.all_expert_rows
        return starts[chunk], ends[chunk]

    @cached_property
    def all_expert_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all chunks, [C, e] each."""
        first_block, first_source = _firsts(self.chunks, self.by, self.rank, self.world_size)
        starts = self._segments[1][:, first_block, first_source].T.astype(np.int32)
        return torch.from_numpy(starts), torch.from_numpy(starts + self.received.sum(axis=1, dtype=np.int32))

    def buffer_order(self, chunk: int) -> torch.Tensor:
        """int64 [recv_rows[chunk]]: position in the experts' buffer of each received row.

        Example: two ranks, two local slots, one chunk, rank 0 sends (2, 1) rows and rank 1 sends (1, 1), all of them
        from their first block: rows arrive as 0a 0a 0b 1a 1b and go to a: 0, 1, 2 and b: 3, 4: [0, 1, 3, 2, 4].
        """
        return self._buffer_orders[chunk]

    @cached_property
    def _buffer_orders(self) -> tuple[torch.Tensor, ...]:
        counts, shifts = self._runs
        order = np.repeat(shifts, counts) + np.arange(sum(self.recv_rows), dtype=np.int64)
        return torch.from_numpy(order).split(self.recv_rows)

    def buffer_runs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(counts, shifts) int32 [S]: rows of each run of rows that stay together, all chunks, as they arrive; and what
        to add to the number of a row among all that arrive, to get its place in the experts' buffer."""
        counts, shifts = (torch.from_numpy(values.astype(np.int32)) for values in self._runs)
        return counts, shifts

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The same, int64."""
        arrival = _arrival(self.chunks, self.by, self.rank, self.world_size, self.local_slots)
        counts, begins = (part.reshape(-1)[arrival] for part in self._segments)
        return counts, begins - (np.cumsum(counts) - counts)

    def send_keys(self, slots_TK: torch.Tensor, table: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """(keys_TK int32, number of keys): sorting (token, k) stably by key gives the send order. -1 stays -1.
        `table`: `key_table`, where the slots are; None: on a CPU."""
        num_slots = self.exchange.num_slots
        if self.chunks == 1:
            return slots_TK, num_slots
        table = self.key_table(slots_TK.shape[0]) if table is None else table
        if self.by == "tokens":
            return torch.where(slots_TK >= 0, slots_TK + table[:, None], slots_TK), num_slots * self.chunks
        return torch.where(slots_TK >= 0, table[slots_TK.clamp_min(0).long()], slots_TK), num_slots

    def key_table(self, tokens: int) -> torch.Tensor:
        """int32: of a cut by tokens [T], what to add to the slot of each; of another one [P], the key of each."""
        if self.by == "tokens":
            begins = [tokens * (BLOCKS * c // self.chunks) // BLOCKS for c in range(self.chunks + 1)]
            keys = np.arange(self.chunks, dtype=np.int32) * np.int32(self.exchange.num_slots)
            return torch.from_numpy(np.repeat(keys, np.diff(begins)))
        size = self.world_size if self.by == "peers" else self.local_slots
        group_of = np.zeros(size, dtype=np.int64)
        for c in range(1, self.chunks):
            group_of[size * c // self.chunks :] += 1
        if self.by == "peers":
            groups = np.repeat(np.roll(group_of, self.rank), self.local_slots)
        else:
            groups = np.tile(group_of, self.world_size)
        order = np.argsort(groups, kind="stable")
        key_of_slot = np.empty(self.exchange.num_slots, dtype=np.int32)
        key_of_slot[order] = np.arange(self.exchange.num_slots, dtype=np.int32)
        return torch.from_numpy(key_of_slot)


def _part(chunk: int, chunks: int, by: ChunkBy, local_slots: int) -> tuple[slice, slice]:
    size = local_slots if by == "experts" else BLOCKS
    part = slice(size * chunk // chunks, size * (chunk + 1) // chunks)
    return (part, slice(None)) if by == "experts" else (slice(None), part)


def _sources(chunk: int, chunks: int, rank: int, world_size: int) -> np.ndarray:
    """Of a cut by peers, the ranks that a chunk comes from, nearest first."""
    return (rank - _distances(chunk, chunks, world_size)) % world_size


def _distances(chunk: int, chunks: int, world_size: int) -> np.ndarray:
    """int64: how far on, in a ring of the ranks, those are that a chunk of a cut by peers goes to."""
    return np.arange(world_size * chunk // chunks, world_size * (chunk + 1) // chunks)


@lru_cache(maxsize=64)
def _firsts(chunks: int, by: ChunkBy, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [C] twice: the block and the source rank with which each chunk begins, in the experts' buffer."""
    blocks, sources = np.zeros((2, chunks), dtype=np.int64)
    for c in range(chunks):
        if by == "tokens":
            blocks[c] = BLOCKS * c // chunks
        elif by == "peers":
            sources[c] = [*_sources(c, chunks, rank, world_size), 0][0]  # a chunk without ranks has no rows
    return blocks, sources


@lru_cache(maxsize=64)
def _arrival(chunks: int, by: ChunkBy, rank: int, world_size: int, local_slots: int) -> np.ndarray:
    """int64 [S]: the segments (slot, block, source rank) in the order in which their rows arrive: by chunk, source
    rank, slot, block."""
    segments = np.arange(local_slots * BLOCKS * world_size).reshape(local_slots, BLOCKS, world_size)
    parts = [
        segments[:, :, np.sort(_sources(c, chunks, rank, world_size))]
        if by == "peers"
        else segments[_part(c, chunks, by, local_slots)]
        for c in range(chunks)
    ]
    return np.concatenate([part.transpose(2, 0, 1).reshape(-1) for part in parts])
