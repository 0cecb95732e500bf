"""The CUDA kernels as compiled: what they use, against the committed table; the launcher that reads it from ptxas."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moe_overlap.commands import cli, kernels

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = kernels.read(kernels.COMMITTED)
BUILT = kernels.read(kernels.BUILT)
ptxas_report = runpy.run_path(str(ROOT / "csrc/ptxas_report.py"))

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN11moe_overlap4copyEv' for 'sm_80'
ptxas info    : Function properties for _ZN11moe_overlap4copyEv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 46 registers, used 1 barriers, 256 bytes smem, 408 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN11moe_overlap4copyEv' for 'sm_100'
ptxas info    : Function properties for _ZN11moe_overlap4copyEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 408 bytes cmem[0]
"""
PTX = """
.visible .entry _ZN11moe_overlap4copyEv(
	.param .align 8 .b8 a[64]
)
.maxntid 256
.minnctapersm 1
{
	ret;
}
.visible .entry unbounded(
	.param .u64 b
)
{
	.maxntid 7
}
"""


@pytest.mark.parametrize("report", [COMMITTED, BUILT], ids=["committed", "built"])
def test_no_kernel_spills_or_has_a_stack(report) -> None:
    if report is None:
        pytest.skip("no CUDA kernels in this install")
    for row in report.kernels:
        assert (row.spill_store_bytes, row.spill_load_bytes, row.stack_bytes) == (0, 0, 0), row


def test_committed_table_has_every_kernel_file_on_every_architecture() -> None:
    assert COMMITTED is not None
    files = {path.name for path in (ROOT / "csrc/kernels").glob("*.cu")}
    assert {(row.source, row.arch) for row in COMMITTED.kernels} == {
        (name, arch) for name in files for arch in kernels.CHIPS
    }
    listed = (ROOT / "CMakeLists.txt").read_text()
    assert all(f"csrc/kernels/{name}" in listed for name in files)


def test_build_uses_what_the_committed_table_says() -> None:
    assert COMMITTED is not None
    if BUILT is None:
        pytest.skip("no CUDA kernels in this install")
    if BUILT.nvcc != COMMITTED.nvcc:
        pytest.skip(f"built with nvcc {BUILT.nvcc}, the table is of {COMMITTED.nvcc}")
    want = {row for row in COMMITTED.kernels if row.arch in {built.arch for built in BUILT.kernels}}
    changed = sorted(map(str, set(BUILT.kernels) ^ want))
    assert not changed, "moe-overlap kernels --write moe_overlap/native/kernel_resources.json\n" + "\n".join(changed)


def test_what_ptxas_says_is_read() -> None:
    threads = ptxas_report["block_sizes"](PTX)
    assert threads == {"_ZN11moe_overlap4copyEv": 256}
    first, second = ptxas_report["parse"](PTXAS, threads, "copy.cu")
    assert (first["source"], first["arch"], first["threads"]) == ("copy.cu", "sm_80", 256)
    assert [first[name] for name in ("stack_bytes", "spill_store_bytes", "spill_load_bytes")] == [16, 8, 4]
    assert (first["registers"], first["shared_bytes"]) == (46, 256)
    assert (second["arch"], second["registers"], second["shared_bytes"]) == ("sm_100", 32, 0)


def test_names_are_shortened_to_what_the_source_says() -> None:
    full = "void moe_overlap::(anonymous namespace)::copy<moe_overlap::bf16, (moe_overlap::Kind)1>(moe_overlap::Args)"
    assert ptxas_report["shorten"](full) == "copy<bf16, (Kind)1>"


def test_launcher_passes_the_compilers_failure_on(tmp_path: Path) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'ptxas info : x'\necho 'pack.cu(3): error: no'\nexit 2\n")
    compiler.chmod(0o755)
    command = [sys.executable, str(ROOT / "csrc/ptxas_report.py"), str(compiler), "-o", str(tmp_path / "pack.cu.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == "pack.cu(3): error: no\n"
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "arch, threads, registers, shared_bytes, expected",
    [
        ("sm_90", 256, 32, 0, 1.0),
        ("sm_90", 256, 40, 0, 0.75),  # 1280 registers a warp: 12 warps on each quarter, 6 blocks of 8
        ("sm_90", 1024, 65, 0, 0.0),  # 18 warps fit beside each other on a multiprocessor, not 32
        ("sm_80", 32, 16, 0, 0.5),  # 32 blocks of one warp
        ("sm_80", 256, 32, 40 << 10, 0.5),  # 4 blocks of 41 KiB in 164 KiB
        ("sm_90", 256, 32, 40 << 10, 0.625),
        ("sm_75", 256, 32, 0, None),
        ("sm_90", None, 32, 0, None),
    ],
)
def test_occupancy(arch, threads, registers, shared_bytes, expected) -> None:
    row = kernels.Resources("a.cu", "a", arch, threads, registers, 0, 0, 0, shared_bytes)
    assert row.occupancy() == expected


def test_command_prints_the_committed_table_where_nothing_was_built(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "none.json")
    assert cli.main(["kernels"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("no CUDA kernels in this install") and "the committed table" in text
    assert "pack.cu:" in text and "sm_100" in text and "occupancy" in text
    with pytest.raises(SystemExit, match="2"):
        cli.main(["kernels", "--write", str(tmp_path / "table.json")])
    assert "no CUDA kernels in this install" in capsys.readouterr().err


def test_written_table_is_read_back(tmp_path, monkeypatch, capsys) -> None:
    row = kernels.Resources("a.cu", "a<1>", "sm_90", 128, 20, 0, 0, 0, 16)
    (tmp_path / "built.json").write_text(json.dumps({"nvcc": "1.2", "kernels": [vars(row)]}))
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "built.json")
    assert cli.main(["kernels", "--write", str(tmp_path / "table.json")]) == 0
    assert "built here with nvcc 1.2" in capsys.readouterr().out
    assert kernels.read(tmp_path / "table.json") == kernels.Report("1.2", (row,))
