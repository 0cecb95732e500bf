"""The torch.library namespace `moe_overlap`: every schema of this package is defined here, once, from Python.

Compiled parts register implementations only (a second definition of a namespace kills the process), so an install
without them has every operator. Kernels go in by `Library.impl`: a `custom_op` costs twice as much per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "moe_overlap"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def define(schema: str) -> str:
    """Define an operator and return its bare name. The operator's tags say it is safe under torch.compile."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return schema.split("(", 1)[0]


def implement(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give an operator its kernel, for every device, and its shape function."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operator its backward, under grad and vjp of torch.func too, which `register_autograd` leaves out."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)

    def forward(*args: Any) -> Any:
        return getattr(getattr(torch.ops, NAMESPACE), name).default(*args)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)

    methods = {"forward": forward, "setup_context": setup, "backward": backward}
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(one) for key, one in methods.items()})
    # What a transform looks at first. One level is done by the function, whose forward meets the next level here again.
    LIBRARY.impl(name, lambda *args: function.apply(*args), "FuncTorchDynamicLayerFrontMode")


def refuse_derivative(name: str) -> None:
    """An operator whose derivative is not there says so. Without this, autograd would leave the gradient out."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{NAMESPACE}::{name} has no derivative (missing: double backward of this operator)")

    differentiate(name, backward, lambda ctx, inputs, output: None)


def cast_under_autocast(name: str, *, lower: Sequence[int] = (), raise_to_float32: Sequence[int] = ()) -> None:
    """Autocast rule of an operator.

    The arguments at the positions `lower` are cast to the autocast dtype, those at `raise_to_float32` to float32 (the
    router is never computed in less). float64 is left alone, as torch does.
    """
    excluded = torch._C.DispatchKeySet(_AUTOCAST_KEYS["cpu"]) | torch._C.DispatchKeySet(_AUTOCAST_KEYS["cuda"])

    def rule(device_type: str) -> Callable[..., Any]:
        def cast(position: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            if position in lower:
                return value.to(torch.get_autocast_dtype(device_type))
            return value.to(torch.float32) if position in raise_to_float32 else value

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                op = getattr(getattr(torch.ops, NAMESPACE), name).default
                return op(*(cast(position, value) for position, value in enumerate(args)), **kwargs)

        return kernel

    for device_type, key in _AUTOCAST_KEYS.items():
        LIBRARY.impl(name, rule(device_type), key.name)
