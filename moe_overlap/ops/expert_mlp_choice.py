"""Which implementation of the expert MLP suits a call, and why: the `misfit` of each in the registry.

A pure function of dtype and of what the host knows, so that all steps of a plan choose alike. Measured on one H200 in
bfloat16, forward and backward with the rows gathered and summed (the results of commit 35c21b4 in benchmarks/results):
the Triton kernels were the fastest on all four shapes, TFLOP/s of forward / backward against torch's grouped matmul and
a loop of matmuls:

    Qwen3-30B, 512 rows an expert      502 / 418   311 / 418    22 / 16
    Qwen3-30B, 2048 rows an expert     565 / 532   349 / 496   148 / 111
    Mixtral 8x7B, 2048 rows            626 / 630   535 / 615   446 / 412
    DeepSeek-V3 on 8 ranks, 1024 rows  673 / 591   516 / 576   583 / 529

So the others run where the Triton kernels cannot, or are not verified.
"""

from __future__ import annotations

import torch

from moe_overlap.ops.expert_mlp_contract import Call
from moe_overlap.ops.registry import Limit


def best(dtype: torch.dtype, *, on_host: bool) -> tuple[str, ...]:
    """The implementations that suit a GPU, the best first. on_host: the host knows the groups."""
    # float32 is multiplied without tf32: by a library, an expert at a time, where that need not wait for the counts.
    return ("reference", "triton") if dtype == torch.float32 and on_host else ("triton", "grouped_mm")


def misfit(name: str) -> Limit:
    """Why another implementation than `name` suits a call better, or None. Among those that suit the registry's order
    decides, which is that of `best`."""

    def why_not(call: Call) -> str | None:
        if call.device.type == "cpu":
            return None if name == "reference" else "on a CPU a loop of matmuls is as fast as anything"
        suited = best(call.dtype, on_host=call.groups.on_host)
        if "reference" in suited and name == "triton":
            return "float32 without tf32: a library matmul an expert is faster"
        return None if name in suited else f"{' and '.join(suited)} were faster on every shape that was measured"

    return why_not
