"""expert_mlp and its raw pieces on torch's grouped matmul: one library kernel for all experts, our activation between.

The activation, with the factor of each row, is the registry's: our kernel where one is verified.
`torch.nn.functional.grouped_mm` takes adjacent groups only and leaves the rows beyond the last one undefined; they are
set to zero here where the contracts say so. On CUDA it is for bfloat16 on compute capability 9.0 and later; on a CPU it
also does float32 and float16, and is registered there for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from moe_overlap.ops import checks, expert_loop, expert_mlp_choice, maps, registry, triton_kernels, verified
from moe_overlap.ops.expert_loop import Bounds

OLDEST_NVIDIA = (9, 0)
CUDA_DTYPES = (torch.bfloat16,)
STRIDE_BYTES = 16
"""What it asks of rows and weights: strides that are multiples of this."""

_activation, _activation_backward = map(registry.kernel, ("activation", "activation_backward"))


def _expert_mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    offs: torch.Tensor,
    kind: str,
    row_to_token: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    num_sms: int | None,
    save_h: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_RD = x if row_to_token is None else maps.take_rows(x, row_to_token)
    with _budget(x.device, num_sms):
        y_RD, h_RF = _through(x_RD, w_in, w_out, offs, kind, row_scale)
    maps.clear_tail(y_RD, offs)
    return y_RD, maps.clear_tail(h_RF, offs) if save_h else x.new_empty((0, w_in.shape[1]))


def _expert_mlp_backward(
    dy_RD: torch.Tensor,
    x: torch.Tensor,
    h_RF: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    offs: torch.Tensor,
    kind: str,
    row_to_token: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    wanted: list[bool],
    num_sms: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wants_dx, wants_dw_in, wants_dw_out, wants_dscale = wanted
    dy_RD, nothing = expert_loop.aligned(dy_RD), x.new_empty((0,))
    dx = dw_in = dw_out = nothing
    with _budget(x.device, num_sms):
        da_RF = functional.grouped_mm(dy_RD, w_out, offs=offs)
        dh_RF, dscale = _activation_backward(da_RF, h_RF, kind, row_scale, offs)
        if wants_dw_out:
            a_RF = _activation(h_RF, kind, row_scale, offs)
            dw_out = functional.grouped_mm(dy_RD.t(), a_RF, offs=offs)
        if wants_dw_in:
            x_RD = x if row_to_token is None else maps.take_rows(x, row_to_token)
            dw_in = functional.grouped_mm(dh_RF.t(), x_RD, offs=offs)
        if wants_dx:
            dx = maps.clear_tail(functional.grouped_mm(dh_RF, w_in, offs=offs), offs)
    if wants_dx and row_to_token is not None:
        dx = maps.add_rows(dx, row_to_token, x.shape[0], checks.accumulation_dtype(x.dtype)).to(x.dtype)
    return dx, dw_in, dw_out, dscale if wants_dscale else nothing


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
    used, offs = _adjacent(ends, x_RD, w_in.shape[0])
    with _budget(x_RD.device, num_sms):
        y_nD, h_nF = _through(expert_loop.aligned(x_RD)[:used], w_in, w_out, offs, kind, None)
    return _put(y, y_nD, x_RD.shape[0]), _put(h, h_nF, x_RD.shape[0])


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
    rows = dy_RD.shape[0]
    used, offs = _adjacent(ends, dy_RD, w_in.shape[0])
    with _budget(dy_RD.device, num_sms):
        da_nF = functional.grouped_mm(expert_loop.aligned(dy_RD)[:used], w_out, offs=offs)
        h_nF = h_RF[:used]
        dh_nF, _ = _activation_backward(da_nF, h_nF, kind, None, None)
        a_nF = _activation(h_nF, kind, None, None)
        dx_nD = functional.grouped_mm(dh_nF, w_in, offs=offs)
    return _put(dx, dx_nD, rows), _put(dh, dh_nF, rows), _put(a, a_nF, rows)


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
    first, last = experts
    ranges = expert_loop.row_ranges(ends, None, x_RD.shape[0], dw_in.shape[0])[first:last]
    if not ranges:
        return
    begin, end = ranges[0][0], ranges[-1][1]
    offs = torch.tensor([stop - begin for _, stop in ranges], dtype=torch.int32).to(x_RD.device)
    x_nD, dy_nD = expert_loop.aligned(x_RD)[begin:end], expert_loop.aligned(dy_RD)[begin:end]
    with _budget(x_RD.device, num_sms):
        dw_in[first:last] = functional.grouped_mm(dh_RF[begin:end].t(), x_nD, offs=offs)
        dw_out[first:last] = functional.grouped_mm(dy_nD.t(), a_RF[begin:end], offs=offs)


def _through(
    x_RD: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    offs: torch.Tensor,
    kind: str,
    row_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    h_RF = functional.grouped_mm(x_RD, w_in.transpose(1, 2), offs=offs)
    a_RF = _activation(h_RF, kind, row_scale, offs)
    return functional.grouped_mm(a_RF, w_out.transpose(1, 2), offs=offs), h_RF


def _adjacent(ends: Bounds, rows: torch.Tensor, experts: int) -> tuple[int, torch.Tensor]:
    """(rows in use, offs on the device of the rows) for groups the host knows."""
    ranges = expert_loop.row_ranges(ends, None, rows.shape[0], experts)
    offs = torch.tensor([end for _, end in ranges], dtype=torch.int32).to(rows.device)
    return (ranges[-1][1] if ranges else 0), offs


def _put(given: torch.Tensor | None, values_nX: torch.Tensor, rows: int) -> torch.Tensor:
    """The buffer given, or a new one that is zero beyond them, with these first rows."""
    if given is None:
        given = values_nX.new_zeros((rows, values_nX.shape[1]))
    given[: values_nX.shape[0]] = values_nX
    return given


@contextmanager
def _budget(device: torch.device, num_sms: int | None) -> Iterator[None]:
    """torch's grouped matmul leaves all but `num_sms` multiprocessors to others."""
    if num_sms is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).multi_processor_count
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(max(0, total - num_sms))
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if device.type == "cpu":
        return "no float64" if dtype == torch.float64 else None
    if device.type != "cuda":
        return f"a kernel for CUDA tensors, not {device.type}"
    if dtype not in CUDA_DTYPES:
        return f"bfloat16 only, not {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_NVIDIA:
        return "its kernel needs compute capability 9.0 or later"
    return None


def sources() -> str:
    """What a verification holds for: the kernel is torch's."""
    return f"torch {torch.__version__}"


def _reservation(op: str) -> registry.Obstacle:
    def reservation(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu":
            return "on a CPU it is for tests"
        kind = triton_kernels.architecture(device)
        return verified.doubt(op, "grouped_mm", architecture=kind, dtype=dtype, sources=sources())

    return reservation


def _limit(op: str) -> registry.Limit:
    def limit(*args: Any) -> str | None:
        shapes = expert_mlp_choice.shapes_of(op, args)
        if not expert_mlp_choice.adjacent(op, args):
            return "groups that are not adjacent"
        if op in ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad") and not shapes.on_host:
            return "groups the host does not know"
        if shapes.hidden * shapes.dtype.itemsize % STRIDE_BYTES or shapes.ffn * shapes.dtype.itemsize % STRIDE_BYTES:
            return f"widths {shapes.hidden} and {shapes.ffn}: rows must be multiples of {STRIDE_BYTES} bytes"
        return "no rows or no experts" if shapes.rows == 0 or shapes.experts == 0 else None

    return limit


_CALLS: dict[str, Any] = {
    "expert_mlp": _expert_mlp,
    "expert_mlp_backward": _expert_mlp_backward,
    "expert_mlp_forward": _forward,
    "expert_mlp_dgrad": _dgrad,
    "expert_mlp_wgrad": _wgrad,
}
OPS = tuple(_CALLS)
for _op, _call in _CALLS.items():
    registry.add(
        _op,
        "grouped_mm",
        _call,
        merit="torch's grouped matmul for all experts at once",
        obstacle=_obstacle,
        reservation=_reservation(_op),
        limit=_limit(_op),
        misfit=expert_mlp_choice.misfit(_op, "grouped_mm"),
    )
