"""The Triton kernels of the expert MLP in every committed block shape, compiled for cuda:80, 90 and 100 without a GPU.

Read from the machine code: matrix instructions are used in 16 bits, nothing spills, shared memory and registers fit as
many programs on a multiprocessor as the table says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ops.interpreted import needs_triton

needs_triton(interpreter=False)

from moe_overlap.ops import expert_mlp_triton as mlp  # noqa: E402
from moe_overlap.ops import triton_kernels  # noqa: E402
from moe_overlap.ops.expert_mlp_blocks_triton import (  # noqa: E402
    ARCHITECTURES,
    SHARED_BYTES,
    TABLE,
    Problem,
    Row,
    block_shape,
)
from moe_overlap.ops.expert_mlp_contract import Dgrad, ExpertMlp, ExpertMlpBackward, Wgrad  # noqa: E402
from tests.ops import aot  # noqa: E402
from tests.ops.aot import meta  # noqa: E402

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "portable": 80}
REGISTERS = 64 << 10
KERNELS = {"up_kernel": "up", "rows_kernel": "rows", "hidden_gradient_kernel": "hidden", "weights_kernel": "weights"}
EXPERTS = 8
STACK_BYTES = 16
"""Of float32 weights whose tiles are dealt out, for sm_80 by Triton 3.6: ptxas spares them to fit a third program."""


def launches(
    problem: Problem, *, kind: str = "swiglu", mapped: bool = True, odd: bool = False, half: torch.dtype = BF16
) -> list[aot.Launch]:
    """Forward and backward of a layer of these sizes on this architecture; `odd` sizes divide by nothing."""
    dtype = half if problem.item_bytes == 2 else F32
    hidden, ffn = problem.hidden + 3 * odd, problem.ffn + odd
    rows = max(1, problem.rows) * EXPERTS
    width = 2 * ffn if kind == "swiglu" else ffn
    w_in, w_out = meta(EXPERTS, width, hidden, dtype=dtype), meta(EXPERTS, hidden, ffn, dtype=dtype)
    offs, scale = meta(EXPERTS, dtype=I32), meta(rows, dtype=F32)
    x = meta(rows // 2 + 8 if mapped else rows, hidden, dtype=dtype)
    row_to_token = meta(rows, dtype=I32) if mapped else None
    h, dy = meta(rows, width, dtype=dtype), meta(rows, hidden, dtype=dtype)
    operands = (w_in, w_out, offs, kind, row_to_token, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "target", lambda device: mlp.Target(problem.arch, 132))
        forward = aot.recorded(mlp.expert_mlp, ExpertMlp(x, *operands, None, save_h=True))
        backward = aot.recorded(mlp.expert_mlp_backward, ExpertMlpBackward(dy, x, h, *operands, [True] * 4))
        pieces = aot.recorded(_pieces, x, dy, h, *operands) if mapped else []
    return [*forward, *backward, *pieces]


def _pieces(
    x: torch.Tensor,
    dy: torch.Tensor,
    h: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    ends: torch.Tensor,
    kind: str,
    rows: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """What the pieces launch that the operator does not: dy through the map, in a gradient of h and one of w_out."""
    dy = meta(*x.shape, dtype=x.dtype)
    dgrad = mlp.expert_mlp_dgrad(Dgrad(dy, h, w_in, w_out, ends, None, kind, None, h, None, None, rows, scale))
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    mlp.expert_mlp_wgrad(Wgrad(x, dy, dgrad.dh, dgrad.a, ends, None, dw_in, dw_out, (0, EXPERTS), None, rows))


def problem_of(row: Row) -> Problem:
    """Sizes that lead to this row of the table: as large as it takes."""
    return Problem(
        arch=row.arch,
        item_bytes=row.item_bytes,
        hidden=row.most_hidden or 2048,
        ffn=row.most_ffn or 2048,
        rows=row.most_rows if row.most_rows is not None else 512,
    )


CASES = {
    f"{stage} {row.arch} {8 * row.item_bytes} bit {row.blocks.m}x{row.blocks.n}x{row.blocks.k}": (stage, row)
    for stage, rows in TABLE.items()
    for row in rows
    if row.arch != "interpreter"
}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def tiles_of(launch: aot.Launch) -> str:
    """How its programs get their tiles."""
    return "in_turn" if launch.args[launch.kernel.arg_names.index("counter")] is None else "dealt"


def check(launch: aot.Launch, row: Row, folder: Path, capability: int) -> None:
    kernel = aot.compiled(launch, capability)
    used, ptx, shape = aot.resources(kernel, folder), kernel.asm["ptx"], row.blocks
    if os.environ.get("SHOW_RESOURCES"):
        print(launch.name, row.arch, shape, used, {key: ptx.count(key) for key in ("cp.async.bulk.tensor", "cp.async")})
    assert (launch.keywords["BLOCK_M"], launch.keywords["BLOCK_N"]) == (shape.m, shape.n)
    spared = (launch.name, row.item_bytes, capability, tiles_of(launch)) == ("weights_kernel", 4, 80, "dealt")
    most_stack = STACK_BYTES if spared and triton_kernels.release() < (3, 9) else 0
    assert used.local_bytes == 0 and used.stack_bytes <= most_stack, (launch.name, used)
    assert used.shared_bytes * shape.per_sm <= SHARED_BYTES[row.arch], (launch.name, used)
    assert used.registers * 32 * kernel.metadata.num_warps * shape.per_sm <= REGISTERS, (launch.name, used)
    if row.item_bytes == 2:
        assert aot.MATRIX_INSTRUCTION[capability] in ptx
    if launch.keywords.get("B_TMA") or launch.keywords.get("TMA"):
        assert "cp.async.bulk.tensor" in ptx


@pytest.mark.parametrize("tiles", ["in_turn", "dealt"])
@pytest.mark.parametrize("name", CASES)
def test_every_block_shape_of_the_table(name: str, tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_OVERLAP_TILES", tiles)
    stage, row = CASES[name]
    found = [launch for launch in launches(problem_of(row)) if KERNELS.get(launch.name) == stage]
    assert found
    for launch in found:
        assert tiles_of(launch) == tiles
        check(launch, row, tmp_path, CAPABILITY[row.arch])


MAIN = Problem(arch="sm_90", item_bytes=2, hidden=2048, ffn=768, rows=512)  # Qwen3-30B-A3B, 8192 tokens
VARIANTS = {
    "rows as they lie": {"mapped": False},
    "gelu": {"kind": "gelu"},
    "relu, rows as they lie": {"kind": "relu", "mapped": False},
    "odd sizes": {"odd": True},
    "odd sizes, rows as they lie, gelu": {"odd": True, "mapped": False, "kind": "gelu"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_sm_90(name: str, tmp_path: Path) -> None:
    """TMA reads weights, and rows that are not gathered. Odd sizes are read element by element, in smaller tiles."""
    variant = VARIANTS[name]
    odd, found = variant.get("odd", False), set()
    problem = replace(MAIN, arch="portable") if odd else MAIN
    for launch in launches(MAIN, **variant):
        found.add(launch.name)
        if stage := KERNELS.get(launch.name):
            check(launch, next(row for row in TABLE[stage] if problem.fits(row)), tmp_path, 90)
        else:
            used = aot.resources(aot.compiled(launch, 90), tmp_path)
            assert used.stack_bytes == used.local_bytes == 0, (launch.name, used)
        if "B_TMA" in launch.keywords:
            gathered = bool(launch.keywords.get("MAPPED"))
            assert (launch.keywords["A_TMA"], launch.keywords["B_TMA"]) == (not odd and not gathered, not odd)
    mapped = variant.get("mapped", True)
    for_maps = {"sum_rows_kernel"} | (set() if odd else {"gather_rows_kernel"})
    assert found == {"list_tiles_kernel", "sum_parts_kernel", *KERNELS} | (for_maps if mapped else set())
    assert mapped == any(launch.keywords.get("MAPPED") for launch in launches(MAIN, **variant))


def everything(arch: str) -> Iterator[tuple[str, list[aot.Launch]]]:
    """(name, launches) of all there is for an architecture, in every dtype, for benchmarks/same_kernels.py."""
    for name, (_, row) in CASES.items():
        for half in (BF16, F16) if row.item_bytes == 2 else (F32,):
            if row.arch in (arch, "portable"):
                yield f"{name} {str(half)[6:]}", launches(problem_of(row), half=half)
    for name, variant in {"the main case": {}, **VARIANTS}.items():
        for half in (BF16, F16):
            yield f"{name} {str(half)[6:]}", launches(replace(MAIN, arch=arch), half=half, **variant)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("tiles", ["in_turn", "dealt"])
def test_the_kernels_without_a_block_shape(
    arch: str, tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of tiles, with counters behind it and without, the sums of dscale and those by token."""
    monkeypatch.setenv("MOE_OVERLAP_TILES", tiles)
    found = [launch for launch in launches(replace(MAIN, arch=arch)) if launch.name not in KERNELS]
    names = {"list_tiles_kernel", "sum_parts_kernel", "sum_rows_kernel"}
    assert {launch.name for launch in found} == names | ({"gather_rows_kernel"} if arch != "sm_80" else set())
    for launch in found:
        used = aot.resources(aot.compiled(launch, CAPABILITY[arch]), tmp_path)
        assert used.stack_bytes == used.local_bytes == 0, (launch.name, used)


def test_the_table_covers_everything_and_every_row_is_reached() -> None:
    for stage, rows in TABLE.items():
        for arch in ARCHITECTURES:
            for item_bytes in (2, 4):
                some = [row for row in rows if (row.arch, row.item_bytes) == (arch, item_bytes)]
                assert some and (some[-1].most_rows, some[-1].most_ffn, some[-1].most_hidden) == (None,) * 3, (
                    stage,
                    arch,
                )
                assert len({row.blocks.k for row in some}) == 1, "sums in the same order whatever the height"
        for row in rows:
            assert block_shape(stage, problem_of(row)) is row.blocks
