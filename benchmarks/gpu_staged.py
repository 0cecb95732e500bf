"""Overlap on one card over a real wire: every exchange goes to the host's memory and back (transport/staged.py).

    python benchmarks/gpu_staged.py [--out FILE] [--cases qwen3,mixtral] [--ways serial,chunked(4)] [--ranks 8]
                                    [--timeline FILE.png]

The part `staged` of `make gpu`: the rows of `moe-overlap bench layer --device cuda --link staged`, where they are
explained (moe_overlap/commands/bench/staged_rows.py), with the run's clock and its file of rows. A whole layer in
bfloat16, forward and backward, with the bytes that one of --ranks ranks with equal loads sends: (ranks - 1) / ranks of
its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_process, gpu_timing  # noqa: E402
from moe_overlap.commands.bench import staged_ways  # noqa: E402
from moe_overlap.commands.bench.staged_rows import measure_shapes  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    cases, ways = (",".join(words) for words in (staged_ways.CASES, staged_ways.WAYS))
    found = gpu_timing.options(__doc__.splitlines()[0], argv, cases=cases, ways=ways, ranks=8, timeline="")
    if reason := gpu_process.no_gpu():
        print(f"gpu_staged: not run: {reason}", file=sys.stderr)
        return 2
    measure_shapes(
        gpu_timing.Results(found.out).row,
        cases=found.cases.split(","),
        ways=found.ways.split(","),
        ranks=found.ranks,
        picture=Path(found.timeline) if found.timeline else None,
        end_s=found.end_s,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
