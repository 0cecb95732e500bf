"""Which kernels are right on the GPU at hand: the tests of tests/gpu, each kernel's in a process of its own.

A process has the tests of one (operator, implementation, dtype), and a limit: a crash, a CUDA error that stays or a
kernel that never ends costs these tests alone. A kernel is right when tests that cover it passed and none failed,
crashed or was cut off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Kernel = tuple[str, str, str]
"""(operator, implementation, dtype)"""
Command = Callable[..., Any]
"""gpu_process.Run.command: (*words, most_s=, ...) -> Done"""

PROCESSES = 10
"""At a time, on one GPU: compiling, importing and the references take most of the time."""


@dataclass(frozen=True)
class Case:
    """One test: its pytest id, and the kernels it covers."""

    id: str
    covers: tuple[Kernel, ...]

    @property
    def function(self) -> str:
        return self.id.partition("[")[0]

    @property
    def file(self) -> str:
        return self.id.partition("::")[0]

    @property
    def process(self) -> str:
        """Tests of one process share this."""
        if not self.covers:
            return self.function
        _, implementation, dtype = self.covers[0]
        ops = "+".join(op for op, *_ in self.covers)
        return f"{ops} {implementation} {dtype}"


@dataclass(frozen=True)
class Outcome:
    """What became of a test: passed, failed, skipped, or its process ended before it: `lost` by a crash or by the limit
    of a process, `cut` where the part's own time was over, which says nothing about a kernel."""

    case: Case
    outcome: str
    text: str = ""


def collect(command: Command, folder: Path, paths: Sequence[str], most_s: float) -> tuple[list[Case], str]:
    """The tests there, and what pytest said where some of them cannot be imported ("": all can). Raises RuntimeError
    with what it said where there are none."""
    file = folder / "cases.json"
    done = command(sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *paths, f"--gpu-cases={file}",
                   most_s=most_s, quiet=True)  # fmt: skip
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not rows:
        raise RuntimeError(f"the tests cannot be collected: {done.text[-2000:]}")
    cases = [Case(row["id"], tuple(tuple(kernel) for kernel in row["covers"])) for row in rows]
    return cases, "" if done.status == 0 else done.text


def essential(cases: Iterable[Case]) -> list[Case]:
    """Of each test function the first and the last case for every set of kernels, where it covers any."""
    chosen: dict[tuple[str, tuple[Kernel, ...]], list[Case]] = {}
    for case in cases:
        if case.covers:
            kept = chosen.setdefault((case.function, case.covers), [])
            kept[1:] = [case]
    return [case for kept in chosen.values() for case in kept]


def unverified(cases: Iterable[Case]) -> list[Case]:
    """Those that cover a kernel which has not been found right here with these very sources."""
    import torch

    from moe_overlap.ops import verified

    here, sources = architecture(), current_sources()

    def known(kernel: Kernel) -> bool:
        op, implementation, dtype = kernel
        doubt = verified.doubt(op, implementation, architecture=here, dtype=getattr(torch, dtype),
                               sources=sources[implementation])  # fmt: skip
        return doubt is None

    return [case for case in cases if not all(map(known, case.covers))]


def architecture() -> str:
    """Of the card at hand, as in verified.json."""
    import torch

    from moe_overlap.ops import hardware

    return hardware.architecture(torch.device("cuda", 0))


def current_sources() -> dict[str, str]:
    """What a verification holds for, by implementation."""
    from moe_overlap.native import native
    from moe_overlap.ops import expert_mlp_grouped, triton_kernels

    return {
        "cuda": native.kernel_sources(),
        "triton": triton_kernels.sources(),
        "grouped_mm": expert_mlp_grouped.sources(),
    }


def run(command: Command, folder: Path, cases: Sequence[Case], *, most_s: float, each_s: float) -> list[Outcome]:
    """Run these tests, some processes at a time, each for `each_s` at most and all for `most_s`."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.process, []).append(case)
    end_s = time.monotonic() + most_s

    def one(place: int, group: list[Case]) -> list[Outcome]:
        left_s = min(each_s, end_s - time.monotonic())
        if left_s < 1:
            return [Outcome(case, "cut", "the time was over") for case in group]
        record = folder / f"tests-{place}.jsonl"
        record.unlink(missing_ok=True)
        done = command(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu",
                       f"--gpu-record={record}", *(case.id for case in group), most_s=left_s, quiet=True,
                       OMP_NUM_THREADS="2")  # fmt: skip
        return outcomes(group, record, done, cut=left_s < each_s)

    with ThreadPoolExecutor(PROCESSES) as pool:
        found = pool.map(one, range(len(groups)), groups.values())
        return [outcome for group in found for outcome in group]


def outcomes(group: Sequence[Case], record: Path, done: Any, *, cut: bool) -> list[Outcome]:
    """Of the tests of one process: what they wrote, and `lost` for those that wrote nothing; `cut` where the process
    ran past a limit that was less than its own."""
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.is_file() else []
    said: dict[str, dict[str, Any]] = {}
    for row in rows:
        if said.get(row["id"], {}).get("outcome") != "failed":  # after a call that failed its end may be well
            said[row["id"]] = row
    ended = "it ran past its limit" if done.status is None else f"its process ended with status {done.status}"
    lost = f"{ended}: {done.text[-1500:]}"
    silent = "cut" if cut and done.status is None else "lost"
    return [
        Outcome(case, said[case.id]["outcome"], said[case.id]["text"])
        if case.id in said
        else Outcome(case, silent, lost)
        for case in group
    ]


def verdicts(found: Iterable[Outcome]) -> dict[Kernel, str]:
    """kernel -> "right", or the first outcome of a test of it that was something else."""
    result: dict[Kernel, str] = {}
    for one in found:
        for kernel in one.case.covers:
            if one.outcome == "passed":
                result.setdefault(kernel, "right")
            elif one.outcome in ("failed", "lost") and result.get(kernel, "right") == "right":
                result[kernel] = f"{one.outcome}: {one.case.id}"
    return result


def wrong_pairs(found: Mapping[Kernel, str]) -> set[tuple[str, str]]:
    """(operator, implementation) of which some dtype is not right: not timed."""
    return {kernel[:2] for kernel, verdict in found.items() if verdict != "right"}


def verify(found: Mapping[Kernel, str], commit: str, date: str) -> int:
    """Write the kernels that are right into verified.json, take out those that are not; how many are right."""
    from moe_overlap.ops import verified

    here, sources = architecture(), current_sources()
    new = [
        verified.Record(op, implementation, here, dtype, sources[implementation], commit, date)
        for (op, implementation, dtype), verdict in found.items()
        if verdict == "right"
    ]
    kept = [
        record
        for record in verified.read()
        if record.architecture != here or (record.op, record.implementation, record.dtype) not in found
    ]
    verified.write([*kept, *new])
    return len(new)
