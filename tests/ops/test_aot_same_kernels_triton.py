"""benchmarks/same_kernels.py: equal trees pass and renew the record, a constant changed in one kernel is found.

A few small kernels; the whole list takes minutes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ops.interpreted import needs_triton

needs_triton(interpreter=False)

from benchmarks import same_kernels  # noqa: E402
from moe_overlap.ops import triton_kernels, verified  # noqa: E402

ONLY = "sm_90, permute odd"
OPS = Path("moe_overlap/ops")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A checkout whose sources differ from these by a comment, without compiled parts."""
    tree = tmp_path / "earlier"
    shutil.copytree(same_kernels.ROOT / "moe_overlap", tree / "moe_overlap",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    with (tree / OPS / "permute_triton.py").open("a") as file:
        file.write("# a comment\n")
    return tree


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """record(tree): one check of the Triton sources of this tree, one of older ones, one of CUDA kernels; the file."""
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")

    def written(tree: Path) -> Path:
        found = same_kernels.sources(tree)
        checks = (("triton", found, "float16"), ("triton", "5c", "float32"), ("cuda", "5c", "float16"))
        verified.write([verified.Record("permute", way, "sm_90", dtype, digest, "abc", "2026-01-01")
                        for way, digest, dtype in checks])  # fmt: skip
        return verified.FILE

    yield written
    verified.find.cache_clear()


def test_equal_machine_code_renews_the_digest_and_nothing_else(earlier: Path, record, monkeypatch, capsys) -> None:
    record(earlier)
    before = verified.read()
    assert same_kernels.main([str(earlier), f"--only={ONLY}", "--write"]) == 0
    assert verified.read() == before, "a part of the launches proves nothing"
    assert re.search(
        r"sm_90: \d launches of \d kernels, 0 differ\nsm_90: 0 of another ptx\nsm_90: 0 of", capsys.readouterr().out
    )
    # As if these were all launches.
    monkeypatch.setattr(same_kernels, "listing", lambda *_: {"permute": {"ptx": "b", "cubin": "a"}})
    assert same_kernels.main([str(earlier), "--write"]) == 0
    assert same_kernels.main([str(earlier), "--write"]) == 1, "no record of them any more"
    changed = [(one, other) for one, other in zip(before, verified.read(), strict=True) if one != other]
    assert changed == [(one, replace(one, sources=triton_kernels.sources())) for one, _ in changed]
    assert [(one.implementation, one.dtype) for one, _ in changed] == [("triton", "float16")]


def test_a_changed_constant_is_found_and_nothing_is_written(earlier: Path, record, capsys) -> None:
    source = earlier / OPS / "permute_triton.py"
    text = source.read_text()
    assert text.count("(BLOCK_T,), 1,") == 1
    source.write_text(text.replace("(BLOCK_T,), 1,", "(BLOCK_T,), 2,"))
    file = record(earlier)
    written = file.read_text()
    assert same_kernels.main([str(earlier), f"--only={ONLY}", "--write"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^differs: permute_kernel \(sm_90, permute odd float16, launch 0\): ptx, cubin$", said, re.M)
    assert said.count("differs:") == 1 and "nothing written" in said and file.read_text() == written


def test_what_is_passed_and_the_grid_count_too() -> None:
    row = {"grid": [4], "passed": ["torch.int32 4 by 1"], "options": "", "ptx": "b", "cubin": "a"}
    before = {"one": row, "two": row, "gone": row}
    now = {"one": row, "two": row | {"grid": [5], "passed": []}, "new": row}
    assert same_kernels.differences(before, now) == ["gone: only earlier", "new: only now", "two: grid, passed"]
    for key, differ in (("ptx", 0), ("cubin", 0), ("options", 1)):
        changed = {name: value | {key: "another"} for name, value in before.items()}
        assert len(same_kernels.differences(before, changed)) == differ * len(before)
    changed = {name: value | {"ptx": "another", "cubin": "another"} for name, value in before.items()}
    assert len(same_kernels.differences(before, changed)) == len(before)
