"""The operators as a layer calls them, many times in a step: the kernel that the registry chooses, and nothing else.

No check of shapes, no gradient, no dispatcher of torch: what a user gives was checked at the layer's edge, buffers and
maps are the step's own, and autograd has nodes for whole stretches of a scheduled step. Arguments are those of the
operators in `torch.ops.moe_overlap`, all of them; the pieces of the expert MLP take a call (`expert_mlp_contract.py`).
Whoever calls these has gradients off, and is not traced by torch.compile; a schedule always, other code where
`suffices` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moe_overlap.ops import checks, registry
from moe_overlap.ops.expert_mlp_contract import ExpertMlp

OWN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _operator(name: str) -> Callable[..., Any]:
    """A dispatch mode sees the operator, as ever: what a selective checkpoint keeps or makes anew is its result, not
    that of the call inside that writes into a buffer."""
    kernel, operator = registry.kernel(name), getattr(torch.ops.moe_overlap, name).default

    def run(*arguments: Any) -> Any:
        return kernel(*arguments) if _get_current_dispatch_mode() is None else operator(*arguments)

    return run


row_map, permute, combine, combine_backward, pack = map(
    _operator, ("row_map", "permute", "combine", "combine_backward", "pack")
)
unpack_into = registry.kernel("unpack_into")
expert_mlp_forward, expert_mlp_dgrad, expert_mlp_wgrad, _expert_mlp = map(
    registry.kernel, ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad", "expert_mlp")
)


def expert_mlp(*arguments: Any) -> torch.Tensor:
    """`_expert_mlp` without h, which only a backward needs."""
    y_RD: torch.Tensor = _expert_mlp(ExpertMlp(*arguments))[0]
    return y_RD


def suffices(*tensors: torch.Tensor) -> bool:
    """Whether the kernels alone do what the operators in `torch.ops.moe_overlap` would, for these tensors and here: no
    gradient is wanted, nobody traces, transforms, casts or watches, and each tensor is one of torch's own."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or checks.inside_transform()
        or _get_current_dispatch_mode() is not None
        or any(type(one) not in OWN_TYPES or checks.autocast_on(one.device) for one in tensors)
    )
