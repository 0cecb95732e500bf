"""The activation and its derivative as device functions in float32, for every Triton kernel that has one inside.

Of swiglu h = [gate | up] and a = silu(gate) * up. The others have no gate and read `up` = h alone.
NaN in h comes out as NaN, as in the reference: comparisons are written so that they are false for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

KIND_NUMBERS = {"swiglu": 0, "gelu": 1, "relu": 2}
"""What the constexpr KIND of a kernel means."""

SWIGLU = tl.constexpr(0)
GELU = tl.constexpr(1)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def activate(gate, up, KIND: tl.constexpr):
    """a = act(h). float32 in and out, any shape."""
    if KIND == SWIGLU:
        a = gate * tl.sigmoid(gate) * up
    elif KIND == GELU:
        a = 0.5 * up * (1.0 + tl.erf(up * _SQRT_HALF))
    else:
        a = tl.where(up < 0, 0.0, up)
    return a


@triton.jit
def differentiate(da, gate, up, KIND: tl.constexpr):
    """(dgate, dup) for the gradient da of a; without a gate dup is dh. float32."""
    if KIND == SWIGLU:
        share = tl.sigmoid(gate)
        dup = da * gate * share
        dgate = da * up * share * (1.0 + gate * (1.0 - share))
    elif KIND == GELU:
        below = 0.5 * (1.0 + tl.erf(up * _SQRT_HALF))
        dup = da * (below + up * _NORMAL_AT_ZERO * tl.exp(-0.5 * up * up))
        dgate = dup
    else:
        dup = tl.where(up <= 0, 0.0, da)
        dgate = dup
    return dgate, dup
