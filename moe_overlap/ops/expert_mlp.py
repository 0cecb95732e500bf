"""expert_mlp: the two matmuls of every expert with the activation between, differentiable.

Two operators: `expert_mlp`, which users call, and `_expert_mlp`, which also returns the pre-activation h. Saved for
backward are x, h, the weights and the maps; a = act(h) is computed again, and y is never kept (the memory plan of
SonicMoE, arXiv 2512.14080). With `row_to_token` rows are read from x through the map, expert by expert, and no permuted
copy of x is written. `row_scale` multiplies a, so that router weights can be applied here and combine is a plain sum.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, expert_loop, expert_mlp_choice, maps, registry, workspace
from moe_overlap.ops.activation import backward_into, forward_into, width
from moe_overlap.ops.library import (
    LIBRARY,
    cast_under_autocast,
    define,
    differentiate,
    implement,
    refuse_derivative,
)


def expert_mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    offs: torch.Tensor,
    *,
    kind: str,
    row_to_token: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """y = (act(x @ w_in.T) * row_scale) @ w_out.T with the weights of the expert each row belongs to.

    Args:
        x: [R, D] in the order by expert, or [T, D] in any order with `row_to_token`.
        w_in: gate_up_proj [E, 2F, D] for "swiglu", up_proj [E, F, D] for "gelu" and "relu".
        w_out: down_proj [E, D, F].
        offs: int32 [E], inclusive ends: expert i has the rows [offs[i-1], offs[i]).
        kind: "swiglu", "gelu" or "relu".
        row_to_token: int32 [R], the token each row reads, -1 for a row of zeros.
        row_scale: float32 or float64 [R].
        num_sms: multiprocessors the kernels of forward and backward may use, a hint for GPU implementations; the CPU
            has none.

    Returns:
        y_RD [R, D] in the dtype of x, rows from offs[-1] on zero; differentiable in x, both weights and row_scale.
        Under autocast x and the weights are cast to its dtype.

    Raises:
        ConfigError: naming the argument, its value and what was expected.
    """
    checks.check_kind(kind)
    checks.check_tensor("x", x, (None, None), checks.FLOATS, what="[R, D]")
    hidden, device = x.shape[1], x.device
    # Autocast makes the dtypes equal further down.
    dtypes = checks.FLOATS if torch.is_autocast_enabled(device.type) else (x.dtype,)
    checks.check_tensor("w_in", w_in, (None, None, hidden), dtypes, what="[E, F', D]", device=device)
    experts, ffn = w_in.shape[0], width(w_in.shape[1], kind)
    if kind == "swiglu" and w_in.shape[1] % 2 != 0:
        raise ConfigError("w_in", f"shape {tuple(w_in.shape)}", "[E, 2F, D] = [gate | up] for swiglu")
    checks.check_tensor("w_out", w_out, (experts, hidden, ffn), dtypes, what="[E, D, F]", device=device)
    checks.check_tensor("offs", offs, (experts,), torch.int32, what="[E]", device=device)
    if row_to_token is not None:
        checks.check_tensor("row_to_token", row_to_token, (None,), torch.int32, what="[R]", device=device)
    if row_scale is not None:
        rows = x.shape[0] if row_to_token is None else row_to_token.shape[0]
        floats = (torch.float32, torch.float64)
        checks.check_tensor("row_scale", row_scale, (rows,), floats, what="[R]", device=device)
    if num_sms is not None and num_sms < 1:
        raise ConfigError("num_sms", num_sms, "at least 1, or None for all")
    return torch.ops.moe_overlap.expert_mlp.default(x, w_in, w_out, offs, kind, row_to_token, row_scale, num_sms)


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
    num_rows = _num_rows(x, row_to_token)
    ranges = expert_loop.row_ranges(offs, None, num_rows, w_in.shape[0])
    used, most = (ranges[-1][1] if ranges else 0), expert_loop.longest(ranges)
    x = expert_loop.aligned(x)
    y_RD = workspace.empty((num_rows, w_out.shape[1]), like=x)
    h_RF = workspace.empty((num_rows if save_h else most, w_in.shape[1]), like=x)
    a_nF = workspace.empty((most, w_out.shape[2]), like=x)
    for (begin, end), w_in_FD, w_out_DF in zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True):
        if begin < end:
            h, a = h_RF[begin:end] if save_h else h_RF[: end - begin], a_nF[: end - begin]
            torch.mm(_take(x, row_to_token, begin, end), w_in_FD.t(), out=h)
            forward_into(h, kind, a)
            if row_scale is not None:
                a.mul_(row_scale[begin:end, None])
            torch.mm(a, w_out_DF.t(), out=y_RD[begin:end])
    y_RD[used:].zero_()
    if not save_h:
        return y_RD, x.new_empty((0, w_in.shape[1]))
    h_RF[used:].zero_()
    return y_RD, h_RF


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
    """Gradients of x, w_in, w_out and row_scale, those `wanted`; an empty tensor stands for the others."""
    wants_dx, wants_dw_in, wants_dw_out, wants_dscale = wanted
    num_rows, dtype = _num_rows(x, row_to_token), checks.accumulation_dtype(x.dtype)
    ranges = expert_loop.row_ranges(offs, None, num_rows, w_in.shape[0])
    used, most = (ranges[-1][1] if ranges else 0), expert_loop.longest(ranges)
    x, dy_RD, nothing = expert_loop.aligned(x), expert_loop.aligned(dy_RD), x.new_empty((0,))
    dx_RD = workspace.empty((num_rows, x.shape[1]), like=x) if wants_dx else nothing
    dw_in = workspace.empty(w_in.shape, like=x) if wants_dw_in else nothing
    dw_out = workspace.empty(w_out.shape, like=x) if wants_dw_out else nothing
    dscale = torch.zeros_like(row_scale) if row_scale is not None and wants_dscale else nothing
    a_nF = workspace.empty((most, w_out.shape[2]), like=x)
    dh_nF = workspace.empty((most, w_in.shape[1]), like=x)
    da_nF = expert_loop.da_buffer(kind, ranges, w_out, x)
    for i, ((begin, end), w_in_FD, w_out_DF) in enumerate(zip(ranges, w_in.unbind(0), w_out.unbind(0), strict=True)):
        rows = end - begin
        dy, h, dh, a = dy_RD[begin:end], h_RF[begin:end], dh_nF[:rows], a_nF[:rows]
        if rows > 0:
            da = dh if da_nF is None else da_nF[:rows]
            torch.mm(dy, w_out_DF, out=da)
            if wants_dscale:
                forward_into(h, kind, a)
                dscale[begin:end] = (da.to(dtype) * a.to(dtype)).sum(dim=1)
            if row_scale is not None:
                da.mul_(row_scale[begin:end, None])
            backward_into(da, h, kind, dh, a)
            if row_scale is not None:
                a.mul_(row_scale[begin:end, None])
        if wants_dw_out:
            expert_loop.weight_gradient(dy, a, dw_out[i])
        if wants_dw_in:
            expert_loop.weight_gradient(dh, _take(x, row_to_token, begin, end), dw_in[i])
        if wants_dx and rows > 0:
            torch.mm(dh, w_in_FD, out=dx_RD[begin:end])
    if not wants_dx:
        return nothing, dw_in, dw_out, dscale
    dx_RD[used:].zero_()
    if row_to_token is None:
        return dx_RD, dw_in, dw_out, dscale
    return maps.add_rows(dx_RD, row_to_token, x.shape[0], dtype).to(x.dtype), dw_in, dw_out, dscale


def _num_rows(x: torch.Tensor, row_to_token: torch.Tensor | None) -> int:
    return x.shape[0] if row_to_token is None else row_to_token.shape[0]


def _take(x: torch.Tensor, row_to_token: torch.Tensor | None, begin: int, end: int) -> torch.Tensor:
    return x[begin:end] if row_to_token is None else maps.take_rows(x, row_to_token[begin:end])


def _with_checked_map(name: str, map_position: int, tokens_position: int) -> Any:
    """The kernel of an operator, after a look at the values of row_to_token."""
    run = registry.kernel(name)

    def kernel(*args: Any) -> Any:
        if args[map_position] is not None:
            tokens = args[tokens_position].shape[0]
            checks.check_values("row_to_token", args[map_position], -1, tokens, why="-1 = none, the rows of x")
        return run(*args)

    return kernel


def _fake(
    x: torch.Tensor, w_in: torch.Tensor, w_out: Any, offs: Any, kind: str, row_to_token: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, save_h = _num_rows(x, row_to_token), rest[-1]
    return x.new_empty((num_rows, x.shape[1])), x.new_empty((num_rows if save_h else 0, w_in.shape[1]))


def _backward_fake(
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
) -> tuple[torch.Tensor, ...]:
    return tuple(
        like.new_empty(like.shape) if want and like is not None else x.new_empty((0,))
        for like, want in zip((x, w_in, w_out, row_scale), wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w_in, w_out, offs, ctx.kind, row_to_token, row_scale, ctx.num_sms, save_h = inputs
    _, h_RF = output
    assert save_h, "a backward needs h: _expert_mlp was called with save_h=False and inputs that require gradients"
    ctx.mark_non_differentiable(h_RF)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h_RF, w_in, w_out, offs, row_to_token, row_scale)


def _backward(ctx: Any, dy_RD: torch.Tensor | None, dh_RF: None) -> tuple[torch.Tensor | None, ...]:
    if dy_RD is None:
        return (None,) * 9
    x, h_RF, w_in, w_out, offs, row_to_token, row_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[6]]
    gradients = torch.ops.moe_overlap._expert_mlp_backward.default(
        dy_RD, x, h_RF, w_in, w_out, offs, ctx.kind, row_to_token, row_scale, wanted, ctx.num_sms
    )
    dx, dw_in, dw_out, dscale = (grad if want else None for grad, want in zip(gradients, wanted, strict=True))
    return dx, dw_in, dw_out, None, None, None, dscale, None, None


def _compose(
    x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, offs: torch.Tensor, kind: str, *rest: Any
) -> torch.Tensor:
    """expert_mlp in terms of _expert_mlp: h is kept only where a backward can come."""
    floats = (x, w_in, w_out, rest[1])
    save_h = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats)
    y_RD: torch.Tensor = torch.ops.moe_overlap._expert_mlp.default(x, w_in, w_out, offs, kind, *rest, save_h)[0]
    return y_RD


_OPERANDS = "Tensor w_in, Tensor w_out, Tensor offs, str kind, Tensor? row_to_token, Tensor? row_scale"
define(f"expert_mlp(Tensor x, {_OPERANDS}, int? num_sms) -> Tensor")
define(f"_expert_mlp(Tensor x, {_OPERANDS}, int? num_sms, bool save_h) -> (Tensor, Tensor)")
# With a default: code that torch.compile kept from an earlier version calls it without num_sms.
define(
    f"_expert_mlp_backward(Tensor dy, Tensor x, Tensor h, {_OPERANDS}, bool[] wanted, int? num_sms=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _op, _kernel in (("expert_mlp", _expert_mlp), ("expert_mlp_backward", _expert_mlp_backward)):
    registry.add(
        _op,
        "reference",
        _kernel,
        merit="a loop of matmuls over experts, runs everywhere",
        misfit=expert_mlp_choice.misfit(_op, "reference"),
    )
LIBRARY.impl("expert_mlp", _compose, "CompositeImplicitAutograd")
implement("_expert_mlp", _with_checked_map("expert_mlp", 5, 0), _fake)
implement("_expert_mlp_backward", _with_checked_map("expert_mlp_backward", 7, 1), _backward_fake)
differentiate("_expert_mlp", _backward, _setup_context)
refuse_derivative("_expert_mlp_backward")
cast_under_autocast("_expert_mlp", lower=(0, 1, 2))
