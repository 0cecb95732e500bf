"""The one table of tolerances: how far a result in a dtype may lie from the one that is right.

Relative to the largest entry of the right one, as the sums of a matmul have errors of that size. Never loosened for one
comparison: what needs more has found something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol * max(|want|)."""

    rtol: float
    atol: float

    def limit(self, largest: float) -> float:
        """What |got - want| may be. largest: max(|want|)."""
        return self.atol + self.rtol * largest


TOLERANCES = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float16: Tolerance(rtol=4e-3, atol=1e-4),
    torch.bfloat16: Tolerance(rtol=2e-2, atol=1e-3),
}
