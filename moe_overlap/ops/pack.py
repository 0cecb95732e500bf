"""pack and unpack: put rows into the order in which they are sent, and back.

pack(rows, order)[i] = rows[order[i]]; unpack is its inverse: unpack(received, order)[order[i]] = received[i].
"""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, maps, registry, workspace
from moe_overlap.ops.library import define, differentiate, implement, refuse_derivative

_ORDERS = (torch.int64, torch.int32)


def pack(rows_ND: torch.Tensor, row_order_R: torch.Tensor) -> torch.Tensor:
    """rows[row_order]: [R, D] in sending order.

    Args:
        rows_ND: [N, D], any float dtype.
        row_order_R: int64 or int32 [R], entries in [0, N); a row may be left out or sent several times.

    Returns:
        [R, D], differentiable.

    Raises:
        ConfigError: shapes or dtypes that do not match, or (on CPU) an entry out of range.
    """
    checks.check_tensor("rows", rows_ND, (None, None), checks.FLOATS, what="[N, D]")
    checks.check_tensor("row_order", row_order_R, (None,), _ORDERS, what="[R]", device=rows_ND.device)
    return torch.ops.moe_overlap.pack.default(rows_ND, row_order_R)


def unpack(received_RD: torch.Tensor, row_order_R: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse of pack: out[row_order] = received.

    Args:
        received_RD: [R, D], any float dtype.
        row_order_R: int64 or int32 [R], distinct. Without `out` a permutation of 0 .. R-1.
        out: [N, D], written in the rows of `row_order` only; no gradient flows through it.

    Returns:
        `out`, or a new [R, D], differentiable.

    Raises:
        ConfigError: shapes or dtypes that do not match, or (on CPU) an order that is no permutation or out of range.
    """
    checks.check_tensor("received", received_RD, (None, None), checks.FLOATS, what="[R, D]")
    checks.check_tensor(
        "row_order", row_order_R, (received_RD.shape[0],), _ORDERS, what="[R]", device=received_RD.device
    )
    if out is None:
        return torch.ops.moe_overlap.unpack.default(received_RD, row_order_R)
    checks.check_tensor("out", out, (None, received_RD.shape[1]), received_RD.dtype, what="[N, D]")
    checks.check_values("row_order", row_order_R, 0, out.shape[0], why="the rows of out")
    with torch.no_grad():
        _run_into(received_RD, row_order_R, out)
    return out


def _pack(rows_ND: torch.Tensor, row_order_R: torch.Tensor) -> torch.Tensor:
    return maps.pick_rows("row_order", rows_ND, row_order_R)


def _pack_backward(dpacked_RD: torch.Tensor, row_order_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    dtype = checks.accumulation_dtype(dpacked_RD.dtype)
    return maps.add_rows(dpacked_RD, row_order_R, num_rows, dtype).to(dpacked_RD.dtype)


def _unpack(received_RD: torch.Tensor, row_order_R: torch.Tensor) -> torch.Tensor:
    count = received_RD.shape[0]
    checks.check_values("row_order", row_order_R, 0, count, why="a permutation of the rows")
    order = row_order_R.long()
    if received_RD.device.type == "cpu":
        seen = torch.zeros(count, dtype=torch.bool).index_fill_(0, order, True)
        if not bool(seen.all()):
            missing = int((~seen).nonzero()[0])
            raise ConfigError("row_order", f"no entry {missing}", f"a permutation of 0 .. {count - 1}")
    rows_RD = workspace.empty(received_RD.shape, like=received_RD)
    return rows_RD.index_copy_(0, order, received_RD)


def _unpack_into(received_RD: torch.Tensor, row_order_R: torch.Tensor, out_ND: torch.Tensor) -> None:
    out_ND.index_copy_(0, row_order_R.long(), received_RD)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows_ND, row_order_R = inputs
    ctx.num_rows = rows_ND.shape[0]
    ctx.save_for_backward(row_order_R)


def _backward_pack(ctx: Any, dpacked_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
    (row_order_R,) = ctx.saved_tensors
    return torch.ops.moe_overlap.pack_backward.default(dpacked_RD, row_order_R, ctx.num_rows), None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_unpack(ctx: Any, drows_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
    (row_order_R,) = ctx.saved_tensors
    return torch.ops.moe_overlap.pack.default(drows_RD, row_order_R), None


define("pack(Tensor rows, Tensor row_order) -> Tensor")
define("pack_backward(Tensor dpacked, Tensor row_order, SymInt num_rows) -> Tensor")
define("unpack(Tensor received, Tensor row_order) -> Tensor")
registry.add("pack", "reference", _pack, merit="pure PyTorch, runs everywhere")
registry.add("pack_backward", "reference", _pack_backward, merit="pure PyTorch, runs everywhere")
registry.add("unpack", "reference", _unpack, merit="pure PyTorch, runs everywhere")
registry.add("unpack_into", "reference", _unpack_into, merit="pure PyTorch, runs everywhere")
_run_into = registry.kernel("unpack_into")
implement(
    "pack",
    registry.kernel("pack"),
    lambda rows_ND, row_order_R: rows_ND.new_empty((row_order_R.shape[0], rows_ND.shape[1])),
)
implement(
    "pack_backward",
    registry.kernel("pack_backward"),
    lambda dpacked_RD, row_order_R, num_rows: dpacked_RD.new_empty((num_rows, dpacked_RD.shape[1])),
)
implement(
    "unpack", registry.kernel("unpack"), lambda received_RD, row_order_R: received_RD.new_empty(received_RD.shape)
)
differentiate("pack", _backward_pack, _setup_pack)
differentiate("unpack", _backward_unpack, _setup_unpack)
refuse_derivative("pack_backward")
