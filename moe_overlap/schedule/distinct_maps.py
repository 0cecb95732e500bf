"""Index maps of a deduplicated step: which rows a rank's tokens make, and which experts read which row.

Pure functions of ids and agreed counts. Nothing here is read by the host on CUDA: every size follows from the plan.
"""

from __future__ import annotations

from functools import cached_property

import torch

from moe_overlap import ops
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.distinct import DistinctPlan
from moe_overlap.agreement.node_plan import NodePlan
from moe_overlap.schedule.tables import Tables

UNUSED = 1 << 30  # stands for -1 where slots are sorted: after all others, on a rank that nobody is


class TokenMaps:
    """The rows of this rank's tokens: one for each rank that a token is sent to (`carrier_of` of the plan).

    A token's choices stand sorted by slot (`slots_TK`; `choice_TK` says which choice it was), so those of one rank
    stand together and sums over them go by slot. slots_TK: int32 [T, K], -1 = unused.
    """

    def __init__(self, plan: DistinctPlan, slots_TK: torch.Tensor) -> None:
        self.plan = plan
        self.tokens, self.top_k = slots_TK.shape
        sortable = torch.where(slots_TK >= 0, slots_TK, UNUSED)
        self.slots_TK, self.choice_TK = sortable.sort(dim=1, stable=True)
        self._used = self.slots_TK < UNUSED
        rank_TK = self.slots_TK.div(plan.local_slots, rounding_mode="floor")
        self.rank_TK = torch.where(self._used, plan.carrier_of(rank_TK), -1)
        apart = self.rank_TK[:, 1:] != self.rank_TK[:, :-1]
        edge = torch.ones_like(self._used[:, :1])
        self._first = torch.cat([edge, apart], dim=1) & self._used
        self._last = torch.cat([apart, edge], dim=1) & self._used

    @cached_property
    def _chunk_T(self) -> torch.Tensor:
        """int32 [T, 1]: the chunk of token blocks that each token is in."""
        bounds = [self.tokens * (BLOCKS * c // self.plan.chunks) // BLOCKS for c in range(1, self.plan.chunks)]
        chunk_T = torch.zeros(self.tokens, dtype=torch.int32, device=self.slots_TK.device)
        for bound in bounds:
            chunk_T[bound:] += 1
        return chunk_T[:, None]

    def _rows(self, at_TK: torch.Tensor, *, chunked: bool, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(row of each choice that is `at`, token of each row): others' by chunk, rank, token, then own rows. last: by
        the last chunk that needs a row, else by the first one."""
        plan, world = self.plan, self.plan.world_size
        chunks = plan.chunks if chunked else 1
        key_TK = self.rank_TK.to(torch.int32)
        if chunks > 1:
            key_TK = key_TK + world * (self._chunk_T if plan.by == "tokens" else self._groups(last))
        key_TK = torch.where(self.rank_TK == plan.rank, chunks * world, key_TK)
        key_TK = torch.where(at_TK, key_TK, -1).to(torch.int32)
        _, _, choice_to_row, row_to_choice = ops.row_map(key_TK, num_experts=chunks * world + 1)
        token_R = row_to_choice.div(max(1, self.top_k), rounding_mode="floor").long()
        return choice_to_row, token_R[: plan.outgoing_rows + plan.own_rows]

    def _groups(self, last: bool) -> torch.Tensor:
        """int32 [T, K]: the last or the first group of experts that needs each choice's row. On one rank that is the
        group of the row's highest or lowest choice; on the ranks behind a gateway it may be that of any choice."""
        plan = self.plan
        group_TK = slot_groups(self.slots_TK % plan.local_slots, plan)
        if not isinstance(plan, NodePlan):
            return group_TK
        column_TK = torch.where(self._used, self.rank_TK, plan.world_size).long()
        ends_TW = group_TK.new_full((self.tokens, plan.world_size + 1), -1 if last else plan.chunks)
        return ends_TW.scatter_reduce_(1, column_TK, group_TK, "amax" if last else "amin").gather(1, column_TK)

    @cached_property
    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the whole step, by rank and token."""
        return self._rows(self._first, chunked=False)

    @cached_property
    def outgoing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows in the order in which chunks need them."""
        return self.plain if self.plan.chunks == 1 else self._rows(self._first, chunked=True)

    @cached_property
    def _returning(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [T, K], the rows in the order in which chunks give them back, -1 = none, and which choices have one."""
        by_tokens = self.plan.chunks == 1 or self.plan.by == "tokens"
        choice_to_row, _ = self.outgoing if by_tokens else self._rows(self._last, chunked=True, last=True)
        return choice_to_row, self._first if by_tokens else self._last

    @cached_property
    def returning(self) -> torch.Tensor:
        """int32 [T, min(K, W)]: a token's rows, by rank, in the order in which chunks give them back; -1 = none.

        A token has no more of them than ranks: summing over all its choices would mostly add nothing.
        """
        _, has_row = self._returning
        most = min(self.top_k, self.plan.world_size)
        # Choices without a row are written to one column more.
        return self._spread(torch.where(has_row, has_row.cumsum(dim=1) - 1, most), most)

    @cached_property
    def returning_from(self) -> torch.Tensor:
        """int32 [T, W]: the same with a column for each rank."""
        world = self.plan.world_size
        return self._spread(torch.where(self._returning[1], self.rank_TK, world), world)

    def _spread(self, column_TK: torch.Tensor, columns: int) -> torch.Tensor:
        """int32 [T, columns]: `_returning` in these columns."""
        choice_to_row, _ = self._returning
        rows = torch.full((self.tokens, columns + 1), -1, dtype=torch.int32, device=choice_to_row.device)
        return rows.scatter_(1, column_TK.long(), choice_to_row)[:, :columns].contiguous()

    def sum(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """[T, D]: the sum of each token's rows, which came back in the order of `returning`: over the ranks of a node,
        then over the nodes, both in their order; rounded once."""
        carriers = self.plan.carriers
        if len(carriers) == 1:
            return ops.combine(rows_RD, self.returning)
        wide_RD = rows_RD.to(weights_dtype(rows_RD.dtype))
        sum_TD: torch.Tensor | None = None
        for ranks in carriers:
            columns = self.returning_from[:, ranks[0] : ranks[-1] + 1].contiguous()
            sum_TD = ops.combine(wide_RD, columns, None, sum_TD)
        assert sum_TD is not None
        return sum_TD.to(rows_RD.dtype)

    def metadata(self, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes beside each row, by rank and token, then own rows: slots int32 [R, K], numbered from the first one
        that the rank is sent rows for, -1 where the choice is another rank's, and weights [R, K], 0 there."""
        choice_to_row, token_R = self.plain
        plan, rows = self.plan, token_R.shape[0]
        slots_RK = self.slots_TK.index_select(0, token_R)
        weights_RK = weights_TK.gather(1, self.choice_TK).index_select(0, token_R)
        # Choices that are not the first of a row are written to one place more.
        row_C = torch.where(choice_to_row >= 0, choice_to_row, rows).reshape(-1).long()
        rank_R = self.rank_TK.new_empty(rows + 1).scatter_(0, row_C, self.rank_TK.reshape(-1))[:rows]
        local_RK = slots_RK - (plan.first_behind(rank_R) * plan.local_slots)[:, None]
        here = self.rank_TK.index_select(0, token_R) == rank_R[:, None]
        return torch.where(here, local_RK, -1).to(torch.int32), torch.where(here, weights_RK, 0)

    def weight_gradients(self, dweights_RK: torch.Tensor) -> torch.Tensor:
        """[T, K]: the gradients of the choices' weights from those of the rows, as `metadata` orders them."""
        choice_to_row, _ = self.plain
        if dweights_RK.shape[0] == 0:
            return dweights_RK.new_zeros(self.tokens, self.top_k)
        # A choice that is not the first of its row has the row of the one before.
        at = torch.arange(self.top_k, device=choice_to_row.device).expand_as(choice_to_row)
        first_TK = torch.where(self._first, at, 0).cummax(dim=1).values
        row_TK = choice_to_row.gather(1, first_TK).long()
        sorted_TK = torch.where(self._used, dweights_RK[row_TK.clamp(min=0), at], 0)
        return torch.empty_like(sorted_TK).scatter_(1, self.choice_TK, sorted_TK)


class ExpertMaps:
    """Which row each expert of this rank reads, and which experts' rows make up each row that goes back.

    `row_R` int32 [Re]: the distinct row of each row of the experts; `scale_R` [Re]: its router weight; `places_RK`
    int32 [Rd, K]: the experts' rows of each distinct row, by slot, -1 = none. Those of own rows are there at once, the
    others after `take`.
    """

    def __init__(self, tables: Tables, own_ids_RK: torch.Tensor, own_weights_RK: torch.Tensor) -> None:
        self.plan = plan = plan_of(tables)
        self._tables = tables
        device, dtype = own_ids_RK.device, own_weights_RK.dtype
        top_k = own_ids_RK.shape[1]
        rows = plan.own_rows + plan.incoming_rows
        # One place more, where choices without a row are written: nothing has to be selected.
        self._row_R = torch.empty(plan.expert_total + 1, dtype=torch.int32, device=device)
        self._scale_R = torch.empty(plan.expert_total + 1, dtype=dtype, device=device)
        self.ids_RK = torch.empty(rows, top_k, dtype=torch.int32, device=device)
        self.weights_RK = torch.empty(rows, top_k, dtype=dtype, device=device)
        self.places_RK = torch.empty(rows, top_k, dtype=torch.int32, device=device)
        self.ids_RK[: plan.own_rows] = own_ids_RK
        self.weights_RK[: plan.own_rows] = own_weights_RK
        self._enter(slice(0, plan.own_rows), tables.one("own_shift"))

    @property
    def row_R(self) -> torch.Tensor:
        return self._row_R[:-1]

    @property
    def scale_R(self) -> torch.Tensor:
        return self._scale_R[:-1]

    def take(self, ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> None:
        """The rows of the others, by source rank and token."""
        order = self.distinct_order
        self.ids_RK.index_copy_(0, order, ids_RK)
        self.weights_RK.index_copy_(0, order, weights_RK)
        self._enter(slice(self.plan.own_rows, None), self._tables.one("others_shift"))

    def _enter(self, part: slice, shift: torch.Tensor) -> None:
        ids_RK, weights_RK = self.ids_RK[part], self.weights_RK[part]
        _, _, sorted_RK, _ = ops.row_map(ids_RK, num_experts=self.plan.local_slots)
        places_RK = torch.where(ids_RK >= 0, sorted_RK + shift[ids_RK.clamp(min=0).long()], -1)
        self.places_RK[part] = places_RK
        first = part.start
        rows = torch.arange(first, first + ids_RK.shape[0], dtype=torch.int32, device=ids_RK.device)
        target = torch.where(places_RK >= 0, places_RK, self.plan.expert_total).reshape(-1).long()
        self._row_R.index_copy_(0, target, rows[:, None].expand_as(ids_RK).reshape(-1))
        self._scale_R.index_copy_(0, target, weights_RK.reshape(-1))

    @property
    def distinct_order(self) -> torch.Tensor:
        return self._tables.one("distinct_order")

    def arriving(self, chunk: int) -> torch.Tensor:
        """int64: the distinct rows of a chunk in the order in which they arrive."""
        if self.plan.by == "tokens":
            return self._of_blocks(chunk)
        begin, end = self.plan.first_arrivals[chunk : chunk + 2]
        return self._by_first[begin:end]

    def leaving(self, chunk: int) -> torch.Tensor:
        """int64: the distinct rows of a chunk in the order in which they go back."""
        if self.plan.by == "tokens":
            return self._of_blocks(chunk)
        begin, end = self.plan.last_departures[chunk : chunk + 2]
        return self._by_last[begin:end]

    def _of_blocks(self, chunk: int) -> torch.Tensor:
        if self.plan.chunks == 1:
            return self.distinct_order
        return self.distinct_order[self._tables.one("block_arrivals", chunk)]

    @cached_property
    def _by_first(self) -> torch.Tensor:
        ids_RK = self.ids_RK[self.distinct_order]
        return self._sorted(torch.where(ids_RK >= 0, ids_RK, UNUSED).amin(dim=1))

    @cached_property
    def _by_last(self) -> torch.Tensor:
        return self._sorted(self.ids_RK[self.distinct_order].amax(dim=1))

    def _sorted(self, slot_R: torch.Tensor) -> torch.Tensor:
        """The rows of the others by the group of `slot_R`; within a group by source rank and token."""
        return self.distinct_order[slot_groups(slot_R, self.plan).sort(stable=True).indices]


def plan_of(tables: Tables) -> DistinctPlan:
    """The plan of a deduplicated step."""
    assert isinstance(tables.plan, DistinctPlan)
    return tables.plan


def weights_dtype(rows: torch.dtype) -> torch.dtype:
    """In what router weights travel, multiply and are summed."""
    return torch.float64 if rows == torch.float64 else torch.float32


def slot_groups(slots: torch.Tensor, plan: DistinctPlan) -> torch.Tensor:
    """int32: the group of experts of each local slot, of those that begin at local_slots * c // chunks; slots that
    nobody has are beyond the last one."""
    slots = slots.clamp(max=plan.local_slots).to(torch.int32)
    return ((slots + 1) * plan.chunks - 1).div(plan.local_slots, rounding_mode="floor")
