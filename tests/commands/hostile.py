"""Bad values for every option of every command, found by asking the parsers: for a test, and for a longer soak."""

from __future__ import annotations

import argparse
import importlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from moe_overlap.commands import cli
from moe_overlap.commands.parser import OneLineParser

PLAN = {"sweep": lambda _: None, "_map": lambda *_: [], "write_png": lambda *_: None, "_record": lambda *_: {}}
# Command line -> the module whose functions do the heavy work, and what stands for them.
COMMANDS: dict[tuple[str, ...], tuple[str, dict[str, object]]] = {
    ("info",): ("moe_overlap.commands.info", {"lines": lambda **_: []}),
    ("kernels",): ("moe_overlap.commands.kernels", {}),
    ("plan",): ("moe_overlap.commands.plan.command", PLAN),
    ("place",): ("moe_overlap.commands.place", {"write_png": lambda *_: None, "saying": lambda _: nullcontext()}),
    ("train",): ("moe_overlap.commands.train.command", {"run": lambda *_, **__: 0}),
    ("verify",): ("moe_overlap.commands.verify", {"check": lambda *_, **__: None, "_tell": lambda *_: 0}),
    ("calibrate",): ("moe_overlap.commands.calibrate", {"run": lambda *_, **__: 0}),
    ("bench", "layer"): ("moe_overlap.commands.bench.layer", {"run": lambda *_, **__: 0}),
    ("bench", "overlap"): (
        "moe_overlap.commands.bench.overlap",
        {"run": lambda *_, **__: 0, "torchrun": lambda *_, **__: 0, "unavailable": lambda: None},
    ),
    ("bench", "ops"): ("moe_overlap.commands.bench.ops", {"run": lambda *_, **__: 0}),
    ("bench", "balance"): ("moe_overlap.commands.bench.balance", {"run": lambda *_, **__: 0}),
}  # fmt: skip
SMALL = {
    ("train",): "--batch 2 --seq 8 --layers 2 --hidden 32 --ffn 48 --experts 4 --vocab 257 --threads 1".split(),
    ("plan",): "--ranks 4 --experts 4".split(),
}


@dataclass(frozen=True)
class Case:
    """A command line: its command, and the options that are bad in it."""

    command: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


def values(folder: Path) -> dict[str, list[str]]:
    """Ten kinds of bad values. Files and special files of these kinds lie in `folder`."""
    fifo, file, link, deep = folder / "fifo", folder / "file", folder / "loop", folder / "deep"
    special = [fifo, folder / "folder", link, deep, "/proc/self/mem", "/proc/self/environ"]
    if not fifo.exists():
        os.mkfifo(fifo)
        file.write_text("no folder, no model, no text\n")
        link.symlink_to(link)
        deep.write_text("[" * 100_000)
        (folder / "folder").mkdir()
    return {
        "empty": ["", " ", "\t", "\n"],
        "no number": ["nan", "-nan", "inf", "-inf", "1e400", "0x10", "ten", "1,5", "--", "-"],
        "negative": ["-1", "-0.5", "-1us", "-9" * 9, "-0"],
        "zero": ["0", "0.0", "1e-320", "0us", "0gbit", "0" * 4000],
        "huge": [str(10**9), str(10**9 + 1), str(2**63), str(2**64), str(10**20), "1e30", "1e308", "9" * 5000],
        "long": ["x" * 5000, "a/" * 3000, ",".join("ab" * 500), "[" * 3000, "\N{SNOWMAN}" * 400],
        "odd characters": ["a\nb", "a\0b", "\udcff", "\x1b[31m", "\N{FULLWIDTH DIGIT ONE}", "a\rb"],
        "other unit": ["1.5", "1e3", "1_000", "10parsec", "400mbit:50", "1gbit:", ":1us", "1ms,1ms", "true", "None"],
        "special file": [str(path) for path in special],
        "no path": [str(file / "below"), str(folder / "missing" / "file"), str(file), "/proc/no/such", "." * 300],
    }  # fmt: skip


def options_of(command: tuple[str, ...]) -> list[argparse.Action]:
    """The options of a command, as its parser has them."""
    seen: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        seen.append(parser)
        raise SystemExit(0)

    with mock.patch.object(OneLineParser, "parse_args", stop):
        try:
            cli.main([*command])
        except SystemExit:
            pass
    return [action for action in seen[-1]._actions if action.option_strings and action.dest != "help"]


def cases(folder: Path) -> Iterator[Case]:
    """Every option of every command with every value."""
    for command in COMMANDS:
        for action in options_of(command):
            for bad in values(folder).values():
                for value in bad:
                    yield Case(command, ((action.option_strings[-1], value),))


def pairs(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """`count` times two bad options, drawn."""
    draw = random.Random(seed)
    found = [value for bad in values(folder).values() for value in bad]
    options = {command: options_of(command) for command in COMMANDS}
    for _ in range(count):
        command = draw.choice([command for command in COMMANDS if len(options[command]) > 1])
        two = draw.sample(options[command], 2)
        yield Case(command, tuple((action.option_strings[-1], draw.choice(found)) for action in two))


@contextmanager
def without_work(command: tuple[str, ...]) -> Iterator[None]:
    """Nothing is measured, trained or drawn."""
    module, stand_ins = COMMANDS[command]
    with mock.patch.multiple(importlib.import_module(module), **stand_ins) if stand_ins else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def words_of(case: Case, folder: Path) -> list[str]:
    """The command line of a case; what it may write goes into `folder`, and a small text is there for it."""
    words = [*case.command, *SMALL.get(case.command, [])]
    text = folder / "text.txt"
    if case.command == ("train",):
        if not text.exists():
            text.write_text("".join(f"{n} words of a text, " for n in range(400)))
        words += ["--text", str(text)]
    if case.command == ("place",) and not {"--trace", "--routing"} & set(dict(case.bad)):
        (folder / "trace.jsonl").write_text("[9, 5, 3, 1]\n[8, 6, 2, 2]\n")
        words += ["--trace", str(folder / "trace.jsonl")]
    if case.command not in (("info",), ("kernels",), ("verify",)) and "--out" not in dict(case.bad):
        words += ["--out", str(folder / ("model.json" if case.command == ("calibrate",) else "out"))]
    return [*words, *(f"{option}={value}" for option, value in case.bad)]


def run(case: Case, folder: Path) -> int:
    """Exit status of the command, in this process. Other exceptions are those of the command."""
    with without_work(case.command):
        try:
            return cli.main(words_of(case, folder))
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
