"""permute: copy each token's row to the places its slots have in the order by expert.

x_TD [T, D] and slot_to_row [T, K] give x_RD with x_RD[slot_to_row[t, k]] = x_TD[t]; every other row is zero. The
backward is combine without weights: the gradient of a token is the sum over its rows, in the order of k.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, compiled, maps, registry, workspace
from moe_overlap.ops.library import define, differentiate, implement

_NUM_ROWS = "-1 = no row, num_rows is the end"


def permute(
    x_TD: torch.Tensor, slot_to_row_TK: torch.Tensor, offs: torch.Tensor | None = None, *, num_rows: int
) -> torch.Tensor:
    """Rows in the order by expert.

    Args:
        x_TD: [T, D], any float dtype.
        slot_to_row_TK: int32 [T, K] from row_map, -1 = no row.
        offs: int32 [E'] from row_map. Rows from offs[-1] on, and padding, come out as zeros; kernels may use it to find
            them, the reference needs only slot_to_row.
        num_rows: R, rows of the result, at least offs[-1]; row_to_slot.shape[0] always suffices.

    Returns:
        x_RD [R, D], differentiable.

    Raises:
        ConfigError: shapes or dtypes that do not match, or (on CPU) a row outside the result.
    """
    checks.check_tensor("x", x_TD, (None, None), checks.FLOATS, what="[T, D]")
    checks.check_tensor(
        "slot_to_row", slot_to_row_TK, (x_TD.shape[0], None), torch.int32, what="[T, K]", device=x_TD.device
    )
    if offs is not None:
        checks.check_tensor("offs", offs, (None,), torch.int32, what="[E']", device=x_TD.device)
    if num_rows < 0:
        raise ConfigError("num_rows", num_rows, "at least 0")
    return torch.ops.moe_overlap.permute.default(x_TD, slot_to_row_TK, offs, num_rows)


def _permute_cpp(
    x_TD: torch.Tensor, slot_to_row_TK: torch.Tensor, offs: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why=_NUM_ROWS)
    out_RD = workspace.empty((num_rows, x_TD.shape[1]), like=x_TD)
    maps.refuse_twice(
        torch.ops.moe_overlap._permute_cpp.default(x_TD.contiguous(), slot_to_row_TK.contiguous(), out_RD)
    )
    return out_RD


def _permute(
    x_TD: torch.Tensor, slot_to_row_TK: torch.Tensor, offs: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    checks.check_values("slot_to_row", slot_to_row_TK, -1, num_rows, why=_NUM_ROWS)
    top_k = max(1, slot_to_row_TK.shape[1])
    row_to_slot = maps.invert(slot_to_row_TK, num_rows)
    return maps.take_rows(x_TD, row_to_slot.div(top_k, rounding_mode="floor"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, dx_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (slot_to_row_TK,) = ctx.saved_tensors
    return torch.ops.moe_overlap.combine.default(dx_RD, slot_to_row_TK, None, None), None, None, None


define("permute(Tensor x, Tensor slot_to_row, Tensor? offs, SymInt num_rows) -> Tensor")
# In the compiled part, where there is one; see csrc/bindings. It returns a row that two slots point to, or -1.
define("_permute_cpp(Tensor x, Tensor slot_to_row, Tensor(a!) out) -> int")
registry.add(
    "permute",
    "cpp",
    _permute_cpp,
    obstacle=compiled.obstacle("permute"),
    merit="compiled: each token is read once, and the map is not inverted",
)
registry.add("permute", "reference", _permute, merit="pure PyTorch, runs everywhere")
implement(
    "permute",
    registry.kernel("permute"),
    lambda x_TD, slot_to_row_TK, offs, num_rows: x_TD.new_empty((num_rows, x_TD.shape[1])),
)
differentiate("permute", _backward, _setup_context)
