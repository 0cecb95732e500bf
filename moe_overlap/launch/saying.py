"""What a user is told in one line, by a command or by one of its ranks."""

from __future__ import annotations

import io
import re
import sys

from moe_overlap.errors import ConfigError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells say it: 128 + SIGINT
LONGEST_LINE = 1000
_NO_MEMORY = re.compile(r"allocate memory|not enough memory|size calculation overflowed|numel: integer")


def print_anything() -> None:
    """From here on stdout writes out what its encoding does not have, such as the odd bytes of a file's name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """`text` without line breaks and what a terminal would obey, and not endless."""
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}... ({len(line)} characters)"


def complaint(error: BaseException) -> str | None:
    """What to say of an error that the user or the machine made; None for one of ours, which needs a traceback."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{reason}: {error.filename}" if error.filename else reason
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return f"not enough memory: {str(error).partition(chr(10))[0] or 'an allocation failed'}"
    return None
