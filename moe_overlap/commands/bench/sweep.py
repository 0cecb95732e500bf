"""One table from several runs of `moe-overlap bench layer`, each with options of its own. For the benchmark scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.bench.layer import main as bench_layer
from moe_overlap.measure.report import read_jsonl, write_jsonl

Row = dict[str, Any]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and those that go to every run: what it does not know, and what stands after `--`."""
    return parser.parse_known_args([word for word in argv if word != "--"])


def sweep(
    settings: Mapping[str, Sequence[str]],
    rest: Sequence[str],
    file: Path,
    summary: Callable[[Sequence[Row]], Sequence[str]],
) -> int:
    """Run each of `settings` (name -> options) with the options `rest`, in a folder of its name beside `file`; write
    the rows of all to `file` and print their summary. The first exit status that is not zero ends it."""
    rows: list[Row] = []
    for name, options in settings.items():
        folder = file.parent / name
        status = bench_layer([*options, *rest, "--out", str(folder)])
        if status:
            print(f"{file.name} was not written: the run of {name} ended with {status}", file=sys.stderr)
            return status
        rows += read_jsonl(folder / "results.jsonl")
    write_jsonl(file, rows)
    print(*summary(rows), f"wrote {file}", sep="\n")
    return 0
