"""What the options of every command share: a parser whose errors are one line, ranges of numbers, paths to write to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moe_overlap.errors import ConfigError
from moe_overlap.launch.saying import EXIT_BAD_INPUT, one_line
from moe_overlap.measure.files import check_writable

MOST = 10**9  # of anything that is counted
MOST_THREADS = 1024  # of a rank
LIMITS_S = (1.0, 86400.0)  # shortest and longest wait for another rank


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which makes an empty list of the value in `--option=--`."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, not '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


class TypedDefaults(argparse.RawDescriptionHelpFormatter):
    """Help with every default as one would type it; nothing where there is none, or the help says it already. Line
    breaks of the epilog, which has the examples, are kept."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if text is None or not action.option_strings or "default" in text or default in (None, "", argparse.SUPPRESS):
            return text
        if isinstance(default, bool):
            return text
        typed = ",".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
        return f"{text} (default: {typed.replace('%', '%%')})"


def flag_of(name: str) -> str:
    """The option of a field: `top_k` is --top-k."""
    return "--" + name.replace("_", "-")


def check_count(name: str, value: int, *, least: int = 1, most: int = MOST) -> None:
    """Refuse an integer outside a range; `name` is the field's."""
    if not least <= value <= most:
        raise ConfigError(flag_of(name), value, f"an integer from {least} to {most}")


def check_number(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    """Refuse a number outside a range, and NaN."""
    if not least <= value <= most:
        raise ConfigError(flag_of(name), value, f"a number from {least:g} to {most:g}{unit}")


def check_timeout(value: float) -> None:
    """Refuse a limit that no wait can have."""
    check_number("timeout_s", value, *LIMITS_S, unit=" seconds")


def check_output(flag: str, path: str | Path) -> None:
    """Refuse, before the work, a file that cannot be written or that is no regular one; leaves only its folder."""
    try:
        if not str(path):
            raise ValueError("no name")
        check_writable(Path(path))
    except OSError as error:
        raise ConfigError(flag, str(path), f"a file that can be written ({error.strerror})") from None
    except ValueError as error:  # a zero byte
        raise ConfigError(flag, str(path), f"a file that can be written ({error})") from None


def check_folder(flag: str, folder: str, files: Iterable[str]) -> Path:
    """The folder, made, where all of `files` can be written; else refused as by `check_output`."""
    if not folder:
        raise ConfigError(flag, folder, "the name of a folder")
    for name in files:
        try:
            check_output(flag, Path(folder) / name)
        except ConfigError as error:
            raise ConfigError(flag, error.value if Path(folder).is_dir() else folder, error.expected) from None
    return Path(folder)


def fresh_folder(flag: str, folder: str, files: Sequence[str]) -> Path:
    """`check_folder`, with `files` gone: rows of an earlier run are not to be taken for those of one that broke off."""
    found = check_folder(flag, folder, files)
    for name in files:
        (found / name).unlink(missing_ok=True)
    return found
