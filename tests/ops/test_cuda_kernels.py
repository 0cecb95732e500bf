"""The CUDA kernels' operators on a machine without a GPU: registered, with shapes, with reasons, with clear errors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_overlap.errors import ConfigError
from moe_overlap.native import build_info, native
from moe_overlap.ops import (
    cuda_kernels,
    expert_mlp_contract,
    expert_mlp_grouped,
    registry,
    triton_kernels,
    verified,
)

MOE = torch.ops.moe_overlap
CUDA = torch.device("cuda", 0)
F32, BF16, F64, I32 = torch.float32, torch.bfloat16, torch.float64, torch.int32


def samples(new) -> dict[str, tuple]:
    """Arguments of each operator; new(shape, dtype) makes a tensor."""
    logits, slot_to_row, offs = new((6, 8), F32), new((6, 2), I32), new((4,), I32)
    rows, weights, scale = new((12, 16), BF16), new((6, 2), F32), new((12,), F32)
    return {
        "gate_topk": (logits, new((8,), F32), 2, 1, 1, "sigmoid", True, 1.0),
        "gate_topk_backward": (weights, logits, slot_to_row, "softmax", True, 1.0),
        "row_map": (slot_to_row, 8, 2, 6, 4, None),
        "permute": (new((6, 16), BF16), slot_to_row, offs, 12),
        "combine": (rows, slot_to_row, weights, new((6, 16), BF16)),
        "combine_backward": (new((6, 16), BF16), rows, slot_to_row, weights, 12),
        "activation": (rows, "swiglu", scale, offs),
        "activation_backward": (new((12, 8), BF16), rows, "swiglu", scale, offs),
        "pack": (rows, new((5,), torch.int64)),
        "unpack": (rows, new((12,), I32)),
        "unpack_into": (new((5, 16), BF16), new((5,), I32), rows),
    }


# An entry of the registry that writes its last argument; users call `unpack(out=)`.
OPERATORS = [op for op in cuda_kernels.OPS if op != "unpack_into"]


def shapes(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[tuple]:
    return [(tuple(t.shape), t.dtype, t.device) for t in (result if isinstance(result, tuple) else (result,))]


def kernel(op: str):
    return getattr(MOE, cuda_kernels.kernel_op(op)).default


@pytest.mark.parametrize("op", OPERATORS)
def test_shapes_are_those_of_the_operator(op: str) -> None:
    with FakeTensorMode():
        arguments = samples(lambda shape, dtype: torch.empty(shape, dtype=dtype, device="cuda"))[op]
        assert shapes(kernel(op)(*arguments)) == shapes(getattr(MOE, op).default(*arguments))


@pytest.mark.parametrize("op", cuda_kernels.OPS)
def test_on_cpu_tensors_they_say_what_they_are_for(op: str) -> None:
    arguments = samples(lambda shape, dtype: torch.zeros(shape, dtype=dtype))[op]
    with pytest.raises(ConfigError, match=rf"_{op}_cuda = 'a tensor on cpu': expected a CUDA tensor"):
        kernel(op)(*arguments)
    with registry.force(op, "cuda"), pytest.raises(ConfigError, match="for CUDA tensors, not cpu"):
        registry.kernel(op)(*arguments)
    assert registry.choose(op, device="cpu", dtype=F32).impl in ("reference", "cpp")


@pytest.mark.parametrize("op", cuda_kernels.OPS)
def test_compiled_part_registers_them_without_cuda(op: str) -> None:
    """The same file loads under a torch without CUDA."""
    if "cuda" not in build_info.read().built:
        pytest.skip(build_info.why_not_built("cuda"))
    assert native.load_ops(), native.reason("ops")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_overlap::{cuda_kernels.kernel_op(op)}", "CUDA")
    assert cuda_kernels.missing() is None


def test_without_the_kernels_the_reason_is_what_the_build_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_ops", lambda: False)
    monkeypatch.setattr(native, "reason", lambda name: f"{name} left out for this test")
    assert registry.choose("pack", device=CUDA, dtype=BF16).reason.endswith(
        "cuda cannot run: ops left out for this test"
    )
    registry._chosen.clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As on a GPU of architecture sm_90 with the kernels built and nothing verified; yields the record's file."""
    monkeypatch.setattr(cuda_kernels, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "check_device", lambda device: None)
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    monkeypatch.setattr(native, "kernel_sources", lambda: "5c")
    verified.find.cache_clear()
    registry._chosen.clear()
    yield tmp_path / "verified.json"
    verified.find.cache_clear()
    registry._chosen.clear()


def test_compiled_is_not_verified(hopper: Path) -> None:
    choice = registry.choose("combine", device=CUDA, dtype=BF16)
    assert choice.impl == "reference" and "cuda is not the default: not verified on sm_90 for bfloat16" in choice.reason
    assert any(line.startswith("combine: not cuda (not verified") for line in registry.explain(CUDA, BF16))
    with registry.force("combine", "cuda"):
        assert registry.choose("combine", device=CUDA, dtype=BF16) == registry.Choice("cuda", "forced")


def test_verified_is_the_default_for_that_dtype_and_architecture(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified.write(
        [
            verified.Record(op, "cuda", "sm_90", dtype, "5c", "abc", "2026-01-01")
            for op, dtype in (("combine", "bfloat16"), ("row_map", "int32"))
        ]
    )
    registry._chosen.clear()
    assert registry.choose("combine", device=CUDA, dtype=BF16).impl == "cuda"
    assert registry.choose("combine", device=CUDA, dtype=F32).impl == "reference"
    assert registry.choose("row_map", device=CUDA, dtype=I32).impl == "cuda"
    assert registry.choose("row_map", device=CUDA, dtype=F32).impl == "cuda", "asked without a call at hand"
    registry._chosen.clear()
    monkeypatch.setattr(native, "kernel_sources", lambda: "another")
    assert "at commit abc, but the sources have changed" in registry.choose("combine", device=CUDA, dtype=BF16).reason
    registry._chosen.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "not verified on sm_100" in registry.choose("combine", device=CUDA, dtype=BF16).reason


def test_what_kernels_cannot_take_is_named(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.force("combine", "cuda"), pytest.raises(ConfigError, match="no kernel for float64"):
        registry.choose("combine", device=CUDA, dtype=F64)
    assert cuda_kernels.dtypes("permute") == cuda_kernels.dtypes("pack") and F64 in cuda_kernels.dtypes("pack")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 and later, this is sm_75" in registry.choose("pack", device=CUDA, dtype=F32).reason


@pytest.mark.parametrize(
    "op, change, why",
    [
        ("gate_topk", {0: ((2, 1025), F32)}, "1025 experts, k = 2"),
        ("gate_topk_backward", {0: ((6, 17), F32)}, "k = 17"),
        ("combine", {3: ((6, 16), F64)}, "a residual of float64"),
        ("combine_backward", {1: ((12, 16), F32)}, "y of float32 and dy of bfloat16"),
    ],
)
def test_sizes_beyond_a_kernel_go_to_the_next_one_with_the_reason(hopper: Path, op: str, change, why: str) -> None:
    def arguments(changed: bool) -> list:
        values = list(samples(lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))[op])
        for place, (shape, dtype) in change.items() if changed else ():
            values[place] = torch.empty(shape, dtype=dtype, device="meta")
        return values

    dtype = cuda_kernels.dtypes(op)[0] if "gate" in op else BF16
    verified.write([verified.Record(op, "cuda", "sm_90", str(dtype)[6:], "5c", "abc", "2026-01-01")])
    registry._chosen.clear()
    assert registry.choose(op, device=CUDA, dtype=dtype, arguments=arguments(False)).impl == "cuda"
    choice = registry.choose(op, device=CUDA, dtype=dtype, arguments=arguments(True))
    assert choice.impl == "reference" and why in choice.reason
    with registry.force(op, "cuda"), pytest.raises(ConfigError, match=why):
        registry.choose(op, device=CUDA, dtype=dtype, arguments=arguments(True))


def test_limits_are_those_of_the_kernels() -> None:
    text = (Path(__file__).parents[2] / "csrc/kernels/kernels.h").read_text()
    said = {name: int(value) for name, value in re.findall(r"constexpr \w+ (k\w+) = (\d+);", text)}
    assert said["kMostGateExperts"] == cuda_kernels.MOST_GATE_EXPERTS
    assert said["kMostGateK"] == cuda_kernels.MOST_GATE_K
    assert said["kMostRowMapExperts"] == cuda_kernels.MOST_ROW_MAP_EXPERTS


# ---- the record ----


def test_record_is_read_back_sorted(tmp_path: Path) -> None:
    rows = [verified.Record(op, "cuda", "sm_90", "float32", "5c", "abc", "2026-01-01") for op in ("pack", "combine")]
    verified.write(rows, tmp_path / "record.json")
    assert verified.read(tmp_path / "record.json") == (rows[1], rows[0])
    assert verified.read(tmp_path / "none.json") == ()
    (tmp_path / "record.json").write_text(json.dumps([{"op": "pack"}]))
    with pytest.raises(ValueError, match="no list of records"):
        verified.read(tmp_path / "record.json")


def test_committed_record_names_what_exists() -> None:
    dtypes = {("cuda", op): cuda_kernels.dtypes(op) for op in cuda_kernels.OPS}
    dtypes |= {("triton", op): kernel.dtypes for op, kernel in triton_kernels.KERNELS.items()}
    dtypes |= {("grouped_mm", op): expert_mlp_grouped.CUDA_DTYPES for op in expert_mlp_contract.OPS}
    for record in verified.read():
        assert record.dtype in {str(dtype)[6:] for dtype in dtypes[record.implementation, record.op]}, record
        assert all(dataclasses.astuple(record)), record
