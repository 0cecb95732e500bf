"""The raw pieces of the expert MLP that the schedule's stages are made of; they know nothing of autograd.

Rows of expert i are [starts[i], ends[i]); with starts = None the groups are adjacent and `ends` is `offs` of row_map.
Each piece is an entry of the registry. The references here are loops over experts: plain matmuls on contiguous slices
of rows, into buffers that exist. A weight is used as it lies: y = x @ w.T, no transposed copy. Operands begin at
multiples of 64 bytes, since a BLAS may round differently otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, expert_mlp_choice, registry, workspace
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
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = act(x @ w_in.T) @ w_out.T for the rows of each expert.

    Args:
        x_RD: [R, D]. w_in: [e, F', D] (F' = 2F for swiglu). w_out: [e, D, F]. One dtype.
        ends, starts: int32 [e] or integers, the row ranges of the experts.
        kind: the activation.
        y, h: buffers [R, D] and [R, F'] to write, in the ranges only. None: new ones, zero outside the ranges.
        num_sms: multiprocessors a kernel may use, a hint for GPU implementations; the CPU has none.

    Returns:
        (y_RD, h_RF'), h being the pre-activation that the backward needs.

    Raises:
        ConfigError: shapes, dtypes or ranges that do not match.
    """
    _check_weights(x_RD, w_in, w_out, kind)
    rows = x_RD.shape[0]
    _check_buffers(x_RD, y=(y, (rows, w_out.shape[1])), h=(h, (rows, w_in.shape[1])))
    with torch.no_grad():
        result: tuple[torch.Tensor, torch.Tensor] = _run_forward(x_RD, w_in, w_out, ends, starts, kind, y, h, num_sms)
    return result


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
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient with respect to the rows, and what the weight gradient needs.

    Args:
        dy_RD: [R, D], may be expanded (stride 0). h_RF: what the forward returned. The rest as in the forward.
        dx, dh, a: buffers [R, D], [R, F'] and [R, F], written in the ranges only. None: new ones, zero elsewhere.

    Returns:
        (dx_RD, dh_RF', a_RF), with a = act(h) computed again.
    """
    _check_weights(dy_RD, w_in, w_out, kind)
    rows = dy_RD.shape[0]
    _check_buffers(dy_RD, dx=(dx, (rows, w_in.shape[2])), dh=(dh, (rows, w_in.shape[1])), a=(a, (rows, w_out.shape[2])))
    with torch.no_grad():
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _run_dgrad(
            dy_RD, h_RF, w_in, w_out, ends, starts, kind, dx, dh, a, num_sms
        )
    return result


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
    num_sms: int | None = None,
) -> None:
    """dw_in[i] = dh_i.T @ x_i and dw_out[i] = dy_i.T @ a_i, into buffers; zeros for an expert without rows.

    Args:
        x_RD, dy_RD, dh_RF, a_RF: the rows of the forward and of `expert_mlp_dgrad`.
        ends, starts: the row ranges of all experts.
        dw_in: [e, F', D]. dw_out: [e, D, F]. Overwritten for the experts asked for.
        experts: (first, last), the experts first .. last-1; None: all.
    """
    first, last = experts = (0, dw_in.shape[0]) if experts is None else experts
    if not 0 <= first <= last <= dw_in.shape[0]:
        raise ConfigError("experts", experts, f"0 <= first <= last <= {dw_in.shape[0]}")
    with torch.no_grad():
        _run_wgrad(x_RD, dy_RD, dh_RF, a_RF, ends, starts, dw_in, dw_out, experts, num_sms)


def _forward(
    x_RD: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: Bounds,
    starts: Bounds | None,
    kind: str,
    y: torch.Tensor | None,
    h: torch.Tensor | None,
    num_sms: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ranges, x_RD = row_ranges(ends, starts, x_RD.shape[0], w_in.shape[0]), aligned(x_RD)
    y = _buffer(y, (x_RD.shape[0], w_out.shape[1]), x_RD, ranges)
    h = _buffer(h, (x_RD.shape[0], w_in.shape[1]), x_RD, ranges)
    a_nF = workspace.empty((longest(ranges), w_out.shape[2]), like=x_RD)
    for (begin, end), w_in_FD, w_out_DF in zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
        if begin < end:
            a = a_nF[: end - begin]
            torch.mm(x_RD[begin:end], w_in_FD.t(), out=h[begin:end])
            forward_into(h[begin:end], kind, a)
            torch.mm(a, w_out_DF.t(), out=y[begin:end])
    return y, h


def _dgrad(
    dy_RD: torch.Tensor,
    h_RF: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: Bounds,
    starts: Bounds | None,
    kind: str,
    dx: torch.Tensor | None,
    dh: torch.Tensor | None,
    a: torch.Tensor | None,
    num_sms: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranges, dy_RD = row_ranges(ends, starts, dy_RD.shape[0], w_in.shape[0]), aligned(dy_RD)
    rows = dy_RD.shape[0]
    dx = _buffer(dx, (rows, w_in.shape[2]), dy_RD, ranges)
    dh = _buffer(dh, (rows, w_in.shape[1]), dy_RD, ranges)
    a = _buffer(a, (rows, w_out.shape[2]), dy_RD, ranges)
    da_nF = da_buffer(kind, ranges, w_out, dy_RD)
    for (begin, end), w_in_FD, w_out_DF in zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
        if begin < end:
            dh_e = dh[begin:end]
            da = dh_e if da_nF is None else da_nF[: end - begin]
            torch.mm(dy_RD[begin:end], w_out_DF, out=da)
            backward_into(da, h_RF[begin:end], kind, dh_e, a[begin:end])
            torch.mm(dh_e, w_in_FD, out=dx[begin:end])
    return dx, dh, a


def _wgrad(
    x_RD: torch.Tensor,
    dy_RD: torch.Tensor,
    dh_RF: torch.Tensor,
    a_RF: torch.Tensor,
    ends: Bounds,
    starts: Bounds | None,
    dw_in: torch.Tensor,
    dw_out: torch.Tensor,
    experts: tuple[int, int],
    num_sms: int | None,
) -> None:
    ranges = row_ranges(ends, starts, x_RD.shape[0], dw_in.shape[0])
    x_RD, dy_RD = aligned(x_RD), aligned(dy_RD)
    for i in range(*experts):
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


def _check_buffers(like: torch.Tensor, **buffers: tuple[torch.Tensor | None, tuple[int, int]]) -> None:
    """The buffers given have the shapes asked for, and the dtype and device of `like`."""
    for field, (given, shape) in buffers.items():
        if given is not None:
            checks.check_tensor(field, given, shape, like.dtype, what="[rows, width]", device=like.device)


def _buffer(
    given: torch.Tensor | None, shape: tuple[int, int], like: torch.Tensor, ranges: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The buffer given, or a new one that is zero outside the ranges."""
    if given is not None:
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


for _op, _piece in (("expert_mlp_forward", _forward), ("expert_mlp_dgrad", _dgrad), ("expert_mlp_wgrad", _wgrad)):
    registry.add(
        _op,
        "reference",
        _piece,
        merit="a loop of matmuls over experts, runs everywhere",
        misfit=expert_mlp_choice.misfit(_op, "reference"),
    )
_run_forward, _run_dgrad, _run_wgrad = map(
    registry.kernel, ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
)
