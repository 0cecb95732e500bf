"""How the GPU benchmarks measure: CUDA graphs, input sets that do not fit into the cache, medians; JSON lines. What
`moe-overlap bench layer --link staged` needs of it is in moe_overlap/commands/bench/cuda_timing.py."""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_overlap.commands.bench.cuda_timing import Phases, Time, host_s, once, two_phases  # noqa: E402

__all__ = ["CACHE_BYTES", "HOLD_CYCLES", "Phases", "Results", "Time", "broken", "copy_bytes_per_s", "graph_of",
           "host_profile", "host_s", "interleaved", "kernel_times", "once", "options", "peak_bytes", "rounds_needed",
           "sets_needed", "two_phases"]  # fmt: skip

CACHE_BYTES = 64 << 20
"""More than the L2 cache of the chips in question (60 MB on the H200)."""


HOLD_CYCLES = 200_000
"""Some 0.1 ms: longer than a graph needs from the host to the GPU."""


def sets_needed(bytes_moved: int) -> int:
    """How many copies of the inputs, used in turn, keep a call from finding its data in the cache."""
    return min(64, -(-4 * CACHE_BYTES // max(1, bytes_moved)))


def rounds_needed(sets: int, bytes_moved: int) -> int:
    """How many times the input sets are gone through in one timing: until some milliseconds have passed, so that the
    begin of a graph is no part of the result."""
    calls = min(200, max(20, -(-(4 << 30) // max(1, bytes_moved))))
    return -(-calls // sets)


def graph_of(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, as a graph: launches cost next to nothing in a replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what is set up at a first call stays out of the graph
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleaved(contenders: dict[str, Sequence[Callable[[], Any]]], *, repeats: int = 30) -> dict[str, Time]:
    """The time of one call of each contender: graphs of all its calls, replayed in turns with the others'."""
    graphs = {name: graph_of(calls) for name, calls in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 3):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOLD_CYCLES)  # the graph is on the GPU before the clock starts
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                samples[name].append(begin.elapsed_time(end) * 1e-3 / len(contenders[name]))
    return {name: Time.of(values) for name, values in samples.items()}


def kernel_times(call: Callable[[], Any], *, repeats: int = 5) -> dict[str, list[float]]:
    """kernel -> [launches in a call, microseconds of all of them]; the longest first. By torch's profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for one in profile.key_averages():
        if one.self_device_time_total > 0:  # long names of one template count as one kernel
            entry = found.setdefault(one.key[:80], [0.0, 0.0])
            entry[0] += one.count / repeats
            entry[1] += one.self_device_time_total / repeats
    rows = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: [round(count, 1), round(us, 1)] for name, (count, us) in rows}


def host_profile(call: Callable[[], Any], *, repeats: int = 20, most: int = 30) -> dict[str, list[float]]:
    """function -> [calls, microseconds in itself, with what it calls] a call of `call`, the longest first."""
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(repeats):
        call()
    profile.disable()
    torch.cuda.synchronize()
    rows = sorted(pstats.Stats(profile).stats.items(), key=lambda item: -item[1][2])[:most]  # type: ignore[attr-defined]
    return {
        f"{Path(file).name}:{line} {name}"[:70]: [round(n / repeats, 1), *(round(s / repeats * 1e6, 1) for s in times)]
        for (file, line, name), (_, n, *times, _) in rows
    }


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """(result of the call, how much more memory than before it held at most)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def broken() -> bool:
    """Whether a CUDA error stays in this process, which then can measure nothing more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def copy_bytes_per_s(size_bytes: int = 4 << 30) -> float:
    """What a large copy on the device reads and writes in a second."""
    source = torch.randint(-128, 127, (size_bytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size_bytes / once(lambda: target.copy_(source)).median_s


class Results:
    """Rows on the terminal and, where a file is given, at its end."""

    def __init__(self, file: Path | None) -> None:
        from benchmarks.gpu_process import about

        self.file = file
        self.about = about()

    def row(self, **values: object) -> None:
        line = json.dumps(self.about | {"time": datetime.datetime.now().strftime("%H:%M:%S")} | values)
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def options(description: str, argv: Sequence[str] | None, **more: float | str | bool) -> argparse.Namespace:
    """The options that every GPU benchmark has, and its own: name=default, where False makes a flag."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in more.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--out", type=Path, help="append the rows to this file too")
    parser.add_argument("--most-s", type=float, default=180.0, help="begin nothing new after this many seconds")
    found = parser.parse_args(argv)
    found.end_s = time.monotonic() + found.most_s
    return found
