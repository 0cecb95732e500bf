"""Comparisons with the float64 oracle. The tolerances are the package's: moe_overlap/verify/tolerances.py."""

from __future__ import annotations

import torch

from moe_overlap.verify.tolerances import TOLERANCES


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, in float64; NaN if there is one in `got`."""
    return (got.double() - want.double()).abs().max().item() if want.numel() else 0.0


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that `got` is `want` (from the oracle) as nearly as computing in `dtype` (default: got's) allows."""
    assert got.shape == want.shape, (got.shape, want.shape)
    tolerance = TOLERANCES[dtype or got.dtype]
    scale = want.double().abs().max().item() if want.numel() else 0.0
    limit = tolerance.limit(scale)
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
