"""The second half of a hierarchical exchange: this rank passes rows on inside its node, and adds up what comes back.

One row for each (token, node) has come across (`NodePlan`). On the way out (D, Ct, M) it goes on from here to each rank
of the node that has an expert of its token. On the way back (C, Dt, Mt) the node's partial sums come here first and are
added up in the order of ranks: float32 (float64), rounded once. Gradients of weights (Mt) need no sum: each belongs to
one rank. The exchange inside the node is waited for at once, so that nothing but the one across nodes is under way
beside compute. Callers see the rows of a `DistinctPlan`, in its order.

Cut by groups of experts, a row is kept here until the last rank has got it, and sums until the last one has come; so
buffers hold the rows of all chunks, here as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_overlap import ops
from moe_overlap.agreement.distinct import RowCounts
from moe_overlap.agreement.node_plan import InsidePlan, NodePlan
from moe_overlap.agreement.plan import RowLayout
from moe_overlap.ops import workspace
from moe_overlap.schedule.distinct_maps import slot_groups
from moe_overlap.schedule.tables import Tables

Exchange = Callable[[torch.Tensor, InsidePlan, bool], torch.Tensor]  # rows, plan, reverse -> what came


class Gateway:
    """What one rank passes on in one half of a step. Where every row goes to its rank directly, nothing.

    ids_GK: int32 [G, K], the choices of the rows that are passed on in the whole step, by source rank and token: slots
    of this node, -1 = none. In forward M brings them.
    """

    def __init__(self, tables: Tables, ids_GK: torch.Tensor) -> None:
        self.tables, self.ids_GK = tables, ids_GK
        self._places: _Places | None = None  # of the half's chunks
        self._rows: torch.Tensor | None = None  # [G, D] that came across, in the order in which they came
        self._sums: torch.Tensor | None = None  # those that came back from the ranks of the node, as they were sent

    @property
    def top_k(self) -> int:
        return self.ids_GK.shape[1]

    def pass_on(self, chunk: int, received: torch.Tensor, layout: RowLayout, exchange: Exchange) -> torch.Tensor:
        """From the rows that came across to those of this rank's experts, in the order of a `DistinctPlan`."""
        if not isinstance(self.tables.plan, NodePlan):
            return received
        tables, plan = self._cut(layout)
        arrived = tables.one("arrived_to_pass_on", chunk)
        if layout.metadata:
            words = received[arrived]
            self.ids_GK = words[:, -self.top_k :].contiguous()
            places = self._places_of(tables)
            rows = self._for_rank(words[places.row_R], places.local_R)
        else:
            rows = self._kept(chunk, received, arrived, plan)
        passed_on = exchange(rows, plan.inside, False)
        return torch.cat([received, passed_on])[tables.one("in_flat_order", chunk)]

    def give_back(self, chunk: int, rows: torch.Tensor, layout: RowLayout, exchange: Exchange) -> torch.Tensor:
        """From the rows of this rank's experts, in the order of a `DistinctPlan`, to those that go back across."""
        if not isinstance(self.tables.plan, NodePlan):
            return rows
        tables, plan = self._cut(layout)
        back = exchange(rows[tables.one("to_gateways", chunk)], plan.inside, True)
        if layout.metadata:
            whole = self._of_choices(back, self._places_of(tables))
        else:
            whole = self._summed(chunk, back, plan)
        return torch.cat([whole, rows])[tables.one("homewards", chunk)]

    def _kept(self, chunk: int, received: torch.Tensor, arrived: torch.Tensor, plan: NodePlan) -> torch.Tensor:
        """The rows to pass on with a chunk, of those that came across, up to this one."""
        places, begin = self._places_of(self.tables), plan.gateway_arrivals
        if plan.chunks == 1:
            return received[arrived[places.row_R]]
        if self._rows is None:
            self._rows = workspace.empty((begin[-1], received.shape[1]), like=received)
        self._rows[begin[chunk] : begin[chunk + 1]] = received[arrived]
        return self._rows[places.arrival_R[places.sent(chunk)]]

    def _summed(self, chunk: int, back: torch.Tensor, plan: NodePlan) -> torch.Tensor:
        """The rows that go back across with a chunk, each the sum of what its ranks gave back, up to this one."""
        places, begin = self._places_of(self.tables), plan.gateway_departures
        if plan.chunks == 1:
            return ops.combine(back, places.place_GL)
        if self._sums is None:
            self._sums = workspace.empty((places.returned(plan.chunks).start, back.shape[1]), like=back)
        self._sums[places.returned(chunk)] = back
        return ops.combine(self._sums, places.place_GL[places.departing[begin[chunk] : begin[chunk + 1]]])

    def _places_of(self, tables: Tables) -> _Places:
        if tables is not self.tables:
            return _Places(tables, self.ids_GK)
        if self._places is None:
            self._places = _Places(tables, self.ids_GK)
        return self._places

    def _cut(self, layout: RowLayout) -> tuple[Tables, NodePlan]:
        """Those of an exchange; metadata goes for all chunks at once."""
        tables = self.tables.whole if layout.metadata else self.tables
        return tables, _plan_of(tables)

    def _for_rank(self, words_RW: torch.Tensor, local_R: torch.Tensor) -> torch.Tensor:
        """Weights and ids of rows as their ranks take them: ids among a rank's slots, without those of others.

        words_RW: int32 [R, W], the weights as words, then the ids. local_R: [R], the place in the node of each row's
        rank.
        """
        words = words_RW.shape[1] - self.top_k
        ids_RK = words_RW[:, words:] - (local_R * self.tables.plan.local_slots).to(torch.int32)[:, None]
        here = (words_RW[:, words:] >= 0) & (ids_RK >= 0) & (ids_RK < self.tables.plan.local_slots)
        weights = words_RW[:, :words].masked_fill(~here.repeat_interleave(words // self.top_k, dim=1), 0)
        return torch.cat([weights, torch.where(here, ids_RK, -1)], dim=1)

    def _of_choices(self, back_RK: torch.Tensor, places: _Places) -> torch.Tensor:
        """[G, K]: the gradient of each choice's weight, from the one rank that has it."""
        local_GK = places.local_GK
        row_GK = places.place_GL.gather(1, local_GK.clamp(min=0)).long()
        choice = torch.arange(self.top_k, device=back_RK.device).expand_as(row_GK)
        if back_RK.shape[0] == 0:
            return back_RK.new_zeros(row_GK.shape)
        return torch.where(local_GK >= 0, back_RK[row_GK.clamp(min=0), choice], 0)


class _Places:
    """Where the rows of all chunks are passed on to, and in which order they come and go.

    `place_GL` int32 [G, L]: the place of each row's sum from rank l of the node, among all that come back, chunk after
    chunk; -1 = none from that one. `row_R`: the row of each one that is passed on, chunk after chunk; `local_R`: its
    rank in the node; `arrival_R`: where it came among the rows that came across. `departing` [G]: the rows in the order
    in which they go back. `local_GK`: the rank in the node of each choice, -1 = none.
    """

    def __init__(self, tables: Tables, ids_GK: torch.Tensor) -> None:
        self._plan = plan = _plan_of(tables)
        size, chunks = plan.node_size, plan.chunks
        local_GK = ids_GK.div(plan.local_slots, rounding_mode="floor")
        self.local_GK = torch.where(ids_GK >= 0, local_GK, -1).long()
        if plan.by == "tokens":
            chunk_GK = tables.one("gateway_chunks")[:, None].expand(ids_GK.shape)
        else:
            chunk_GK = slot_groups(ids_GK % plan.local_slots, plan)
        ranks = torch.arange(size, dtype=torch.int32, device=ids_GK.device)
        there_GKL = self.local_GK[:, :, None] == ranks
        first_GL = torch.where(there_GKL, chunk_GK[:, :, None], chunks).amin(dim=1)
        last_GL = torch.where(there_GKL, chunk_GK[:, :, None], -1).amax(dim=1)
        out_GL = torch.where(first_GL < chunks, first_GL * size + ranks, -1).to(torch.int32)
        back_GL = torch.where(last_GL >= 0, last_GL * size + ranks, -1).to(torch.int32)
        _, _, _, slot_R = ops.row_map(out_GL, num_experts=chunks * size)
        _, _, self.place_GL, _ = ops.row_map(back_GL, num_experts=chunks * size)
        self.departing = last_GL.amax(dim=1).sort(stable=True).indices
        slot_R = slot_R[: self.sent(chunks).start].long()
        self.row_R = slot_R.div(size, rounding_mode="floor")
        self.local_R = slot_R % size
        arriving = first_GL.amin(dim=1).sort(stable=True).indices
        came_G = torch.empty_like(arriving)
        came_G[arriving] = torch.arange(len(arriving), device=arriving.device)
        self.arrival_R = came_G[self.row_R]

    def sent(self, chunk: int) -> slice:
        """Those of a chunk, of all rows that are passed on; of one chunk more than there are: what is behind them."""
        return _of_chunk(self._plan.inside.there[0], chunk)

    def returned(self, chunk: int) -> slice:
        """The same of all sums that come back."""
        return _of_chunk(self._plan.inside.back[0], chunk)


def _of_chunk(rows: RowCounts, chunk: int) -> slice:
    begin = sum(map(sum, rows[:chunk]))
    return slice(begin, begin + sum(map(sum, rows[chunk : chunk + 1])))


def _plan_of(tables: Tables) -> NodePlan:
    assert isinstance(tables.plan, NodePlan)
    return tables.plan
