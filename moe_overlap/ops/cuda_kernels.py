"""The kernels of csrc/kernels as implementations `cuda` of the operators.

The kernel of `<op>` is the operator `_<op>_cuda`, with the schema and the shapes of `<op>`. It is registered for CUDA
tensors by the compiled part where that was built with nvcc, and by nobody else; called on a CPU tensor it says so. It
is the default only on an architecture and for a dtype that `verified.json` has: see `verified`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.ops import checks, hardware, registry, verified
from moe_overlap.ops.activation_kinds import not_built_in
from moe_overlap.ops.library import LIBRARY, NAMESPACE, define, refuse_derivative

OPS = (
    "gate_topk",
    "gate_topk_backward",
    "row_map",
    "permute",
    "combine",
    "combine_backward",
    "activation",
    "activation_backward",
    "pack",
    "unpack",
    "unpack_into",
)
"""The operators that have a CUDA kernel."""

ROW_COPIES = ("permute", "pack", "unpack", "unpack_into")

MOST_GATE_EXPERTS, MOST_GATE_K = 1024, 16
MOST_ROW_MAP_EXPERTS = 3000
"""Limits of the kernels, as in csrc/kernels/kernels.h."""

OLDEST = (8, 0)
_SIXTEEN_AND_32 = (torch.float32, torch.bfloat16, torch.float16)


def kernel_op(op: str) -> str:
    """The bare name of the operator behind which the kernel of `op` stands."""
    return f"_{op}_cuda"


def missing() -> str | None:
    """Why this install has no CUDA kernels, or None."""
    if not native.load_ops():
        return native.reason("ops")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{kernel_op(OPS[0])}", "CUDA"):
        return native.why_no_cuda_kernels()
    return None


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What the kernel of `op` takes as its first argument."""
    if op == "row_map":
        return (torch.int32,)
    if op in ("gate_topk", "gate_topk_backward"):
        return (torch.float32,)
    return checks.FLOATS if op in ROW_COPIES else _SIXTEEN_AND_32


def _obstacle(op: str) -> registry.Obstacle:
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"a kernel for CUDA tensors, not {device.type}"
        # The ids of row_map have one dtype; whoever asks without a call at hand asks for float ones.
        if dtype not in dtypes(op) and op != "row_map":
            return f"no kernel for {_name(dtype)}"
        if why_not := missing():
            return why_not
        if hardware.older_than(device, OLDEST):
            return f"compiled for compute capability 8.0 and later, this is {hardware.architecture(device)}"
        return None

    return obstacle


def _reservation(op: str) -> registry.Obstacle:
    def reservation(device: torch.device, dtype: torch.dtype) -> str | None:
        first = dtypes(op)[0] if op == "row_map" else dtype
        architecture, sources = hardware.architecture(device), native.kernel_sources()
        return verified.doubt(op, "cuda", architecture=architecture, dtype=first, sources=sources)

    return reservation


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(op: str) -> Callable[..., Any]:
    def refuse(first: torch.Tensor, *args: Any) -> Any:
        raise ConfigError(f"the first argument of {kernel_op(op)}", f"a tensor on {first.device}", "a CUDA tensor")

    return refuse


def _shapes_of(op: str) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        return getattr(torch.ops.moe_overlap, op).default(*args)

    return fake


def _with_float32(op: str, position: int, *, gradient: int | None = None) -> Callable[..., Any]:
    """The kernel reads the optional argument at `position` (weights, row factors) in float32, in which the reference
    computes too; `gradient` is the place of its gradient among the results, returned in the dtype of the argument."""
    kernel = getattr(torch.ops.moe_overlap, kernel_op(op)).default

    def call(*args: Any) -> Any:
        given = args[position]
        if given is None or given.dtype == torch.float32:
            return kernel(*args)
        result = kernel(*args[:position], given.to(torch.float32), *args[position + 1 :])
        if gradient is None:
            return result
        return tuple(value.to(given.dtype) if place == gradient else value for place, value in enumerate(result))

    return call


def _gate_limit(logits_TE: torch.Tensor, bias_E: Any, k: int, *rest: Any) -> str | None:
    num_experts = logits_TE.shape[1]
    if num_experts > MOST_GATE_EXPERTS or k > MOST_GATE_K:
        return f"{num_experts} experts, k = {k}; it takes {MOST_GATE_EXPERTS} experts and k = {MOST_GATE_K}"
    return None


def _gate_backward_limit(dweights_TK: torch.Tensor, logits_TE: torch.Tensor, *rest: Any) -> str | None:
    return _gate_limit(logits_TE, None, dweights_TK.shape[1])


def _row_map_limit(ids_TK: torch.Tensor, num_experts: int, first: int, last: int, *rest: Any) -> str | None:
    if last - first > MOST_ROW_MAP_EXPERTS:
        return f"{last - first} experts; it takes {MOST_ROW_MAP_EXPERTS}"
    return None


def _into_limit(received_RD: torch.Tensor, row_order_R: Any, out_ND: torch.Tensor) -> str | None:
    return None if out_ND.is_contiguous() else f"a buffer with strides {out_ND.stride()}"


def _combine_limit(y_RD: torch.Tensor, slot_to_row_TK: Any, weights_TK: Any, residual_TD: Any) -> str | None:
    if residual_TD is not None and residual_TD.dtype not in _SIXTEEN_AND_32:
        return f"a residual of {_name(residual_TD.dtype)}"
    return None


def _combine_backward_limit(dy_TD: torch.Tensor, y_RD: torch.Tensor | None, *rest: Any) -> str | None:
    if y_RD is not None and y_RD.dtype != dy_TD.dtype:
        return f"y of {_name(y_RD.dtype)} and dy of {_name(dy_TD.dtype)}"
    return None


def _activation_limit(h_RF: torch.Tensor, kind: str, *rest: Any) -> str | None:
    return not_built_in(kind)


def _activation_backward_limit(da_RF: torch.Tensor, h_RF: torch.Tensor, kind: str, *rest: Any) -> str | None:
    return not_built_in(kind)


_LIMITS: dict[str, registry.Limit] = {
    "gate_topk": _gate_limit,
    "gate_topk_backward": _gate_backward_limit,
    "row_map": _row_map_limit,
    "unpack_into": _into_limit,
    "combine": _combine_limit,
    "combine_backward": _combine_backward_limit,
    "activation": _activation_limit,
    "activation_backward": _activation_backward_limit,
}


def _define(op: str) -> None:
    """The operator behind which the kernel of `op` stands."""
    if op == "unpack_into":  # which writes its argument: an entry of the registry, no operator that users call
        name = define(f"{kernel_op(op)}(Tensor received, Tensor row_order, Tensor(a!) out) -> ()")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=LIBRARY)
    else:
        schema = str(getattr(torch.ops.moe_overlap, op).default._schema)
        name = define(schema.replace(f"{NAMESPACE}::{op}", kernel_op(op), 1))
        torch.library.register_fake(f"{NAMESPACE}::{name}", _shapes_of(op), lib=LIBRARY)
        refuse_derivative(name)
    LIBRARY.impl(name, _refuse(op), "CPU")


def _add(ops: Sequence[str]) -> None:
    for op in ops:
        _define(op)
    calls = {
        "combine": _with_float32("combine", 2),
        "combine_backward": _with_float32("combine_backward", 3, gradient=1),
        "activation": _with_float32("activation", 2),
        "activation_backward": _with_float32("activation_backward", 3, gradient=1),
    }
    for op in ops:
        registry.add(
            op,
            "cuda",
            calls.get(op) or getattr(torch.ops.moe_overlap, kernel_op(op)).default,
            merit="CUDA kernel, verified on this architecture",
            obstacle=_obstacle(op),
            reservation=_reservation(op),
            limit=_LIMITS.get(op),
            preferred=True,
        )


_add(OPS)
