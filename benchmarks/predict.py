"""Predicted against measured, over links, shapes and phases: is the planner right, and does its choice win?

    python benchmarks/predict.py --out out/predict [--setting N] [-- --tokens 512 ...]
    python benchmarks/predict.py --out out/predict-dedup -- --dedup on --experts 32 --top-k 8

Runs `moe-overlap bench layer --schedules ...,auto` for every setting below (options after `--` go to each run) and
gathers the rows in OUT/predict.jsonl; with --setting N for that one alone, numbered from 0. `predicted_ms` of every row
was computed before the row was timed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.bench.sweep import parse, sweep

SCHEDULES = "serial,chunked,shared_expert,shortcut,auto"
SETTINGS = tuple(
    ["--link", f"{rate}:50us", "--tokens", tokens, "--ffn", ffn]
    for rate, tokens, ffn in (
        ("60mbit", "512", "2048"),
        ("120mbit", "512", "2048"),
        ("80mbit", "512", "4096"),
        ("200mbit", "1024", "2048"),
    )
)
CLOSE, BEST = 0.10, 0.05


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows say, without and with those whose machine changed its speed after the calibration."""
    known = [row for row in rows if row["predicted_ms"] is not None]
    clean = [row for row in known if row["flagged"] is None]
    drifted = [row for row in known if row["flagged"] in (None, "drifted")]
    return [
        *figures(f"{len(clean)} unflagged rows of {len(rows)}", clean),
        *figures(f"with those flagged drifted, {len(drifted)} rows", drifted),
    ]


def figures(what: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many predictions lie within 10 %, and the planner's rows against the best of their group."""
    errors = [abs(row["predicted_ms"] / row["time_ms_median"] - 1) for row in rows]
    near = sum(error <= CLOSE for error in errors)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in ("case", "phase", "link", "tokens", "ffn"))].append(row)
    won = all_auto = 0
    for group in groups.values():
        best = min(group, key=lambda row: row["time_ms_median"])
        for row in (row for row in group if row["schedule"] == "auto"):
            all_auto += 1
            within = row["time_ms_median"] <= (1 + BEST) * best["time_ms_median"]
            won += within or row["time_ms_p10"] <= best["time_ms_p90"]
    return [
        f"{what}; predicted within {CLOSE:.0%} of the measured median: {near} of {len(rows)} "
        f"({near / max(1, len(rows)):.0%}), largest error {max(errors, default=0.0):.1%}",
        f"  auto within {BEST:.0%} of the best of its case, or not to be told from it: {won} of {all_auto}",
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/predict", help="folder for predict.jsonl and one folder per setting")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="run this one alone")
    known, rest = parse(parser, argv)
    chosen = range(len(SETTINGS)) if known.setting is None else [known.setting]
    settings = {str(number): ("--schedules", SCHEDULES, *SETTINGS[number]) for number in chosen}
    return sweep(settings, rest, Path(known.out) / "predict.jsonl", summary)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
