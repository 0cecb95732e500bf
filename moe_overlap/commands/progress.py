"""What a command says while it is at something long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAY_EVERY_S = 5.0


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Every SAY_EVERY_S seconds until the block ends, one line on stderr: what is done, and since when."""
    over, begin_s = threading.Event(), time.monotonic()

    def say() -> None:
        while not over.wait(SAY_EVERY_S):
            print(f"{what}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, name="moe_overlap progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
