"""What time it is on the compute lane: the host's time on a CPU, the stream's on a CUDA device.

On CUDA the host only launches: a clock of the host would time launches. There a stamp is an event on the current
stream, which costs a microsecond or two, and reading one waits for the stream; so steps on CUDA are timed inside
`record()` only.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.recorder import recording


class Clock(Protocol):
    """`now()` gives a stamp; `seconds(stamp)` its time on the scale of time.perf_counter, once it has passed."""

    def now(self) -> Any: ...
    def seconds(self, stamp: Any) -> float: ...


class HostClock:
    """Stamps are seconds of time.perf_counter, which processes of a machine share."""

    now = staticmethod(time.perf_counter)

    def seconds(self, stamp: float) -> float:
        return stamp


class StreamClock:
    """Stamps are events on the current stream of `device`. Making a clock waits until that is empty, to tie the two
    scales."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self.now()
        self._base.synchronize()
        self._base_s = time.perf_counter()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, stamp: Any) -> float:
        """Waits until the stream has passed the stamp."""
        stamp.synchronize()
        return self._base_s + float(self._base.elapsed_time(stamp)) * 1e-3


def clock_for(device: torch.device) -> Clock | None:
    """The clock of a step whose rows are on `device`; None where it is not to be timed. Raises ConfigError for a step
    that is to be timed while it is captured in a CUDA graph."""
    if device.type != "cuda":
        return HostClock()
    if recording() is None:
        return None
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError("record", "a step in a CUDA graph", "a step that runs: events in a graph have no times")
    return StreamClock(device)
