"""The integers of a step in which one row for each (token, node) crosses nodes, and is passed on inside the node.

L ranks in a row share a node; rank (m, l) is the l-th of node m. A row of rank (m, l) for other ranks of node m goes
there itself. Its row for node n goes to (n, l), its counterpart, which passes it on to the ranks of its node (itself
included) and adds up what comes back from them: it is their gateway. So an exchange is two: one across nodes, in which
the rows for the own node travel too, and one inside the nodes.

    across      rows of (m, l) to (m, j), one for each (token, rank), and to (n, l), one for each (token, node)
    inside      rows of (n, l) to (n, j): those of the sources (m, l), m != n, that rank j has experts for

Experts see no difference: what arrives is brought into the order of a `DistinctPlan`. Orders of rows, beside its own:

    gateway's   those to pass on: source rank, token
    passed on   chunk, destination rank, source rank, token; on arrival gateway, source rank, token

By groups of experts a row crosses with the first group that any rank of the node needs it in, and is passed on to each
rank with the first group that this one needs it in; sums come to the gateway with the last group of each rank, and go
back across with the last one of all. So a gateway keeps rows and sums from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.distinct import DistinctPlan, RowCounts, distinct_plan
from moe_overlap.agreement.loads import ChunkBy, Counts
from moe_overlap.agreement.node_counts import NodeCounts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan


@dataclass(frozen=True, kw_only=True)
class InsidePlan(ChunkPlan):
    """The exchanges inside the nodes. There and back, [C][W] each: (rows to each rank, rows from each rank)."""

    there: tuple[RowCounts, RowCounts]
    back: tuple[RowCounts, RowCounts]

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if reverse:
            return self.back[1][chunk], self.back[0][chunk]
        return self.there[0][chunk], self.there[1][chunk]


@dataclass(frozen=True, kw_only=True)
class NodePlan(DistinctPlan):
    """A `DistinctPlan` whose exchanges are those across nodes; `inside` has the others."""

    def cut(self, chunks: int, by: ChunkBy) -> NodePlan:
        return self if (chunks, by) == (self.chunks, self.by) else _node_plan(self.exchange, chunks, by)

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if reverse:
            return self._across_back[chunk], self._last_to_others[chunk]
        return self._first_to_others[chunk], self._across_here[chunk]

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
        there, back = (self._rows_of(counts) for counts in self._node_rows.inside)
        return InsidePlan(exchange=self.exchange, chunks=self.chunks, by=self.by, sent=self.sent,
                          received=self.received, there=there, back=back)  # fmt: skip

    @cached_property
    def gateway_arrivals(self) -> tuple[int, ...]:
        """First row of each chunk among those that this rank passes on, in the order in which they come, [C + 1]."""
        return self._gateway_offsets(self._across_here)

    @cached_property
    def gateway_departures(self) -> tuple[int, ...]:
        """The same in the order in which they go back, [C + 1]."""
        return self._gateway_offsets(self._across_back)

    # ---------------------------------------------------------------- which rows: places, int64

    def gateway_chunks(self) -> torch.Tensor:
        """int32: of a cut by token blocks, the chunk of each row that this rank passes on, in the gateway's order."""
        rows = self._node_rows.across[0].received[list(self._foreign(self.rank))].sum(axis=2)  # [sources, BLOCKS]
        chunk_of_block = np.searchsorted([BLOCKS * (c + 1) // self.chunks for c in range(self.chunks)], range(BLOCKS),
                                         side="right")  # fmt: skip
        chunks = np.repeat(np.tile(chunk_of_block, len(rows)), rows.reshape(-1))
        return torch.from_numpy(chunks.astype(np.int32))

    def arrived_to_pass_on(self, chunk: int) -> torch.Tensor:
        """Among the rows that came across, those of a chunk to be passed on, in the gateway's order."""
        begins, rows = _begins(enumerate(self._across_here[chunk])), self._across_here[chunk]
        return _places((begins[source], rows[source]) for source in self._foreign(self.rank))

    def in_flat_order(self, chunk: int) -> torch.Tensor:
        """Among the rows that came across and then those that were passed on here, the rows of a `DistinctPlan` in the
        order in which they arrive."""
        rows = self._first_from_others[chunk]
        begins, passed_on = _begins(enumerate(self._across_here[chunk])), _begins(self._by_gateway(rows))
        first = sum(self._across_here[chunk])
        near = {source: begins[source] for source in self.node_ranks}
        far = {source: first + begin for source, begin in passed_on.items()}
        return _places(((near | far)[source], rows[source]) for source in self._others)

    def to_gateways(self, chunk: int) -> torch.Tensor:
        """Among the rows of a `DistinctPlan`, those that go back to gateways, in the order in which they go."""
        rows = self._last_from_others[chunk]
        begins = _begins(enumerate(rows))
        return _places((begins[source], count) for source, count in self._by_gateway(rows))

    def homewards(self, chunk: int) -> torch.Tensor:
        """Among the rows of a gateway and then those of a `DistinctPlan`, those that go back across."""
        rows, across = self._last_from_others[chunk], self._across_back[chunk]
        flat, gateway = (
            _begins(enumerate(rows)),
            _begins((source, across[source]) for source in self._foreign(self.rank)),
        )
        first = sum(across[source] for source in self._foreign(self.rank))
        near = {source: first + flat[source] for source in self.node_ranks}
        return _places(((near | gateway)[source], across[source]) for source in sorted(near | gateway))

    # ---------------------------------------------------------------- details

    @property
    def node_size(self) -> int:
        """L."""
        return self.exchange.ranks_per_node

    @property
    def node_ranks(self) -> range:
        """The ranks of this node."""
        here = self.rank // self.node_size
        return range(here * self.node_size, (here + 1) * self.node_size)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _foreign(self, gateway: int) -> list[int]:
        """The sources of the rows that a rank of this node passes on."""
        same_place = range(gateway % self.node_size, self.world_size, self.node_size)
        return [rank for rank in same_place if rank != gateway]

    def _by_gateway(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """(source, its rows), of rows [W], for the sources of other nodes: by gateway, then source."""
        return [(source, rows[source]) for gateway in self.node_ranks for source in self._foreign(gateway)]

    @property
    def _node_rows(self) -> NodeCounts:
        assert self.exchange.node_rows is not None
        return self.exchange.node_rows

    def _rows_of(self, counts: Counts) -> tuple[RowCounts, RowCounts]:
        """[C][W] both: rows to each rank and from each rank, own ones too."""
        there = counts.sent.reshape(BLOCKS, self.world_size, self.local_slots)
        parts = [self._part_of(c) for c in range(self.chunks)]
        sent = [there[blocks, :, slots].sum(axis=(0, 2)) for slots, blocks in parts]
        received = [counts.received[:, blocks, slots].sum(axis=(1, 2)) for slots, blocks in parts]
        return tuple(tuple(one.tolist()) for one in sent), tuple(tuple(one.tolist()) for one in received)

    def _gateway_offsets(self, across: RowCounts) -> tuple[int, ...]:
        foreign = self._foreign(self.rank)
        return tuple(accumulate((sum(rows[source] for source in foreign) for rows in across), initial=0))

    @cached_property
    def _first_to_others(self) -> RowCounts:
        return self._to_others(self._node_rows.across[0])

    @cached_property
    def _last_to_others(self) -> RowCounts:
        return self._to_others(self._node_rows.across[1])

    @cached_property
    def _across_here(self) -> RowCounts:
        """[C][W]: rows that come across to this rank, by the chunk with which they come."""
        return self._from_others(self._node_rows.across[0])

    @cached_property
    def _across_back(self) -> RowCounts:
        """[C][W]: the same by the chunk with which they go back."""
        return self._from_others(self._node_rows.across[1])


def rows_plan(exchange: ExchangePlan, chunks: int, by: ChunkBy = "tokens") -> DistinctPlan:
    """The exchange of a deduplicated step, cut into `chunks` (1..16), with a row for each (token, node) where the ranks
    agreed on that."""
    return distinct_plan(exchange, chunks, by) if exchange.node_rows is None else _node_plan(exchange, chunks, by)


def _node_plan(exchange: ExchangePlan, chunks: int, by: ChunkBy) -> NodePlan:
    sent, received = exchange.cut_counts(chunks, by)
    return NodePlan(exchange=exchange, chunks=chunks, by=by, sent=sent, received=received)


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
