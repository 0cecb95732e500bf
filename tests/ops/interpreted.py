"""Triton kernels under Triton's interpreter, on CPU tensors.

The interpreter is chosen when a kernel is defined, so the whole process is in one mode or the other: `make test` runs
the files *_triton.py once more with TRITON_INTERPRET=1. It computes bfloat16 wrongly; tests use float16, float32 and
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import pytest
import torch

from moe_overlap import config
from moe_overlap.ops import registry, triton_kernels

MOE = torch.ops.moe_overlap
DTYPES = (torch.float32, torch.float16, torch.float64)
NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])
Results = tuple[torch.Tensor, ...]


def needs_triton(*, interpreter: bool) -> None:
    """At the top of a test file: skips it, with the reason, without Triton or in a process of the other mode."""
    if triton_kernels.missing():
        pytest.skip(str(triton_kernels.missing()), allow_module_level=True)
    if interpreter and triton_kernels.release() < (3, 9) and NUMPY >= (2, 4):
        reason = "before 3.9 Triton's interpreter turns arrays of one element into numbers, which numpy 2.4 refuses"
        pytest.skip(reason, allow_module_level=True)
    if interpreter and not config.triton_interpreter():
        pytest.skip("needs a process with TRITON_INTERPRET=1, the second one of `make test`", allow_module_level=True)
    if not interpreter and config.triton_interpreter():
        pytest.skip("Triton compiles only in a process without TRITON_INTERPRET", allow_module_level=True)


@contextmanager
def on_triton(*ops: str) -> Iterator[None]:
    """These operators, or all that have a kernel, run on Triton."""
    with ExitStack() as stack:
        for op in ops or triton_kernels.KERNELS:
            stack.enter_context(registry.force(op, "triton"))
        yield


def triton(op: str, *args: Any) -> Results:
    """The results of the Triton kernel of `op`."""
    with registry.force(op, "triton"):
        return _results(op, args)


def reference(op: str, *args: Any) -> Results:
    """The results of the reference of `op`."""
    with registry.force(op, "reference"):
        return _results(op, args)


def _results(op: str, args: tuple[Any, ...]) -> Results:
    result = getattr(MOE, op).default(*args)
    return result if isinstance(result, tuple) else (result,)


@contextmanager
def far_programs(first: int) -> Iterator[Callable[..., torch.Tensor]]:
    """Launches run the programs from `first` on, so that offsets beyond 2^31 are met without computing what is before.

    Yields a function that makes a tensor with the contents of fresh memory, zeros, which the system provides page by
    page when they are touched. The interpreter would copy such a tensor onto itself after each launch; not here.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_grid_index = builder.set_grid_idx

    def shifted(x: int, y: int, z: int) -> None:
        set_grid_index(x, y, z)
        builder.grid_idx = (x + first, y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        patch.setattr(builder, "set_grid_idx", shifted)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        yield _lazy


def _lazy(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)
