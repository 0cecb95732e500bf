"""The activation between the two matmuls of an expert: "swiglu" (arXiv 2002.05202), "gelu" (exact, erf) or "relu".

Others by name: see `activation_kinds.py`. For swiglu the rows hold [gate | up], 2F wide, and a = silu(gate) * up.
`forward_into` and `backward_into` work on a block of rows in buffers of the caller, right after the matmul while the
block is in cache: entries `activation_rows` and `activation_rows_backward` of the registry. With a factor for each row
everything is computed in the factor's dtype, that of accumulation, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, compiled, maps, registry, workspace
from moe_overlap.ops.activation_kinds import Activation, is_gated, registered
from moe_overlap.ops.library import define, differentiate, implement, refuse_derivative

_aten = torch.ops.aten

COMPILED_KINDS = ("swiglu", "relu")
"""What the compiled part has: for the erf of gelu PyTorch's own vector code stays."""

BLOCK_ELEMENTS = 1 << 15
"""Elements of `a` for each thread in the blocks of rows with a factor: their temporaries stay in cache."""


def activation(
    h_RF: torch.Tensor, *, kind: str, row_scale: torch.Tensor | None = None, offs: torch.Tensor | None = None
) -> torch.Tensor:
    """a = act(h) * row_scale.

    Args:
        h_RF: [R, F], or [R, 2F] = [gate | up] for "swiglu"; any float dtype.
        kind: "swiglu", "gelu" (erf), "relu", or a name of `activation_kinds.py`.
        row_scale: float32 or float64 [R], such as the router weight of each row; None: 1.
        offs: int32 [E']; rows from offs[-1] on come out as zeros whatever h holds there. None: all rows count.

    Returns:
        a_RF [R, F] in h's dtype, differentiable in h and row_scale.

    Raises:
        ConfigError: naming the argument, its value and what was expected.
    """
    checks.check_kind(kind)
    checks.check_tensor("h", h_RF, (None, None), checks.FLOATS, what="[R, F']")
    if is_gated(kind) and h_RF.shape[1] % 2 != 0:
        raise ConfigError("h", f"shape {tuple(h_RF.shape)}", f"an even width, [gate | up], for {kind}")
    if row_scale is not None:
        dtypes = (torch.float32, torch.float64)
        checks.check_tensor("row_scale", row_scale, (h_RF.shape[0],), dtypes, what="[R]", device=h_RF.device)
    if offs is not None:
        checks.check_tensor("offs", offs, (None,), torch.int32, what="[E']", device=h_RF.device)
    return torch.ops.moe_overlap.activation.default(h_RF, kind, row_scale, offs)


def width(h_width: int, kind: str) -> int:
    """F for rows of h that are `h_width` wide."""
    return h_width // 2 if is_gated(kind) else h_width


def forward_into(h_nF: torch.Tensor, kind: str, a_nF: torch.Tensor, scale_n: torch.Tensor | None = None) -> None:
    """a = act(h) for a block of rows, or act(h) * scale in the dtype of `scale`, rounded once."""
    forward_kernel(h_nF, kind, a_nF, scale_n)(h_nF, kind, a_nF, scale_n)


def forward_kernel(*arguments: Any) -> Callable[..., None]:
    """What `forward_into` calls for these arguments, all four, and for other blocks of rows of the same buffers."""
    return registry.chosen("activation_rows", *arguments)


def _forward_into(h_nF: torch.Tensor, kind: str, a_nF: torch.Tensor, scale_n: torch.Tensor | None) -> None:
    own = registered(kind)
    if own is not None:
        for rows in _blocks(a_nF):
            _own_forward(own, h_nF[rows], a_nF[rows], None if scale_n is None else scale_n[rows])
    elif scale_n is not None:
        for rows in _blocks(a_nF):
            wide_nF, _ = _activated(h_nF[rows].to(scale_n.dtype), kind)
            torch.mul(wide_nF, scale_n[rows, None], out=a_nF[rows])
    elif kind == "swiglu":
        gate_nF, up_nF = h_nF.chunk(2, dim=1)
        _aten.silu.out(gate_nF, out=a_nF)
        a_nF.mul_(up_nF)
    elif kind == "gelu":
        _aten.gelu.out(h_nF, out=a_nF)
    else:
        torch.clamp(h_nF, min=0, out=a_nF)


def backward_into(
    da_nF: torch.Tensor,
    h_nF: torch.Tensor,
    kind: str,
    dh_nF: torch.Tensor,
    a_nF: torch.Tensor,
    scale_n: torch.Tensor | None = None,
    dscale_n: torch.Tensor | None = None,
) -> None:
    """dh = act'(h) * da, and a = act(h) once more for the weight gradient, for a block of rows.

    With `scale` a = act(h) * scale, dh = act'(h) * da * scale and, where a buffer is given, dscale = sum(da * act(h))
    over the row, all in the dtype of `scale` before they are rounded. `dh` may be the memory of `h`. `da` is
    undefined afterwards for swiglu; for those without a gate it may be the same memory as `dh`, but not as `h`.
    """
    arguments = da_nF, h_nF, kind, dh_nF, a_nF, scale_n, dscale_n
    backward_kernel(*arguments)(*arguments)


def backward_kernel(*arguments: Any) -> Callable[..., None]:
    """What `backward_into` calls for these arguments, all seven, and for other blocks of rows of the same buffers."""
    return registry.chosen("activation_rows_backward", *arguments)


def _backward_into(
    da_nF: torch.Tensor,
    h_nF: torch.Tensor,
    kind: str,
    dh_nF: torch.Tensor,
    a_nF: torch.Tensor,
    scale_n: torch.Tensor | None,
    dscale_n: torch.Tensor | None,
) -> None:
    own = registered(kind)
    if own is not None:
        for rows in _blocks(a_nF):
            scale, dscale = (None if one is None else one[rows] for one in (scale_n, dscale_n))
            _own_backward(own, da_nF[rows], h_nF[rows], dh_nF[rows], a_nF[rows], scale, dscale)
    elif scale_n is not None:
        for rows in _blocks(a_nF):
            dscale = None if dscale_n is None else dscale_n[rows]
            _scaled_backward(da_nF[rows], h_nF[rows], kind, dh_nF[rows], a_nF[rows], scale_n[rows], dscale)
    elif kind == "swiglu":
        gate_nF, up_nF = h_nF.chunk(2, dim=1)
        dgate_nF, dup_nF = dh_nF.chunk(2, dim=1)
        in_place = same_memory(dh_nF, h_nF)
        _aten.silu.out(gate_nF, out=a_nF)
        product_nF = torch.mul(da_nF, a_nF, out=workspace.empty(a_nF.shape, like=a_nF) if in_place else dup_nF)
        a_nF.mul_(up_nF)
        da_nF.mul_(up_nF)
        if in_place:
            dup_nF.copy_(product_nF)
        _aten.silu_backward.grad_input(da_nF, gate_nF, grad_input=dgate_nF)
    elif kind == "gelu":
        _aten.gelu.out(h_nF, out=a_nF)
        _aten.gelu_backward.grad_input(da_nF, h_nF, grad_input=dh_nF)
    else:
        torch.clamp(h_nF, min=0, out=a_nF)
        _aten.threshold_backward.grad_input(da_nF, h_nF, 0, grad_input=dh_nF)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape begin at the same address, as a buffer given for `dh` may with `h`."""
    return one.data_ptr() == other.data_ptr()


def _scaled_backward(
    da_nF: torch.Tensor,
    h_nF: torch.Tensor,
    kind: str,
    dh_nF: torch.Tensor,
    a_nF: torch.Tensor,
    scale_n: torch.Tensor,
    dscale_n: torch.Tensor | None,
) -> None:
    """`backward_into` with a scale, for few rows. All is read, or is a temporary, before dh is written."""
    h_nF, da_nF, scale_n1 = h_nF.to(scale_n.dtype), da_nF.to(scale_n.dtype), scale_n[:, None]
    act_nF, silu_nF = _activated(h_nF, kind)
    if dscale_n is not None:
        dscale_n.copy_((da_nF * act_nF).sum(dim=1))
    torch.mul(act_nF, scale_n1, out=a_nF)
    da_nF = da_nF * scale_n1
    if kind == "swiglu":
        gate_nF, up_nF = h_nF.chunk(2, dim=1)
        dgate_nF, dup_nF = dh_nF.chunk(2, dim=1)
        from_gate_nF = _aten.silu_backward(da_nF * up_nF, gate_nF)
        dup_nF.copy_(da_nF.mul_(silu_nF))
        dgate_nF.copy_(from_gate_nF)
    elif kind == "gelu":
        dh_nF.copy_(_aten.gelu_backward(da_nF, h_nF))
    else:
        dh_nF.copy_(_aten.threshold_backward(da_nF, h_nF, 0))


def _own_forward(own: Activation, h_nF: torch.Tensor, a_nF: torch.Tensor, scale_n: torch.Tensor | None) -> None:
    """`forward_into` of a registered activation, for few rows."""
    wide_nF = own.forward(h_nF.to(checks.accumulation_dtype(h_nF.dtype)))
    a_nF.copy_(wide_nF if scale_n is None else wide_nF * scale_n[:, None])


def _own_backward(
    own: Activation,
    da_nF: torch.Tensor,
    h_nF: torch.Tensor,
    dh_nF: torch.Tensor,
    a_nF: torch.Tensor,
    scale_n: torch.Tensor | None,
    dscale_n: torch.Tensor | None,
) -> None:
    """`backward_into` of a registered activation, for few rows. All is read before dh is written."""
    dtype = checks.accumulation_dtype(h_nF.dtype)
    h_nF, da_nF = h_nF.to(dtype), da_nF.to(dtype)
    act_nF = own.forward(h_nF)
    if dscale_n is not None:
        dscale_n.copy_((da_nF * act_nF).sum(dim=1))
    if scale_n is not None:
        act_nF, da_nF = act_nF * scale_n[:, None], da_nF * scale_n[:, None]
    a_nF.copy_(act_nF)
    dh_nF.copy_(own.backward(da_nF, h_nF))


def _activated(h_nF: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(h), and for swiglu silu(gate)), new."""
    if kind == "swiglu":
        gate_nF, up_nF = h_nF.chunk(2, dim=1)
        silu_nF = _aten.silu(gate_nF)
        return silu_nF * up_nF, silu_nF
    a_nF = _aten.gelu(h_nF) if kind == "gelu" else torch.clamp(h_nF, min=0)
    return a_nF, a_nF


def _blocks(a_nF: torch.Tensor) -> Iterator[slice]:
    """The rows in blocks, on a CPU; elsewhere all of them."""
    rows, columns = a_nF.shape
    elements = BLOCK_ELEMENTS * torch.get_num_threads() if a_nF.device.type == "cpu" else a_nF.numel()
    step = max(1, elements // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _limit(h_nF: torch.Tensor, kind: str, a_nF: torch.Tensor, scale_n: torch.Tensor | None) -> str | None:
    return _compiled_limit(kind, (h_nF, a_nF), (scale_n,))


def _backward_limit(
    da_nF: torch.Tensor,
    h_nF: torch.Tensor,
    kind: str,
    dh_nF: torch.Tensor,
    a_nF: torch.Tensor,
    scale_n: torch.Tensor | None,
    dscale_n: torch.Tensor | None,
) -> str | None:
    return _compiled_limit(kind, (da_nF, h_nF, dh_nF, a_nF), (scale_n, dscale_n))


def _misfit(h_nF: torch.Tensor, kind: str, a_nF: torch.Tensor, scale_n: torch.Tensor | None) -> str | None:
    if kind == "relu" and scale_n is None and h_nF.dtype == checks.accumulation_dtype(h_nF.dtype):
        return "relu alone is one pass of PyTorch too"
    return None


def _compiled_limit(kind: str, rows: tuple[torch.Tensor, ...], factors: tuple[torch.Tensor | None, ...]) -> str | None:
    """Why compiled code, which computes in the dtype of accumulation, does not take these, or None."""
    dtype = rows[0].dtype
    if kind not in COMPILED_KINDS:
        return f"{kind}; it has {', '.join(COMPILED_KINDS)}"
    for one in rows:
        if one.dtype != dtype or not one.is_contiguous():
            return "rows that are not contiguous or not of one dtype"
    accumulation = checks.accumulation_dtype(dtype)
    for factor in factors:
        if factor is not None and (factor.dtype != accumulation or not factor.is_contiguous()):
            return f"factors that are not contiguous {accumulation}"
    return None


def _activation(
    h_RF: torch.Tensor, kind: str, row_scale: torch.Tensor | None, offs: torch.Tensor | None
) -> torch.Tensor:
    live = maps.live_rows(offs, h_RF.shape[0])
    a_RF = workspace.empty((h_RF.shape[0], width(h_RF.shape[1], kind)), like=h_RF)
    scale = None if row_scale is None else row_scale[:live].to(checks.accumulation_dtype(h_RF.dtype))
    forward_into(h_RF[:live], kind, a_RF[:live], scale)
    return maps.clear_tail(a_RF, offs)


def _activation_backward(
    da_RF: torch.Tensor, h_RF: torch.Tensor, kind: str, row_scale: torch.Tensor | None, offs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    live = maps.live_rows(offs, h_RF.shape[0])
    a_RF = workspace.empty(da_RF.shape, like=h_RF)
    da, h, a = workspace.empty((live, da_RF.shape[1]), like=da_RF).copy_(da_RF[:live]), h_RF[:live], a_RF[:live]
    dh_RF = workspace.empty(h_RF.shape, like=h_RF)
    if row_scale is None:
        dscale = da_RF.new_empty((0,))
        backward_into(da, h, kind, dh_RF[:live], a)
    else:
        dscale = torch.zeros_like(row_scale, memory_format=torch.contiguous_format)
        scale = row_scale[:live].to(checks.accumulation_dtype(h_RF.dtype))
        backward_into(da, h, kind, dh_RF[:live], a, scale, dscale[:live])
        maps.clear_tail(dscale, offs)
    return maps.clear_tail(dh_RF, offs), dscale


def _activation_backward_fake(
    da_RF: torch.Tensor, h_RF: torch.Tensor, kind: str, row_scale: torch.Tensor | None, offs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dscale = da_RF.new_empty((0,)) if row_scale is None else row_scale.new_empty(row_scale.shape)
    return h_RF.new_empty(h_RF.shape), dscale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    h_RF, ctx.kind, row_scale, offs = inputs
    ctx.save_for_backward(h_RF, row_scale, offs)


def _backward(ctx: Any, da_RF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    h_RF, row_scale, offs = ctx.saved_tensors
    dh_RF, dscale = torch.ops.moe_overlap.activation_backward.default(da_RF, h_RF, ctx.kind, row_scale, offs)
    return dh_RF, None, dscale if row_scale is not None else None, None


define("activation(Tensor h, str kind, Tensor? row_scale, Tensor? offs) -> Tensor")
define("activation_backward(Tensor da, Tensor h, str kind, Tensor? row_scale, Tensor? offs) -> (Tensor, Tensor)")
define("_activation_rows_cpp(Tensor h, str kind, Tensor(a!) a, Tensor? scale) -> ()")
define(
    "_activation_rows_backward_cpp(Tensor da, Tensor(a!) h, str kind, Tensor(b!) dh, Tensor(c!) a, Tensor? scale, "
    "Tensor(d!)? dscale) -> ()"
)
for _op, _limit_of, _misfit_of, _reference in (
    ("activation_rows", _limit, _misfit, _forward_into),
    ("activation_rows_backward", _backward_limit, None, _backward_into),
):
    registry.add(
        _op,
        "cpp",
        getattr(torch.ops.moe_overlap, f"_{_op}_cpp").default,
        obstacle=compiled.obstacle(_op),
        limit=_limit_of,
        misfit=_misfit_of,
        merit="compiled: one pass over memory",
    )
    registry.add(_op, "reference", _reference, merit="PyTorch's own operators, run everywhere")
registry.add("activation", "reference", _activation, merit="pure PyTorch, runs everywhere")
registry.add("activation_backward", "reference", _activation_backward, merit="pure PyTorch, runs everywhere")
implement(
    "activation",
    registry.kernel("activation"),
    lambda h_RF, kind, row_scale, offs: h_RF.new_empty((h_RF.shape[0], width(h_RF.shape[1], kind))),
)
implement("activation_backward", registry.kernel("activation_backward"), _activation_backward_fake)
differentiate("activation", _backward, _setup_context)
refuse_derivative("activation_backward")
