"""The operation that a wait or an error is about."""

from __future__ import annotations

from typing import NamedTuple


class Where(NamedTuple):
    """Part of what an error says. A tuple because one is made for every exchange, and few are ever read."""

    action: str
    step: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        chunk = "" if self.chunk is None else f" (chunk {self.chunk})"
        return f"{self.action}{step}{chunk}"
