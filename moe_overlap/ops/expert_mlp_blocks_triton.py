"""Block shapes of the Triton kernels of the expert MLP: a committed table, and nothing measured behind anyone's back.

The first row that fits an architecture, an element size and the widths of a layer counts. The inner block is the same
in all rows of an architecture and element size, so that a tile of another height sums in the same order. The table was
chosen from the limits of each chip (shared memory, registers: tests/ops/test_aot_expert_mlp_triton.py) and has not been
measured on a GPU. `expert_mlp_tune_triton` measures, where someone asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

STAGES = ("up", "rows", "hidden", "weights")
"""The kernels: up_kernel, rows_kernel, hidden_gradient_kernel and weights_kernel."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "portable", "interpreter")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "portable": 64 << 10}
"""What one program may use. "portable" is every other GPU: 99 KiB on sm_86, sm_89 and sm_120, 64 KiB on AMD."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Rows, columns and inner elements of a tile; row tiles that share a column; warps; loads in flight; programs per
    multiprocessor. For "weights" rows and columns are those of the weight, and the inner dimension is the rows."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int
    per_sm: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: valid up to these sizes (None: any)."""

    arch: str
    item_bytes: int
    blocks: Blocks
    most_rows: int | None = None
    most_ffn: int | None = None
    most_hidden: int | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice may look at. rows: mean number of rows of an expert in this call."""

    arch: str
    item_bytes: int
    hidden: int
    ffn: int
    rows: int

    def fits(self, row: Row) -> bool:
        limits = ((row.most_rows, self.rows), (row.most_ffn, self.ffn), (row.most_hidden, self.hidden))
        return (row.arch, row.item_bytes) == (self.arch, self.item_bytes) and all(
            most is None or size <= most for most, size in limits
        )


def _row(arch: str, item_bytes: int, shape: tuple[int, int, int], how: tuple[int, int, int, int], **most: int) -> Row:
    """shape: m, n, k. how: group, warps, stages, programs per multiprocessor."""
    blocks = Blocks(m=shape[0], n=shape[1], k=shape[2], group=how[0], warps=how[1], stages=how[2], per_sm=how[3])
    return Row(arch=arch, item_bytes=item_bytes, blocks=blocks, **{f"most_{name}": size for name, size in most.items()})


# With few rows an expert, its weights are read for one row tile only: small programs, two to a multiprocessor. float32
# is multiplied without matrix instructions (tf32 would be the only ones), so its tiles are bound by registers.
_FEW = 64
TABLE: Mapping[str, tuple[Row, ...]] = {
    "up": (  # for swiglu with two accumulators and two tiles of weights
        _row("sm_90", 2, (64, 64, 64), (1, 4, 4, 2), rows=_FEW),
        _row("sm_90", 2, (128, 64, 64), (8, 8, 4, 1), ffn=64),
        _row("sm_90", 2, (128, 128, 64), (8, 8, 4, 1)),
        _row("sm_100", 2, (128, 64, 64), (1, 4, 3, 2), rows=_FEW),
        _row("sm_100", 2, (128, 128, 64), (8, 8, 4, 1)),
        _row("sm_80", 2, (64, 64, 32), (1, 4, 4, 2), rows=_FEW),
        _row("sm_80", 2, (128, 64, 32), (8, 8, 4, 1)),
        _row("portable", 2, (64, 64, 32), (8, 8, 3, 1)),
        *(_row(arch, 4, (64, 32, 32), (8, 8, 2, 1)) for arch in SHARED_BYTES),
        *(_row("interpreter", size, (16, 16, 16), (2, 1, 1, 1)) for size in (2, 4)),
    ),
    "rows": (
        _row("sm_90", 2, (64, 128, 64), (1, 4, 4, 2), rows=_FEW),
        _row("sm_90", 2, (128, 128, 64), (8, 8, 4, 1), hidden=1024),
        _row("sm_90", 2, (128, 256, 64), (8, 8, 4, 1)),
        _row("sm_100", 2, (128, 128, 64), (1, 4, 3, 2), rows=_FEW),
        _row("sm_100", 2, (128, 256, 64), (8, 8, 4, 1)),
        _row("sm_80", 2, (64, 128, 32), (1, 4, 4, 2), rows=_FEW),
        _row("sm_80", 2, (128, 128, 32), (8, 8, 4, 1)),
        _row("portable", 2, (64, 64, 32), (8, 4, 3, 1)),
        *(_row(arch, 4, (64, 64, 32), (8, 8, 2, 1)) for arch in SHARED_BYTES),
        *(_row("interpreter", size, (16, 16, 16), (2, 1, 1, 1)) for size in (2, 4)),
    ),
    "hidden": (  # reads h and writes dh and a while it holds da
        _row("sm_90", 2, (64, 64, 64), (1, 4, 4, 2), rows=_FEW),
        _row("sm_90", 2, (128, 128, 64), (8, 8, 4, 1)),
        _row("sm_100", 2, (128, 64, 64), (1, 4, 3, 2), rows=_FEW),
        _row("sm_100", 2, (128, 128, 64), (8, 8, 4, 1)),
        _row("sm_80", 2, (64, 64, 32), (1, 4, 4, 2), rows=_FEW),
        _row("sm_80", 2, (128, 64, 32), (8, 8, 4, 1)),
        _row("portable", 2, (64, 64, 32), (8, 4, 3, 1)),
        *(_row(arch, 4, (64, 32, 32), (8, 8, 2, 1)) for arch in SHARED_BYTES),
        *(_row("interpreter", size, (16, 16, 16), (2, 1, 1, 1)) for size in (2, 4)),
    ),
    "weights": (  # not by rows: a weight gradient is one kernel whatever the chunks were
        _row("sm_90", 2, (128, 256, 64), (8, 8, 4, 1)),
        _row("sm_100", 2, (128, 128, 64), (8, 8, 4, 1), ffn=1024),
        _row("sm_100", 2, (128, 256, 64), (8, 8, 3, 1)),
        _row("sm_80", 2, (128, 128, 32), (8, 8, 4, 1)),
        _row("portable", 2, (64, 64, 32), (8, 4, 3, 1)),
        *(_row(arch, 4, (64, 64, 32), (8, 8, 2, 1)) for arch in SHARED_BYTES),
        *(_row("interpreter", size, (16, 16, 16), (2, 1, 1, 1)) for size in (2, 4)),
    ),
}

Measured = Mapping[tuple[str, Problem], Blocks]
_measured: dict[tuple[str, Problem], Blocks] = {}


def candidates(stage: str, problem: Problem) -> tuple[Blocks, ...]:
    """What there is to measure: the table's shapes for this architecture, with other L2 groups and fewer stages.

    The inner block stays the table's, and with it the order of sums.
    """
    same = [row.blocks for row in TABLE[stage] if (row.arch, row.item_bytes) == (problem.arch, problem.item_bytes)]
    wider = [replace(shape, group=group) for shape in same for group in (4, 16)]
    fewer = [replace(shape, stages=shape.stages - 1) for shape in same if shape.stages > 2]
    return tuple(dict.fromkeys([*same, *wider, *fewer]))


def _rounded(problem: Problem) -> Problem:
    """Rows up to a power of two: a measurement holds for calls of about its size."""
    return replace(problem, rows=1 << max(0, problem.rows - 1).bit_length())


def block_shape(stage: str, problem: Problem) -> Blocks:
    """The block shape in force: the measured one inside `use`, else the first row of the table that fits."""
    found = _measured.get((stage, _rounded(problem))) if _measured else None
    return _from_table(stage, problem) if found is None else found


@lru_cache(maxsize=4096)
def _from_table(stage: str, problem: Problem) -> Blocks:
    return next(row.blocks for row in TABLE[stage] if problem.fits(row))


@contextmanager
def use(measured: Measured) -> Iterator[None]:
    """Take these instead of the table inside the block, in the whole process, for calls of about the same rows.

    All ranks of a job and all steps that are to be equal bit for bit must use the same.
    """
    before = dict(_measured)
    _measured.update({(stage, _rounded(problem)): shape for (stage, problem), shape in measured.items()})
    try:
        yield
    finally:
        _measured.clear()
        _measured.update(before)


def architecture_class(name: str) -> str:
    """The class of the table for an architecture such as sm_90, gfx942 or "interpreter"."""
    same = {"sm_87": "sm_80", "sm_103": "sm_100"}
    name = same.get(name, name)
    return name if name in ARCHITECTURES else "portable"
