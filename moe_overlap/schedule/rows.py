"""The arithmetic of a step on its row buffers: what the compute actions of a schedule do. No transport.

Buffers (rows of D elements; see `ChunkPlan` for the orders):

    send  [R, D]    rows permuted into send order, all chunks          dsend  their gradients
    x     [Re, D]   rows received, in the experts' order               dy     gradients of the experts' outputs
    h     [Re, F']  pre-activation                                     dh, a  its gradient, the activation
    back  [R, D]    rows returned, in send order                       dback  their gradients

They, and the weight gradients, come from the workspace pool: ordinary tensors, whose memory is given out again when
nobody holds it any longer, whoever that was: this step, autograd's saved tensors, a parameter's `.grad`, an exchange.

Where one rank's rows are in order already (`ChunkPlan.in_order`) nothing is moved: send is x, what the experts make is
back, and likewise for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.agreement.static_plan import StaticChunks
from moe_overlap.ops import raw, workspace
from moe_overlap.ops.expert_mlp_contract import Dgrad, Forward, Wgrad
from moe_overlap.schedule.static_rows import static_order
from moe_overlap.schedule.tables import Tables
from moe_overlap.schedule.weights import ExpertWeights, GradientRows, Loaded, parts_of


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What backward needs of a forward call: [R, D], int32 [T, K] twice, [T, K], [Re, D], [Re, F'] and the weights,
    those of copies where there are any.

    `back` is in the send order of forward, as `slot_to_row` says; `slot_to_dback` is the send order of backward. Bytes,
    beside the weights, with s of an element and w of a router weight (4, or 8 for float64):

        D s + 8 + w     for each choice of this rank's tokens
        (D + F') s      for each row of its experts

    so (2 D + F') s + 8 + w a token-slot where ranks are balanced: 10252 for D 512, F 2048, swiglu, bfloat16.
    """

    back: torch.Tensor
    slot_to_row: torch.Tensor
    slot_to_dback: torch.Tensor
    weights_TK: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    copied: tuple[torch.Tensor, ...] = ()

    @property
    def choice(self) -> torch.Tensor:
        """What a recompute must choose again."""
        return self.slot_to_row

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Saved:
        """From what `tensors` returned."""
        return cls(**dict(zip(cls.__dataclass_fields__, tensors[:8], strict=False)), copied=tuple(tensors[8:]))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        first = self.back, self.slot_to_row, self.slot_to_dback, self.weights_TK
        return (*first, self.x, self.h, self.w_in, self.w_out, *self.copied)


def send_order(tables: Tables, slots_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot_to_row, offs): the row of each (token, k) in the send buffer of a plan, and the ends of its groups."""
    plan = tables.plan
    if isinstance(plan, StaticChunks):
        return static_order(plan)
    table = tables.one("key_table", slots_TK.shape[0]) if plan.chunks > 1 else None
    keys_TK, num_keys = plan.send_keys(slots_TK, table)
    _, offs, slot_to_row, _ = raw.row_map(keys_TK, num_keys, 0, num_keys, 1, None)
    return slot_to_row, offs


def experts_sms(device: torch.device, exchange_sms: int) -> int | None:
    """How many multiprocessors the experts' kernels may use beside exchanges that take `exchange_sms`; None: all there
    are, or a CPU. A block of NCCL shares no multiprocessor with one of a matrix kernel, whose shared memory fills it:
    without this exchanges would begin when experts end."""
    if exchange_sms == 0 or device.type != "cuda":
        return None
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count - exchange_sms)


class _Chunks:
    """Where the rows of each chunk lie, and the multiprocessors that their experts may use (None: all)."""

    def __init__(self, tables: Tables, num_sms: int | None) -> None:
        self.plan = tables.plan
        self.tables = tables
        self.num_sms = num_sms

    def _of(self, rows: torch.Tensor, c: int) -> torch.Tensor:
        """The slice of chunk c of a buffer in send order."""
        return rows[self.plan.send_offsets[c] : self.plan.send_offsets[c + 1]]

    def _new(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer of `count` rows."""
        return workspace.empty((count, like.shape[1]), like=like)

    def _put(self, received: torch.Tensor, c: int, buffer: torch.Tensor) -> None:
        """The received rows of chunk c into the experts' buffer."""
        if self.plan.in_order:
            self._settle(received, self._of(buffer, c))
        else:
            raw.unpack_into(received, self.tables.one("buffer_order", c), buffer)

    def _take(self, buffer: torch.Tensor, c: int) -> torch.Tensor:
        """The rows of chunk c in the experts' buffer, in the order in which they came."""
        return self._of(buffer, c) if self.plan.in_order else raw.pack(buffer, self.tables.one("buffer_order", c))

    @staticmethod
    def _settle(rows: torch.Tensor, place: torch.Tensor) -> None:
        """Rows of an exchange to where they belong: they may be there, or come in memory of their own."""
        if rows.data_ptr() != place.data_ptr():
            place.copy_(rows)

    def expert_rows(self, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(starts, ends) int32 [e]: the rows of chunk c of each expert in the experts' buffer."""
        return self.tables.both("expert_rows", c)


class ForwardRows(_Chunks):
    """The forward actions P, E, U. Made by P."""

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
        super().__init__(tables, num_sms)
        plan = self.plan
        self.weights = weights
        self._slots_TK, self._weights_TK = slots_TK, weights_TK
        self.slot_to_row, offs = send_order(tables, slots_TK)
        self.send = raw.permute(x_TD, self.slot_to_row, offs, plan.send_offsets[-1])
        rows = sum(plan.recv_rows)
        self.x = self.send if plan.in_order else self._new(rows, x_TD)
        self.y = self._new(rows, x_TD)
        self.h = workspace.empty((rows, weights.w_in.shape[1]), like=x_TD)
        self.back = self.y if plan.in_order else self._new(self.send.shape[0], x_TD)

    def outgoing(self, c: int) -> torch.Tensor:
        """The rows of chunk c to send."""
        return self._of(self.send, c)

    def incoming(self, c: int) -> torch.Tensor | None:
        """Where the rows of chunk c come back; None: anywhere, as those in order may be there."""
        return None if self.plan.in_order else self._of(self.back, c)

    def returned(self, c: int, rows: torch.Tensor) -> None:
        """The rows of chunk c have come back."""
        self._settle(rows, self._of(self.back, c))

    def experts(self, c: int, received: torch.Tensor) -> torch.Tensor:
        """E of chunk c: the received rows through this rank's experts, in the order in which they came."""
        self._put(received, c, self.x)
        starts, ends = self.expert_rows(c)
        for w_in, w_out, seats in self.weights.parts(c):
            raw.expert_mlp_forward(Forward(self.x, w_in, w_out, ends[seats], starts[seats], self.weights.kind,
                                           self.y, self.h, self.num_sms))  # fmt: skip
        return self._take(self.y, c)

    def combine(self) -> torch.Tensor:
        """U: y[t] = sum over k, in order, of weights[t, k] * returned row of (t, k)."""
        y_TD: torch.Tensor = raw.combine(self.back, self.slot_to_row, self._weights_TK, None)
        return y_TD

    def saved(self, backward: Tables) -> Saved:
        w = self.weights
        alike = backward is self.tables
        slot_to_dback = self.slot_to_row if alike else send_order(backward, self._slots_TK)[0]
        return Saved(back=self.back, slot_to_row=self.slot_to_row, slot_to_dback=slot_to_dback,
                     weights_TK=self._weights_TK, x=self.x, h=self.h, w_in=w.w_in, w_out=w.w_out,
                     copied=w.copied or ())  # fmt: skip


class BackwardRows(_Chunks):
    """The backward actions Ut, Ed, Ew, Pt. Made by Ut; lives until the gradients are handed over.

    `over_h`: the gradient of h is written over h, which nobody needs again. `loaded`: where the weights are in host
    memory, what brings them up; their gradients are then made by groups (`group_gradient`).
    """

    def __init__(
        self,
        tables: Tables,
        saved: Saved,
        kind: str,
        dy_TD: torch.Tensor | None,
        *,
        need_dx: bool,
        need_dw: bool,
        over_h: bool,
        num_sms: int | None,
        loaded: Loaded | None = None,
    ) -> None:
        super().__init__(tables, num_sms)
        plan = self.plan
        self.saved, self._loaded = saved, loaded
        self.kind = kind
        if dy_TD is None:
            dy_TD = saved.back.new_zeros(saved.slot_to_row.shape[0], saved.back.shape[1])
        # Gradients may arrive with stride 0 (from an expand or a sum).
        back = self._back_in_order()
        self.dback, self.dweights_TK = raw.combine_backward(
            dy_TD.contiguous(), back, saved.slot_to_dback, saved.weights_TK, back.shape[0]
        )
        x, h = saved.x, saved.h
        self.dy = self.dback if plan.in_order else self._new(x.shape[0], x)
        self.dx = self._new(x.shape[0], x)
        self.need_dx = need_dx
        self.dsend = self.dx if plan.in_order or not need_dx else self._new(self.dback.shape[0], x)
        self.dh = h if over_h else workspace.empty(h.shape, like=h)
        self.a = workspace.empty((x.shape[0], saved.w_out.shape[2]), like=x)
        self.dw_in = workspace.empty(saved.w_in.shape, like=saved.w_in, rows=False) if need_dw else None
        self.dw_out = workspace.empty(saved.w_out.shape, like=saved.w_out, rows=False) if need_dw else None

    def _back_in_order(self) -> torch.Tensor:
        """The returned rows of forward in the send order of backward."""
        s = self.saved
        if s.slot_to_dback.data_ptr() == s.slot_to_row.data_ptr():
            return s.back
        rows = s.back.shape[0]
        used = s.slot_to_row >= 0
        # Unused slots write to one row more: no selection whose size the host would have to know. Unused rows (of fixed
        # shapes) read row 0, and nobody reads them.
        order = torch.zeros(rows + 1, dtype=torch.int64, device=s.back.device)
        order[torch.where(used, s.slot_to_dback, rows).long().reshape(-1)] = s.slot_to_row.long().reshape(-1)
        packed: torch.Tensor = raw.pack(s.back, order[:rows])
        return packed

    def outgoing(self, c: int) -> torch.Tensor:
        """The gradients of chunk c to send."""
        return self._of(self.dback, c)

    def incoming(self, c: int) -> torch.Tensor | None:
        """Where the gradients of chunk c come back; None: anywhere, as those in order may be there."""
        return None if self.plan.in_order else self._of(self.dsend, c)

    def returned(self, c: int, rows: torch.Tensor) -> None:
        """The gradients of chunk c have come back."""
        self._settle(rows, self._of(self.dsend, c))

    def dgrad(self, c: int, received: torch.Tensor) -> torch.Tensor | None:
        """Ed of chunk c: the gradients of the experts' outputs into those of their inputs, in the order they came.

        None where no rank wants the gradient of x.
        """
        self._put(received, c, self.dy)
        starts, ends = self.expert_rows(c)
        s = self.saved
        parts = parts_of(s.w_in, s.w_out, *s.copied) if self._loaded is None else self._loaded.parts(c)
        for w_in, w_out, seats in parts:
            raw.expert_mlp_dgrad(Dgrad(self.dy, s.h, w_in, w_out, ends[seats], starts[seats], self.kind, self.dx,
                                       self.dh, self.a, self.num_sms))  # fmt: skip
        return self._take(self.dx, c) if self.need_dx else None

    def weight_gradient(self, first: int, last: int) -> None:
        """Ew of this rank's experts first .. last-1: one matmul an expert over the rows of all chunks."""
        if self.dw_in is not None and self.dw_out is not None:
            offs = self.tables.one("expert_offs")[: self.dw_in.shape[0]]
            raw.expert_mlp_wgrad(Wgrad(self.saved.x, self.dy, self.dh, self.a, offs, None, self.dw_in, self.dw_out,
                                       (first, last), self.num_sms))  # fmt: skip

    def group_gradient(self, first: int, last: int, dw_in: torch.Tensor, dw_out: torch.Tensor) -> None:
        """Ew of the same experts into buffers of their own, [last - first, ...]."""
        ends = self.tables.one("expert_offs")
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        raw.expert_mlp_wgrad(Wgrad(self.saved.x, self.dy, self.dh, self.a, ends[first:last], starts[first:last], dw_in,
                                   dw_out, (0, last - first), self.num_sms))  # fmt: skip

    def gradient_rows(self) -> GradientRows:
        """What the weight gradients of single experts are made of."""
        offs = self.plan.expert_offs.tolist()
        return GradientRows(self.saved.x, self.dy, self.dh, self.a, offs, None, self.num_sms)

    def dx_TD(self) -> torch.Tensor:
        """Pt: dx[t] = sum over k, in order, of the gradient of the row of (t, k)."""
        dx_TD: torch.Tensor = raw.combine(self.dsend, self.saved.slot_to_dback, None, None)
        return dx_TD
