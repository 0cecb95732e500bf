"""How the Triton kernels stand in the registry, on a machine without a GPU: reasons, limits, records."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_overlap import config
from moe_overlap.errors import ConfigError
from moe_overlap.ops import cuda_kernels, registry, triton_kernels, verified

OPS = tuple(triton_kernels.KERNELS)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
F32, BF16, F64, I32 = torch.float32, torch.bfloat16, torch.float64, torch.int32
MANY_ROWS = torch.full((2, triton_kernels.MOST_ROWS_OF_A_TOKEN + 1), -1, dtype=I32)


def first_dtype(op: str) -> torch.dtype:
    return triton_kernels.KERNELS[op].dtypes[0]


def triton_entry(op: str) -> registry.Implementation:
    (entry,) = (entry for entry in registry._implementations[op] if entry.name == "triton")
    return entry


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Choices made in a pretended environment do not outlive the test."""
    missing = triton_kernels.missing
    missing.cache_clear()
    registry._chosen.clear()
    yield
    missing.cache_clear()
    verified.find.cache_clear()
    registry._chosen.clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on a GPU of architecture sm_90 with Triton, without CUDA kernels, and nothing verified; the record's file."""
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)
    monkeypatch.setattr(cuda_kernels, "missing", lambda: "left out for this test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    verified.find.cache_clear()
    registry._chosen.clear()
    return tmp_path / "verified.json"


@pytest.mark.parametrize("op", OPS)
def test_the_function_of_each_operator_exists(op: str) -> None:
    if triton_kernels.missing():
        pytest.skip(str(triton_kernels.missing()))
    assert callable(triton_kernels._function(op))


def test_no_module_of_a_kernel_is_imported_before_it_is_called() -> None:
    code = "import sys, torch, moe_overlap\n"
    code += "moe_overlap.MoELayer(16, 32, 4, 2)(torch.randn(8, 16)).sum().backward()\n"
    code += "print([name for name in sys.modules if name.startswith('moe_overlap') and name.endswith('_triton')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_are_for_the_interpreter_and_only_when_forced(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(config.TRITON_INTERPRET, raising=False)
    registry._chosen.clear()
    with registry.force(op, "triton"), pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        registry.choose(op, device=CPU, dtype=first_dtype(op))
    monkeypatch.setenv(config.TRITON_INTERPRET, "1")
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)
    registry._chosen.clear()
    choice = registry.choose(op, device=CPU, dtype=first_dtype(op))
    assert choice.impl != "triton" and "the interpreter is for tests" in choice.reason + "; ".join(registry.explain())
    with registry.force(op, "triton"):
        assert registry.choose(op, device=CPU, dtype=first_dtype(op)) == registry.Choice("triton", "forced")


def test_the_interpreter_does_no_arithmetic_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.TRITON_INTERPRET, "1")
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)
    for op, kernel in triton_kernels.KERNELS.items():
        if BF16 in kernel.dtypes:
            why = triton_entry(op).obstacle(CPU, BF16)
            assert (why is None) == (op == "permute") and "bfloat16 wrongly" in (why or "bfloat16 wrongly")


def test_without_triton_or_with_an_old_one_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.TRITON_INTERPRET, "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not installed" in str(triton_kernels.missing())
    assert "Triton is not installed" in str(triton_entry("combine").obstacle(CPU, F32))
    for version, works in (("3.5.1", False), ("2.9", False), ("3.6.0", True), ("3.10.0+git123", True), ("4.0", True)):
        triton_kernels.missing.cache_clear()
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        why = triton_kernels.missing()
        assert (why is None) == works and (works or f"Triton {version}: 3.6 or later" in str(why))


def test_an_unverified_kernel_runs_when_forced(hopper: Path) -> None:
    for op in OPS:
        choice = registry.choose(op, device=CUDA, dtype=first_dtype(op))
        assert choice.impl != "triton" and "triton is not the default: not verified on sm_90" in choice.reason, op
        with registry.force(op, "triton"):
            assert registry.choose(op, device=CUDA, dtype=first_dtype(op)) == registry.Choice("triton", "forced")


def test_a_verification_holds_for_its_architecture_dtype_and_sources(
    hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [("combine", "bfloat16"), ("row_map", "int32")]
    verified.write(
        [
            verified.Record(op, "triton", "sm_90", name, triton_kernels.sources(), "abc", "2026-01-01")
            for op, name in records
        ]
    )
    registry._chosen.clear()
    choice = registry.choose("combine", device=CUDA, dtype=BF16)
    assert choice.impl == "triton" and choice.reason.startswith("Triton kernel, verified")
    assert registry.choose("row_map", device=CUDA, dtype=I32).impl == "triton"
    assert registry.choose("combine", device=CUDA, dtype=F32).impl == "reference"
    registry._chosen.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "not verified on sm_80" in registry.choose("combine", device=CUDA, dtype=BF16).reason
    registry._chosen.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_kernels, "sources", lambda: "another")
    assert "at commit abc, but the sources have changed" in registry.choose("combine", device=CUDA, dtype=BF16).reason


def test_what_kernels_cannot_take_is_named(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry.force("gate_topk", "triton"), pytest.raises(ConfigError, match="no kernel for bfloat16"):
        registry.choose("gate_topk", device=CUDA, dtype=BF16)
    assert "not xpu" in str(triton_entry("combine").obstacle(torch.device("xpu"), F32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later, this is sm_75" in str(triton_entry("combine").obstacle(CUDA, F32))


@pytest.mark.parametrize(
    "op, arguments",
    [
        ("gate_topk", (torch.empty(2, triton_kernels.MOST_GATE_EXPERTS + 1), None, 2, 1, 1, "softmax", False, 1.0)),
        ("gate_topk_backward", (torch.empty(2, 2), torch.empty(2, triton_kernels.MOST_GATE_EXPERTS + 1))),
        ("row_map", (torch.empty(2, 2, dtype=I32), 9999, 1, triton_kernels.MOST_ROW_MAP_EXPERTS + 2, 1, None)),
        ("permute", (torch.empty(2, 3), MANY_ROWS, None, 9)),
        ("combine", (torch.empty(9, 3), MANY_ROWS, None, None)),
        ("combine_backward", (torch.empty(2, 3), None, MANY_ROWS, None, 9)),
    ],
)
def test_sizes_beyond_a_kernel_go_to_the_next_one_with_the_reason(hopper: Path, op: str, arguments) -> None:
    dtype = first_dtype(op)
    digest = triton_kernels.sources()
    verified.write([verified.Record(op, "triton", "sm_90", str(dtype)[6:], digest, "abc", "2026-01-01")])
    registry._chosen.clear()
    assert registry.choose(op, device=CUDA, dtype=dtype).impl == "triton"
    choice = registry.choose(op, device=CUDA, dtype=dtype, arguments=arguments)
    assert choice.impl == "reference" and "triton does not take these arguments" in choice.reason
    with registry.force(op, "triton"), pytest.raises(ConfigError, match="it takes"):
        registry.choose(op, device=CUDA, dtype=dtype, arguments=arguments)


def test_the_digest_is_of_every_kernel_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(triton_kernels.__file__).parent
    files = {path.stem: path.read_text() for path in folder.glob("*_triton.py")}
    assert {kernel.module for kernel in triton_kernels.KERNELS.values()} <= {
        f"moe_overlap.ops.{stem}" for stem in files
    }
    monkeypatch.setattr(triton_kernels, "__file__", str(tmp_path / "triton_kernels.py"))
    digests = set()
    for changed in (None, *files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text + "#" * (name == changed))
        digests.add(triton_kernels.sources.__wrapped__())
    assert len(digests) == 1 + len(files)


def test_no_kernel_file_leads_back_to_the_module_that_imports_it() -> None:
    for path in Path(triton_kernels.__file__).parent.glob("*_triton.py"):
        assert "triton_kernels" not in path.read_text(), path.name
