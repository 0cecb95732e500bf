"""How long the planner's search takes over its default space.

    python benchmarks/planner_search.py

The default space: 1, 2, 4, 8 and 16 chunks by tokens and 2, 4 and 8 by experts, beside four backbone ops. Chunks are
equal or, as real routing makes them, all different (then their order is searched too); lanes slow each other down or do
not. Every repeat is a new window. "core" is the compiled search alone, "search" the whole call from Python, with the
schedules as text and sorted; "reference" the same without compiled parts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moe_overlap.measure.machine import hardware
from moe_overlap.measure.report import append_jsonl
from moe_overlap.native import native
from moe_overlap.planning.search import cut_arguments, search, search_reference
from moe_overlap.planning.window import Chunking, Slowdown, Window

CUTS = [*((chunks, "tokens") for chunks in (1, 2, 4, 8, 16)), *((chunks, "experts") for chunks in (2, 4, 8))]
NUM_OPS = 4


def window(chance: random.Random, *, equal: bool, slowdown: bool) -> Window:
    """A forward phase of about ten milliseconds."""
    exchange_s, experts_s = chance.uniform(1e-3, 5e-3), chance.uniform(1e-3, 5e-3)

    def cut(chunks: int, by: str) -> Chunking:
        sizes = [1.0 if equal else chance.uniform(0.5, 1.5) for _ in range(chunks)]
        there = tuple(20e-6 + exchange_s * size / chunks for size in sizes)
        experts = tuple(50e-6 + experts_s * size / chunks for size in sizes)
        return Chunking(chunks=chunks, by=by, first_s=there, experts_s=experts, second_s=there)  # type: ignore[arg-type]

    return Window(
        phase="forward",
        head_s=1e-4,
        tail_s=1e-4,
        ops_s=tuple(chance.uniform(1e-3, 3e-3) for _ in range(NUM_OPS)),
        issue_s=20e-6,
        slowdown=Slowdown(compute=1.1, wire=1.3) if slowdown else Slowdown(),
        chunkings=tuple(cut(*each) for each in CUTS),
    )


def core(problem: Window) -> None:
    """The compiled search of every cut."""
    planner = native.planner()
    assert planner is not None
    for chunking in problem.chunkings:
        planner.search(planner.Cut(*cut_arguments(problem, chunking)))


def timed_row(name: str, run: Callable[[Window], object], repeats: int, *, equal: bool, slowdown: bool) -> dict:
    chance = random.Random(1)
    seconds = []
    for _ in range(repeats):
        problem = window(chance, equal=equal, slowdown=slowdown)
        start_s = time.perf_counter()
        run(problem)
        seconds.append(time.perf_counter() - start_s)
    tenths = statistics.quantiles(seconds, n=10)
    return {
        "contender": name,
        "chunks_equal": equal,
        "slowdown": slowdown,
        "time_ms_median": 1e3 * statistics.median(seconds),
        "time_ms_p10": 1e3 * tenths[0],
        "time_ms_p90": 1e3 * tenths[-1],
        "cuts": len(CUTS),
        "ops": NUM_OPS,
        "repeats": repeats,
        "hardware": hardware(),
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    options = parser.parse_args()
    contenders: dict[str, Callable[[Window], object]] = {"search": search, "reference": search_reference}
    if native.planner() is not None:
        contenders = {"core": core, **contenders}
    rows = []
    for equal in (True, False):
        for slowdown in (False, True):
            for name, run in contenders.items():
                repeats = max(2, options.repeats // 10) if name == "reference" else options.repeats
                rows.append(timed_row(name, run, repeats, equal=equal, slowdown=slowdown))
    print(f"{'':10s} {'chunks':8s} {'slowdown':9s} {'median':>9s} {'p10':>9s} {'p90':>9s}")
    for row in rows:
        times = " ".join(f"{row[key]:7.2f}ms" for key in ("time_ms_median", "time_ms_p10", "time_ms_p90"))
        chunks = "equal" if row["chunks_equal"] else "unequal"
        print(f"{row['contender']:10s} {chunks:8s} {'yes' if row['slowdown'] else 'no':9s} {times}")
    if options.out is not None:
        append_jsonl(options.out, rows)


if __name__ == "__main__":
    main()
