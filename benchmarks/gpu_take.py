"""Copy what a run of gpu_run.py left in its folder into the tree: rows, verified.json, the table of docs/status.md.

python3 benchmarks/gpu_take.py FOLDER

Several runs of one commit can be taken, in any order, each as often as one likes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_overlap.ops import cuda_kernels, expert_mlp_contract, expert_mlp_grouped, triton_kernels, verified  # noqa: E402

STATUS = ROOT / "docs/status.md"
RESULTS = ROOT / "benchmarks/results"
Row = dict[str, Any]
TABLE_BEGIN, TABLE_END = "<!-- from moe_overlap/ops/verified.json -->", "<!-- end -->"


def slug(device: str) -> str:
    """The folder of a device's results: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")


def status_table() -> list[str]:
    """The table of docs/status.md: each kernel, and on which hardware it has been checked."""
    kernels = [(op, "cuda", cuda_kernels.dtypes(op)) for op in cuda_kernels.OPS]
    kernels += [(op, "triton", kernel.dtypes) for op, kernel in triton_kernels.KERNELS.items()]
    kernels += [(op, "grouped_mm", expert_mlp_grouped.CUDA_DTYPES) for op in expert_mlp_contract.OPS]
    lines = ["| operator | kernel | dtypes | verified on a GPU |", "|---|---|---|---|"]
    for op, implementation, dtypes in kernels:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = [r for r in verified.read() if (r.op, r.implementation) == (op, implementation)]
        checks = "; ".join(f"{r.architecture} {r.dtype} ({r.commit}, {r.date})" for r in found)
        lines.append(f"| `{op}` | {implementation} | {names} | {checks or '**no**'} |")
    return lines


def with_table(text: str) -> str:
    """docs/status.md with the table of today between its two marks."""
    before, rest = text.split(TABLE_BEGIN)
    _, after = rest.split(TABLE_END)
    return "\n".join([before + TABLE_BEGIN, *status_table(), TABLE_END + after])


def take_verified(folder: Path, rows: Sequence[Row]) -> int:
    """What this run found right goes into the package's record, what it found wrong comes out of it, all else stays:
    the folder's record began as the one of the tree that travelled. Returns how many kernels are right."""
    runs = {(row["commit"], row["date"]) for row in rows}
    found = [record for record in verified.read(folder / "verified.json") if (record.commit, record.date) in runs]
    gone = {(record.op, record.implementation, record.dtype, record.architecture) for record in found}
    for row in rows:
        if row["kind"] == "checks":
            gone |= {(*name.split(), row["architecture"]) for name in row["kernels_wrong"]}
    kept = [
        record
        for record in verified.read()
        if (record.op, record.implementation, record.dtype, record.architecture) not in gone
    ]
    verified.write([*kept, *found])
    return len(found)


def take_rows(rows: Sequence[Row]) -> Path | None:
    """The rows become a file of results, named by card, date and commit, behind those of an earlier run that are there;
    None where the run had none."""
    if not rows:
        return None
    target = RESULTS / slug(rows[0]["device"]) / f"{rows[0]['date']}-{rows[0]['commit']}-gpu.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = target.read_text(encoding="utf-8").splitlines() if target.is_file() else []
    lines += [line for line in map(json.dumps, rows) if line not in lines]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    if not (folder / "rows.jsonl").is_file():
        parser.error(f"folder = {folder}: expected one that gpu_run.py wrote: it has no rows.jsonl")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    if (folder / "verified.json").is_file():
        print(f"{take_verified(folder, rows)} kernels are right")
        STATUS.write_text(with_table(STATUS.read_text(encoding="utf-8")), encoding="utf-8")
    print(take_rows(rows) or "no rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
