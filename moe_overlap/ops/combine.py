"""combine: the weighted sum of each token's expert rows, back in token order.

y_TD[t] = sum over k of weights[t, k] * y_RD[slot_to_row[t, k]] + residual[t], in a fixed order (k = 0, 1, ..., then the
residual), summed in float32 (float64 for float64) and rounded once to the dtype of y. It is a gather, not a scatter, so
no atomics are needed and the result is the same run after run.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, compiled, maps, registry, workspace
from moe_overlap.ops.library import define, differentiate, implement, refuse_derivative

_ROWS_OF_Y = "-1 = no row, the rows of y are the end"
_NUM_ROWS = "-1 = no row, num_rows is the end"


def combine(
    y_RD: torch.Tensor,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None = None,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of each token's rows.

    Args:
        y_RD: [R, D], any float dtype.
        slot_to_row_TK: int32 [T, K] from row_map, -1 = no row (adds nothing, whatever its weight).
        weights_TK: [T, K] float32 or float64; None: every weight is 1.
        residual_TD: [T, D], any float dtype, added last.

    Returns:
        y_TD [T, D] in y's dtype, differentiable in y, weights and residual.

    Raises:
        ConfigError: shapes or dtypes that do not match, or (on CPU) a row that y does not have.
    """
    checks.check_tensor("y", y_RD, (None, None), checks.FLOATS, what="[R, D]")
    device = y_RD.device
    checks.check_tensor("slot_to_row", slot_to_row_TK, (None, None), torch.int32, what="[T, K]", device=device)
    _check_weights(weights_TK, slot_to_row_TK, device)
    if residual_TD is not None:
        shape = (slot_to_row_TK.shape[0], y_RD.shape[1])
        checks.check_tensor("residual", residual_TD, shape, checks.FLOATS, what="[T, D]", device=device)
    return torch.ops.moe_overlap.combine.default(y_RD, slot_to_row_TK, weights_TK, residual_TD)


def combine_backward(
    dy_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None = None,
    *,
    num_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of combine. No autograd; the gradient of the residual is `dy_TD` itself.

    Args:
        dy_TD: [T, D], may be expanded (stride 0).
        y_RD: the rows combine was given; None when the gradient of the weights is not wanted.
        slot_to_row_TK, weights_TK: as in combine.
        num_rows: rows of the result where y_RD is None.

    Returns:
        dy_RD [R, D] in the dtype of dy (rows without a slot are zero) and dweights_TK in the dtype of the weights, or
        None when there are no weights or no y_RD.
    """
    checks.check_tensor("dy", dy_TD, (None, None), checks.FLOATS, what="[T, D]")
    checks.check_tensor(
        "slot_to_row", slot_to_row_TK, (dy_TD.shape[0], None), torch.int32, what="[T, K]", device=dy_TD.device
    )
    _check_weights(weights_TK, slot_to_row_TK, dy_TD.device)
    if y_RD is not None:
        checks.check_tensor("y", y_RD, (num_rows, dy_TD.shape[1]), checks.FLOATS, what="[R, D]", device=dy_TD.device)
        num_rows = y_RD.shape[0]
    if num_rows is None:
        raise ConfigError("num_rows", None, "the number of rows, where y is not given")
    dy_RD, dweights_TK = torch.ops.moe_overlap.combine_backward.default(
        dy_TD, y_RD, slot_to_row_TK, weights_TK, num_rows
    )
    return dy_RD, None if y_RD is None or weights_TK is None else dweights_TK


def _check_weights(weights_TK: torch.Tensor | None, slot_to_row_TK: torch.Tensor, device: torch.device) -> None:
    if weights_TK is not None:
        dtypes = (torch.float32, torch.float64)
        checks.check_tensor("weights", weights_TK, tuple(slot_to_row_TK.shape), dtypes, what="[T, K]", device=device)


def _combine(
    y_RD: torch.Tensor,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    residual_TD: torch.Tensor | None,
) -> torch.Tensor:
    checks.check_values("slot_to_row", slot_to_row_TK, -1, y_RD.shape[0], why=_ROWS_OF_Y)
    dtype = checks.accumulation_dtype(y_RD.dtype)
    sum_TD: torch.Tensor | None = None
    for k, rows_T in enumerate(slot_to_row_TK.unbind(1)):
        part_TD = maps.take_rows(y_RD, rows_T).to(dtype)
        if weights_TK is not None:
            # A slot without a row adds nothing even where its weight is NaN.
            weight_T = weights_TK[:, k].to(dtype).masked_fill(rows_T < 0, 0)
            part_TD.mul_(weight_T[:, None])
        sum_TD = part_TD if sum_TD is None else sum_TD.add_(part_TD)
    if sum_TD is None:
        sum_TD = torch.zeros(slot_to_row_TK.shape[0], y_RD.shape[1], dtype=dtype, device=y_RD.device)
    if residual_TD is not None:
        sum_TD.add_(residual_TD.to(dtype))
    return sum_TD.to(y_RD.dtype)


def _combine_cpp(
    y_RD: torch.Tensor,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    residual_TD: torch.Tensor | None,
) -> torch.Tensor:
    """The same sums in the same order, so the same bits, but for those of a NaN."""
    checks.check_values("slot_to_row", slot_to_row_TK, -1, y_RD.shape[0], why=_ROWS_OF_Y)
    out_TD = workspace.empty((slot_to_row_TK.shape[0], y_RD.shape[1]), like=y_RD)
    torch.ops.moe_overlap._combine_cpp.default(
        y_RD.contiguous(),
        slot_to_row_TK.contiguous(),
        None if weights_TK is None else compiled.in_accumulation_dtype(weights_TK, y_RD),
        None if residual_TD is None else residual_TD.contiguous(),
        out_TD,
    )
    return out_TD


def _combine_limit(
    y_RD: torch.Tensor, slot_to_row_TK: torch.Tensor, weights_TK: torch.Tensor | None, residual_TD: torch.Tensor | None
) -> str | None:
    if residual_TD is not None and residual_TD.dtype != y_RD.dtype:
        return f"a residual of {residual_TD.dtype} beside rows of {y_RD.dtype}"
    return None


def _combine_backward(
    dy_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    num_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why=_NUM_ROWS)
    dy_TD = dy_TD.contiguous()
    dtype = checks.accumulation_dtype(dy_TD.dtype)
    tokens, top_k = slot_to_row_TK.shape
    row_to_slot = maps.invert(slot_to_row_TK, num_rows)
    dy_RD = maps.take_rows(dy_TD, row_to_slot.div(max(1, top_k), rounding_mode="floor"))
    nothing = dy_TD.new_empty((0,))
    if weights_TK is None:
        return dy_RD, nothing
    if tokens == 0 or top_k == 0 or num_rows == 0:
        return dy_RD, nothing if y_RD is None else torch.zeros_like(weights_TK)
    if y_RD is not None:
        product_RD = workspace.empty(dy_RD.shape, like=dy_RD, dtype=dtype)
        dot_R = torch.mul(dy_RD.to(dtype), y_RD.to(dtype), out=product_RD).sum(dim=1)
        dweights_TK = dot_R[slot_to_row_TK.clamp(min=0)].masked_fill_(slot_to_row_TK < 0, 0).to(weights_TK.dtype)
    weight_R = weights_TK.reshape(-1).to(dtype).index_select(0, row_to_slot.clamp(min=0))
    dy_RD.mul_(weight_R.masked_fill_(row_to_slot < 0, 0)[:, None])
    return dy_RD, nothing if y_RD is None else dweights_TK


def _combine_backward_cpp(
    dy_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    num_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy has the bits of the reference; the dot products of dweights are summed in another order, that of D alone."""
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why=_NUM_ROWS)
    dy_TD, slot_to_row_TK = dy_TD.contiguous(), slot_to_row_TK.contiguous()
    dy_RD = workspace.empty((num_rows, dy_TD.shape[1]), like=dy_TD)
    if weights_TK is None:
        maps.refuse_twice(torch.ops.moe_overlap._permute_cpp.default(dy_TD, slot_to_row_TK, dy_RD))
        return dy_RD, dy_TD.new_empty((0,))
    weights = compiled.in_accumulation_dtype(weights_TK, dy_TD)
    dweights = None if y_RD is None else torch.empty_like(weights)
    y_RD = None if y_RD is None else y_RD.contiguous()
    twice = torch.ops.moe_overlap._combine_backward_cpp.default(dy_TD, y_RD, slot_to_row_TK, weights, dy_RD, dweights)
    maps.refuse_twice(twice)
    return dy_RD, dy_TD.new_empty((0,)) if dweights is None else dweights.to(weights_TK.dtype)


def _combine_backward_limit(dy_TD: torch.Tensor, y_RD: torch.Tensor | None, *rest: Any) -> str | None:
    if y_RD is not None and y_RD.dtype != dy_TD.dtype:
        return f"y of {y_RD.dtype} and dy of {dy_TD.dtype}"
    return None


def _combine_backward_fake(
    dy_TD: torch.Tensor,
    y_RD: torch.Tensor | None,
    slot_to_row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    num_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dy_RD = dy_TD.new_empty((num_rows, dy_TD.shape[1]))
    if weights_TK is None or y_RD is None:
        return dy_RD, dy_TD.new_empty((0,))
    return dy_RD, weights_TK.new_empty(weights_TK.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y_RD, slot_to_row_TK, weights_TK, residual_TD = inputs
    ctx.residual_dtype = None if residual_TD is None else residual_TD.dtype
    ctx.num_rows = y_RD.shape[0]
    wants_dweights = weights_TK is not None and ctx.needs_input_grad[2]
    ctx.save_for_backward(y_RD if wants_dweights else None, slot_to_row_TK, weights_TK)


def _backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    y_RD, slot_to_row_TK, weights_TK = ctx.saved_tensors
    dy_RD, dweights_TK = torch.ops.moe_overlap.combine_backward.default(
        dy_TD, y_RD, slot_to_row_TK, weights_TK, ctx.num_rows
    )
    dresidual_TD = dy_TD.to(ctx.residual_dtype) if ctx.residual_dtype is not None else None
    return dy_RD, None, dweights_TK if y_RD is not None else None, dresidual_TD


define("combine(Tensor y, Tensor slot_to_row, Tensor? weights, Tensor? residual) -> Tensor")
define(
    "combine_backward(Tensor dy, Tensor? y, Tensor slot_to_row, Tensor? weights, SymInt num_rows) -> (Tensor, Tensor)"
)
# Their implementations are in the compiled part, where there is one; see csrc/bindings. The second returns a row that
# two slots point to, or -1.
define("_combine_cpp(Tensor y, Tensor slot_to_row, Tensor? weights, Tensor? residual, Tensor(a!) out) -> ()")
define(
    "_combine_backward_cpp(Tensor dy, Tensor? y, Tensor slot_to_row, Tensor weights, Tensor(a!) dy_rows, "
    "Tensor(b!)? dweights) -> int"
)
registry.add(
    "combine",
    "cpp",
    _combine_cpp,
    obstacle=compiled.obstacle("combine"),
    limit=_combine_limit,
    merit="compiled: each row is read once, and the sum stays in cache",
)
registry.add(
    "combine_backward",
    "cpp",
    _combine_backward_cpp,
    obstacle=compiled.obstacle("combine_backward"),
    limit=_combine_backward_limit,
    merit="compiled: rows and dot products in one pass",
)
registry.add("combine", "reference", _combine, merit="pure PyTorch, runs everywhere")
registry.add("combine_backward", "reference", _combine_backward, merit="pure PyTorch, runs everywhere")
implement(
    "combine",
    registry.kernel("combine"),
    lambda y_RD, slot_to_row_TK, weights_TK, residual_TD: y_RD.new_empty((slot_to_row_TK.shape[0], y_RD.shape[1])),
)
implement("combine_backward", registry.kernel("combine_backward"), _combine_backward_fake)
differentiate("combine", _backward, _setup_context)
refuse_derivative("combine_backward")
