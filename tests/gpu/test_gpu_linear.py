"""The router's linear map of bfloat16 operands by matrix instructions: float32, in values and in gradients."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.ops.linear_float32 import linear_float32

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 37, 4096])
def test_logits_and_gradients_are_float32s(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, w = (torch.randn(rows, 512, generator=generator).to(torch.bfloat16).cuda() for rows in (tokens, 96))
    push = torch.randn(tokens, 96, generator=generator).cuda()
    leaves = [x.requires_grad_(), w.requires_grad_()]
    logits = linear_float32(x, w)
    assert logits.dtype == torch.float32
    want = x.detach().double() @ w.detach().double().T
    # Rounding of 512 products added up in float32; bfloat16 logits would be off by 1e-1.
    assert (logits.double() - want).abs().max() < 1e-3
    dx, dw = torch.autograd.grad(logits, leaves, push)
    for got, should in ((dx, push.double() @ w.double()), (dw, push.double().T @ x.double())):
        assert got.dtype == torch.bfloat16
        assert ((got.double() - should).norm() / should.norm()).item() < 3e-3  # one rounding to bfloat16
