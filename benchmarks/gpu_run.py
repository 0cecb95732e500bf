"""`make gpu`: build in this environment, check on the GPU, measure. Always brings something home, within five minutes.

    python3 benchmarks/gpu_run.py [--out FOLDER] [--limit-s 300] [--only build,checks,...] [--skip sanitize,...]

Every part (gpu_parts.PARTS, in order of worth) has processes of its own and a limit: a crash, a CUDA error that stays
or a red test costs that part alone. Kernels that are right are verified and timed although others are not. Rows are
written as they come to FOLDER/rows.jsonl, what the processes said to FOLDER/log.txt, what was found right to
FOLDER/verified.json (and to the package's own, so that later parts use it). `python3 benchmarks/gpu_take.py FOLDER`
copies them into the tree: results, verified.json, the table of docs/status.md. Every row has date, commit, torch,
device and clocks; MOE_OVERLAP_COMMIT names the commit where the sources travelled without their history. Targets of
kernels that move bytes are shares of what the same run measured of the chip; those of matmuls are printed beside such
shares.

Exit status: 0 all is well, 1 a part failed or found something, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts import PARTS  # noqa: E402
from benchmarks.gpu_process import GOOD, LIMIT_S, Part, Run, about, no_gpu  # noqa: E402


def go(run: Run, parts: Sequence[Part]) -> bool:
    """All of them, whatever becomes of one; True if all that ran went well."""
    well = True
    for part in parts:
        begin_s, limit_s = time.monotonic(), min(part.most_s, run.left_s())
        if limit_s < part.least_s:
            run.record(kind="part", part=part.name, result="not run: the time was over")
            continue
        try:
            result = part.call(run, limit_s)
        except Exception as error:  # the parts after it go on
            result = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = round(time.monotonic() - begin_s, 1)
        run.record(kind="part", part=part.name, seconds=seconds, result=result)
        print(f"== {part.name}: {result} ({seconds} s)", flush=True)
        well = well and result == GOOD
    return well


SHORT = {
    "part": ("part", "seconds", "result"),
    "limit": ("what", "bytes_per_s", "flop_per_s"),
    "probe": ("what", "bytes_per_s", "flop_per_s", "result"),
    "test": ("id", "outcome"),
    "checks": ("tests", "cut", "failed_or_lost", "kernels_right", "kernels_wrong"),
    "expert_mlp": ("case", "routing", "implementation", "phase", "tflops", "ms", "share", "target", "met", "result"),
    "kernel": ("case", "implementation", "us", "copy_share", "target", "met", "result"),
    "layer": ("case", "implementation", "ms", "times_ours", "times_graph", "target", "met_by", "peak_gib", "result"),
    "staged": ("case", "implementation", "ms", "serial_ms", "nocomm_ms", "bytes_per_s", "overlap_eff", "allowed",
               "share", "met", "result"),
    "offload": ("case", "rows_per_expert", "ms", "resident_ms", "hidden", "predicted_rows", "not_hidden_rows",
                "hidden_rows", "result"),
    "nccl": ("result",),
    "counters": ("op", "DRAM Throughput", "Compute (SM) Throughput", "result"),
    "sanitizer": ("tool", "result"),
    "summary": ("missed", "another_is_faster_than_the_choice"),
}  # fmt: skip
"""What the table at the end says of a row, by its kind; of others nothing."""


def digest(run: Run) -> list[str]:
    """The run in short lines, to be read where only the end of the output is at hand; last what became of each part."""
    rows = map(json.loads, run.file.read_text(encoding="utf-8").splitlines())
    return [
        " ".join([row["kind"], *(f"{row[name]}" for name in SHORT[row["kind"]] if row.get(name) is not None)])[:240]
        for row in sorted(rows, key=lambda row: row["kind"] == "part")
        if row["kind"] in SHORT
    ]


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"some of {', '.join(names)}")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of the whole run (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of everything (default out/gpu)")
    options = parser.parse_args(argv)
    only, skipped = ([word for word in words.split(",") if word] for words in (options.only, options.skip))
    if not {*only, *skipped} <= set(names):
        parser.error(f"--only, --skip = {options.only!r}, {options.skip!r}: expected some of {', '.join(names)}")
    if reason := no_gpu():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    run = Run(options.out, about(), options.limit_s)
    try:
        well = go(run, [part for part in PARTS if part.name not in skipped and (not only or part.name in only)])
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)
    print("\n".join(["", *digest(run)]))
    print(f"{run.folder}: {run.limit_s - run.left_s():.0f} s in all; python3 benchmarks/gpu_take.py {run.folder}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
