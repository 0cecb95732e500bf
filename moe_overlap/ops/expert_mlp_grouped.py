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

from moe_overlap.ops import checks, expert_mlp_choice, hardware, maps, registry, verified
from moe_overlap.ops.expert_mlp_contract import (
    Call,
    Dgrad,
    DgradResult,
    ExpertMlp,
    ExpertMlpBackward,
    Forward,
    Operator,
    Piece,
    Wgrad,
)
from moe_overlap.ops.row_groups import aligned

OLDEST_NVIDIA = (9, 0)
CUDA_DTYPES = (torch.bfloat16,)
STRIDE_BYTES = 16
"""What it asks of rows and weights: addresses and strides that are multiples of this."""

_activation, _activation_backward = map(registry.kernel, ("activation", "activation_backward"))


def _expert_mlp(call: ExpertMlp) -> tuple[torch.Tensor, torch.Tensor]:
    with _budget(call.device, call.num_sms):
        y_RD, h_RF = _through(call, _rows_of_x(call), call.offs, call.row_scale)
    maps.clear_tail(y_RD, call.offs)
    return y_RD, maps.clear_tail(h_RF, call.offs) if call.save_h else call.new_h()


def _expert_mlp_backward(call: ExpertMlpBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wants_dx, wants_dw_in, wants_dw_out, wants_dscale = call.wanted
    x, h_RF, kind, row_scale, offs = call.x, call.h, call.kind, call.row_scale, call.offs
    dy_RD, w_in, w_out, nothing = _operand(call.dy), _operand(call.w_in), _operand(call.w_out), call.nothing()
    dx = dw_in = dw_out = nothing
    with _budget(call.device, call.num_sms):
        da_RF = functional.grouped_mm(dy_RD, w_out, offs=offs)
        dh_RF, dscale = _activation_backward(da_RF, h_RF, kind, row_scale, offs)
        if wants_dw_out:
            a_RF = _activation(h_RF, kind, row_scale, offs)
            dw_out = functional.grouped_mm(dy_RD.t(), a_RF, offs=offs)
        if wants_dw_in:
            dw_in = functional.grouped_mm(dh_RF.t(), _rows_of_x(call), offs=offs)
        if wants_dx:
            dx = maps.clear_tail(functional.grouped_mm(dh_RF, w_in, offs=offs), offs)
    if wants_dx and call.row_to_token is not None:
        dx = maps.add_rows(dx, call.row_to_token, x.shape[0], checks.accumulation_dtype(x.dtype)).to(x.dtype)
    return dx, dw_in, dw_out, dscale if wants_dscale else nothing


def _forward(call: Forward) -> tuple[torch.Tensor, torch.Tensor]:
    used = call.groups.used
    with _budget(call.device, call.num_sms):
        scale = None if call.scale is None else call.scale[:used]
        y_nD, h_nF = _through(call, _read(call, call.x, 0, used), _offs(call), scale)
    y, h = call.outputs()
    y[:used], h[:used] = y_nD, h_nF
    return y, h


def _dgrad(call: Dgrad) -> DgradResult:
    used, offs = call.groups.used, _offs(call)
    scale = None if call.scale is None else call.scale[:used]
    with _budget(call.device, call.num_sms):
        da_nF = functional.grouped_mm(_read(call, call.dy, 0, used), _operand(call.w_out), offs=offs)
        h_nF = call.h[:used]
        dh_nF, dscale_n = _activation_backward(da_nF, h_nF, call.kind, scale, None)
        a_nF = _activation(h_nF, call.kind, scale, None)
        dx_nD = functional.grouped_mm(dh_nF, _operand(call.w_in), offs=offs)
    (dx, dh, a), dscale = call.outputs(), call.new_dscale()
    # After the last look at h, whose memory dh may be.
    dx[:used], dh[:used], a[:used] = dx_nD, dh_nF, a_nF
    if dscale is not None:
        dscale[:used] = dscale_n
    return DgradResult(dx, dh, a, dscale)


def _wgrad(call: Wgrad) -> None:
    first, last = call.experts
    ranges = call.groups.ranges[first:last]
    if not ranges:
        return
    begin, end = ranges[0][0], ranges[-1][1]
    offs = torch.tensor([stop - begin for _, stop in ranges], dtype=torch.int32).to(call.device)
    x_nD, dy_nD = (_read(call, rows, begin, end) for rows in (call.x, call.dy))
    dh_nF, a_nF = (_operand(rows)[begin:end] for rows in (call.dh, call.a))
    with _budget(call.device, call.num_sms):
        call.dw_in[first:last] = functional.grouped_mm(dh_nF.t(), x_nD, offs=offs)
        call.dw_out[first:last] = functional.grouped_mm(dy_nD.t(), a_nF, offs=offs)


def _through(
    call: ExpertMlp | Forward, x_RD: torch.Tensor, offs: torch.Tensor, row_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of these rows."""
    w_in, w_out = _operand(call.w_in), _operand(call.w_out)
    h_RF = functional.grouped_mm(x_RD, w_in.transpose(1, 2), offs=offs)
    a_RF = _activation(h_RF, call.kind, row_scale, offs)
    return functional.grouped_mm(a_RF, w_out.transpose(1, 2), offs=offs), h_RF


def _rows_of_x(call: Operator) -> torch.Tensor:
    return _operand(call.x) if call.row_to_token is None else maps.take_rows(call.x, call.row_to_token)


def _read(call: Forward | Dgrad | Wgrad, x_ND: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The rows [begin, end) of the experts' order, copied where there is a map."""
    if call.rows is None:
        return _operand(x_ND)[begin:end]
    return maps.pick_rows("rows", x_ND, call.rows[begin:end])


def _operand(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernel reads it as it lies, either way round, else a copy that it does read."""
    *outer, rows, columns = tensor.stride()
    if columns == 1:
        step, least = rows, tensor.shape[-1]
    elif rows == 1:
        step, least = columns, tensor.shape[-2]
    else:
        return aligned(tensor)
    unit = STRIDE_BYTES // tensor.element_size()
    fits = step >= least and not any(stride % unit for stride in (step, *outer))
    return tensor if fits and tensor.data_ptr() % STRIDE_BYTES == 0 else aligned(tensor)


def _offs(call: Piece) -> torch.Tensor:
    """The ends of adjacent groups that the host knows, on the device of the rows."""
    return torch.tensor([end for _, end in call.groups.ranges], dtype=torch.int32).to(call.device)


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
    if hardware.older_than(device, OLDEST_NVIDIA):
        return "its kernel needs compute capability 9.0 or later"
    return None


def sources() -> str:
    """What a verification holds for: the kernel is torch's."""
    return f"torch {torch.__version__}"


def _reservation(op: str) -> registry.Obstacle:
    def reservation(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu":
            return "on a CPU it is for tests"
        architecture = hardware.architecture(device)
        return verified.doubt(op, "grouped_mm", architecture=architecture, dtype=dtype, sources=sources())

    return reservation


def _limit(call: Call) -> str | None:
    if not call.groups.adjacent:
        return "groups that are not adjacent"
    if isinstance(call, Piece) and not call.groups.on_host:
        return "groups the host does not know"
    if call.hidden * call.dtype.itemsize % STRIDE_BYTES or call.ffn * call.dtype.itemsize % STRIDE_BYTES:
        return f"widths {call.hidden} and {call.ffn}: rows must be multiples of {STRIDE_BYTES} bytes"
    return "no rows or no experts" if call.groups.most_rows == 0 or call.num_experts == 0 else None


_IMPLEMENTATIONS: dict[str, Any] = {
    "expert_mlp": _expert_mlp,
    "expert_mlp_backward": _expert_mlp_backward,
    "expert_mlp_forward": _forward,
    "expert_mlp_dgrad": _dgrad,
    "expert_mlp_wgrad": _wgrad,
}
for _op, _implementation in _IMPLEMENTATIONS.items():
    registry.add(
        _op,
        "grouped_mm",
        _implementation,
        merit="torch's grouped matmul for all experts at once",
        obstacle=_obstacle,
        reservation=_reservation(_op),
        limit=_limit,
        misfit=expert_mlp_choice.misfit("grouped_mm"),
    )
