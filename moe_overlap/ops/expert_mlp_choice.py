"""Which implementation of the expert MLP suits the shapes of a call, and why: the `misfit` of each in the registry.

A pure function of shapes and dtype, so that all steps of a plan choose alike. The rows of one call are those of a chunk
where the schedule cuts its exchange: small chunks of few rows choose otherwise than one large exchange. The limits come
from measurements that others published for H100 and H200 (docs/notes/2026-11-22-triton-expert-mlp.md), not from a run
of these kernels: there has been no GPU to measure on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_overlap.ops.expert_mlp_contract import Call
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


def shapes_of(call: Call) -> Shapes:
    """The shapes of one call."""
    groups = call.groups
    return Shapes(call.dtype, call.num_experts, groups.most_rows, call.hidden, call.ffn, groups.on_host)


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


def misfit(name: str) -> Limit:
    """Why another implementation than `name` suits a call better, or None."""

    def why_not(call: Call) -> str | None:
        if call.device.type == "cpu":
            return None if name == "reference" else "on a CPU a loop of matmuls is as fast as anything"
        wanted, reason = best(shapes_of(call))
        return None if wanted == name else f"{wanted} is for {reason}"

    return why_not
