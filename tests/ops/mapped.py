"""Rows that several experts read, with a factor each: the pieces of the expert MLP, and their dense float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_overlap import ops
from tests import oracle
from tests.ops.cases import randn, rng, weights

READ, ROWS, HIDDEN, FFN = 7, 40, 24, 16
"""N, R, D and F."""

MARK = 7.0
BOUNDS: dict[str, tuple[list[int] | None, list[int]]] = {
    "adjacent": (None, [13, 26, 40]),
    "empty experts and a tail": (None, [0, 23, 23, 31]),
    "apart": ([21, 0, 19], [38, 17, 19]),
    "nobody": (None, [0, 0]),
}


@dataclass(frozen=True)
class Mapped:
    """x and dy [N, D], weights, rows int32 [R] with duplicates, scale [R] with zeros and negative entries."""

    x: Tensor
    dy: Tensor
    w_in: Tensor
    w_out: Tensor
    rows: Tensor
    scale: Tensor
    kind: str
    starts: list[int] | None
    ends: list[int]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        begins = [0, *self.ends[:-1]] if self.starts is None else self.starts
        return list(zip(begins, self.ends, strict=True))

    @property
    def inside(self) -> list[int]:
        return [row for begin, end in self.ranges for row in range(begin, end)]

    @property
    def outside(self) -> list[int]:
        return sorted(set(range(ROWS)) - set(self.inside))


def mapped(kind: str, dtype: torch.dtype, bounds: str, *, ffn: int = FFN, hidden: int = HIDDEN) -> Mapped:
    """A call. What lies outside the groups is no row of x, and a scale of NaN: nobody may read it."""
    starts, ends = BOUNDS[bounds]
    w_in, w_out = weights(len(ends), hidden, ffn, kind, dtype)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = randn(ROWS, dtype=scale_dtype, seed=7)
    scale[3::5] = 0.0
    rows = torch.randint(0, READ, (ROWS,), generator=rng(8)).int()
    x, dy = randn(READ, hidden, dtype=dtype), randn(READ, hidden, dtype=dtype, seed=5)
    made = Mapped(x, dy, w_in, w_out, rows, scale, kind, starts, ends)
    rows[made.outside], scale[made.outside] = 1 << 30, torch.nan
    return made


def run(case: Mapped, *, mark: float | None = None, in_place: bool = False) -> dict[str, Tensor]:
    """Everything that the three pieces write, by name; into buffers full of `mark`, or (None) new ones."""

    def buffer(*shape: int, dtype: torch.dtype = case.x.dtype) -> Tensor | None:
        return None if mark is None else torch.full(shape, mark, dtype=dtype)

    hidden, ffn, width = case.x.shape[1], case.w_out.shape[2], case.w_in.shape[1]
    y, h = ops.expert_mlp_forward(
        case.x, case.w_in, case.w_out, case.ends, starts=case.starts, kind=case.kind, rows=case.rows, scale=case.scale,
        y=buffer(ROWS, hidden), h=buffer(ROWS, width),
    )  # fmt: skip
    saved = h.clone()
    result = ops.expert_mlp_dgrad(
        case.dy, h, case.w_in, case.w_out, case.ends, starts=case.starts, kind=case.kind, rows=case.rows,
        scale=case.scale, dx=buffer(ROWS, hidden), dh=h if in_place else buffer(ROWS, width), a=buffer(ROWS, ffn),
        dscale=buffer(ROWS, dtype=case.scale.dtype),
    )  # fmt: skip
    assert result.dscale is not None and (result.dh is h) == in_place
    dw_in, dw_out = torch.full_like(case.w_in, MARK), torch.full_like(case.w_out, MARK)
    ops.expert_mlp_wgrad(
        case.x, case.dy, result.dh, result.a, case.ends, starts=case.starts, rows=case.rows, dw_in=dw_in, dw_out=dw_out
    )
    return {"y": y, "h": saved, "dx": result.dx, "dh": result.dh, "a": result.a, "dscale": result.dscale,
            "dw_in": dw_in, "dw_out": dw_out}  # fmt: skip


def wanted(case: Mapped) -> dict[str, Tensor]:
    """What of it has an oracle: y, dx, dscale (rows in groups only, in the order of `inside`), dw_in, dw_out."""
    index = case.rows[case.inside].long()
    x = case.x.double()[index].requires_grad_()
    scale = case.scale.double()[case.inside].requires_grad_()
    w_in, w_out = (weight.double().requires_grad_() for weight in (case.w_in, case.w_out))
    outputs, done = [torch.zeros(0, x.shape[1], dtype=torch.float64)], 0
    for expert, (begin, end) in enumerate(case.ranges):
        some = slice(done, done + end - begin)
        outputs.append(oracle.mlp(x[some], w_in[expert], w_out[expert], case.kind) * scale[some, None])
        done += end - begin
    y = torch.cat(outputs)
    leaves = {"dx": x, "dscale": scale, "dw_in": w_in, "dw_out": w_out}
    loss = (y * case.dy.double()[index]).sum() + sum(0 * leaf.sum() for leaf in leaves.values())
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}
