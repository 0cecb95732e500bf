"""Copies of experts at run time: weights fetched from their homes (Wf), gradients returned there (Wg) and added (Wa).

What a rank has fetched is kept as long as it is valid (`agreement/copies.py`); a step that fetches something writes a
new buffer, as an earlier call's backward may still hold the old one. Buffers are the pool's (`ops/workspace.py`): those
of a layer whose copies are not kept are another one's afterwards.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.agreement.copies import CopyBook, CopyPlan, copy_plan, state_of
from moe_overlap.agreement.plan import ExchangePlan, RowLayout
from moe_overlap.ops import workspace
from moe_overlap.ops.checks import accumulation_dtype
from moe_overlap.schedule.weights import ExpertWeights, as_rows, fill_row, of_rows, row_width


class CopyStore:
    """The valid copies of one layer on one rank, and the versions of its own weights."""

    def __init__(self) -> None:
        self.version = 0
        self._seen: tuple[object, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Nothing is valid any more, here and (as all ranks do the same) elsewhere."""
        self.book = CopyBook()
        self.experts: tuple[int, ...] = ()
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    def look_at(self, *weights: torch.Tensor) -> None:
        """The expert weights of a call: their version is a new one where they may have changed. In-place changes are
        seen by torch's version counter, which writes through `.data` leave alone: `layer.forget_copies()` is for those.
        """
        seen = tuple(state_of(one) for one in weights)
        # Others may have changed since the last call: what a parametrization computes, what was put in their place.
        if None in seen or seen != self._seen:
            self.version += 1
        self._seen = seen


class StepCopies:
    """The copies of one step on this rank. relayed: those that are fetched go from rank to rank, in two groups, where
    that helps; `groups`: of Wf, 0 where nothing is fetched."""

    def __init__(self, exchange: ExchangePlan, weights: ExpertWeights, store: CopyStore, *, relayed: bool) -> None:
        assert exchange.seats is not None
        self.seats, self.rank, self._store, self._weights = exchange.seats, exchange.rank, store, weights
        self._exchange = exchange
        wanted = store.book.wanted(exchange, weights.w_in.dtype)
        self.fetch = copy_plan(exchange, wanted, relayed=relayed)
        self.groups = self.fetch.chunks if any(wanted) else 0
        mine = self.seats.copies[self.rank]
        if mine:
            as_kept = not self.groups and store.experts == tuple(one.expert for one in mine)
            weights.copied = store.held if as_kept else self._new_buffers(len(mine))
        self._waiting = self.groups
        if not self.groups:
            self._keep()

    @property
    def layout(self) -> RowLayout:
        """Of the rows of Wf."""
        w = self._weights
        return RowLayout(width=row_width(w.w_in, w.w_out), dtype=w.w_in.dtype, weights=True)

    def outgoing(self, group: int) -> torch.Tensor:
        """Wf: the weights of experts that others get from this rank: of its own ones, and of copies that came in the
        group before."""
        w, experts = self._weights, self.fetch.sent_experts(group)
        places = {one.expert: (w.copied, place) for place, one in enumerate(self.seats.copies[self.rank])}
        places |= {expert: ((w.w_in, w.w_out), place) for place, expert in enumerate(self.seats.homes[self.rank])}
        rows = w.w_in.new_empty(len(experts), self.layout.width)
        for row, expert in zip(rows, experts, strict=True):
            stacks, place = places[expert]
            assert stacks is not None
            fill_row(row, stacks[0][place], stacks[1][place])
        return rows

    def arrived(self, group: int, rows: torch.Tensor) -> None:
        """Wf: to their seats; after the last group they are kept."""
        w = self._weights
        if w.copied is not None:
            parts = of_rows(rows, w.w_in, w.w_out)
            arrived = {one.expert: row for row, one in enumerate(self.fetch.group(self.rank, group))}
            for place, one in enumerate(self.seats.copies[self.rank]):
                if one.expert in arrived:
                    for target, part in zip(w.copied, parts, strict=True):
                        target[place].copy_(part[arrived[one.expert]])
        self._waiting -= 1
        if not self._waiting:
            self._keep()

    def _keep(self) -> None:
        """All copies are here: those of the layer's own placement are kept."""
        if self._exchange.copies_kept:
            self._store.book.hold(self._exchange, self._weights.w_in.dtype)
            self._store.experts = tuple(one.expert for one in self.seats.copies[self.rank])
            self._store.held = self._weights.copied

    def _new_buffers(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for all copies, with those in them that are valid still. No inference tensors: what is kept may be
        read by a later step that has a backward, for which autograd would not save them."""
        w = self._weights
        with torch.inference_mode(False):
            new = tuple(workspace.empty((count, *one.shape[1:]), like=one, rows=False) for one in (w.w_in, w.w_out))
        wanted = {one.expert for one in self.fetch.wanted[self.rank]}
        old = {expert: place for place, expert in enumerate(self._store.experts)}
        for place, one in enumerate(self.seats.copies[self.rank]):
            if one.expert not in wanted:
                assert self._store.held is not None
                for target, source in zip(new, self._store.held, strict=True):
                    target[place].copy_(source[old[one.expert]])
        return new[0], new[1]


class ReturnedGradients:
    """Wd, Wg and Wa of one backward: the gradients of copies go home in float32 (float64), where the contributions of
    all ranks are added in the order of the ranks, the home's own one at its place, and rounded once."""

    def __init__(self, plan: CopyPlan) -> None:
        assert plan.exchange.seats is not None
        self._seats, self._plan, self._rank = plan.exchange.seats, plan, plan.rank
        self._returned: torch.Tensor | None = None
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def copied_homes(self) -> list[int]:
        """The places of this rank's experts of which other slots have copies, ascending."""
        copied = set(self._plan.sent_experts(0))
        return [place for place, expert in enumerate(self._seats.homes[self._rank]) if expert in copied]

    def weigh_copies(self, rows: Any) -> None:
        """Wd: the gradients of this rank's copies, as rows by home. rows: a `BackwardRows` or `DistinctBackward`."""
        homes, copies = len(self._seats.homes[self._rank]), len(self._seats.copies[self._rank])
        dw_in, dw_out = rows.gradient_rows().wide(homes, homes + copies)
        w_in, w_out = rows.saved.w_in, rows.saved.w_out
        self.layout = RowLayout(width=row_width(w_in, w_out), dtype=accumulation_dtype(w_in.dtype), weights=True)
        self.outgoing = as_rows(dw_in, dw_out, range(copies))

    def weigh_homes(self, rows: Any, first: int, last: int) -> None:
        """Ew of the homes first .. last-1, of which those with copies keep their part unrounded for Wa."""
        for place in self.copied_homes:
            if first <= place < last:
                self._own[place] = rows.gradient_rows().wide(place, place + 1)
                if first < place:
                    rows.weight_gradient(first, place)
                first = place + 1
        if first < last:
            rows.weight_gradient(first, last)

    def take(self, rows: torch.Tensor) -> None:
        """Wg: what came home, by rank and expert."""
        self._returned = rows

    def add(self, dw_in: torch.Tensor, dw_out: torch.Tensor) -> None:
        """Wa: the sums into the gradients of this rank's parameters."""
        assert self._returned is not None
        parts, plan = of_rows(self._returned, dw_in, dw_out), self._plan
        said = [(rank, one.expert) for rank in range(plan.world_size) for one in plan.group(rank, 0)
                if one.home == self._rank]  # fmt: skip
        for place in self.copied_homes:
            expert = self._seats.homes[self._rank][place]
            rows = [(rank, row) for row, (rank, found) in enumerate(said) if found == expert]
            for target, part, own in zip((dw_in, dw_out), parts, self._own.pop(place), strict=True):
                mine = [part[row] for rank, row in rows if rank < self._rank] + [own[0]]
                mine += [part[row] for rank, row in rows if rank >= self._rank]
                total = mine[0].clone()
                for one in mine[1:]:
                    total += one
                target[place].copy_(total)
