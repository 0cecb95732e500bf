"""Which implementations have been checked on which hardware: the committed record `verified.json`.

Only `make gpu` adds to it, after the tests of tests/gpu passed on the GPU it names. Compiled is not verified, nor is
what ran under the harness on the CPU. A record says nothing about kernels whose machine code has changed since.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).resolve().parent / "verified.json"


@dataclass(frozen=True, order=True)
class Record:
    """One check that passed. architecture: such as sm_90. dtype: of the operator's first argument, such as bfloat16.
    sources: digest of the kernels' sources, as the build wrote it down, or of later sources shown to give the same
    machine code (benchmarks/same_kernels.py). commit, date (year-month-day): of the check."""

    op: str
    implementation: str
    architecture: str
    dtype: str
    sources: str
    commit: str
    date: str


def read(path: Path | None = None) -> tuple[Record, ...]:
    """All records (path None: of this package). A missing file is an empty record; a damaged one raises ValueError."""
    path = path or FILE
    if not path.is_file():
        return ()
    try:
        return tuple(sorted(Record(**row) for row in json.loads(path.read_text(encoding="utf-8"))))
    except TypeError as error:
        raise ValueError(f"{path.name} is no list of records: {error}") from error


def write(records: list[Record], path: Path | None = None) -> None:
    """Replace the record, one line for each check."""
    rows = ",\n".join(f"  {json.dumps(asdict(record))}" for record in sorted(records))
    (path or FILE).write_text(f"[\n{rows}\n]\n" if rows else "[]\n", encoding="utf-8")
    find.cache_clear()


def doubt(op: str, implementation: str, *, architecture: str, dtype: torch.dtype, sources: str) -> str | None:
    """Why an implementation is not to be the default there, or None: it was verified with these very sources."""
    name = str(dtype).removeprefix("torch.")
    record = find(op, implementation, architecture, name)
    if record is None:
        return f"not verified on {architecture} for {name} (make gpu does that)"
    if record.sources != sources:
        return (
            f"verified on {architecture} for {name} at commit {record.commit}, but the sources have changed (make gpu)"
        )
    return None


@cache
def find(op: str, implementation: str, architecture: str, dtype: str) -> Record | None:
    """The package's record of this check, or None."""
    for record in read():
        if (record.op, record.implementation, record.architecture, record.dtype) == (
            op,
            implementation,
            architecture,
            dtype,
        ):
            return record
    return None
