"""One call on the CUDA kernel and on the reference: the same CPU arguments, two sets of results on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_overlap.ops import cuda_kernels, registry

MOE = torch.ops.moe_overlap
Results = tuple[torch.Tensor, ...]


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def kernel(op: str, *arguments: Any) -> Results:
    """The results of the kernel, on the GPU. Arguments on the CPU are copied; those on the GPU keep their strides."""
    with registry.force(op, "cuda"):
        if op == "unpack_into":  # an entry of the registry alone, which writes its last argument
            registry.kernel(op)(*map(on_gpu, arguments))
            return ()
        result = getattr(MOE, op).default(*map(on_gpu, arguments))
    return result if isinstance(result, tuple) else (result,)


def reference(op: str, *arguments: Any) -> Results:
    """The reference's results for CPU arguments."""
    with registry.force(op, "reference"):
        result = getattr(MOE, op).default(*arguments)
    return result if isinstance(result, tuple) else (result,)


def cpu(results: Results) -> Results:
    return tuple(value.cpu() for value in results)


def every(*ops: str) -> list[Any]:
    """(op, dtype) for each dtype that a kernel takes, each covering what it names."""
    return [
        pytest.param(op, dtype, marks=pytest.mark.covers(op, dtype), id=f"{op}-{str(dtype)[6:]}")
        for op in ops
        for dtype in cuda_kernels.dtypes(op)
    ]
