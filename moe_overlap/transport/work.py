"""The work of an exchange that was over when it began."""

from __future__ import annotations

import torch


class DoneWork:
    """An exchange that is over. `interval`: when the bytes were under way, if there were any."""

    def __init__(self, rows: torch.Tensor, interval: tuple[float, float] | None = None) -> None:
        self._rows = rows
        self._interval = interval

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        return self._rows

    def done(self) -> bool:
        return True

    def interval(self) -> tuple[float, float] | None:
        return self._interval
