"""Which implementation of the expert MLP suits the shapes of a call, and why: the `misfit` of each in the registry.

A pure function of shapes and dtype, so that all steps of a plan choose alike. The rows of one call are those of a chunk
where the schedule cuts its exchange: small chunks of few rows choose otherwise than one large exchange. The limits come
from measurements that others published for H100 and H200 (docs/notes/2026-11-22-triton-expert-mlp.md), not from a run
of these kernels: there has been no GPU to measure on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.ops.registry import Limit

LARGE_FFN, LARGE_ROWS = 2048, 512
"""From these on torch's grouped matmul (CUTLASS, tiles of 128 x 256) is the faster one: 597 to 624 TFLOP/s on an H200,
plain Triton kernels 469 to 490. Below, the fused kernels are, as they save reading and writing the rows."""

FEW_EXPERTS, MANY_ROWS = 2, 8192
"""A matmul of this size fills a GPU alone, so one library call an expert is as good as it gets."""


@dataclass(frozen=True)
class Shapes:
    """What the choice looks at. rows: of all experts in this call; on_host: the host knows the groups."""

    dtype: torch.dtype
    experts: int
    rows: int
    hidden: int
    ffn: int
    on_host: bool


@dataclass(frozen=True)
class _Places:
    """Where an operator has w_out (or its gradient) and the groups among its arguments; the first one has the rows."""

    w_out: int
    ends: int
    starts: int | None = None
    row_to_token: int | None = None


_PLACES = {
    "expert_mlp": _Places(w_out=2, ends=3, row_to_token=5),
    "expert_mlp_backward": _Places(w_out=4, ends=5),
    "expert_mlp_forward": _Places(w_out=2, ends=3, starts=4),
    "expert_mlp_dgrad": _Places(w_out=3, ends=4, starts=5),
    "expert_mlp_wgrad": _Places(w_out=7, ends=4, starts=5),
}
OPS = tuple(_PLACES)
"""The registry's operators that make up the expert MLP."""


def shapes_of(op: str, args: tuple[Any, ...]) -> Shapes:
    """The shapes of one call."""
    place = _PLACES[op]
    ends, starts = args[place.ends], None if place.starts is None else args[place.starts]
    row_to_token = None if place.row_to_token is None else args[place.row_to_token]
    rows = (args[0] if row_to_token is None else row_to_token).shape[0]
    on_host = _on_host(ends, starts)
    if on_host and starts is not None:
        rows = _total(ends) - _total(starts)
    experts, hidden, ffn = args[place.w_out].shape
    return Shapes(args[0].dtype, experts, rows, hidden, ffn, on_host)


def adjacent(op: str, args: tuple[Any, ...]) -> bool:
    """Whether the groups of a call follow each other from row 0 on, as far as the host can see."""
    place = _PLACES[op]
    ends, starts = args[place.ends], None if place.starts is None else args[place.starts]
    if starts is None or not _on_host(ends, starts):
        return starts is None
    begins, stops = torch.as_tensor(starts), torch.as_tensor(ends)
    return bool((begins[:1] == 0).all()) and torch.equal(begins[1:], stops[:-1])


def _on_host(*bounds: Any) -> bool:
    return all(not isinstance(value, torch.Tensor) or value.device.type == "cpu" for value in bounds)


def _total(bounds: Any) -> int:
    return int(bounds.sum()) if isinstance(bounds, torch.Tensor) else sum(bounds)


def best(shapes: Shapes) -> tuple[str, str]:
    """(implementation, reason) on a GPU."""
    mean = shapes.rows // max(1, shapes.experts)
    if shapes.dtype == torch.float32 and shapes.on_host:
        return "reference", "float32 without tf32: a library matmul an expert"
    if shapes.on_host and shapes.experts <= FEW_EXPERTS and mean >= MANY_ROWS:
        return "reference", f"{shapes.experts} experts of {mean} rows: a library matmul each fills the GPU"
    if shapes.ffn >= LARGE_FFN and mean >= LARGE_ROWS and shapes.dtype == torch.bfloat16:
        return "grouped_mm", f"large experts (F {shapes.ffn}, {mean} rows each)"
    return "triton", f"small experts or few rows (F {shapes.ffn}, {mean} rows each): the fused kernels"


def misfit(op: str, name: str) -> Limit:
    """Why another implementation than `name` suits a call of `op` better, or None."""

    def why_not(*args: Any) -> str | None:
        if args[0].device.type == "cpu":
            return None if name == "reference" else "on a CPU a loop of matmuls is as fast as anything"
        wanted, reason = best(shapes_of(op, args))
        return None if wanted == name else f"{wanted} is for {reason}"

    return why_not
