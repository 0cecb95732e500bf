"""The command `moe-overlap`: `info`, `kernels`, `plan`, `place`, `train`, `calibrate`, `verify` and `bench`.

Exit status: 0 done, 1 a correctness check or a rank failed, 2 bad input, said in one line that names the option, the
value and what was expected, or a file or memory that could not be had, 130 interrupted, 141 (without a word) nobody
reads on, as behind `head`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from moe_overlap import config
from moe_overlap.commands.parser import OneLineParser
from moe_overlap.launch.saying import EXIT_BAD_INPUT, EXIT_INTERRUPTED, complaint, one_line, print_anything
from moe_overlap.native.build_info import VERSION

COMMANDS = {
    "info": ("moe_overlap.commands.info", "versions, what is compiled, the chosen implementations and why"),
    "kernels": ("moe_overlap.commands.kernels", "registers, spills, shared memory and occupancy of the CUDA kernels"),
    "plan": ("moe_overlap.commands.plan", "predict from numbers alone which schedule wins on a cluster"),
    "place": ("moe_overlap.commands.place", "what planners of expert placement would make of a trace of loads"),
    "train": ("moe_overlap.commands.train", "train a small MoE language model on real text, overlap on or off"),
    "calibrate": ("moe_overlap.commands.calibrate", 'measure the cost model of a layer, for schedule="auto"'),
    "verify": ("moe_overlap.commands.verify", "compare a MoE module on n ranks with itself on one, ours or yours"),
    "bench": ("moe_overlap.commands.bench", "measure schedules against each other: moe-overlap bench layer"),
}

EXIT_NO_READER = 128 + 13  # as of a program that a closed pipe ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. argv: without the program's name; None: sys.argv."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _parser().parse_args(words)
        _parser().print_help()
        return EXIT_BAD_INPUT
    command, rest = words[0], words[1:]
    said = " ".join(words[:2]) if command == "bench" else command  # the name in what is said
    print_anything()
    try:
        if command != "info":  # which says what is wrong
            config.check_environment()
        module = importlib.import_module(COMMANDS[command][0])
        status: int | None = module.main(rest)
        sys.stdout.flush()  # here, where it is said that it cannot be
    except KeyboardInterrupt:
        if not config.torchrun("RANK"):  # one line, however many ranks torchrun has interrupted
            print(f"moe-overlap {said}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "moe_overlap":
            raise
        return _complain(said, f"needs the package {error.name}: pip install 'moe-overlap[cli]'")
    except BrokenPipeError:
        _drop_output()
        return EXIT_NO_READER
    except Exception as error:
        text = complaint(error)
        if text is None:
            raise
        if isinstance(error, OSError):
            _drop_output()
        return _complain(said, text)
    return status or 0


def _parser() -> argparse.ArgumentParser:
    """Only for help, --version and errors: a command parses its own options."""
    parser = OneLineParser(prog="moe-overlap", description="Mixture-of-Experts layers with overlapped All-to-Alls.")
    parser.add_argument("--version", action="version", version=f"moe-overlap {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="{" + ",".join(COMMANDS) + "}")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _complain(command: str, text: str) -> int:
    print(f"moe-overlap {command}: error: {one_line(text)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _drop_output() -> None:
    """What stdout could not take, as a full disk or a closed pipe, is not tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
