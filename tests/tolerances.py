"""The one table of tolerances: how far a result in a dtype may lie from the float64 oracle.

`close` compares relative to the largest entry of the reference, as the sums of a matmul have errors of that size. Never
loosened for one test: a test that needs more has found something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol * max(|want|)."""

    rtol: float
    atol: float


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float16: Tolerance(rtol=4e-3, atol=1e-4),
    torch.bfloat16: Tolerance(rtol=2e-2, atol=1e-3),
}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, in float64; NaN if there is one in `got`."""
    return (got.double() - want.double()).abs().max().item() if want.numel() else 0.0


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that `got` is `want` (from the oracle) as nearly as computing in `dtype` (default: got's) allows."""
    assert got.shape == want.shape, (got.shape, want.shape)
    tolerance = TOLERANCES[dtype or got.dtype]
    scale = want.double().abs().max().item() if want.numel() else 0.0
    limit = tolerance.atol + tolerance.rtol * scale
    worst = error(got, want)
    assert worst <= limit, f"error {worst:.3g} > {limit:.3g} (largest entry {scale:.3g}, {dtype or got.dtype})"


def same_bits(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Assert equality bit for bit (so that NaN equals NaN and 0.0 differs from -0.0), dtype and shape included."""
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, got.shape, want.dtype, want.shape)
        if got.numel():
            assert torch.equal(bits(got), bits(want)), "not the same bits"


def bits(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return value.detach().contiguous().view(-1).view(torch.uint8)
