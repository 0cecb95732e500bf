"""Ahead-of-time compilation of Triton kernels, without a GPU: what an operator would launch, for an architecture.

`recorded` runs an operator's function on meta tensors and keeps its launches; `compiled` compiles one exactly as the
launch would (types, divisibility by 16, constants), down to machine code; `resources` reads that back with the
cuobjdump of Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moe_overlap.ops import launch_triton

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""As the PTX of each architecture writes them."""


@dataclass(frozen=True)
class Launch:
    """One launch that was not made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Resources:
    """What one program takes, as the machine code says. Spilled registers show as stack."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory. Triton takes its address, 0, for aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(function: Callable[..., Any], *args: Any) -> list[Launch]:
    """The launches of function(*args)."""
    launches: list[Launch] = []

    def keep(kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict, options: dict) -> None:
        launches.append(Launch(kernel, grid, args, {**constants, **options}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_triton, "enqueue", keep)
        function(*args)
    return launches


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel compiled for compute capability `arch` (80, 90, 100)."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.keywords)
    packed = launch.kernel._pack_args(backend, launch.keywords, bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(kernel: Any, folder: Path) -> Resources:
    """What a compiled kernel takes; `folder` is for scratch files."""
    text = _cuobjdump(kernel, folder, "-res-usage")
    (line,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack_bytes, local_bytes = map(int, line)
    return Resources(registers, stack_bytes, local_bytes, int(kernel.metadata.shared))


def machine_code(kernel: Any, folder: Path) -> str:
    """The disassembly of a compiled kernel."""
    return _cuobjdump(kernel, folder, "-sass")


def _cuobjdump(kernel: Any, folder: Path, option: str) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, timeout=60).stdout
