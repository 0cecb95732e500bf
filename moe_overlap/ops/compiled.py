"""What the operators have in common whose implementation `cpp` is in the compiled part `_C` (csrc/bindings).

The implementation of `<op>` is the operator `_<op>_cpp`, for contiguous CPU tensors and without checks of arguments.
Those that write rows are given the memory to write.
"""

from __future__ import annotations

import torch

from moe_overlap.ops import checks, registry


def obstacle(op: str) -> registry.Obstacle:
    """Why the compiled implementation of `op` cannot run somewhere, or None."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"compiled for CPU tensors, not {device.type}"
        try:
            from moe_overlap.native import native
        except ImportError as error:
            return f"no compiled part in this install ({error})"
        if not native.load_ops():
            return native.reason("ops")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_overlap::_{op}_cpp", "CPU"):
            return f"the compiled part has no {op}"
        return None

    return why_not


def in_accumulation_dtype(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The weights of rows, as the compiled code reads them."""
    return weights.to(checks.accumulation_dtype(rows.dtype)).contiguous()
