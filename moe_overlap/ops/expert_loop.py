"""The expert MLP as a loop over experts: plain matmuls on contiguous slices of rows, into buffers that exist.

These are the raw pieces the schedule's stages are made of; they know nothing of autograd. Rows of expert i are
[starts[i], ends[i]); with starts = None the groups are adjacent and `ends` is `offs` of row_map. A weight is used as it
lies: y = x @ w.T, no transposed copy. Operands begin at multiples of 64 bytes, since a BLAS may round differently
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, workspace
from moe_overlap.ops.activation import backward_into, forward_into, width

Bounds = torch.Tensor | Sequence[int]
ALIGNMENT_BYTES = 64


def expert_mlp_forward(
    x_RD: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: Bounds,
    *,
    starts: Bounds | None = None,
    kind: str,
    y: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = act(x @ w_in.T) @ w_out.T for the rows of each expert.

    Args:
        x_RD: [R, D]. w_in: [e, F', D] (F' = 2F for swiglu). w_out: [e, D, F]. One dtype.
        ends, starts: int32 [e] or integers, the row ranges of the experts.
        kind: the activation.
        y, h: buffers [R, D] and [R, F'] to write, in the ranges only. None: new ones, zero outside the ranges.

    Returns:
        (y_RD, h_RF'), h being the pre-activation that the backward needs.

    Raises:
        ConfigError: shapes, dtypes or ranges that do not match.
    """
    ranges = row_ranges(ends, starts, x_RD.shape[0], w_in.shape[0])
    _check_weights(x_RD, w_in, w_out, kind)
    with torch.no_grad():
        x_RD = aligned(x_RD)
        y = _buffer("y", y, (x_RD.shape[0], w_out.shape[1]), x_RD, ranges)
        h = _buffer("h", h, (x_RD.shape[0], w_in.shape[1]), x_RD, ranges)
        a_nF = workspace.empty((longest(ranges), w_out.shape[2]), like=x_RD)
        for (begin, end), w_in_FD, w_out_DF in zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
            if begin < end:
                a = a_nF[: end - begin]
                torch.mm(x_RD[begin:end], w_in_FD.t(), out=h[begin:end])
                forward_into(h[begin:end], kind, a)
                torch.mm(a, w_out_DF.t(), out=y[begin:end])
    return y, h


def expert_mlp_dgrad(
    dy_RD: torch.Tensor,
    h_RF: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: Bounds,
    *,
    starts: Bounds | None = None,
    kind: str,
    dx: torch.Tensor | None = None,
    dh: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient with respect to the rows, and what the weight gradient needs.

    Args:
        dy_RD: [R, D], may be expanded (stride 0). h_RF: what the forward returned. The rest as in the forward.
        dx, dh, a: buffers [R, D], [R, F'] and [R, F], written in the ranges only. None: new ones, zero elsewhere.

    Returns:
        (dx_RD, dh_RF', a_RF), with a = act(h) computed again.
    """
    ranges = row_ranges(ends, starts, dy_RD.shape[0], w_in.shape[0])
    _check_weights(dy_RD, w_in, w_out, kind)
    with torch.no_grad():
        dy_RD, rows = aligned(dy_RD), dy_RD.shape[0]
        dx = _buffer("dx", dx, (rows, w_in.shape[2]), dy_RD, ranges)
        dh = _buffer("dh", dh, (rows, w_in.shape[1]), dy_RD, ranges)
        a = _buffer("a", a, (rows, w_out.shape[2]), dy_RD, ranges)
        da_nF = da_buffer(kind, ranges, w_out, dy_RD)
        for (begin, end), w_in_FD, w_out_DF in zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
            if begin < end:
                dh_e = dh[begin:end]
                da = dh_e if da_nF is None else da_nF[: end - begin]
                torch.mm(dy_RD[begin:end], w_out_DF, out=da)
                backward_into(da, h_RF[begin:end], kind, dh_e, a[begin:end])
                torch.mm(dh_e, w_in_FD, out=dx[begin:end])
    return dx, dh, a


def expert_mlp_wgrad(
    x_RD: torch.Tensor,
    dy_RD: torch.Tensor,
    dh_RF: torch.Tensor,
    a_RF: torch.Tensor,
    ends: Bounds,
    *,
    starts: Bounds | None = None,
    dw_in: torch.Tensor,
    dw_out: torch.Tensor,
    experts: tuple[int, int] | None = None,
) -> None:
    """dw_in[i] = dh_i.T @ x_i and dw_out[i] = dy_i.T @ a_i, into buffers; zeros for an expert without rows.

    Args:
        x_RD, dy_RD, dh_RF, a_RF: the rows of the forward and of `expert_mlp_dgrad`.
        ends, starts: the row ranges of all experts.
        dw_in: [e, F', D]. dw_out: [e, D, F]. Overwritten for the experts asked for.
        experts: (first, last), the experts first .. last-1; None: all.
    """
    ranges = row_ranges(ends, starts, x_RD.shape[0], dw_in.shape[0])
    first, last = (0, len(ranges)) if experts is None else experts
    if not 0 <= first <= last <= len(ranges):
        raise ConfigError("experts", experts, f"0 <= first <= last <= {len(ranges)}")
    with torch.no_grad():
        x_RD, dy_RD = aligned(x_RD), aligned(dy_RD)
        for i in range(first, last):
            begin, end = ranges[i]
            weight_gradient(dh_RF[begin:end], x_RD[begin:end], dw_in[i])
            weight_gradient(dy_RD[begin:end], a_RF[begin:end], dw_out[i])


def weight_gradient(d_nN: torch.Tensor, rows_nK: torch.Tensor, dw_NK: torch.Tensor) -> None:
    """dw = d.T @ rows for one expert; zeros where it has no rows."""
    if d_nN.shape[0] == 0:
        dw_NK.zero_()
    else:
        torch.mm(d_nN.t(), rows_nK, out=dw_NK)


def row_ranges(ends: Bounds, starts: Bounds | None, num_rows: int, experts: int) -> list[tuple[int, int]]:
    """The (begin, end) of each expert as integers, checked against the rows there are."""
    stops = ends.tolist() if isinstance(ends, torch.Tensor) else list(ends)
    if starts is None:
        begins = [0, *stops[:-1]] if stops else []
    else:
        begins = starts.tolist() if isinstance(starts, torch.Tensor) else list(starts)
    if len(stops) != experts or len(begins) != experts:
        raise ConfigError("starts, ends", (len(begins), len(stops)), f"one entry per expert, {experts}")
    for begin, end in zip(begins, stops, strict=True):
        if not 0 <= begin <= end <= num_rows:
            raise ConfigError("starts, ends", (begin, end), f"0 <= start <= end <= {num_rows} rows")
    return list(zip(begins, stops, strict=True))


def longest(ranges: Sequence[tuple[int, int]]) -> int:
    """Rows of the expert with the most."""
    return max((end - begin for begin, end in ranges), default=0)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """The tensor itself when it is contiguous and begins at a multiple of 64 bytes, else a copy that does."""
    if rows.is_contiguous() and rows.data_ptr() % ALIGNMENT_BYTES == 0:
        return rows
    return workspace.empty(rows.shape, like=rows).copy_(rows)


def da_buffer(
    kind: str, ranges: Sequence[tuple[int, int]], w_out: torch.Tensor, like: torch.Tensor
) -> torch.Tensor | None:
    """Room for da of one expert where it cannot be written into dh: swiglu, whose dh is twice as wide."""
    return workspace.empty((longest(ranges), w_out.shape[2]), like=like) if kind == "swiglu" else None


def _buffer(
    field: str,
    given: torch.Tensor | None,
    shape: tuple[int, int],
    like: torch.Tensor,
    ranges: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """The buffer given, checked, or a new one that is zero outside the ranges."""
    if given is not None:
        checks.check_tensor(field, given, shape, like.dtype, what="[rows, width]", device=like.device)
        return given
    buffer = workspace.empty(shape, like=like)
    position = 0
    for begin, end in sorted(ranges):
        if begin > position:
            buffer[position:begin].zero_()
        position = max(position, end)
    buffer[position:].zero_()
    return buffer


def _check_weights(rows: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, kind: str) -> None:
    """Rows [R, D], w_in [e, F', D], w_out [e, D, F], one dtype."""
    checks.check_kind(kind)
    checks.check_tensor("x", rows, (None, None), checks.FLOATS, what="[R, D]")
    hidden = rows.shape[1]
    checks.check_tensor("w_in", w_in, (None, None, hidden), rows.dtype, what="[e, F', D]", device=rows.device)
    checks.check_tensor(
        "w_out",
        w_out,
        (w_in.shape[0], hidden, width(w_in.shape[1], kind)),
        rows.dtype,
        what="[e, D, F]",
        device=rows.device,
    )
