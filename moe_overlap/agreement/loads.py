"""How much the busiest rank of a step has to do, for every way of cutting the step: what a schedule is chosen from.

A rank needs the counts that concern itself to move its rows. To plan like all others it needs a few sums and maxima
over the ranks beside them. With a table of all counts they follow from it; without one, every rank measures its own
counts (`of_rank`) and the ranks reduce the results: the sums by adding, `most` by the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from moe_overlap.agreement.sizes import BLOCKS
from moe_overlap.errors import ConfigError

ChunkBy = Literal["tokens", "experts", "peers"]
CHUNK_BY: tuple[ChunkBy, ...] = ("tokens", "experts", "peers")
PLANNED_BY = CHUNK_BY[:2]  # the cuts that loads are kept of
LANES = ("inter", "intra")  # rows to ranks on other nodes, to other ranks of the same node
KINDS = ("rows", *LANES)  # rows: those that a rank's experts receive, its own ones too
PARTS = BLOCKS * (BLOCKS + 1) // 2  # chunks of all cuts: 1 + 2 + ... + BLOCKS

# A row fewer on the wire saves its bytes both ways; metadata and the sums on the experts' side cost some of that again.
PAYS_BELOW = 2 / 3

Nodes = tuple[int, ...]  # the node of each rank
LOOPBACK: Nodes = (-1,)  # of a single rank whose rows go out and come back to it, as to another node


@dataclass(frozen=True, eq=False, kw_only=True)
class Loads:
    """Over all ranks. most: int64 [2, PARTS, 3], by (tokens or experts, chunk of a cut, kind) the most that one rank
    has, of rows that leave it or that enter it. blocks, slots: int64 [BLOCKS, 3] and [e, 3], by (block, kind) and
    (position of a slot on its rank, kind) how many all ranks have. nodes: what is another node (None: every rank)."""

    most: np.ndarray
    blocks: np.ndarray
    slots: np.ndarray
    nodes: Nodes | None

    def busiest(self, kind: str, chunks: int, by: ChunkBy) -> np.ndarray:
        """int64 [C]: of each chunk, the most that one rank has."""
        begin = chunks * (chunks - 1) // 2
        found: np.ndarray = self.most[CHUNK_BY.index(by), begin : begin + chunks, KINDS.index(kind)]
        return found

    def total(self, kind: str, chunks: int, by: ChunkBy) -> np.ndarray:
        """int64 [C]: of each chunk, what all ranks have together."""
        rows = (self.blocks if by == "tokens" else self.slots)[:, KINDS.index(kind)]
        return _of_chunks(rows, chunks)

    @property
    def away(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows to other ranks, of all ranks together: int64 [BLOCKS], [e]."""
        return self.blocks[:, 1:].sum(axis=1), self.slots[:, 1:].sum(axis=1)


@lru_cache(maxsize=64)
def moves(world_size: int, nodes: Nodes | None) -> np.ndarray:
    """bool [2, W, W], in the order of LANES: whether rows from one rank to another take that wire."""
    if nodes == LOOPBACK:
        return np.array([[[True]], [[False]]])
    ranks = np.arange(world_size)
    node = ranks if nodes is None else np.array(nodes)
    same = node[:, None] == node[None, :]
    return np.stack([~same, same & (ranks[:, None] != ranks[None, :])])


def of_table(table: np.ndarray, nodes: Nodes | None) -> Loads:
    """From all counts, int64 [W, BLOCKS, P]."""
    world_size = table.shape[0]
    whole = table.reshape(world_size, BLOCKS, world_size, -1)
    taken = moves(world_size, nodes)
    measured = []
    for pairs in (whole.sum(axis=3).transpose(0, 2, 1), whole.sum(axis=1)):  # [from, to, BLOCKS], [from, to, e]
        rows = pairs.sum(axis=0)[:, :, None]
        out, into = np.einsum("ftn,lft->fnl", pairs, taken), np.einsum("ftn,lft->tnl", pairs, taken)
        measured.append((np.concatenate([rows, out], axis=2), np.concatenate([rows, into], axis=2)))
    return _loads(measured, nodes)


def of_rank(sent: np.ndarray, received: np.ndarray, *, rank: int, nodes: Nodes | None) -> Loads:
    """Of one rank alone: int64 [BLOCKS, P] that it sends, [W, BLOCKS, e] that it receives. What the ranks reduce."""
    world_size = received.shape[0]
    out_to = sent.reshape(BLOCKS, world_size, -1).transpose(1, 0, 2)  # [to, BLOCKS, e]
    taken = moves(world_size, nodes)
    measured = []
    for axis in (2, 1):
        there, here = out_to.sum(axis=axis), received.sum(axis=axis)  # [to, n], [from, n]
        rows = here.sum(axis=0)[None, :, None]
        out, into = taken[:, rank] @ there, taken[:, :, rank] @ here  # [2, n]
        measured.append((np.concatenate([rows, out.T[None]], axis=2), np.concatenate([rows, into.T[None]], axis=2)))
    return _loads(measured, nodes)


def _loads(measured: list[tuple[np.ndarray, np.ndarray]], nodes: Nodes | None) -> Loads:
    """measured: by blocks and by slots, (rows and what leaves, rows and what enters), int64 [ranks, n, 3] each."""
    (blocks_out, _), (slots_out, _) = measured
    most = np.stack([np.maximum(*(_parts(one).max(axis=0) for one in both)) for both in measured])
    return Loads(most=most, blocks=blocks_out.sum(axis=0), slots=slots_out.sum(axis=0), nodes=nodes)


def _parts(counts: np.ndarray) -> np.ndarray:
    """int64 [ranks, PARTS, 3]: the sums of [ranks, n, 3] over the chunks of every cut."""
    size = counts.shape[1]
    cuts = [(size * c // chunks, size * (c + 1) // chunks) for chunks in range(1, BLOCKS + 1) for c in range(chunks)]
    begins, ends = np.array(cuts).T
    sums = np.concatenate([np.zeros_like(counts[:, :1]), counts.cumsum(axis=1)], axis=1)
    found: np.ndarray = sums[:, ends] - sums[:, begins]
    return found


def _of_chunks(counts: np.ndarray, chunks: int) -> np.ndarray:
    """int64 [C]: the sums of [n] over the chunks of one cut."""
    size = len(counts)
    sums = np.concatenate([[0], counts.cumsum()])
    found: np.ndarray = np.diff(sums[[size * c // chunks for c in range(chunks + 1)]])
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Counts:
    """A table of counts [W, BLOCKS, P], as one rank knows it.

    sent: int64 [BLOCKS, P], its own row. received: int64 [W, BLOCKS, e], what concerns its slots. Over all ranks:
    totals, int64 [P]; most_sent, of the rank that sends most; away, what goes to other ranks by block, int64 [BLOCKS],
    and by position of a slot on its rank, int64 [e]. `table` where all of it is known, else `reduced`.
    """

    sent: np.ndarray
    received: np.ndarray
    totals: np.ndarray
    most_sent: int
    away: tuple[np.ndarray, np.ndarray]
    table: np.ndarray | None = None
    reduced: Loads | None = None

    @classmethod
    def of(cls, table: np.ndarray, rank: int) -> Counts:
        """From all counts, int64 [W, BLOCKS, P]."""
        world_size, local = table.shape[0], table.shape[2] // table.shape[0]
        by_block, totals = table.sum(axis=2), table.sum(axis=(0, 1))  # [W, BLOCKS], [P]
        ranks = np.arange(world_size)
        stay = table.reshape(world_size, BLOCKS, world_size, local)[ranks, :, ranks]  # [W, BLOCKS, e]
        slots = totals.reshape(world_size, local).sum(axis=0)
        return cls(
            sent=table[rank], received=table[:, :, rank * local : (rank + 1) * local], table=table, totals=totals,
            most_sent=int(by_block.sum(axis=1).max()),
            away=(by_block.sum(axis=0) - stay.sum(axis=(0, 2)), slots - stay.sum(axis=(0, 1))),
        )  # fmt: skip

    def loads(self, nodes: Nodes | None) -> Loads:
        """What all ranks have to do. Raises ConfigError for other nodes than those that were agreed with, where they
        cannot be changed any more."""
        if self.table is not None:
            return of_table(self.table, nodes)
        assert self.reduced is not None
        if self.reduced.nodes != nodes:
            raise ConfigError("nodes", nodes, f"those of the agreement, {self.reduced.nodes}")
        return self.reduced

    def stays(self, chunks: int, by: ChunkBy) -> np.ndarray:
        """bool [C]: whether no row of a chunk goes to another rank, on any rank."""
        if by == "peers":  # only the first chunk can have own rows alone
            ends = [self.received.shape[0] * (c + 1) // chunks for c in range(chunks)]
            return np.array([end <= 1 or self.rows_away == 0 for end in ends])
        found: np.ndarray = _of_chunks(self.away[CHUNK_BY.index(by)], chunks) == 0
        return found

    @property
    def rows_away(self) -> int:
        """Rows to other ranks, of all ranks together."""
        return int(self.away[0].sum())


def impossible_rows(counts: np.ndarray, first: np.ndarray | None = None, last: np.ndarray | None = None) -> np.ndarray:
    """bool [W]: the ranks whose counts no routing can have; int64 [W, BLOCKS, ranks, e] each, of all ranks' slots or
    of one's."""
    bad = np.asarray((counts < 0).any(axis=(1, 2, 3)))
    if first is None or last is None:
        return bad
    bad |= ((first < 0) | (last < 0) | (first > counts) | (last > counts)).any(axis=(1, 2, 3))
    choices, begun, ended = (one.cumsum(axis=3) for one in (counts, first, last))
    rows, chosen = begun[..., -1], choices[..., -1]
    # No row is over before it began, each is over in the end, and it stands for 1 to e choices.
    bad |= (ended > begun).any(axis=(1, 2, 3))
    bad |= ((ended[..., -1] != rows) | (rows > chosen) | (chosen > rows * counts.shape[3])).any(axis=(1, 2))
    return bad


class Agreed(Protocol):
    """What schedules read of an `ExchangePlan`."""

    @property
    def dedup(self) -> int: ...

    @property
    def counts(self) -> Counts: ...

    @property
    def first(self) -> Counts | None: ...


def pays(exchange: Agreed) -> bool:
    """Whether a step is to be deduplicated where no cost model says it: distinct rows to other ranks are at most 2/3 of
    the rows that would travel else."""
    assert exchange.first is not None
    return 0 < exchange.first.rows_away <= PAYS_BELOW * exchange.counts.rows_away
