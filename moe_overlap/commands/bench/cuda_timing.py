"""How long something takes on a CUDA device: by events on its stream, the contenders in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def no_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is a build without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device found"


@dataclass(frozen=True)
class Time:
    """Seconds of one call: median, and the 10th and 90th percentile over the repeats."""

    median_s: float
    p10_s: float
    p90_s: float

    @staticmethod
    def of(samples_s: Sequence[float]) -> Time:
        ordered = sorted(samples_s)
        place = [round(share * (len(ordered) - 1)) for share in (0.1, 0.9)]
        return Time(statistics.median(ordered), ordered[place[0]], ordered[place[1]])


Phases = tuple[Callable[[], tuple[Any, Any]], Callable[[Any], Any]]
"""forward() -> (result, what backward needs); backward(that)."""

_LEAD_CYCLES = 2_000_000


def two_phases(contenders: Mapping[Key, Phases], *, repeats: int = 10) -> dict[Key, tuple[Time, Time]]:
    """The times of forward and of the backward that follows it, of each contender in turns with the others.

    Without graphs, as not everything can be captured: the GPU is held for about a millisecond first, so that the host
    is ahead of it by as much, and no launch of short work is timed.
    """
    samples: dict[Key, tuple[list[float], list[float]]] = {key: ([], []) for key in contenders}
    for repeat in range(repeats + 2):
        for key, (forward, backward) in contenders.items():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda._sleep(_LEAD_CYCLES)
            marks[0].record()
            result, saved = forward()
            marks[1].record()
            gradients = backward(saved)
            marks[2].record()
            marks[2].synchronize()
            del result, saved, gradients
            if repeat >= 2:
                for phase in range(2):
                    samples[key][phase].append(marks[phase].elapsed_time(marks[phase + 1]) * 1e-3)
    return {key: (Time.of(first), Time.of(second)) for key, (first, second) in samples.items()}


def once(call: Callable[[], Any], *, repeats: int = 10) -> Time:
    """The time of a call that is long enough to be timed by itself."""
    call()
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3)
    return Time.of(samples)


def host_s(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Seconds until a call is back on the host, while the GPU has other work: what it costs to say what is to be done,
    or to wait for the GPU where it does."""
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin_s)
    torch.cuda.synchronize()
    return statistics.median(samples)
