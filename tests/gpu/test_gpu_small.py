"""One call of every kernel, with sizes at which tails and odd widths matter: what compute-sanitizer runs.

It compares nothing; the sanitizer looks for memory that is not ours, races and memory that nobody wrote.
"""

from __future__ import annotations

import pytest
import torch

from moe_overlap.ops import cuda_kernels
from tests.gpu.both import kernel
from tests.ops.cases import randn, routed

pytestmark = pytest.mark.gpu

F32, I32 = torch.float32, torch.int32


def calls(dtype: torch.dtype):
    """(op, arguments) of every kernel that takes `dtype` rows, for several widths and numbers of experts."""
    for experts, width in ((3, 7), (72, 64), (256, 1000), (1000, 2056)):
        generator = torch.Generator().manual_seed(experts)
        tokens, k = 37, min(8, experts)
        logits_TE = torch.randn(tokens, experts, generator=generator)
        weights_TK = torch.rand(tokens, k, generator=generator)
        ids_TK = torch.randint(-1, experts, (tokens, k), generator=generator, dtype=I32)
        maps = routed(ids_TK, experts, align=8)
        x_TD, y_RD = randn(tokens, width, dtype=dtype), randn(maps.num_rows, width, dtype=dtype)
        h, scale = randn(maps.num_rows, 2 * width, dtype=dtype), randn(maps.num_rows, dtype=F32)
        if dtype == F32:
            yield "gate_topk", (logits_TE, None, k, 1, 1, "softmax", True, 1.0)
            chosen_TK = logits_TE.topk(k).indices.to(I32)  # distinct, as those of gate_topk are
            yield "gate_topk_backward", (weights_TK, logits_TE, chosen_TK, "softmax", True, 1.0)
            yield "row_map", (ids_TK, experts, 0, experts, 8, None)
            yield "row_map", (ids_TK, experts, experts // 3, experts, 1, 5)
            yield "row_map", (ids_TK.repeat(1800 // k, 1), experts, 0, experts, 8, None)  # several blocks
        yield "permute", (x_TD, maps.slot_to_row, maps.offs, maps.num_rows)
        yield "combine", (y_RD, maps.slot_to_row, weights_TK, x_TD)
        yield "combine_backward", (x_TD, y_RD, maps.slot_to_row, weights_TK, maps.num_rows)
        yield "activation", (h, "swiglu", scale, maps.offs)
        yield "activation_backward", (y_RD, h, "swiglu", scale, maps.offs)
        yield "pack", (x_TD, torch.arange(tokens).flip(0))
        yield "unpack", (x_TD, torch.arange(tokens).flip(0))
        yield "unpack_into", (x_TD, torch.arange(tokens).flip(0), randn(tokens + 3, width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_once(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    called = set()
    for op, arguments in calls(dtype):
        if op != "gate_topk":
            kernel(op, *arguments)
        called.add(op)
    if "gate_topk" in called:  # reads its workspace as it finds it, by design: here it finds what somebody has written
        request.getfixturevalue("poison")
        for op, arguments in calls(dtype):
            if op == "gate_topk":
                kernel(op, *arguments)
    torch.cuda.synchronize()
    assert called == {op for op in cuda_kernels.OPS if dtype in cuda_kernels.dtypes(op) or dtype == F32}
