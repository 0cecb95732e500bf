"""`moe-overlap verify`: is a Mixture-of-Experts module on n ranks what it is on one? Ours, or yours by an adapter.

Exit status: 0 nothing found, 1 findings, 2 it could not run or bad input.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moe_overlap import config
from moe_overlap.commands.parser import (
    LIMITS_S,
    OneLineParser,
    TypedDefaults,
    check_count,
    check_number,
    check_output,
    check_timeout,
)
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import MOST_RANKS, join_torchrun, torchrun_world_size
from moe_overlap.measure.files import write_atomically
from moe_overlap.verify.adapter import Adapter
from moe_overlap.verify.report import Report
from moe_overlap.verify.run import LIMIT_S, PROGRAM, TIMEOUT_S, check, run

ADAPTERS = {
    "ours": ("moe_overlap.verify.adapters.ours", "Ours"),
    "ours-dedup": ("moe_overlap.verify.adapters.ours", "OursDeduplicated"),
    "ours-ddp": ("moe_overlap.verify.adapters.ours", "OursInDDP"),
    "plain": ("moe_overlap.verify.adapters.plain", "PlainAdapter"),
    "transformers": ("moe_overlap.verify.adapters.transformers", "Qwen3MoE"),
    "transformers-tp": ("moe_overlap.verify.adapters.transformers", "Qwen3MoESharedBatch"),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
EXPECTED = f"one of {', '.join(ADAPTERS)}, or package.module:Class, a subclass of moe_overlap.verify.Adapter"
EXAMPLES = """examples:
  moe-overlap verify
  moe-overlap verify mine:Mine --ranks 3 --json report.json
  torchrun --nproc-per-node 2 -m moe_overlap verify mine:Mine"""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """See HELP."""

    adapter: str
    ranks: int
    dtype: str
    json: str
    all: bool
    timeout_s: float
    limit_s: float

    def __post_init__(self) -> None:
        check_count("ranks", self.ranks, most=MOST_RANKS)
        check_timeout(self.timeout_s)
        check_number("limit_s", self.limit_s, *LIMITS_S, unit=" seconds")


def parse(argv: Sequence[str]) -> VerifyOptions:
    """Options from the command line; ConfigError for a value out of range."""
    parser = OneLineParser(prog=PROGRAM, description="Compare a MoE module on n ranks with itself on one rank.",
                           formatter_class=TypedDefaults, epilog=EXAMPLES)  # fmt: skip
    parser.add_argument("adapter", nargs="?", default="ours", help=EXPECTED)
    parser.add_argument("--ranks", type=int, default=2, help="processes to spawn (under torchrun: its world size)")
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="of all values; float64 is the sharpest")
    parser.add_argument("--json", default="", help="file for the report")
    parser.add_argument("--all", action="store_true", help="tell findings that may follow from others, too")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="longest wait for another rank, seconds")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="after this a rank shows its stack and ends")
    return VerifyOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Run the kit and print its report; the exit status. ConfigError for bad input."""
    options = parse(argv)
    if options.json and not config.torchrun("RANK"):  # rank 0 alone writes
        check_output("--json", options.json)
    factory = adapter_named(options.adapter)
    dtype = DTYPES[options.dtype]
    if torchrun_world_size() is None:
        report = check(factory, options.ranks, dtype=dtype, timeout_s=options.timeout_s, limit_s=options.limit_s)
        return _tell(report, options)
    world = join_torchrun(options.limit_s)
    try:
        report = run(factory, dtype=dtype, timeout_s=options.timeout_s)
    finally:
        dist.destroy_process_group()
    return _tell(report, options) if world.rank == 0 else report.exit_code


def adapter_named(name: str) -> type[Adapter]:
    """The adapter's class. Modules are looked for in the working directory too, as `python -m` does.

    Raises ConfigError where there is none of that name.
    """
    module, _, found = name.partition(":")
    if not found and name not in ADAPTERS:
        raise ConfigError("adapter", name, EXPECTED)
    module, found = ADAPTERS.get(name, (module, found))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        adapter = getattr(importlib.import_module(module), found, None)
    except (ModuleNotFoundError, ValueError, TypeError) as error:  # the last two: no name, or a relative one
        raise ConfigError("adapter", name, f"a module that can be imported ({error})") from None
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise ConfigError("adapter", name, EXPECTED)
    return adapter


def _tell(report: Report, options: VerifyOptions) -> int:
    if options.json:
        write_atomically(Path(options.json), (report.to_json() + "\n").encode())
    print("\n".join(report.lines(every=options.all)))
    return report.exit_code
