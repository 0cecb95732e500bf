"""The second half of a hierarchical exchange: this rank passes rows on inside its node, and adds up what comes back.

One row for each (token, node) has come across (`NodePlan`). On the way out (D, Ct, M) it goes on from here to each rank
of the node that has an expert of its token. On the way back (C, Dt, Mt) the node's partial sums come here first and are
added up in the order of ranks: float32 (float64), rounded once. Gradients of weights (Mt) need no sum: each belongs to
one rank. The exchange inside the node is waited for at once, so that nothing but the one across nodes is under way
beside compute. Callers see the rows of a `DistinctPlan`, in its order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_overlap import ops
from moe_overlap.agreement.node_plan import InsidePlan, NodePlan
from moe_overlap.agreement.plan import RowLayout
from moe_overlap.schedule.tables import Tables

Exchange = Callable[[torch.Tensor, InsidePlan, bool], torch.Tensor]  # rows, plan, reverse -> what came


class Gateway:
    """What one rank passes on in one half of a step. Where every row goes to its rank directly, nothing.

    ids_GK: int32 [G, K], the choices of the rows that are passed on in the whole step, by source rank and token: slots
    of this node, -1 = none. In forward M brings them.
    """

    def __init__(self, tables: Tables, ids_GK: torch.Tensor) -> None:
        self.tables, self.ids_GK = tables, ids_GK

    @property
    def top_k(self) -> int:
        return self.ids_GK.shape[1]

    def pass_on(self, chunk: int, received: torch.Tensor, layout: RowLayout, exchange: Exchange) -> torch.Tensor:
        """From the rows that came across to those of this rank's experts, in the order of a `DistinctPlan`."""
        if not isinstance(self.tables.plan, NodePlan):
            return received
        tables, plan = self._cut(layout)
        if layout.metadata:
            self.ids_GK = received[:, -self.top_k :][tables.one("arrived_to_pass_on", chunk)].contiguous()
        places = _Places(tables, chunk, self.ids_GK)
        rows = received[places.arrived[places.row_R]]
        if layout.metadata:
            rows = self._for_rank(rows, places.local_R)
        passed_on = exchange(rows, plan.inside, False)
        return torch.cat([received, passed_on])[tables.one("in_flat_order", chunk)]

    def give_back(self, chunk: int, rows: torch.Tensor, layout: RowLayout, exchange: Exchange) -> torch.Tensor:
        """From the rows of this rank's experts, in the order of a `DistinctPlan`, to those that go back across."""
        if not isinstance(self.tables.plan, NodePlan):
            return rows
        tables, plan = self._cut(layout)
        places = _Places(tables, chunk, self.ids_GK)
        back = exchange(rows[tables.one("to_gateways", chunk)], plan.inside, True)
        whole = self._of_choices(back, places) if layout.metadata else ops.combine(back, places.place_GL)
        return torch.cat([whole, rows])[tables.one("homewards", chunk)]

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
    """Where the rows of one chunk are passed on to.

    `place_GL` int32 [G, L]: the place of each row among those passed on to rank l of the node, -1 = not to that one;
    `row_R`: the row of each place; `local_R`: its rank in the node. G rows of the chunk.
    """

    def __init__(self, tables: Tables, chunk: int, ids_GK: torch.Tensor) -> None:
        plan = _plan_of(tables)
        size = plan.node_size
        if plan.chunks > 1:
            ids_GK = ids_GK[tables.one("to_pass_on", chunk)]
        local_GK = ids_GK.div(plan.local_slots, rounding_mode="floor")
        self.local_GK = torch.where(ids_GK >= 0, local_GK, -1).long()
        column = torch.where(self.local_GK >= 0, self.local_GK, size)  # one more, for choices that are not of this node
        key_GL = ids_GK.new_full((ids_GK.shape[0], size + 1), -1)
        key_GL.scatter_(1, column, self.local_GK.to(torch.int32))
        key_GL = key_GL[:, :size].contiguous()
        _, _, self.place_GL, slot_R = ops.row_map(key_GL, num_experts=size)
        slot_R = slot_R[: sum(plan.inside.passed_on[chunk])].long()
        self.row_R = slot_R.div(size, rounding_mode="floor")
        self.local_R = slot_R % size
        self._tables, self._chunk = tables, chunk

    @property
    def arrived(self) -> torch.Tensor:
        """int64 [G]: where each row came among those that came across."""
        return self._tables.one("arrived_to_pass_on", self._chunk)


def _plan_of(tables: Tables) -> NodePlan:
    assert isinstance(tables.plan, NodePlan)
    return tables.plan
