"""A linear map in float32, as routers need it: of bfloat16 operands on a GPU, by matrix instructions.

Products of two bfloat16 numbers are exact in float32, in which the matrix instructions sum them: so that is a float32
matmul of the same numbers, in another order of sums, at many times the speed of one without tf32. In backward the
gradient of the logits is float32; it is cut into three bfloat16 parts, which hold its 24 bits, and all are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def linear_float32(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """x @ w.T in float32, [T, E]; gradients in the dtypes of x and w."""
    plain = type(x_TD) in _PLAIN and type(w_ED) in _PLAIN
    if plain and x_TD.device.type == "cuda" and x_TD.dtype == w_ED.dtype == torch.bfloat16:
        result: torch.Tensor = _OfBfloat16.apply(x_TD, w_ED)
        return result
    return functional.linear(x_TD.to(torch.float32), w_ED.to(torch.float32))


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Not, for example, a DTensor, whose placements a function of autograd would not see."""


class _OfBfloat16(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
        return _product(x_TD, w_ED.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits_TE: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TD, w_ED = ctx.saved_tensors
        experts, parts_T3E = w_ED.shape[0], torch.cat(three_parts(dlogits_TE), dim=1)
        dx_TD = _product(parts_T3E, w_ED.repeat(3, 1)).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx_TD, None
        dw_ED = _product(parts_T3E.t(), x_TD).view(3, experts, -1).sum(dim=0)
        return dx_TD, dw_ED.to(w_ED.dtype)


def three_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """bfloat16 tensors whose sum is the float32 `value` (of finite numbers above 2^-110 in magnitude)."""
    parts = []
    for _ in range(3):
        parts.append(value.to(torch.bfloat16))
        value = value - parts[-1]
    return parts


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of bfloat16 operands, summed and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)
