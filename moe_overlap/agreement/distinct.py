"""The integers of a step that sends one row for each (token, rank), whatever the number of its experts there.

A row goes to the experts' side with the first chunk that needs it and comes back with the last: by groups of experts,
that is the group of its lowest slot on the rank and that of its highest. Both follow from two histograms beside the
counts (`first` and `last` of `ExchangePlan`), for every way of cutting. Rows of a rank's own experts stay where they
are; they are a chunk of their own, which no exchange belongs to.

Two orders of rows on the experts' side, neither of which depends on the cut:

    distinct    own rows by token, then those of the others by token block, source rank, token: [Rd]
    experts'    by slot; in a slot own rows by token, then by token block, source rank, token: [Re]

Letters as in `plan.py`; Rd distinct rows and Re rows of experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moe_overlap.agreement.loads import PAYS_BELOW as PAYS_BELOW
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.loads import pays as pays
from moe_overlap.agreement.plan import ChunkBy, ChunkPlan, ExchangePlan

RowCounts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class DistinctPlan(ChunkPlan):
    """A `ChunkPlan` whose exchanges carry distinct rows. `sent` and `received` still count what experts compute.

    Send order of a rank: chunk, destination rank, token, without its own. Arrival: source rank, token.
    """

    def cut(self, chunks: int, by: ChunkBy) -> DistinctPlan:
        """The same exchange cut in another way."""
        return self if (chunks, by) == (self.chunks, self.by) else distinct_plan(self.exchange, chunks, by)

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if reverse:
            return self._last_from_others[chunk], self._last_to_others[chunk]
        return self._first_to_others[chunk], self._first_from_others[chunk]

    # ---------------------------------------------------------------- nodes

    def carrier_of(self, ranks: torch.Tensor) -> torch.Tensor:
        """To which rank this one sends its rows for each of `ranks`: there they go themselves."""
        return ranks

    def first_behind(self, carriers: torch.Tensor) -> torch.Tensor:
        """Of the ranks that each of `carriers` is sent rows for, which are next to each other, the first."""
        return carriers

    @cached_property
    def carriers(self) -> tuple[tuple[int, ...], ...]:
        """By node, the ranks that this rank's rows for it are sent to. What comes back from those of a node is added up
        first, so that it makes no difference where that is done. One node where nodes are not known."""
        size = self.exchange.ranks_per_node or self.world_size
        carrier_of = self.carrier_of(torch.arange(self.world_size)).tolist()
        nodes = [carrier_of[begin : begin + size] for begin in range(0, self.world_size, size)]
        return tuple(tuple(sorted(set(ranks))) for ranks in nodes)

    # ---------------------------------------------------------------- rows on this rank

    @cached_property
    def own_rows(self) -> int:
        """Rows that stay: tokens of this rank with an expert here."""
        return int(_ends(self.exchange)[0].received[self.rank].sum())

    @cached_property
    def outgoing_rows(self) -> int:
        """Rows that this rank sends, in all chunks."""
        return sum(map(sum, self._first_to_others))

    @cached_property
    def incoming_rows(self) -> int:
        """Rows that this rank's experts get from others, in all chunks."""
        return sum(map(sum, self._first_from_others))

    @cached_property
    def first_offsets(self) -> tuple[int, ...]:
        """First row of each chunk among the rows sent, in the order in which chunks need them, [C + 1]."""
        return _offsets(self._first_to_others)

    @cached_property
    def last_offsets(self) -> tuple[int, ...]:
        """First row of each chunk among the rows sent, in the order in which they come back, [C + 1]."""
        return _offsets(self._last_to_others)

    @cached_property
    def first_arrivals(self) -> tuple[int, ...]:
        """First row of each chunk among the rows of others, in the order in which they arrive, [C + 1]."""
        return _offsets(self._first_from_others)

    @cached_property
    def last_departures(self) -> tuple[int, ...]:
        """First row of each chunk among the rows of others, in the order in which they leave again, [C + 1]."""
        return _offsets(self._last_from_others)

    # ---------------------------------------------------------------- order of distinct rows

    @cached_property
    def distinct_order(self) -> torch.Tensor:
        """int64 [incoming_rows]: place among the distinct rows of each row of the others, by source rank and token.

        Example: rank 0 of two has one row of its own; rank 1 sends 2 rows of its first block and 1 of its second, and
        nobody else anything: places 1, 2, 3. With a third rank that sends 1 row of its first block, which comes before
        all rows of second blocks: 1, 2, 4 and 3.
        """
        rows = self._incoming  # [W, BLOCKS]
        before = np.cumsum(rows.T.reshape(-1)).reshape(rows.T.shape).T - rows  # in the order of block, source
        arrival = np.cumsum(rows.reshape(-1)).reshape(rows.shape) - rows
        shift = (before - arrival).reshape(-1) + self.own_rows
        order = np.repeat(shift, rows.reshape(-1)) + np.arange(int(rows.sum()), dtype=np.int64)
        return torch.from_numpy(order)

    def block_arrivals(self, chunk: int) -> torch.Tensor:
        """int64: which rows of the others, numbered by source rank and token, are those of a chunk of token blocks."""
        _, blocks = self._part_of(chunk)
        rows = self._incoming
        starts = (np.cumsum(rows.reshape(-1)).reshape(rows.shape) - rows)[:, blocks]
        part = rows[:, blocks]
        counts = part.reshape(-1)
        order = np.repeat(starts.reshape(-1) - (np.cumsum(counts) - counts), counts)
        return torch.from_numpy(order + np.arange(int(counts.sum()), dtype=np.int64))

    # ---------------------------------------------------------------- order of the experts' rows

    @cached_property
    def expert_total(self) -> int:
        """Rows of all experts of this rank, Re."""
        own, others, _ = self._slot_rows
        return int(own.sum() + others.sum())

    def own_expert_rows(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts, ends) int32 [e]: the own rows of the local experts first .. last-1; none of the others."""
        own, _, begins = self._slot_rows
        lengths = np.zeros_like(own)
        lengths[first:last] = own[first:last]
        return _int32(begins), _int32(begins + lengths)

    def expert_rows(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts, ends) int32 [e]: the rows of `chunk`, all of others, of each local expert."""
        slots, blocks = self._part_of(chunk)
        own, others, begins = self._slot_rows
        per_block = others.sum(axis=2)  # [e, BLOCKS]
        starts = begins + own
        lengths = np.zeros_like(starts)
        starts[slots] += per_block[slots, : blocks.start or 0].sum(axis=1)
        lengths[slots] = per_block[slots, blocks].sum(axis=1)
        return _int32(starts), _int32(starts + lengths)

    @cached_property
    def own_shift(self) -> torch.Tensor:
        """int32 [e]: what to add to a place among own rows, sorted by slot, to get the place among all."""
        _, others, _ = self._slot_rows
        per_slot = others.sum(axis=(1, 2))
        return _int32(np.cumsum(per_slot) - per_slot)

    @cached_property
    def others_shift(self) -> torch.Tensor:
        """int32 [e]: the same for a place among the rows of others."""
        own, _, _ = self._slot_rows
        return _int32(np.cumsum(own))

    # ---------------------------------------------------------------- what arrives

    def odd_source(self, ids_RK: np.ndarray) -> int | None:
        """The first rank of whose rows the ids are not those that it announced; None where all are.

        ids_RK: integers [incoming_rows, K], the local slots of the rows of the others by source rank and token, -1 =
        another rank's or unused. Ids that pass have a place each among the experts' rows, and no place is left over.
        """
        local, segments = self.local_slots, self._incoming.size
        segment_R = np.repeat(np.arange(segments), self._incoming.reshape(-1))  # source rank and block of each row
        ids_RK = np.sort(ids_RK, axis=1)
        used = (ids_RK >= 0) & (ids_RK < local)
        bad = ((ids_RK < -1) | (ids_RK >= local)).any(axis=1) | ~used.any(axis=1)
        bad |= (used[:, 1:] & (ids_RK[:, 1:] == ids_RK[:, :-1])).any(axis=1)
        lowest_R, highest_R = np.where(used, ids_RK, local - 1).min(axis=1), np.where(used, ids_RK, 0).max(axis=1)
        key_RK = segment_R[:, None] * local + ids_RK
        found = (key_RK[used], segment_R * local + lowest_R, segment_R * local + highest_R)
        odd = np.asarray(np.bincount(segment_R[bad], minlength=segments).reshape(self.world_size, -1).any(axis=1))
        for keys, table in zip(found, (self.exchange.counts, *_ends(self.exchange)), strict=True):
            counted = np.bincount(keys, minlength=segments * local).reshape(self.world_size, -1)
            odd |= (counted != table.received.reshape(self.world_size, -1)).any(axis=1)
        odd[self.rank] = False
        return int(odd.argmax()) if odd.any() else None

    # ---------------------------------------------------------------- details

    @cached_property
    def _incoming(self) -> np.ndarray:
        """int64 [W, BLOCKS]: distinct rows that each block of each other rank sends here."""
        rows = _ends(self.exchange)[0].received.sum(axis=2)
        rows[self.rank] = 0
        return rows

    @cached_property
    def _slot_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [e], [e, BLOCKS, W], [e]: own rows of each slot, those of others, and where each slot begins."""
        others = self.exchange.counts.received.transpose(2, 1, 0).copy()
        own = others[:, :, self.rank].sum(axis=1)
        others[:, :, self.rank] = 0
        totals = own + others.sum(axis=(1, 2))
        return own, others, np.cumsum(totals) - totals

    def _to_others(self, histogram: Counts) -> RowCounts:
        """[C][W]: rows of this rank for each other rank, by chunk."""
        table = histogram.sent.reshape(-1, self.world_size, self.local_slots)
        return self._without_own(lambda slots, blocks: table[blocks, :, slots].sum(axis=(0, 2)))

    def _from_others(self, histogram: Counts) -> RowCounts:
        """[C][W]: rows of each other rank for this one, by chunk."""
        table = histogram.received
        return self._without_own(lambda slots, blocks: table[:, blocks, slots].sum(axis=(1, 2)))

    def _without_own(self, rows_of: Callable[[slice, slice], np.ndarray]) -> RowCounts:
        tables = [rows_of(*self._part_of(c)) for c in range(self.chunks)]
        return tuple(tuple(0 if rank == self.rank else int(n) for rank, n in enumerate(table)) for table in tables)

    @cached_property
    def _first_to_others(self) -> RowCounts:
        return self._to_others(_ends(self.exchange)[0])

    @cached_property
    def _first_from_others(self) -> RowCounts:
        return self._from_others(_ends(self.exchange)[0])

    @cached_property
    def _last_to_others(self) -> RowCounts:
        return self._to_others(_ends(self.exchange)[1])

    @cached_property
    def _last_from_others(self) -> RowCounts:
        return self._from_others(_ends(self.exchange)[1])


def distinct_plan(exchange: ExchangePlan, chunks: int, by: ChunkBy = "tokens") -> DistinctPlan:
    """The exchange of a deduplicated step, cut into `chunks` (1..16) by token blocks or by groups of slots."""
    sent, received = exchange.cut_counts(chunks, by)
    return DistinctPlan(exchange=exchange, chunks=chunks, by=by, sent=sent, received=received)


def _ends(exchange: ExchangePlan) -> tuple[Counts, Counts]:
    """(first, last), which a step has that was agreed on with deduplication."""
    assert exchange.first is not None and exchange.last is not None
    return exchange.first, exchange.last


def _offsets(counts: RowCounts) -> tuple[int, ...]:
    return tuple(int(n) for n in np.cumsum([0, *map(sum, counts)]))


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))
