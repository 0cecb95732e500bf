"""Checks of arguments. A user's mistake is a ConfigError that names the field, the value and what was expected.

Everything here looks at shapes and dtypes only and can be traced by torch.compile. Checks of values (ids in range)
stand in the kernels and run on CPU tensors only: on a GPU they would be a synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops.activation_kinds import check_activation

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    field: str,
    value: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    what: str,
    device: torch.device | None = None,
) -> None:
    """Refuse `value` unless it has the shape (None = any size), one of the dtypes and, where given, the device.

    `what` writes the shape out in the words of section "shapes" of the documentation, such as "[T, D]".
    """
    if not isinstance(value, torch.Tensor):
        raise ConfigError(field, type(value).__name__, f"a tensor {what}")
    if not _fits(value.shape, shape):
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise ConfigError(field, f"shape {tuple(value.shape)}", f"{what} = ({sizes})")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if value.dtype not in allowed:
        raise ConfigError(field, str(value.dtype), " or ".join(str(dtype) for dtype in allowed))
    if device is not None and value.device != device:
        raise ConfigError(field, f"a tensor on {value.device}", f"a tensor on {device}")


def _fits(got: Sequence[int], want: Sequence[int | None]) -> bool:
    if len(got) != len(want):
        return False
    # A loop, as a generator costs more than what it looks at; each operator checks several tensors.
    for size, wanted in zip(got, want, strict=True):
        if wanted is not None and size != wanted:
            return False
    return True


def autocast_on(device: torch.device) -> bool:
    """Whether operands on this device are to be cast; torch's own question raises for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_kind(kind: str) -> None:
    """Refuse an activation that does not exist."""
    check_activation("kind", kind)


def check_values(field: str, value: torch.Tensor, low: int, high: int, *, why: str) -> None:
    """Refuse an integer CPU tensor with an entry outside [low, high). Tensors elsewhere are not looked at."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    smallest, largest = torch.aminmax(value)
    least, most = int(smallest), int(largest)
    if least < low or most >= high:
        raise ConfigError(field, least if least < low else most, f"entries in [{low}, {high}) ({why})")


def inside_transform() -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, ...) runs this."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def check_transform(*, inline: bool) -> None:
    """Raises ConfigError inside a transform of torch.func that cannot see through a call. grad and vjp see through ops
    in a row (`inline`); exchanges and a scheduled backward are part of autograd's own graph."""
    if not inside_transform():
        return
    kind = torch._C._functorch.peek_interpreter_stack().key()
    if not inline or kind != torch._C._functorch.TransformType.Grad:
        expected = "grad or vjp where one rank runs its ops in a row, else none (functional_call is no transform)"
        raise ConfigError("transform", f"torch.func, {kind}", expected)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are made in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
