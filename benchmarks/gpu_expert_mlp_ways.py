"""The contenders of gpu_expert_mlp.py: each computes out_TD from x_TD, and the gradients of everything from dout_TD.

triton: our kernels, which read rows through the map. grouped_mm, loop: the registry's other implementations of the
expert MLP between our permute and combine. compile: plain PyTorch around torch's grouped matmul, under torch.compile.
liger: `fused_moe` of the liger-kernel wheel, which sorts by expert inside. Where rows arrived in the experts' order
there is nothing to gather and to sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu_expert_mlp_cases import Inputs
from moe_overlap.config import TILES
from moe_overlap.ops import cuda_kernels, expert_mlp_choice, registry
from moe_overlap.ops.expert_mlp_contract import ExpertMlp, ExpertMlpBackward

Results = dict[str, torch.Tensor]
IMPLEMENTATIONS = {"triton": "triton", "grouped_mm": "grouped_mm", "loop": "reference"}
"""Ours: contender -> name in the registry."""


@dataclass(frozen=True)
class Way:
    """A contender's name; the SM budget, for ours; `tuned`: with the block shapes of this run, not the table's.
    dealt: tiles of Triton's kernels from a counter, not in turn."""

    name: str
    num_sms: int | None = None
    tuned: bool = False
    dealt: bool = False


@dataclass(frozen=True)
class Contender:
    """forward() -> (out_TD, what backward needs); backward(that) -> gradients by the names of `Inputs.leaves`."""

    forward: Callable[[], tuple[torch.Tensor, Any]]
    backward: Callable[[Any], Results]


def moving_rows(device: str) -> str:
    """The implementation that copies and sums rows, and of the activation, for all of ours."""
    if device == "cpu":
        return "reference"
    return "cuda" if cuda_kernels.missing() is None else "triton"


def chosen(dtype: torch.dtype) -> str:
    """The contender that `auto` would take for the operator on a GPU, were all of them verified."""
    wanted = expert_mlp_choice.best(dtype, on_host=False)[0]
    return next(name for name, implementation in IMPLEMENTATIONS.items() if implementation == wanted)


def contender(way: Way, inputs: Inputs, measured: Mapping[Any, Any]) -> Contender:
    """Raises what the contender raises where it is not to be had. `measured`: block shapes for a tuned one."""
    if way.name in IMPLEMENTATIONS:
        ours = _within(_ours(way, inputs), lambda: _tiles("dealt" if way.dealt else "in_turn"))
        return _with_blocks(ours, measured) if way.tuned else ours
    if way.name == "compile":
        return _compiled(inputs)
    return _liger(inputs)


def _ours(way: Way, inputs: Inputs) -> Contender:
    implementation, rows_by = IMPLEMENTATIONS[way.name], moving_rows(inputs.x.device.type)
    forward_op, backward_op = (registry.function(op, implementation) for op in ("expert_mlp", "expert_mlp_backward"))
    permute, combine = (registry.function(op, rows_by) for op in ("permute", "combine"))
    mapped, gathers = inputs.row_to_token is not None, way.name == "triton"
    map_R = inputs.row_to_token if gathers else None
    # The loop has its counts on the host, as in a schedule.
    offs, scale_R = inputs.offs.cpu() if way.name == "loop" else inputs.offs, inputs.row_scale
    operands = (inputs.w_in, inputs.w_out, offs, "swiglu", map_R, scale_R)

    def spread(value_TD: torch.Tensor) -> torch.Tensor:
        return permute(value_TD, inputs.slot_to_row, inputs.offs, inputs.row_to_slot.shape[0]) if mapped else value_TD

    def add_up(value_RD: torch.Tensor) -> torch.Tensor:
        return combine(value_RD, inputs.slot_to_row, None, None) if mapped else value_RD

    def forward() -> tuple[torch.Tensor, Any]:
        x = inputs.x if gathers else spread(inputs.x)
        y_RD, h_RF = forward_op(ExpertMlp(x, *operands, way.num_sms, save_h=True))
        return add_up(y_RD), (x, h_RF)

    def backward(saved: Any) -> Results:
        wanted = [True, True, True, scale_R is not None]
        call = ExpertMlpBackward(spread(inputs.dout), *saved, *operands, wanted, way.num_sms)
        dx, dw_in, dw_out, dscale_R = backward_op(call)
        found = {"x": dx if gathers else add_up(dx), "w_in": dw_in, "w_out": dw_out}
        return found if scale_R is None else found | {"row_scale": dscale_R}

    return Contender(forward, backward)


def _with_blocks(ours: Contender, measured: Mapping[Any, Any]) -> Contender:
    from moe_overlap.ops.expert_mlp_blocks_triton import use

    return _within(ours, lambda: use(measured))


def _within(ours: Contender, context: Callable[[], AbstractContextManager[Any]]) -> Contender:
    def forward() -> tuple[torch.Tensor, Any]:
        with context():
            return ours.forward()

    def backward(saved: Any) -> Results:
        with context():
            return ours.backward(saved)

    return Contender(forward, backward)


@contextmanager
def _tiles(word: str) -> Iterator[None]:
    """How programs of Triton kernels get their tiles, whatever the environment says."""
    before = os.environ.get(TILES.name, "")
    os.environ[TILES.name] = word
    try:
        yield
    finally:
        os.environ[TILES.name] = before


def _plain(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    row_scale: torch.Tensor | None,
    row_to_token: torch.Tensor | None,
    slot_to_row: torch.Tensor,
    offs: torch.Tensor,
) -> torch.Tensor:
    """As one writes it with torch's grouped matmul."""
    rows_RD = x if row_to_token is None else x[row_to_token]
    gate_RF, up_RF = functional.grouped_mm(rows_RD, w_in.transpose(1, 2), offs=offs).chunk(2, dim=1)
    a_RF = functional.silu(gate_RF) * up_RF
    if row_scale is not None:
        a_RF = (a_RF * row_scale[:, None]).to(a_RF.dtype)
    y_RD = functional.grouped_mm(a_RF, w_out.transpose(1, 2), offs=offs)
    return y_RD if row_to_token is None else y_RD[slot_to_row].sum(dim=1)


def _compiled(inputs: Inputs) -> Contender:
    plain = torch.compile(_plain, dynamic=False)

    def whole(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, *scale: torch.Tensor) -> torch.Tensor:
        maps = inputs.row_to_token, inputs.slot_to_row, inputs.offs
        return plain(x, w_in, w_out, scale[0] if scale else None, *maps)

    return _by_autograd(whole, inputs.leaves, inputs.dout)


def _liger(inputs: Inputs) -> Contender:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def whole(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return LigerFusedMoEFunction.apply(x, w_in, w_out, inputs.ids_TK, weights_TK)

    by_token = _by_autograd(whole, inputs.leaves | {"row_scale": inputs.weights_TK}, inputs.dout)

    def backward(saved: Any) -> Results:
        found = by_token.backward(saved)
        dweights_TK = found.pop("row_scale")
        if inputs.row_scale is None:
            return found
        return found | {"row_scale": dweights_TK.reshape(-1)[inputs.row_to_slot.long()]}

    return Contender(by_token.forward, backward)


def _by_autograd(function: Callable[..., torch.Tensor], leaves: Results, dout_TD: torch.Tensor) -> Contender:
    def forward() -> tuple[torch.Tensor, Any]:
        fresh = {name: value.detach().requires_grad_() for name, value in leaves.items()}
        out_TD = function(*fresh.values())
        return out_TD, (out_TD, fresh)

    def backward(saved: Any) -> Results:
        out_TD, fresh = saved
        return dict(zip(fresh, torch.autograd.grad(out_TD, tuple(fresh.values()), dout_TD), strict=True))

    return Contender(forward, backward)
