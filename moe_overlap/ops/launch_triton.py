"""Launching Triton kernels: the one place that calls them, and the small arithmetic of their block shapes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl


def launch(
    kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` on the device of its first tensor, in the current stream; an empty grid is nothing to do.

    Contraction of a * b + c is asked for by name, as the default of Triton changes with its versions. Kernels name the
    sizes that change from step to step in `do_not_specialize`, so that no step but the first compiles.
    """
    if 0 in grid:
        return
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    with _current(first.device):
        enqueue(kernel, tuple(grid), args, constants, options)


def enqueue(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """The launch itself, apart so that tests can compile what would be launched."""
    kernel[grid](*args, **constants, **options)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton dtype sums are made in: float64 for float64, float32 for everything else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`, and at least 1."""
    return int(triton.next_power_of_2(max(1, count)))


def tile(width: int, *, elements: int, widest: int) -> tuple[int, int]:
    """(rows, columns) of a block of about `elements` elements of rows that are `width` wide; powers of two."""
    columns = min(power_of_two(width), widest)
    return max(1, elements // columns), columns


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def contiguous(value: torch.Tensor | None) -> torch.Tensor | None:
    """An optional tensor, contiguous."""
    return None if value is None else value.contiguous()
