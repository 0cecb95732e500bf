"""expert_mlp: the two matmuls of every expert with the activation between, differentiable.

Two operators: `expert_mlp`, which users call, and `_expert_mlp`, which also returns the pre-activation h. Saved for
backward are x, h, the weights and the maps; a = act(h) is computed again, and y is never kept (the memory plan of
SonicMoE, arXiv 2512.14080). With `row_to_token` rows are read from x through the map, expert by expert, and no permuted
copy of x is written. `row_scale` multiplies a, so that router weights can be applied here and combine is a plain sum.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.ops import checks, expert_mlp_choice, maps, registry, workspace
from moe_overlap.ops.expert_loop import HiddenGradient, rows_through_experts
from moe_overlap.ops.expert_mlp_contract import ExpertMlp, ExpertMlpBackward
from moe_overlap.ops.library import (
    LIBRARY,
    cast_under_autocast,
    define,
    differentiate,
    implement,
    refuse_derivative,
)
from moe_overlap.ops.row_groups import RowReader, clear_others


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
        w_in: gate_up_proj [E, 2F, D] with a gate ("swiglu"), up_proj [E, F, D] without ("gelu", "relu").
        w_out: down_proj [E, D, F].
        offs: int32 [E], inclusive ends: expert i has the rows [offs[i-1], offs[i]).
        kind: "swiglu", "gelu", "relu", or a name of `activation_kinds.py`.
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
    ExpertMlp(x, w_in, w_out, offs, kind, row_to_token, row_scale, num_sms).check()
    args = (x, w_in, w_out, offs, kind, row_to_token, row_scale, num_sms)
    if torch.compiler.is_compiling() or checks.inside_transform():
        return torch.ops.moe_overlap.expert_mlp.default(*args)
    return _compose(*args)  # which the dispatcher would call


def _expert_mlp(call: ExpertMlp) -> tuple[torch.Tensor, torch.Tensor]:
    groups, x, w_in, w_out = call.groups, call.x, call.w_in, call.w_out
    y_RD = workspace.empty((groups.num_rows, w_out.shape[1]), like=x)
    h_RF = workspace.empty((groups.num_rows, w_in.shape[1]), like=x) if call.save_h else None
    read = RowReader(x, call.row_to_token, groups, padded=True)
    rows_through_experts(groups, read, w_in, w_out, call.kind, _scale(call), y_RD, h_RF)
    if groups.used < groups.num_rows:
        y_RD[groups.used :].zero_()
        if h_RF is not None:
            h_RF[groups.used :].zero_()
    return y_RD, call.new_h() if h_RF is None else h_RF


def _expert_mlp_backward(call: ExpertMlpBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wants_dx, wants_dw_in, wants_dw_out, wants_dscale = call.wanted
    groups, kind, row_to_token, row_scale = call.groups, call.kind, call.row_to_token, call.row_scale
    x, h_RF, w_in, w_out = call.x, call.h, call.w_in, call.w_out
    read_x, read_dy = RowReader(x, row_to_token, groups, padded=True), RowReader(call.dy, None, groups, padded=True)
    scale, longest, nothing = _scale(call), groups.longest, call.nothing()
    dx_RD = workspace.empty((groups.num_rows, x.shape[1]), like=x) if wants_dx else nothing
    dw_in = workspace.empty(w_in.shape, like=x, rows=False) if wants_dw_in else nothing
    dw_out = workspace.empty(w_out.shape, like=x, rows=False) if wants_dw_out else nothing
    dscale = torch.zeros_like(row_scale) if row_scale is not None and wants_dscale else nothing
    a_nF = workspace.empty((longest, w_out.shape[2]), like=x)
    dh_nF = workspace.empty((longest, w_in.shape[1]), like=x)
    hidden_gradient = HiddenGradient(groups, kind, h_RF, dh_nF, a_nF, scale, dscale if wants_dscale else None)
    dx_parts = groups.cut(dx_RD) if wants_dx else []
    for place, ((i, begin, end), h) in enumerate(zip(groups.hits, groups.cut(h_RF), strict=True)):
        dy, dh, a = read_dy(place), dh_nF[: end - begin], a_nF[: end - begin]
        scales = None if scale is None else scale[begin:end]
        hidden_gradient(dy, w_out[i], h, dh, a, scales, dscale[begin:end] if wants_dscale else None)
        if wants_dw_out:
            torch.mm(dy.t(), a, out=dw_out[i])
        if wants_dw_in:
            torch.mm(dh.t(), read_x(place), out=dw_in[i])
        if wants_dx:
            torch.mm(dh, w_in[i], out=dx_parts[place])
    for dw in (dw_in, dw_out):
        clear_others(groups, dw, 0, dw.shape[0])  # an empty one has no others
    if not wants_dx:
        return nothing, dw_in, dw_out, dscale
    dx_RD[groups.used :].zero_()
    if row_to_token is None:
        return dx_RD, dw_in, dw_out, dscale
    dx_TD = maps.add_rows(dx_RD, row_to_token, x.shape[0], checks.accumulation_dtype(x.dtype))
    return dx_TD.to(x.dtype), dw_in, dw_out, dscale


def _scale(call: ExpertMlp | ExpertMlpBackward) -> torch.Tensor | None:
    """row_scale in the dtype of sums."""
    return None if call.row_scale is None else call.row_scale.to(checks.accumulation_dtype(call.dtype))


def _kernel(name: str, call_type: type[ExpertMlp] | type[ExpertMlpBackward]) -> Any:
    """The kernel of an operator, after a look at the values of row_to_token."""
    run = registry.kernel(name)

    def kernel(*args: Any) -> Any:
        call = call_type(*args)
        call.check_values()
        return run(call)

    return kernel


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = ExpertMlp(*args)
    return call.x.new_empty((call.num_rows, call.x.shape[1])), call.new_h()


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    call = ExpertMlpBackward(*args)
    return tuple(
        like.new_empty(like.shape) if want and like is not None else call.nothing()
        for like, want in zip((call.x, call.w_in, call.w_out, call.row_scale), call.wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    call, (_, h_RF) = ExpertMlp(*inputs), output
    assert call.save_h, "a backward needs h: _expert_mlp was called with save_h=False and inputs that require gradients"
    ctx.kind, ctx.num_sms = call.kind, call.num_sms
    ctx.mark_non_differentiable(h_RF)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.x, h_RF, call.w_in, call.w_out, call.offs, call.row_to_token, call.row_scale)


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


def _compose(*args: Any) -> torch.Tensor:
    """expert_mlp in terms of _expert_mlp: h is kept only where a backward can come."""
    save_h = torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    y_RD: torch.Tensor = torch.ops.moe_overlap._expert_mlp.default(*args, save_h)[0]
    return y_RD


_OPERANDS = "Tensor w_in, Tensor w_out, Tensor offs, str kind, Tensor? row_to_token, Tensor? row_scale"
define(f"expert_mlp(Tensor x, {_OPERANDS}, int? num_sms) -> Tensor")
define(f"_expert_mlp(Tensor x, {_OPERANDS}, int? num_sms, bool save_h) -> (Tensor, Tensor)")
# With a default: code that torch.compile kept from an earlier version calls it without num_sms.
define(
    f"_expert_mlp_backward(Tensor dy, Tensor x, Tensor h, {_OPERANDS}, bool[] wanted, int? num_sms=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _op, _reference in (("expert_mlp", _expert_mlp), ("expert_mlp_backward", _expert_mlp_backward)):
    registry.add(
        _op,
        "reference",
        _reference,
        merit="a loop of matmuls over experts, runs everywhere",
        misfit=expert_mlp_choice.misfit("reference"),
    )
LIBRARY.impl("expert_mlp", _compose, "CompositeImplicitAutograd")
LIBRARY.impl("expert_mlp", _compose, "FuncTorchDynamicLayerFrontMode")  # before a transform looks: see `differentiate`
implement("_expert_mlp", _kernel("expert_mlp", ExpertMlp), _fake)
implement("_expert_mlp_backward", _kernel("expert_mlp_backward", ExpertMlpBackward), _backward_fake)
differentiate("_expert_mlp", _backward, _setup_context)
refuse_derivative("_expert_mlp_backward")
cast_under_autocast("_expert_mlp", lower=(0, 1, 2))
