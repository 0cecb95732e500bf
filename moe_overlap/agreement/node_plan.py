"""The integers of a step in which one row for each (token, node) crosses nodes, and is passed on inside the node.

L ranks in a row share a node; rank (m, l) is the l-th of node m. A row of rank (m, l) for other ranks of node m goes
there itself. Its row for node n goes to (n, l), its counterpart, which passes it on to the ranks of its node (itself
included) and adds up what comes back from them: it is their gateway. So an exchange is two: one across nodes, in which
the rows for the own node travel too, and one inside the nodes.

    across      rows of (m, l) to (m, j), one for each (token, rank), and to (n, l), one for each (token, node)
    inside      rows of (n, l) to (n, j): those of the sources (m, l), m != n, that rank j has experts for

Experts see no difference: what arrives is brought into the order of a `DistinctPlan`. Orders of rows, beside its own:

    gateway's   those to pass on: source rank, token
    passed on   destination rank, source rank, token; on arrival gateway, source rank, token

Cut by token blocks only: by groups of experts a row would cross with the first group of its node and not of its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moe_overlap.agreement.distinct import DistinctPlan, RowCounts, distinct_plan
from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.agreement.node_counts import NodeCounts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan
from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InsidePlan(ChunkPlan):
    """The exchanges inside the nodes. passed_on, passed_here: rows to and from each rank, [C][W]."""

    passed_on: RowCounts
    passed_here: RowCounts

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        both = self.passed_on[chunk], self.passed_here[chunk]
        return both[::-1] if reverse else both


@dataclass(frozen=True, kw_only=True)
class NodePlan(DistinctPlan):
    """A `DistinctPlan` whose exchanges are those across nodes; `inside` has the others."""

    def cut(self, chunks: int, by: ChunkBy = "tokens") -> NodePlan:
        return self if (chunks, by) == (self.chunks, self.by) else _node_plan(self.exchange, chunks, by)

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        both = self._first_to_others[chunk], self._across_here[chunk]
        return both[::-1] if reverse else both

    def carrier_of(self, ranks: torch.Tensor) -> torch.Tensor:
        """Of the ranks of another node, this rank's counterpart there."""
        first = ranks - ranks % self.node_size
        return torch.where(first == self.node_ranks[0], ranks, first + self.rank % self.node_size)

    def first_behind(self, carriers: torch.Tensor) -> torch.Tensor:
        first = carriers - carriers % self.node_size
        return torch.where(first == self.node_ranks[0], carriers, first)

    @cached_property
    def inside(self) -> InsidePlan:
        """The exchanges of the same chunks inside the nodes."""
        mine = self._foreign(self.rank)
        passed_on = self._of_node(lambda rank, c: self._passed(mine, rank, c))
        passed_here = self._of_node(lambda rank, c: self._passed(self._foreign(rank), self.rank, c))
        return InsidePlan(exchange=self.exchange, chunks=self.chunks, by=self.by, sent=self.sent,
                          received=self.received, passed_on=passed_on, passed_here=passed_here)  # fmt: skip

    # ---------------------------------------------------------------- which rows: places, int64

    def to_pass_on(self, chunk: int) -> torch.Tensor:
        """Among all rows that this rank passes on in the step, in the gateway's order, those of a chunk."""
        _, blocks = self._part_of(chunk)
        parts, begin = [], 0
        for source in self._foreign(self.rank):
            rows = self._node_rows.received[source]
            parts.append((begin + int(rows[: blocks.start or 0].sum()), int(rows[blocks].sum())))
            begin += int(rows.sum())
        return _places(parts)

    def arrived_to_pass_on(self, chunk: int) -> torch.Tensor:
        """Among the rows that came across, those of a chunk to be passed on, in the gateway's order."""
        begins = self._across_begins(chunk)
        return _places((begins[source], self._crossing(source, chunk)) for source in self._foreign(self.rank))

    def in_flat_order(self, chunk: int) -> torch.Tensor:
        """Among the rows that came across and then those that were passed on here, the rows of a `DistinctPlan` in the
        order in which they arrive."""
        begins, passed_on = self._across_begins(chunk), self._passed_begins(chunk)
        first = sum(self._across_here[chunk])
        parts = []
        for source in self._others:
            begin = begins[source] if self._node(source) == self._here else first + passed_on[source]
            parts.append((begin, self._rows(source, self.rank, chunk)))
        return _places(parts)

    def to_gateways(self, chunk: int) -> torch.Tensor:
        """Among the rows of a `DistinctPlan`, those that go back to gateways, in the order in which they came."""
        begins = self._flat_begins(chunk)
        return _places((begins[source], self._rows(source, self.rank, chunk)) for source in self._passed_begins(chunk))

    def homewards(self, chunk: int) -> torch.Tensor:
        """Among the rows of a gateway and then those of a `DistinctPlan`, those that go back across."""
        flat, gateway = self._flat_begins(chunk), 0
        first = sum(self._crossing(source, chunk) for source in self._foreign(self.rank))
        parts = []
        for source in self._others:
            if self._node(source) == self._here:
                parts.append((first + flat[source], self._rows(source, self.rank, chunk)))
            elif source in self._foreign(self.rank):
                parts.append((gateway, self._crossing(source, chunk)))
                gateway += self._crossing(source, chunk)
        return _places(parts)

    # ---------------------------------------------------------------- details

    @property
    def node_size(self) -> int:
        """L."""
        return self.exchange.ranks_per_node

    @property
    def node_ranks(self) -> range:
        """The ranks of this node."""
        return range(self._here * self.node_size, (self._here + 1) * self.node_size)

    @property
    def _here(self) -> int:
        return self._node(self.rank)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _node(self, rank: int) -> int:
        return rank // self.node_size

    def _counterpart(self, rank: int) -> int:
        """The rank on the node of `rank` that has this rank's place there."""
        return self._node(rank) * self.node_size + self.rank % self.node_size

    def _foreign(self, gateway: int) -> range | list[int]:
        """The sources of the rows that a rank of this node passes on."""
        same_place = range(gateway % self.node_size, self.world_size, self.node_size)
        return [rank for rank in same_place if rank != gateway]

    @property
    def _node_rows(self) -> NodeCounts:
        assert self.exchange.node_rows is not None
        return self.exchange.node_rows

    @cached_property
    def _table(self) -> np.ndarray:
        """int64 [C, W, L]: distinct rows of each chunk from each rank to each rank of this node."""
        return np.stack([self._node_rows.inside[:, self._part_of(c)[1]].sum(axis=1) for c in range(self.chunks)])

    def _rows(self, source: int, target: int, chunk: int) -> int:
        """Distinct rows of a rank for a rank of this node."""
        return int(self._table[chunk, source, target % self.node_size])

    def _passed(self, sources: Iterable[int], target: int, chunk: int) -> int:
        return sum(self._rows(source, target, chunk) for source in sources)

    def _crossing(self, source: int, chunk: int) -> int:
        """Rows of a rank of another node for this node."""
        return int(self._node_rows.received[source, self._part_of(chunk)[1]].sum())

    def _of_node(self, rows_of: Callable[[int, int], int]) -> RowCounts:
        """[C][W]: rows of each rank of this node and each chunk, none of other ranks."""
        ranks = range(self.world_size)
        return tuple(tuple(rows_of(r, c) if r in self.node_ranks else 0 for r in ranks) for c in range(self.chunks))

    @cached_property
    def _first_to_others(self) -> RowCounts:
        """[C][W]: rows of this rank that go across."""

        def rows(target: int, chunk: int) -> int:
            if target == self.rank:
                return 0
            if self._node(target) == self._here:
                return self._rows(self.rank, target, chunk)
            blocks = self._part_of(chunk)[1]
            crossing = target == self._counterpart(target)
            return int(self._node_rows.sent[blocks, self._node(target)].sum()) if crossing else 0

        return tuple(tuple(rows(target, c) for target in range(self.world_size)) for c in range(self.chunks))

    @property
    def _last_to_others(self) -> RowCounts:
        return self._first_to_others  # cut by token blocks

    @cached_property
    def _across_here(self) -> RowCounts:
        """[C][W]: rows that come across to this rank."""

        def rows(source: int, chunk: int) -> int:
            if source == self.rank:
                return 0
            if self._node(source) == self._here:
                return self._rows(source, self.rank, chunk)
            return self._crossing(source, chunk) if source in self._foreign(self.rank) else 0

        return tuple(tuple(rows(source, c) for source in range(self.world_size)) for c in range(self.chunks))

    def _across_begins(self, chunk: int) -> dict[int, int]:
        """By source rank, its first row among those that came across."""
        return _begins((source, self._across_here[chunk][source]) for source in range(self.world_size))

    def _passed_begins(self, chunk: int) -> dict[int, int]:
        """By source rank, by gateway and source in this order, its first row among those that were passed on here."""
        sources = [source for gateway in self.node_ranks for source in self._foreign(gateway)]
        return _begins((source, self._rows(source, self.rank, chunk)) for source in sources)

    def _flat_begins(self, chunk: int) -> dict[int, int]:
        """By source rank, its first row among those of a `DistinctPlan`."""
        return _begins((source, self._rows(source, self.rank, chunk)) for source in self._others)


def rows_plan(exchange: ExchangePlan, chunks: int, by: ChunkBy = "tokens") -> DistinctPlan:
    """The exchange of a deduplicated step, cut into `chunks` (1..16), with a row for each (token, node) where the ranks
    agreed on that. Raises ConfigError for a cut by groups of experts there."""
    return distinct_plan(exchange, chunks, by) if exchange.node_rows is None else _node_plan(exchange, chunks, by)


def _node_plan(exchange: ExchangePlan, chunks: int, by: ChunkBy) -> NodePlan:
    check_cut(by)
    sent, received = exchange.cut_counts(chunks, by)
    return NodePlan(exchange=exchange, chunks=chunks, by=by, sent=sent, received=received)


def check_cut(by: ChunkBy) -> None:
    """Raises ConfigError for a cut that hierarchical exchanges do not have."""
    if by != "tokens":
        raise ConfigError("chunk_by", by, "'tokens' with hierarchical exchanges")


def _begins(counts: Iterable[tuple[int, int]]) -> dict[int, int]:
    """By key, the sum of the counts before it."""
    found, begin = {}, 0
    for key, count in counts:
        found[key] = begin
        begin += count
    return found


def _places(parts: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int64: begin, begin + 1, ... of each (begin, count) in turn."""
    ranges = [np.arange(begin, begin + count, dtype=np.int64) for begin, count in parts]
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *ranges]))
