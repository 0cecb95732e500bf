"""The kernels of `*_triton.py` as implementations `triton` of the operators: the portable GPU path.

Those modules import Triton, so they are imported at the first call of a kernel and not before: an install without
Triton has every operator. A kernel is the default only on an architecture and for a dtype that `verified.json` has (see
`verified`) or where nothing else can run. On CPU tensors kernels run under Triton's interpreter
(TRITON_INTERPRET=1), for tests, when forced.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moe_overlap import config
from moe_overlap.ops import checks, expert_mlp_choice, expert_mlp_contract, hardware, registry, verified
from moe_overlap.ops.activation_kinds import not_built_in

OLDEST_TRITON = (3, 6)
OLDEST_NVIDIA = (8, 0)
MOST_GATE_EXPERTS = 4096
MOST_ROW_MAP_EXPERTS = 4095
"""One program holds the scores of a token, or a count for each expert, in registers."""
MOST_ROWS_OF_A_TOKEN = 64
"""The loop over the K rows of a token is unrolled."""


@dataclass(frozen=True)
class Kernel:
    """Where the kernel of an operator is: the function of the operator's name in `module`.

    `dtypes` are those of the first argument. `copies`: bytes are moved as they are, so that the interpreter, which
    computes bfloat16 wrongly, may run it in bfloat16 too.
    """

    module: str
    dtypes: tuple[torch.dtype, ...] = checks.FLOATS
    copies: bool = False
    limit: registry.Limit | None = None


def _gate_limit(logits_TE: torch.Tensor, *rest: Any) -> str | None:
    if logits_TE.shape[1] > MOST_GATE_EXPERTS:
        return f"{logits_TE.shape[1]} experts; it takes {MOST_GATE_EXPERTS}"
    return None


def _gate_backward_limit(dweights_TK: torch.Tensor, logits_TE: torch.Tensor, *rest: Any) -> str | None:
    return _gate_limit(logits_TE)


def _row_map_limit(ids_TK: torch.Tensor, num_experts: int, first: int, last: int, *rest: Any) -> str | None:
    if last - first > MOST_ROW_MAP_EXPERTS:
        return f"{last - first} experts; it takes {MOST_ROW_MAP_EXPERTS}"
    return None


def _rows_limit(position: int) -> registry.Limit:
    """slot_to_row [T, K] is the argument at `position`."""

    def limit(*arguments: Any) -> str | None:
        top_k = arguments[position].shape[1]
        return f"K = {top_k}; it takes {MOST_ROWS_OF_A_TOKEN}" if top_k > MOST_ROWS_OF_A_TOKEN else None

    return limit


def _activation_limit(position: int) -> registry.Limit:
    """The kind is the argument at `position`."""
    return lambda *arguments: not_built_in(arguments[position])


def _expert_mlp_limit(call: expert_mlp_contract.Call) -> str | None:
    kind = getattr(call, "kind", None)  # a weight gradient has none
    return None if kind is None else not_built_in(kind)


_ROUTER = (torch.float32, torch.float64)
_MATRICES = (torch.float32, torch.bfloat16, torch.float16)
_EXPERT_MLP = "moe_overlap.ops.expert_mlp_triton"

KERNELS = {
    "gate_topk": Kernel("moe_overlap.ops.gate_triton", _ROUTER, limit=_gate_limit),
    "gate_topk_backward": Kernel("moe_overlap.ops.gate_triton", _ROUTER, limit=_gate_backward_limit),
    "row_map": Kernel("moe_overlap.ops.row_map_triton", (torch.int32,), limit=_row_map_limit),
    "permute": Kernel("moe_overlap.ops.permute_triton", copies=True, limit=_rows_limit(1)),
    "combine": Kernel("moe_overlap.ops.combine_triton", limit=_rows_limit(1)),
    "combine_backward": Kernel("moe_overlap.ops.combine_triton", limit=_rows_limit(2)),
    "activation": Kernel("moe_overlap.ops.swiglu_triton", limit=_activation_limit(1)),
    "activation_backward": Kernel("moe_overlap.ops.swiglu_triton", limit=_activation_limit(2)),
    "expert_mlp": Kernel(_EXPERT_MLP, _MATRICES, limit=_expert_mlp_limit),
    "expert_mlp_backward": Kernel(_EXPERT_MLP, _MATRICES, limit=_expert_mlp_limit),
    "expert_mlp_forward": Kernel(_EXPERT_MLP, _MATRICES, limit=_expert_mlp_limit),
    "expert_mlp_dgrad": Kernel(_EXPERT_MLP, _MATRICES, limit=_expert_mlp_limit),
    "expert_mlp_wgrad": Kernel(_EXPERT_MLP, _MATRICES, limit=_expert_mlp_limit),
}
"""The operators that have a Triton kernel."""


@cache
def missing() -> str | None:
    """Why this environment cannot run Triton kernels at all, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if release() < OLDEST_TRITON:
        return f"Triton {triton.__version__}: {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or later is needed"
    return None


def release() -> tuple[int, ...]:
    """The first two numbers of Triton's version."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@cache
def sources() -> str:
    """The digest of every Triton source: a verification holds for the sources it was made with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*_triton.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def _function(op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(KERNELS[op].module), op)
    return function


def _obstacle(op: str) -> registry.Obstacle:
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"a kernel for GPUs, not {device.type}"
        if device.type == "cpu" and not config.triton_interpreter():
            return "a kernel for GPUs (for tests on CPU tensors: TRITON_INTERPRET=1)"
        # The ids of row_map have one dtype; whoever asks without a call at hand asks for float ones.
        if dtype not in KERNELS[op].dtypes and op != "row_map":
            return f"no kernel for {_name(dtype)}"
        if why_not := missing():
            return why_not
        if device.type == "cpu":
            wrong = dtype == torch.bfloat16 and not KERNELS[op].copies
            return "Triton's interpreter computes bfloat16 wrongly" if wrong else None
        if hardware.older_than(device, OLDEST_NVIDIA):
            return f"Triton needs compute capability 8.0 or later, this is {hardware.architecture(device)}"
        return None

    return obstacle


def _reservation(op: str) -> registry.Obstacle:
    def reservation(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu":
            return "the interpreter is for tests"
        first = KERNELS[op].dtypes[0] if op == "row_map" else dtype
        architecture = hardware.architecture(device)
        return verified.doubt(op, "triton", architecture=architecture, dtype=first, sources=sources())

    return reservation


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _call(op: str) -> Callable[..., Any]:
    return lambda *args: _function(op)(*args)


for _op, _kernel in KERNELS.items():
    registry.add(
        _op,
        "triton",
        _call(_op),
        merit="Triton kernel, verified on this architecture",
        obstacle=_obstacle(_op),
        reservation=_reservation(_op),
        limit=_kernel.limit,
        misfit=expert_mlp_choice.misfit("triton") if _op in expert_mlp_contract.OPS else None,
        preferred=True,
    )
