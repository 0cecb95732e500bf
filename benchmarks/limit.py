"""How near the schedules come to their bounds, at shares of communication from 10 to 70 %.

    python benchmarks/limit.py --out out/limit [--shares 0.1,0.6] [-- --repeats 10 ...]

Runs `moe-overlap bench layer --comm-share S` for every share (options after `--` go to each run) and gathers the rows
in OUT/limit.jsonl. The experts are so wide that the CPU time of the exchanges is a small part of their time: what is
left above the bound is not the price of emulating a link.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.bench.sweep import parse, sweep

SIZES = {
    0.1: (1024, 16384),
    0.2: (1024, 12288),
    0.35: (1024, 6144),
    0.5: (512, 4096),
    0.6: (512, 4096),
    0.7: (512, 4096),
}
"""(tokens of a rank, width of the experts) by share; the rest is the same for all."""
SETTING = ("--cases", "top2,scmoe_pos2", "--schedules", "serial,chunked,shortcut,auto")
CPU_SHARE = 0.05
LIMITS = {"top2": {"infer": 1.05, "train": 1.05}, "scmoe_pos2": {"infer": 1.05, "train": 1.08}}


def time_over_bound(row: dict[str, Any]) -> float | None:
    """Time over bound of a row that counts: overlapped, not flagged but for its prediction, its exchanges cheap for the
    CPU, and no `mirrored` one, which is there for comparison; else None."""
    if row["flagged"] not in (None, "drifted") or row["bound_ms"] is None or row["case"] not in LIMITS:
        return None
    if row["schedule"] == "mirrored" or row["comm_cpu_ms"] > CPU_SHARE * row["exchange_ms"]:
        return None
    return float(row["time_ms_median"] / row["bound_ms"])


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each row that counts, and how many keep the limit."""
    lines, kept = [], []
    for row in rows:
        ratio = time_over_bound(row)
        if ratio is None:
            continue
        limit = LIMITS[row["case"]][row["phase"]]
        kept.append(ratio <= limit)
        what = f"{row['case']} {row['schedule']} r={row['chunks']}"
        lines.append(f"{row['phase']:>5} {row['comm_share']:5.1%}  {what:<28} {ratio:.3f} of its bound (limit {limit})")
    return [*lines, f"{sum(kept)} of {len(kept)} rows within the limit; {len(rows)} rows in all"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/limit", help="folder for limit.jsonl and one folder per share")
    parser.add_argument("--shares", default=",".join(map(str, SIZES)), help="some of them (default: %(default)s)")
    known, rest = parse(parser, argv)
    try:
        sizes = {share: SIZES[float(share)] for share in known.shares.split(",")}
    except (ValueError, KeyError):
        parser.error(f"--shares = {known.shares!r}: expected some of {', '.join(map(str, SIZES))}")
    settings = {
        share: ("--comm-share", share, "--tokens", str(tokens), "--ffn", str(ffn), *SETTING)
        for share, (tokens, ffn) in sizes.items()
    }
    return sweep(settings, rest, Path(known.out) / "limit.jsonl", summary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
