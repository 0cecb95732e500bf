"""grouped_mm: one matmul per expert over the rows of that expert.

y[rows of i] = a[rows of i] @ b[i].T (`transpose_b`, weights in the Hugging Face layout) or a @ b[i]. torch's own
grouped matmul has no float64 on CPU, leaves the rows past offs[-1] uninitialised and has a shape function for bf16
only; hence this operator with its own.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.ops import checks, registry, workspace
from moe_overlap.ops.library import cast_under_autocast, define, differentiate, implement, refuse_derivative
from moe_overlap.ops.row_groups import Groups, aligned, clear_others


def grouped_mm(
    a_RK: torch.Tensor, b_ENK: torch.Tensor, offs: torch.Tensor, *, transpose_b: bool = True
) -> torch.Tensor:
    """Rows times the matrix of their expert.

    Args:
        a_RK: [R, K] in the order by expert.
        b_ENK: [E, N, K], or [E, K, N] with transpose_b=False; dtype of a.
        offs: int32 [E], inclusive ends of the rows of each expert.

    Returns:
        [R, N], rows from offs[-1] on zero; differentiable in a and b. Under autocast a and b are cast to its dtype.

    Raises:
        ConfigError: naming the argument, its value and what was expected.
    """
    checks.check_tensor("a", a_RK, (None, None), checks.FLOATS, what="[R, K]")
    dtypes = checks.FLOATS if checks.autocast_on(a_RK.device) else (a_RK.dtype,)
    inner = a_RK.shape[1]
    shape, what = ((None, None, inner), "[E, N, K]") if transpose_b else ((None, inner, None), "[E, K, N]")
    checks.check_tensor("b", b_ENK, shape, dtypes, what=what, device=a_RK.device)
    checks.check_tensor("offs", offs, (b_ENK.shape[0],), torch.int32, what="[E]", device=a_RK.device)
    return torch.ops.moe_overlap.grouped_mm.default(a_RK, b_ENK, offs, transpose_b)


def _grouped_mm(a_RK: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, transpose_b: bool) -> torch.Tensor:
    groups, a_RK = Groups(offs, None, a_RK.shape[0], b.shape[0]), aligned(a_RK)
    y_RN = workspace.empty((a_RK.shape[0], b.shape[1 if transpose_b else 2]), like=a_RK)
    matrices = b.transpose(1, 2) if transpose_b else b
    for (expert, _, _), a, y in zip(groups.hits, groups.cut(a_RK), groups.cut(y_RN), strict=True):
        torch.mm(a, matrices[expert], out=y)
    y_RN[groups.used :].zero_()
    return y_RN


def _grouped_mm_wgrad(dy_RN: torch.Tensor, a_RK: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """dy_i.T @ a_i for each expert, [E, N, K]; zeros for an expert without rows."""
    groups = Groups(offs, None, a_RK.shape[0], offs.shape[0])
    dy_RN, a_RK = aligned(dy_RN), aligned(a_RK)
    db = workspace.empty((offs.shape[0], dy_RN.shape[1], a_RK.shape[1]), like=a_RK, rows=False)
    for (expert, _, _), dy, a in zip(groups.hits, groups.cut(dy_RN), groups.cut(a_RK), strict=True):
        torch.mm(dy.t(), a, out=db[expert])
    clear_others(groups, db, 0, db.shape[0])
    return db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a_RK, b, offs, ctx.transpose_b = inputs
    ctx.save_for_backward(a_RK if ctx.needs_input_grad[1] else None, b, offs)


def _backward(ctx: Any, dy_RN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a_RK, b, offs = ctx.saved_tensors
    da = db = None
    if ctx.needs_input_grad[0]:
        da = torch.ops.moe_overlap.grouped_mm.default(dy_RN, b, offs, not ctx.transpose_b)
    if ctx.needs_input_grad[1]:
        left, right = (dy_RN, a_RK) if ctx.transpose_b else (a_RK, dy_RN)
        db = torch.ops.moe_overlap.grouped_mm_wgrad.default(left, right, offs)
    return da, db, None, None


define("grouped_mm(Tensor a, Tensor b, Tensor offs, bool transpose_b) -> Tensor")
define("grouped_mm_wgrad(Tensor dy, Tensor a, Tensor offs) -> Tensor")
registry.add("grouped_mm", "reference", _grouped_mm, merit="a loop of matmuls over experts, runs everywhere")
registry.add("grouped_mm_wgrad", "reference", _grouped_mm_wgrad, merit="a loop of matmuls, runs everywhere")
implement(
    "grouped_mm",
    registry.kernel("grouped_mm"),
    lambda a_RK, b, offs, transpose_b: a_RK.new_empty((a_RK.shape[0], b.shape[1 if transpose_b else 2])),
)
implement(
    "grouped_mm_wgrad",
    registry.kernel("grouped_mm_wgrad"),
    lambda dy_RN, a_RK, offs: a_RK.new_empty((offs.shape[0], dy_RN.shape[1], a_RK.shape[1])),
)
differentiate("grouped_mm", _backward, _setup_context)
refuse_derivative("grouped_mm_wgrad")
cast_under_autocast("grouped_mm", lower=(0, 1))
