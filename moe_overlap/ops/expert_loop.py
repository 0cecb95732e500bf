"""The raw pieces of the expert MLP that the schedule's stages are made of; they know nothing of autograd.

Rows of expert i are [starts[i], ends[i]); with starts = None the groups are adjacent and `ends` is `offs` of row_map.
Each piece is an entry of the registry. The references here are loops over experts: plain matmuls on contiguous slices
of rows, into buffers that exist. A weight is used as it lies: y = x @ w.T, no transposed copy. The loop is also that of
the operator (`expert_mlp.py`).

Where several experts read one row, `rows` maps the experts' order to the rows there are: the rows of one expert at a
time are copied into a buffer of the pool, and no copy of all is kept. `scale` puts the router's weight on the experts'
side, between activation and second matmul, so that its gradient needs no y.
"""

from __future__ import annotations

import torch

from moe_overlap.ops import expert_mlp_choice, registry, workspace
from moe_overlap.ops.activation import COMPILED_KINDS, backward_kernel, forward_kernel, same_memory
from moe_overlap.ops.activation_kinds import is_gated
from moe_overlap.ops.expert_mlp_contract import Dgrad, DgradResult, Forward, Wgrad
from moe_overlap.ops.row_groups import ALIGNMENT_BYTES, Bounds, Groups, RowReader, clear_others

FEW_ELEMENTS = 1 << 15  # of h: with more, what an operator's call costs does not count


def expert_mlp_forward(
    x_ND: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: Bounds,
    *,
    starts: Bounds | None = None,
    kind: str,
    y: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = (act(x[rows] @ w_in.T) * scale) @ w_out.T for the rows of each expert.

    Args:
        x_ND: [N, D]. w_in: [e, F', D] (F' = 2F for swiglu). w_out: [e, D, F]. One dtype.
        ends, starts: int32 [e] or integers, the row ranges of the experts.
        kind: the activation.
        y, h: buffers [R, D] and [R, F'] to write, in the ranges only. None: new ones, zero outside the ranges.
        rows: int32 [R], the row of x that each row of the ranges reads; None: R = N, rows as they lie.
        scale: [R], float32 (float64 for float64 rows), multiplied in that dtype before a is rounded. None: 1.
        num_sms: multiprocessors a kernel may use, a hint for GPU implementations; the CPU has none.

    Returns:
        (y_RD, h_RF'), h being the pre-activation that the backward needs.

    Raises:
        ConfigError: shapes, dtypes or ranges that do not match; on a CPU a row in the ranges that x does not have, of
            which the buffers may be written in part.
    """
    call = Forward(x_ND, w_in, w_out, ends, starts, kind, y, h, num_sms, rows, scale)
    call.check()
    with torch.no_grad():
        result: tuple[torch.Tensor, torch.Tensor] = _run_forward(call)
    return result


def expert_mlp_dgrad(
    dy_ND: torch.Tensor,
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
    rows: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dscale: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> DgradResult:
    """The gradient with respect to the rows, and what the weight gradient needs.

    Args:
        dy_ND: [N, D], may be expanded (stride 0); with `rows` read through them, so that y[i] is given back the
            gradient dy[rows[i]]. h_RF: what the forward returned. The rest as in the forward.
        dx, dh, a: buffers [R, D], [R, F'] and [R, F], written in the ranges only. None: new ones, zero elsewhere.
            dh may be h itself, which is then overwritten.
        dscale: buffer [R] for the gradient of `scale`, in its dtype; as the others.

    Returns:
        (dx_RD, dh_RF', a_RF, dscale_R): a = act(h) * scale computed again, dscale the sum of (dy @ w_out) * act(h) over
        F, or None without a scale.

    Raises:
        ConfigError: as the forward.
    """
    call = Dgrad(dy_ND, h_RF, w_in, w_out, ends, starts, kind, dx, dh, a, num_sms, rows, scale, dscale)
    call.check()
    with torch.no_grad():
        result: DgradResult = _run_dgrad(call)
    return result


def expert_mlp_wgrad(
    x_ND: torch.Tensor,
    dy_ND: torch.Tensor,
    dh_RF: torch.Tensor,
    a_RF: torch.Tensor,
    ends: Bounds,
    *,
    starts: Bounds | None = None,
    dw_in: torch.Tensor,
    dw_out: torch.Tensor,
    experts: tuple[int, int] | None = None,
    rows: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> None:
    """dw_in[i] = dh_i.T @ x_i and dw_out[i] = dy_i.T @ a_i, into buffers; zeros for an expert without rows.

    Args:
        x_ND, dy_ND, dh_RF, a_RF: the rows of the forward and of `expert_mlp_dgrad`; with a scale it is in dh and a.
        ends, starts: the row ranges of all experts.
        dw_in: [e, F', D]. dw_out: [e, D, F]. Overwritten for the experts asked for.
        experts: (first, last), the experts first .. last-1; None: all.
        rows: as in the forward, for x and dy.

    Raises:
        ConfigError: as the forward.
    """
    experts = (0, dw_in.shape[0]) if experts is None else experts
    call = Wgrad(x_ND, dy_ND, dh_RF, a_RF, ends, starts, dw_in, dw_out, experts, num_sms, rows)
    call.check()
    with torch.no_grad():
        _run_wgrad(call)


def rows_through_experts(
    groups: Groups,
    read: RowReader,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    kind: str,
    scale_R: torch.Tensor | None,
    y_RD: torch.Tensor,
    h_RF: torch.Tensor | None,
) -> None:
    """Writes y of every group, and h where a buffer is given."""
    if _few_rows(groups, w_in, w_out, kind):
        _few_rows_through_experts(groups, read, w_in, w_out, kind, scale_R, y_RD, h_RF)
        return
    a_nF = workspace.empty((groups.longest, w_out.shape[2]), like=y_RD)
    h_nF = workspace.empty((groups.longest, w_in.shape[1]), like=y_RD) if h_RF is None else h_RF
    h_parts = None if h_RF is None else groups.cut(h_RF)
    activate = forward_kernel(h_nF, kind, a_nF, scale_R)
    # Views of the weights in use alone: of few tokens most experts have none, and to `unbind` all costs more.
    w_in_EDF, w_out_EFD = w_in.transpose(1, 2), w_out.transpose(1, 2)
    for place, ((i, begin, end), y) in enumerate(zip(groups.hits, groups.cut(y_RD), strict=True)):
        a = a_nF[: end - begin]
        h = h_nF[: end - begin] if h_parts is None else h_parts[place]
        torch.mm(read(place), w_in_EDF[i], out=h)
        activate(h, kind, a, None if scale_R is None else scale_R[begin:end])
        torch.mm(a, w_out_EFD[i], out=y)


def _few_rows(groups: Groups, w_in: torch.Tensor, w_out: torch.Tensor, kind: str) -> bool:
    """Whether one activation for the rows of all experts has the bits of one for each: rows without gaps, of a kind
    whose rows do not depend on each other (the vector code of erf has other bits at the end of a block), and each
    beginning where a matmul may read."""
    return (
        groups.starts is None
        and kind in COMPILED_KINDS
        and groups.used * w_in.shape[1] <= FEW_ELEMENTS
        and w_out.shape[2] * w_out.element_size() % ALIGNMENT_BYTES == 0
    )


def _few_rows_through_experts(
    groups: Groups,
    read: RowReader,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    kind: str,
    scale_R: torch.Tensor | None,
    y_RD: torch.Tensor,
    h_RF: torch.Tensor | None,
) -> None:
    """As `rows_through_experts` with fewer operators, whose calls are what few rows cost."""
    used = groups.used
    h = workspace.empty((used, w_in.shape[1]), like=y_RD) if h_RF is None else h_RF[:used]
    a = workspace.empty((used, w_out.shape[2]), like=y_RD)
    w_in_EDF, w_out_EFD = w_in.transpose(1, 2), w_out.transpose(1, 2)
    for place, (i, begin, end) in enumerate(groups.hits):
        torch.mm(read(place), w_in_EDF[i], out=h[begin:end])
    scale = None if scale_R is None else scale_R[:used]
    forward_kernel(h, kind, a, scale)(h, kind, a, scale)
    for i, begin, end in groups.hits:
        torch.mm(a[begin:end], w_out_EFD[i], out=y_RD[begin:end])


class HiddenGradient:
    """dh, a and dscale of one expert after the other, from dy @ w_out and h: in parts of the buffers that this is made
    with, which are those of `activation.backward_into`."""

    def __init__(
        self,
        groups: Groups,
        kind: str,
        h: torch.Tensor,
        dh: torch.Tensor,
        a: torch.Tensor,
        scale: torch.Tensor | None,
        dscale: torch.Tensor | None,
    ) -> None:
        self._kind = kind
        # A buffer where da cannot be written into dh: that of a gate is twice as wide, or it is h, which is still read.
        apart = is_gated(kind) or same_memory(dh, h)
        self._da_nF = workspace.empty((groups.longest, a.shape[1]), like=dh) if apart else None
        da = dh if self._da_nF is None else self._da_nF
        self._differentiate = backward_kernel(da, h, kind, dh, a, scale, dscale)

    def __call__(
        self,
        dy_nD: torch.Tensor,
        w_out_DF: torch.Tensor,
        h_nF: torch.Tensor,
        dh_nF: torch.Tensor,
        a_nF: torch.Tensor,
        scale_n: torch.Tensor | None,
        dscale_n: torch.Tensor | None,
    ) -> None:
        da = dh_nF if self._da_nF is None else self._da_nF[: dy_nD.shape[0]]
        torch.mm(dy_nD, w_out_DF, out=da)
        self._differentiate(da, h_nF, self._kind, dh_nF, a_nF, scale_n, dscale_n)


def _forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    y, h = call.outputs()
    read = RowReader(call.x, call.rows, call.groups, padded=False)
    rows_through_experts(call.groups, read, call.w_in, call.w_out, call.kind, call.scale, y, h)
    return y, h


def _dgrad(call: Dgrad) -> DgradResult:
    groups, h_RF, w_in, w_out, scale = call.groups, call.h, call.w_in, call.w_out, call.scale
    (dx, dh, a), dscale = call.outputs(), call.new_dscale()
    read = RowReader(call.dy, call.rows, groups, padded=False)
    hidden_gradient = HiddenGradient(groups, call.kind, h_RF, dh, a, scale, dscale)
    parts = zip(groups.hits, *(groups.cut(rows) for rows in (h_RF, dh, a, dx)), strict=True)
    for place, ((i, begin, end), h_e, dh_e, a_e, dx_e) in enumerate(parts):
        scale_e, dscale_e = (None if one is None else one[begin:end] for one in (scale, dscale))
        hidden_gradient(read(place), w_out[i], h_e, dh_e, a_e, scale_e, dscale_e)
        torch.mm(dh_e, w_in[i], out=dx_e)
    return DgradResult(dx, dh, a, dscale)


def _wgrad(call: Wgrad) -> None:
    groups, (first, last) = call.groups, call.experts
    read_x, read_dy = (RowReader(rows, call.rows, groups, padded=False) for rows in (call.x, call.dy))
    parts = zip(groups.hits, groups.cut(call.dh), groups.cut(call.a), strict=True)
    for place, ((expert, _, _), dh, a) in enumerate(parts):
        if first <= expert < last:
            torch.mm(dh.t(), read_x(place), out=call.dw_in[expert])
            torch.mm(read_dy(place).t(), a, out=call.dw_out[expert])
    for dw in (call.dw_in, call.dw_out):
        clear_others(groups, dw, first, last)


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
