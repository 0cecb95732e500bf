"""The raw pieces of the expert MLP that the schedule's stages are made of; they know nothing of autograd.

Rows of expert i are [starts[i], ends[i]); with starts = None the groups are adjacent and `ends` is `offs` of row_map.
Each piece is an entry of the registry. The references here are loops over experts: plain matmuls on contiguous slices
of rows, into buffers that exist. A weight is used as it lies: y = x @ w.T, no transposed copy.
"""

from __future__ import annotations

import torch

from moe_overlap.ops import expert_mlp_choice, registry, workspace
from moe_overlap.ops.activation import backward_into, forward_into
from moe_overlap.ops.expert_mlp_contract import Dgrad, Forward, Wgrad
from moe_overlap.ops.row_groups import Bounds, aligned, weight_gradient


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
    call = Forward(x_RD, w_in, w_out, ends, starts, kind, y, h, num_sms)
    call.check()
    with torch.no_grad():
        result: tuple[torch.Tensor, torch.Tensor] = _run_forward(call)
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

    Raises:
        ConfigError: as the forward.
    """
    call = Dgrad(dy_RD, h_RF, w_in, w_out, ends, starts, kind, dx, dh, a, num_sms)
    call.check()
    with torch.no_grad():
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _run_dgrad(call)
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

    Raises:
        ConfigError: as the forward.
    """
    experts = (0, dw_in.shape[0]) if experts is None else experts
    call = Wgrad(x_RD, dy_RD, dh_RF, a_RF, ends, starts, dw_in, dw_out, experts, num_sms)
    call.check()
    with torch.no_grad():
        _run_wgrad(call)


def _forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    groups, x_RD, w_in, w_out = call.groups, aligned(call.x), call.w_in, call.w_out
    y, h = call.outputs()
    a_nF = workspace.empty((groups.longest, w_out.shape[2]), like=x_RD)
    for (begin, end), w_in_FD, w_out_DF in zip(groups.ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
        if begin < end:
            a = a_nF[: end - begin]
            torch.mm(x_RD[begin:end], w_in_FD.t(), out=h[begin:end])
            forward_into(h[begin:end], call.kind, a)
            torch.mm(a, w_out_DF.t(), out=y[begin:end])
    return y, h


def _dgrad(call: Dgrad) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups, dy_RD, h_RF, w_in, w_out = call.groups, aligned(call.dy), call.h, call.w_in, call.w_out
    dx, dh, a = call.outputs()
    # Where da cannot be written into dh: that of swiglu is twice as wide.
    da_nF = workspace.empty((groups.longest, w_out.shape[2]), like=dy_RD) if call.kind == "swiglu" else None
    for (begin, end), w_in_FD, w_out_DF in zip(groups.ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
        if begin < end:
            dh_e = dh[begin:end]
            da = dh_e if da_nF is None else da_nF[: end - begin]
            torch.mm(dy_RD[begin:end], w_out_DF, out=da)
            backward_into(da, h_RF[begin:end], call.kind, dh_e, a[begin:end])
            torch.mm(dh_e, w_in_FD, out=dx[begin:end])
    return dx, dh, a


def _wgrad(call: Wgrad) -> None:
    x_RD, dy_RD = aligned(call.x), aligned(call.dy)
    ranges = call.groups.ranges
    for i in range(*call.experts):
        begin, end = ranges[i]
        weight_gradient(call.dh[begin:end], x_RD[begin:end], call.dw_in[i])
        weight_gradient(dy_RD[begin:end], call.a[begin:end], call.dw_out[i])


for _op, _piece in (("expert_mlp_forward", _forward), ("expert_mlp_dgrad", _dgrad), ("expert_mlp_wgrad", _wgrad)):
    registry.add(
        _op,
        "reference",
        _piece,
        merit="a loop of matmuls over experts, runs everywhere",
        misfit=expert_mlp_choice.misfit("reference"),
    )
_run_forward, _run_dgrad, _run_wgrad = map(
    registry.kernel, ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
)
