"""What share of a step the agreement takes, from the timelines of a run of `moe-overlap bench layer`.

    moe-overlap bench layer --ranks 8 --compute slept --link 10gbit:2ms --cases top2 --out OUT
    python benchmarks/agreement_share.py OUT [--out FILE.jsonl]

A row for every schedule and phase: `n_ms_least`, `n_ms_median` of the ranks' times in N, and their shares of the step.
In N a rank waits for whoever comes last, however long that one computes; the rank that waited least came last itself,
so its time is that of the messages alone. Each timeline is of one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

WIRE = 1  # the lane, as a thread of the trace


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One for each schedule and phase of the run in `folder`."""
    settings = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    waits: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    for pid, name in names.items():
        timed = [event for event in events if event["pid"] == pid and event["ph"] == "X"]
        ends = [event["ts"] + event["dur"] for event in timed]
        row = name.rpartition(" rank ")[0]
        steps[row].append((max(ends) - min(event["ts"] for event in timed)) / 1e3)
        on_wire = [event["dur"] for event in timed if event["name"] == "N" and event["tid"] == WIRE]
        waits[row].append(sum(on_wire) / 1e3)
    kept = ("ranks", "tokens", "hidden", "ffn", "experts", "top_k", "dtype", "compute", "link", "meta_bytes",
            "hardware", "torch", "commit", "date")  # fmt: skip
    found = []
    for row, of_ranks in waits.items():
        step_ms, least_ms, median_ms = max(steps[row]), min(of_ranks), statistics.median(of_ranks)
        found.append({
            "row": row, "step_ms": round(step_ms, 3), "n_ms_least": round(least_ms, 3),
            "n_ms_median": round(median_ms, 3), "share_least": round(least_ms / step_ms, 4),
            "share_median": round(median_ms / step_ms, 4), **{name: settings[name] for name in kept},
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="OUT of the bench")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    options = parser.parse_args()
    for row in rows_of(options.folder):
        line = json.dumps(row)
        print(line)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
