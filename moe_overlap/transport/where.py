"""The operation that a wait or an error is about."""

from __future__ import annotations

from typing import NamedTuple

# What actions are called where an error names them; those of a chunk keep their name in the schedule beside it.
SPOKEN = {"N": "agreement", "Ut": "start of backward", "R": "reduction over replicas"}
SPOKEN_CHUNKS = {"D": "dispatch", "C": "combine", "Dt": "gradient of dispatch", "Ct": "gradient of combine",
                 "M": "ids and weights", "Mt": "gradients of weights"}  # fmt: skip


class Where(NamedTuple):
    """Part of what an error says. A tuple because one is made for every exchange, and few are ever read."""

    action: str
    step: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        chunk = "" if self.chunk is None else f" (chunk {self.chunk})"
        spoken = SPOKEN_CHUNKS.get(self.action.rstrip("0123456789"))
        name = SPOKEN.get(self.action, self.action if spoken is None else f"{spoken} {self.action}")
        return f"{name}{step}{chunk}"
