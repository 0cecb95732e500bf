"""The router's linear map on bfloat16 operands, with the matmul of the GPU played in float32."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.ops import linear_float32 as module
from moe_overlap.ops.linear_float32 import _OfBfloat16, linear_float32, three_parts

BF16 = torch.bfloat16


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype == BF16
        return a.float() @ b.float()

    monkeypatch.setattr(module, "_product", product)


def test_three_parts_are_the_number() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(10000, generator=generator) * torch.exp2(torch.randint(-60, 60, (10000,), generator=generator))
    parts = three_parts(value)
    assert all(part.dtype == BF16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), value.double())


@pytest.mark.parametrize("wants_x, wants_w", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_are_those_in_float64(played: None, wants_x: bool, wants_w: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w, push = (torch.randn(shape, generator=generator) for shape in ((37, 24), (5, 24), (37, 5)))
    x, w = x.to(BF16).requires_grad_(wants_x), w.to(BF16).requires_grad_(wants_w)
    leaves = [value for value in (x, w) if value.requires_grad]
    logits = _OfBfloat16.apply(x, w)
    found = torch.autograd.grad(logits, leaves, push)
    want = [x.double().T @ push.double()] if not wants_x else [push.double() @ w.double()]
    want += [push.double().T @ x.double()] if wants_x and wants_w else []
    want = [value.T if value.shape == (24, 5) else value for value in want]
    torch.testing.assert_close(logits.double(), x.double() @ w.double().T, rtol=1e-6, atol=1e-5)
    for have, should, leaf in zip(found, want, leaves, strict=True):
        assert have.dtype == BF16 == leaf.dtype
        torch.testing.assert_close(have.double(), should, rtol=2**-8, atol=1e-5)


def test_elsewhere_it_is_a_linear_map_in_float32() -> None:
    x, w = torch.randn(3, 4, dtype=BF16), torch.randn(2, 4)
    assert torch.equal(linear_float32(x, w), torch.nn.functional.linear(x.float(), w))
    assert linear_float32(x, w.to(BF16)).dtype == torch.float32
