"""The weights of a step's experts: those of this rank's parameters, and copies of other ranks' ones.

Seats of a rank are its homes and then its copies (`agreement/seats.py`), so their rows are two ranges of the experts'
buffer, and each range has weights of its own: parameters are never copied to stand beside copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from moe_overlap.ops import raw
from moe_overlap.ops.checks import accumulation_dtype
from moe_overlap.ops.expert_mlp_contract import Wgrad


class Part(NamedTuple):
    """The weights of some seats next to each other."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    seats: slice


class Loaded(Protocol):
    """Experts in host memory: see `schedule/host_experts.py`."""

    def parts(self, chunk: int) -> Iterator[Part]: ...


@dataclass(kw_only=True)
class ExpertWeights:
    """The stacked weights of this rank's experts, in the dtype of the rows. `grad_scale` multiplies their gradients.
    `copied`: (w_in, w_out) of its copies, once they are there (None: it has none). `loaded`: where w_in and w_out are
    in the host's memory, what brings them to the device."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    kind: str
    grad_scale: float = 1.0
    copied: tuple[torch.Tensor, torch.Tensor] | None = None
    loaded: Loaded | None = None

    def parts(self, chunk: int) -> Iterator[Part]:
        """Homes and copies, those that there are, or those of a chunk that are loaded."""
        if self.loaded is not None:
            return self.loaded.parts(chunk)
        return parts_of(self.w_in, self.w_out, *(self.copied or ()))


def parts_of(w_in: torch.Tensor, w_out: torch.Tensor, *copied: torch.Tensor) -> Iterator[Part]:
    """copied: nothing, or w_in and w_out of the copies."""
    homes = w_in.shape[0]
    if homes:
        yield Part(w_in, w_out, slice(0, homes))
    if copied and copied[0].shape[0]:
        yield Part(copied[0], copied[1], slice(homes, homes + copied[0].shape[0]))


def row_width(w_in: torch.Tensor, w_out: torch.Tensor) -> int:
    """Elements of one expert."""
    return w_in.shape[1] * w_in.shape[2] + w_out.shape[1] * w_out.shape[2]


def as_rows(w_in: torch.Tensor, w_out: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """[len(experts), width]: the weights of some experts of a stack, w_in first."""
    rows = w_in.new_empty(len(experts), row_width(w_in, w_out))
    for row, expert in zip(rows, experts, strict=True):
        fill_row(row, w_in[expert], w_out[expert])
    return rows


def fill_row(row: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> None:
    """The weights of one expert, [F', D] and [D, F], into its row."""
    row[: w_in.numel()].view(w_in.shape).copy_(w_in)
    row[w_in.numel() :].view(w_out.shape).copy_(w_out)


def of_rows(rows: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(w_in, w_out) of rows, views; w_in and w_out of other experts say the shapes."""
    first, second = rows.split([w_in.shape[1] * w_in.shape[2], w_out.shape[1] * w_out.shape[2]], dim=1)
    return first.view(-1, *w_in.shape[1:]), second.view(-1, *w_out.shape[1:])


class GradientRows(NamedTuple):
    """What weight gradients are made of, by expert: see `ops.expert_mlp_wgrad`. offs: integers, one for each seat."""

    x: torch.Tensor
    dy: torch.Tensor
    dh: torch.Tensor
    a: torch.Tensor
    offs: Sequence[int]
    row_R: torch.Tensor | None
    num_sms: int | None

    def wide(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(dw_in [n, F', D], dw_out [n, D, F]) of the seats first .. last-1 in the dtype of sums: float32, or float64,
        before any rounding to the dtype of the weights."""
        begin = self.offs[first - 1] if first else 0
        end = self.offs[last - 1] if last else 0
        dtype = accumulation_dtype(self.x.dtype)
        x, dy = (self._rows(rows, begin, end).to(dtype) for rows in (self.x, self.dy))
        dh, a = (rows[begin:end].to(dtype) for rows in (self.dh, self.a))
        dw_in = x.new_empty(last - first, dh.shape[1], x.shape[1])
        dw_out = x.new_empty(last - first, x.shape[1], a.shape[1])
        ends = [offset - begin for offset in self.offs[first:last]]
        if ends:
            raw.expert_mlp_wgrad(Wgrad(x, dy, dh, a, ends, None, dw_in, dw_out, (0, len(ends)), self.num_sms))
        return dw_in, dw_out

    def _rows(self, rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return rows[begin:end] if self.row_R is None else rows.index_select(0, self.row_R[begin:end])
