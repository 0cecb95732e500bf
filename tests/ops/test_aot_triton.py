"""Every Triton kernel but those of the expert MLP, compiled for cuda:80, cuda:90 and cuda:100 without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_overlap.ops import triton_kernels
from tests.ops.interpreted import needs_triton

needs_triton(interpreter=False)

from moe_overlap.ops import combine_triton, gate_triton, permute_triton, row_map_triton, swiglu_triton  # noqa: E402
from tests.ops import aot  # noqa: E402
from tests.ops.aot import meta  # noqa: E402

F16, BF16, F32, F64, I32 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32
MAPPED = (
    ("Qwen3-30B-A3B", 2048, 8, BF16),
    ("Mixtral 8x7B", 4096, 2, F32),
    ("odd", 1001, 3, F16),
)
"""Name, D, K, dtype."""
DOUBLE = (("wide", 512, 8, F64),)
"""Compared by benchmarks/same_kernels.py; the sums of combine's backward spill in float64."""


def launches(mapped: tuple = MAPPED + DOUBLE) -> Iterator[tuple[str, list[aot.Launch]]]:
    """What is launched for the sizes of public models and for odd ones."""
    for name, hidden, top_k, dtype in mapped:
        slots, rows = meta(4096, top_k, dtype=I32), 4096 * top_k
        x, y, weights = meta(4096, hidden, dtype=dtype), meta(rows, hidden, dtype=dtype), meta(4096, top_k, dtype=F32)
        label = f"{name} {str(dtype)[6:]}"
        yield f"permute {label}", aot.recorded(permute_triton.permute, x, slots, None, rows)
        for how, given in (("plain", (None, None)), ("all", (weights, x))):
            yield f"combine {how} {label}", aot.recorded(combine_triton.combine, y, slots, *given)
        for how, given in (("plain", (None, slots, None)), ("all", (y, slots, weights))):
            yield f"combine backward {how} {label}", aot.recorded(combine_triton.combine_backward, x, *given, rows)
    for kind, ffn, dtype in (("swiglu", 768, BF16), ("swiglu", 2048, F16), ("gelu", 64, F64), ("relu", 1001, F32)):
        h, a = meta(4096, 2 * ffn if kind == "swiglu" else ffn, dtype=dtype), meta(4096, ffn, dtype=dtype)
        for how, given in (("plain", (None, None)), ("all", (meta(4096, dtype=F32), meta(128, dtype=I32)))):
            label = f"{how} {kind} {ffn} {str(dtype)[6:]}"
            yield f"activation {label}", aot.recorded(swiglu_triton.activation, h, kind, *given)
            yield f"activation backward {label}", aot.recorded(swiglu_triton.activation_backward, a, h, kind, *given)
    for experts, top_k, groups, score, biased, dtype in (
        (128, 8, (1, 1), "softmax", False, F32),
        (8, 2, (1, 1), "topk_softmax", False, F32),
        (256, 8, (8, 4), "sigmoid", True, F32),
        (60, 4, (1, 1), "softmax", True, F64),
        (4096, 8, (1, 1), "softmax", False, F32),
    ):
        logits, bias = meta(4096, experts, dtype=dtype), meta(experts, dtype=dtype) if biased else None
        dweights, ids = meta(4096, top_k, dtype=dtype), meta(4096, top_k, dtype=I32)
        how = (score, score != "softmax", 2.5)
        label = f"{experts} {score} {str(dtype)[6:]}"
        yield f"gate {label}", aot.recorded(gate_triton.gate_topk, logits, bias, top_k, *groups, *how)
        yield f"gate backward {label}", aot.recorded(gate_triton.gate_topk_backward, dweights, logits, ids, *how)
    for experts, align in ((128, 1), (257, 16), (4095, 1)):
        ids = meta(8192, 8, dtype=I32)
        yield f"row_map {experts}", aot.recorded(row_map_triton.row_map, ids, experts, 0, experts, align, None)


CASES = dict(launches(MAPPED))


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_triton_kernels_compile_and_nothing_spills(name: str, arch: int, tmp_path: Path) -> None:
    assert CASES[name], "nothing was launched"
    for launch in CASES[name]:
        kernel = aot.compiled(launch, arch)
        used = aot.resources(kernel, tmp_path)
        assert used.stack_bytes == used.local_bytes == 0, (launch.name, used)
        assert used.shared_bytes <= min(aot.SHARED_LIMIT_BYTES[arch], 48 << 10), (launch.name, used)
        assert f"sm_{arch}" in kernel.asm["ptx"]


def test_rows_move_in_16_byte_words() -> None:
    """Where the width is a multiple of 16 bytes; the compiler has to prove it from the launch's arguments."""
    for name in (
        "permute Qwen3-30B-A3B bfloat16",
        "combine all Qwen3-30B-A3B bfloat16",
        "permute Mixtral 8x7B float32",
    ):
        ptx = aot.compiled(CASES[name][0], 90).asm["ptx"]
        assert re.search(r"ld\.global\.\S*v4\.b32", ptx) and re.search(r"st\.global\.\S*v4\.b32", ptx), name
    assert "v4.b32" not in aot.compiled(CASES["permute odd float16"][0], 90).asm["ptx"]


def test_every_triton_operator_is_here() -> None:
    modules = {case.kernel.__module__ for cases in CASES.values() for case in cases}
    own = {kernel.module for kernel in triton_kernels.KERNELS.values()}
    assert {name for name in own if "expert_mlp" not in name} <= modules
