"""The arithmetic of a deduplicated step: one row for each (token, rank) travels, the experts' side does the rest.

There each expert reads its rows through a map, and the weighted sum over a row's experts goes back as one row: float32
(float64) over the choices by slot, rounded once, then on the token's side over the ranks of a node and over
the nodes, rounded once. Backward takes the weights for factors of the activations, and gets their gradients from those
and what it computes again. So no row is kept in copies, and neither experts' outputs nor what came back are kept at
all. Buffers:

    send  [Rs, D]   a token's row for each other rank      dsend  the sums that come back for them
    x     [Rd, D]   distinct rows here, own ones first     dx_D   gradients of the experts' outputs' sums, in that order
    h     [Re, F']  pre-activation, by expert              dh, a  its gradient (over h where that is free), activation
    y     [Re, D]   experts' outputs, until summed         dx     experts' input gradients, until summed
    back  [Rs + own, D]  sums that come back, then own ones

Letters: Rs rows sent, Rd distinct rows on this rank, Re rows of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.agreement.plan import RowLayout
from moe_overlap.ops import raw, workspace
from moe_overlap.ops.expert_mlp_contract import Dgrad, Forward, Wgrad
from moe_overlap.schedule.distinct_maps import ExpertMaps, TokenMaps, plan_of, weights_dtype
from moe_overlap.schedule.gateway import Gateway
from moe_overlap.schedule.tables import Tables
from moe_overlap.schedule.weights import ExpertWeights, GradientRows, parts_of


@dataclass(frozen=True, kw_only=True)
class DistinctSaved:
    """What backward needs of a deduplicated forward call: the choices int32 [T, K], [Rd, D], [Re, F'], int32 [Rd, K],
    [Rd, K], the ids of the rows that this rank passes on, int32 [G, K] (see `gateway.py`), and the weights,
    those of copies where there are any. Bytes, beside the weights, with s of an element and w of a router weight (4, or
    8 for float64):

        4                       for each choice of this rank's tokens
        F' s                    for each row of its experts
        D s + K (4 + w)         for each distinct row here
        4 K                     for each row that it passes on inside its node

    so F' s + 4 + (D s + K (4 + w)) / c a token-slot where ranks are balanced and a row has c experts: 8468 for D 512,
    F 2048, swiglu, bfloat16, top-8 of 32 on two ranks, where c is 4.
    """

    slots_TK: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    node_ids_GK: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    copied: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> DistinctSaved:
        """From what `tensors` returned."""
        return cls(**dict(zip(cls.__dataclass_fields__, tensors[:8], strict=False)), copied=tuple(tensors[8:]))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        first = self.slots_TK, self.x, self.h, self.ids_RK, self.weights_RK
        return (*first, self.node_ids_GK, self.w_in, self.w_out, *self.copied)

    @property
    def choice(self) -> torch.Tensor:
        """What a recompute must choose again."""
        return self.slots_TK


def metadata_layout(top_k: int, dtype: torch.dtype) -> RowLayout:
    """Ids and weights of one row, as int32 words."""
    return RowLayout(width=top_k * (1 + dtype.itemsize // 4), dtype=torch.int32, metadata=True)


def gradient_layout(top_k: int, dtype: torch.dtype) -> RowLayout:
    """The gradients of one row's weights."""
    return RowLayout(width=top_k, dtype=dtype, metadata=True)


class DistinctForward:
    """The forward actions P, O, E, U, and what M carries. Made by P."""

    def __init__(
        self,
        tables: Tables,
        weights: ExpertWeights,
        x_TD: torch.Tensor,
        slots_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        num_sms: int | None,
    ) -> None:
        self.plan = plan = plan_of(tables)
        self.tables, self.weights = tables, weights
        self._num_sms = num_sms
        self._slots_TK = slots_TK
        self._tokens = TokenMaps(plan, slots_TK)
        sent, own = plan.outgoing_rows, plan.own_rows
        _, token_R = self._tokens.outgoing
        self.send = raw.pack(x_TD, token_R[:sent])
        self.x = workspace.empty((own + plan.incoming_rows, x_TD.shape[1]), like=x_TD)
        self.x[:own] = raw.pack(x_TD, token_R[sent:])
        self.y = workspace.empty((plan.expert_total, x_TD.shape[1]), like=x_TD)
        self.h = workspace.empty((plan.expert_total, weights.w_in.shape[1]), like=x_TD)
        self.back = workspace.empty((sent + own, x_TD.shape[1]), like=x_TD)
        self._ids_RK, self._weights_RK = self._tokens.metadata(weights_TK.detach().to(weights_dtype(x_TD.dtype)))
        self._maps = ExpertMaps(tables, self._ids_RK[sent:], self._weights_RK[sent:])
        self.gateway = Gateway(tables, slots_TK[:0])

    @property
    def metadata_layout(self) -> RowLayout:
        return metadata_layout(self._slots_TK.shape[1], self._weights_RK.dtype)

    def metadata(self) -> torch.Tensor:
        """M: ids and weights of the rows sent, by rank and token."""
        sent = self.plan.outgoing_rows
        words = self._weights_RK[:sent].reshape(-1).view(torch.int32)
        words = words.view(sent, self.metadata_layout.width - self._slots_TK.shape[1])
        return torch.cat([words, self._ids_RK[:sent]], dim=1)  # in this order words of 8 bytes are aligned

    def odd_source(self, received: torch.Tensor) -> int | None:
        """The first rank whose metadata is not what it announced. On CUDA, where the host does not read it: None."""
        if received.device.type != "cpu":
            return None
        return self.plan.odd_source(received[:, received.shape[1] - self._slots_TK.shape[1] :].numpy())

    def take_metadata(self, received: torch.Tensor) -> None:
        """What `metadata` of the others says."""
        count, top_k = received.shape[0], self._slots_TK.shape[1]
        words = received.shape[1] - top_k
        weights = received[:, :words].reshape(-1).view(self._weights_RK.dtype)
        self._maps.take(received[:, words:], weights.view(count, top_k))

    def outgoing(self, c: int) -> torch.Tensor:
        """The rows of chunk c to send."""
        return self.send[self.plan.first_offsets[c] : self.plan.first_offsets[c + 1]]

    def incoming(self, c: int) -> torch.Tensor:
        """Where the sums of chunk c come back."""
        return self.back[self.plan.last_offsets[c] : self.plan.last_offsets[c + 1]]

    def returned(self, c: int, rows: torch.Tensor) -> None:
        """They come back to where `incoming` says."""

    def own(self, half: int, halves: int) -> None:
        """O and Or: one of 1 or 2 halves of the experts on the rows that stay; after the last one, their sums."""
        local = self.plan.local_slots
        self._compute(*self.tables.both("own_expert_rows", local * half // halves, local * (half + 1) // halves))
        own, maps = self.plan.own_rows, self._maps
        if own and half + 1 == halves:
            sums = raw.combine(self.y, maps.places_RK[:own], maps.weights_RK[:own], None)
            self.back[self.plan.outgoing_rows :] = sums

    def experts(self, c: int, received: torch.Tensor) -> torch.Tensor:
        """E of chunk c: the sums of the rows that go back with it."""
        maps = self._maps
        raw.unpack_into(received, maps.arriving(c), self.x)
        self._compute(*self.tables.both("expert_rows", c))
        leaving = maps.leaving(c)
        sums: torch.Tensor = raw.combine(self.y, maps.places_RK[leaving], maps.weights_RK[leaving], None)
        return sums

    def _compute(self, starts: torch.Tensor, ends: torch.Tensor) -> None:
        for w_in, w_out, seats in self.weights.parts(0):
            raw.expert_mlp_forward(Forward(self.x, w_in, w_out, ends[seats], starts[seats], self.weights.kind, self.y,
                                           self.h, self._num_sms, self._maps.row_R))  # fmt: skip

    def combine(self) -> torch.Tensor:
        """U: y[t] = sum over the ranks of a node and then over the nodes, in order, of what came back."""
        return self._tokens.sum(self.back)

    def saved(self, _: Tables) -> DistinctSaved:
        return DistinctSaved(slots_TK=self._slots_TK, x=self.x, h=self.h, ids_RK=self._maps.ids_RK,
                             weights_RK=self._maps.weights_RK, node_ids_GK=self.gateway.ids_GK,
                             w_in=self.weights.w_in, w_out=self.weights.w_out,
                             copied=self.weights.copied or ())  # fmt: skip


class DistinctBackward:
    """The backward actions Ut, Od, Ed, Ew, Pt, and what Mt carries. Made by Ut."""

    def __init__(
        self,
        tables: Tables,
        saved: DistinctSaved,
        kind: str,
        dy_TD: torch.Tensor | None,
        *,
        need_dx: bool,
        need_dw: bool,
        over_h: bool,
        num_sms: int | None,
    ) -> None:
        self.plan = plan = plan_of(tables)
        self.tables, self.saved, self.kind = tables, saved, kind
        self._num_sms = num_sms
        own = plan.own_rows
        self._tokens = TokenMaps(plan, saved.slots_TK)
        self._maps = ExpertMaps(tables, saved.ids_RK[:own], saved.weights_RK[:own])
        order = self._maps.distinct_order
        self._maps.take(saved.ids_RK[order], saved.weights_RK[order])
        self.gateway = Gateway(tables, saved.node_ids_GK)
        x, h, sent = saved.x, saved.h, plan.outgoing_rows
        if dy_TD is None:
            dy_TD = x.new_zeros(saved.slots_TK.shape[0], x.shape[1])
        dy_TD = dy_TD.contiguous()  # gradients may arrive with stride 0 (from an expand or a sum)
        _, token_R = self._tokens.outgoing
        self.dsend = raw.pack(dy_TD, token_R[:sent])
        self.dy = workspace.empty(x.shape, like=x)
        self.dy[:own] = raw.pack(dy_TD, token_R[sent:])
        self.need_dx = need_dx
        self.dback = workspace.empty((sent + own, x.shape[1]), like=x) if need_dx else None
        self.dx = workspace.empty((plan.expert_total, x.shape[1]), like=x)
        self.dh = h if over_h else workspace.empty(h.shape, like=h)
        self.a = workspace.empty((plan.expert_total, saved.w_out.shape[2]), like=x)
        self._dscale_R = torch.empty(plan.expert_total + 1, dtype=saved.weights_RK.dtype, device=x.device)
        self._dscale_R[-1:] = 0
        self._dweights_RK: torch.Tensor | None = None
        self.dw_in = workspace.empty(saved.w_in.shape, like=saved.w_in, rows=False) if need_dw else None
        self.dw_out = workspace.empty(saved.w_out.shape, like=saved.w_out, rows=False) if need_dw else None

    def outgoing(self, c: int) -> torch.Tensor:
        """The gradients of chunk c to send."""
        return self.dsend[self.plan.first_offsets[c] : self.plan.first_offsets[c + 1]]

    def incoming(self, c: int) -> torch.Tensor:
        """Where the gradients of chunk c come back."""
        assert self.dback is not None
        return self.dback[self.plan.last_offsets[c] : self.plan.last_offsets[c + 1]]

    def returned(self, c: int, rows: torch.Tensor) -> None:
        """They come back to where `incoming` says."""

    def own(self) -> None:
        """Od: the gradients of the experts on the rows that stay."""
        self._compute(*self.tables.both("own_expert_rows", 0, self.plan.local_slots))
        if self.dback is not None and self.plan.own_rows:
            sums = raw.combine(self.dx, self._maps.places_RK[: self.plan.own_rows], None, None)
            self.dback[self.plan.outgoing_rows :] = sums

    def dgrad(self, c: int, received: torch.Tensor) -> torch.Tensor | None:
        """Ed of chunk c: the sums of the input gradients that go back with it; None where no rank wants them."""
        raw.unpack_into(received, self._maps.arriving(c), self.dy)
        self._compute(*self.tables.both("expert_rows", c))
        if self.dback is None:
            return None
        sums: torch.Tensor = raw.combine(self.dx, self._maps.places_RK[self._maps.leaving(c)], None, None)
        return sums

    def _compute(self, starts: torch.Tensor, ends: torch.Tensor) -> None:
        s, maps = self.saved, self._maps
        for w_in, w_out, seats in parts_of(s.w_in, s.w_out, *s.copied):
            raw.expert_mlp_dgrad(Dgrad(self.dy, s.h, w_in, w_out, ends[seats], starts[seats], self.kind, self.dx,
                                       self.dh, self.a, self._num_sms, maps.row_R, maps.scale_R,
                                       self._dscale_R[:-1]))  # fmt: skip

    @property
    def gradient_layout(self) -> RowLayout:
        return gradient_layout(self.saved.slots_TK.shape[1], self._dscale_R.dtype)

    def weight_gradients(self) -> torch.Tensor:
        """Mt: the gradients of the weights of the rows of others, by source rank and token."""
        return self._of_choices(self._maps.places_RK[self._maps.distinct_order])

    def take_weight_gradients(self, received: torch.Tensor) -> None:
        own_RK = self._of_choices(self._maps.places_RK[: self.plan.own_rows])
        self._dweights_RK = torch.cat([received, own_RK])

    def _of_choices(self, places_RK: torch.Tensor) -> torch.Tensor:
        return self._dscale_R[torch.where(places_RK >= 0, places_RK, self.plan.expert_total).long()]

    @property
    def dweights_TK(self) -> torch.Tensor:
        """The gradients of the router's weights, once Mt was waited for."""
        assert self._dweights_RK is not None
        return self._tokens.weight_gradients(self._dweights_RK)

    def weight_gradient(self, first: int, last: int) -> None:
        """Ew of this rank's experts first .. last-1: one matmul an expert over the rows of all chunks."""
        if self.dw_in is not None and self.dw_out is not None:
            offs = self.tables.one("expert_offs")[: self.dw_in.shape[0]]
            raw.expert_mlp_wgrad(Wgrad(self.saved.x, self.dy, self.dh, self.a, offs, None, self.dw_in, self.dw_out,
                                       (first, last), self._num_sms, self._maps.row_R))  # fmt: skip

    def gradient_rows(self) -> GradientRows:
        """What the weight gradients of single experts are made of."""
        offs = self.plan.expert_offs.tolist()
        return GradientRows(self.saved.x, self.dy, self.dh, self.a, offs, self._maps.row_R, self._num_sms)

    def dx_TD(self) -> torch.Tensor:
        """Pt: dx[t] = sum over the ranks of a node and then over the nodes, in order, of its rows' gradients."""
        assert self.dback is not None
        return self._tokens.sum(self.dback)
