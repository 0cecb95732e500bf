"""The CUDA kernels against the limits of the chip and against torch, in one process.

    python benchmarks/gpu_kernels.py [--out FILE] [--contenders cuda,eager,triton,compile]

Each row: operator, shape, implementation (cuda: our kernel; eager: our reference, pure PyTorch; compile: the reference
under torch.compile; triton: where there is one), microseconds, bytes that have to be moved (each input read once, each
output written once), and the share of the copy bandwidth measured at the start of the same run. Inputs are rotated so
that nothing is found in the cache. Targets are those of the project; `met` compares.
After a CUDA error nothing more can be measured in a process: it ends with status 3, and --begin with the number in the
file --mark, which names the case at hand, goes on behind it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_timing  # noqa: E402
from moe_overlap.errors import ConfigError  # noqa: E402
from moe_overlap.ops import cuda_kernels, registry  # noqa: E402

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
Inputs = tuple[Any, ...]
REGISTRY_NAMES = {"eager": "reference", "compile": "reference"}
# Operator -> the function of the implementation that is measured.
Functions = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """One shape. ops: the operators; make(seed): arguments; run(functions, *arguments): the call that is timed;
    moved_bytes: what has to move; most_us or least_share (of the copy bandwidth): the target, if there is one."""

    name: str
    ops: tuple[str, ...]
    make: Callable[[int], Inputs]
    run: Callable[..., Any]
    moved_bytes: int
    most_us: float | None = None
    least_share: float | None = None


def single(op: str) -> Callable[..., Any]:
    """A call of one operator."""
    return lambda functions, *arguments: functions(op)(*arguments)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=F32, generator=generator(seed)).to(dtype)


def routing(tokens: int, k: int, experts: int, seed: int) -> torch.Tensor:
    """ids [tokens, k], distinct in a row."""
    scores = torch.rand(tokens, experts, device="cuda", generator=generator(seed))
    return scores.topk(k, dim=1).indices.to(I32)


def gate(tokens: int, experts: int, k: int, most_us: float) -> Case:
    def make(seed: int) -> Inputs:
        return (normal(tokens, experts, seed=seed, dtype=F32), None, k, 1, 1, "softmax", True, 1.0)

    moved = 4 * tokens * experts + 8 * tokens * k
    return Case(f"gate {tokens}x{experts} k{k}", ("gate_topk",), make, single("gate_topk"), moved, most_us=most_us)


def row_map(tokens: int, k: int, experts: int, most_us: float | None) -> Case:
    def make(seed: int) -> Inputs:
        return (routing(tokens, k, experts, seed), experts, 0, experts, 1, None)

    return Case(
        f"row_map {tokens}x{k} e{experts}", ("row_map",), make, single("row_map"), 12 * tokens * k, most_us=most_us
    )


def permute_with_map(tokens: int, k: int, width: int, experts: int, most_us: float) -> Case:
    def make(seed: int) -> Inputs:
        return normal(tokens, width, seed=seed), routing(tokens, k, experts, seed), experts

    def run(functions: Functions, x_TD: torch.Tensor, ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
        _, offs, slot_to_row, row_to_slot = functions("row_map")(ids_TK, experts, 0, experts, 1, None)
        return functions("permute")(x_TD, slot_to_row, offs, row_to_slot.shape[0])

    moved = 2 * tokens * (1 + k) * width + 12 * tokens * k
    return Case(f"map+permute {tokens} k{k} {width}", ("row_map", "permute"), make, run, moved, most_us=most_us)


def mapped(tokens: int, k: int, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """slot_to_row and offs, by the reference."""
    row_map_reference = registry.function("row_map", "reference")
    _, offs, slot_to_row, _ = row_map_reference(routing(tokens, k, experts, seed), experts, 0, experts, 1, None)
    return slot_to_row, offs


def permute(tokens: int, k: int, width: int, least_share: float | None) -> Case:
    def make(seed: int) -> Inputs:
        slot_to_row, offs = mapped(tokens, k, 128, seed)
        return normal(tokens, width, seed=seed), slot_to_row, offs, tokens * k

    moved = 2 * tokens * (1 + k) * width + 4 * tokens * k
    return Case(f"permute {tokens} k{k} {width}", ("permute",), make, single("permute"), moved, least_share=least_share)


def combine(tokens: int, k: int, width: int, least_share: float | None) -> Case:
    def make(seed: int) -> Inputs:
        weights_TK = torch.rand(tokens, k, device="cuda", generator=generator(seed))
        return normal(tokens * k, width, seed=seed), mapped(tokens, k, 128, seed)[0], weights_TK, None

    moved = 2 * tokens * (1 + k) * width + 8 * tokens * k
    return Case(f"combine {tokens} k{k} {width}", ("combine",), make, single("combine"), moved, least_share=least_share)


def combine_backward(tokens: int, k: int, width: int) -> Case:
    def make(seed: int) -> Inputs:
        weights_TK = torch.rand(tokens, k, device="cuda", generator=generator(seed))
        rows = tokens * k
        return (normal(tokens, width, seed=seed), normal(rows, width, seed=seed + 1), mapped(tokens, k, 128, seed)[0],
                weights_TK, rows)  # fmt: skip

    moved = 2 * tokens * (1 + 2 * k) * width + 12 * tokens * k
    return Case(
        f"combine_backward {tokens} k{k} {width}", ("combine_backward",), make, single("combine_backward"), moved
    )


def activation(rows: int, width: int, backward: bool) -> Case:
    op = "activation_backward" if backward else "activation"

    def make(seed: int) -> Inputs:
        h, scale = normal(rows, 2 * width, seed=seed), torch.rand(rows, device="cuda", generator=generator(seed))
        offs = torch.tensor([rows], dtype=I32, device="cuda")
        return ((normal(rows, width, seed=seed + 1),) if backward else ()) + (h, "swiglu", scale, offs)

    moved = 2 * rows * width * (5 if backward else 3) + 4 * rows * (2 if backward else 1)
    return Case(f"{op} {rows} {width}", (op,), make, single(op), moved, least_share=0.9)


def pack(rows: int, width: int) -> Case:
    def make(seed: int) -> Inputs:
        return normal(rows, width, seed=seed), torch.randperm(rows, device="cuda", generator=generator(seed))

    return Case(f"pack {rows} {width}", ("pack",), make, single("pack"), 4 * rows * width + 8 * rows, least_share=0.85)


def cases() -> list[Case]:
    """The shapes that have targets first."""
    return [
        gate(16384, 128, 8, most_us=6),
        gate(16384, 256, 8, most_us=11),
        row_map(8192, 8, 128, most_us=8),
        permute_with_map(4096, 8, 7168, 128, most_us=150),
        permute(8192, 8, 2048, least_share=0.85),
        combine(8192, 8, 2048, least_share=0.88),
        combine(8192, 2, 4096, least_share=0.88),
        activation(65536, 768, backward=False),
        activation(65536, 768, backward=True),
        activation(16384, 14336, backward=False),
        activation(16384, 14336, backward=True),
        combine_backward(8192, 8, 2048),
        pack(65536, 2048),
        row_map(512, 8, 128, most_us=None),
        permute(128, 8, 7168, least_share=None),
        combine(128, 8, 7168, least_share=None),
    ]


def contenders(case: Case, wanted: Sequence[str], skipped: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Name -> case.run with the operators of one implementation; triton where the registry has it for all of them.
    skipped: "op:implementation" that is not to be timed."""

    def by(implementation: str) -> Callable[..., Any]:
        functions = {op: registry.function(op, implementation) for op in case.ops}
        return lambda *arguments: case.run(functions.__getitem__, *arguments)

    torch.compiler.reset()  # each case is compiled for its own shapes
    found: dict[str, Callable[..., Any]] = {}
    for name in wanted:
        implementation = REGISTRY_NAMES.get(name, name)
        if any(f"{op}:{implementation}" in skipped for op in case.ops):
            continue
        try:
            run = by(implementation)
        except ConfigError:
            continue  # there is none
        found[name] = torch.compile(run, dynamic=False) if name == "compile" else run
    return found


def measure(case: Case, runs: dict[str, Callable[..., Any]], copy_rate: float, results: gpu_timing.Results) -> bool:
    """Time one case and write its rows; False where our kernel missed its target."""
    inputs = [case.make(seed) for seed in range(gpu_timing.sets_needed(case.moved_bytes))]
    rounds = gpu_timing.rounds_needed(len(inputs), case.moved_bytes)
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, run in runs.items():
        try:
            run(*inputs[0])
            torch.cuda.synchronize()
            calls[name] = [lambda run=run, given=given: run(*given) for given in inputs]
            gpu_timing.graph_of(calls[name])
            calls[name] *= rounds
        except Exception as error:  # a contender that cannot be captured is left out, and says so
            calls.pop(name, None)
            reason = f"not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            results.row(kind="kernel", case=case.name, implementation=name, result=reason)
            if name == "cuda":
                return False
    met = True
    for name, time_s in gpu_timing.interleaved(calls).items():
        share = case.moved_bytes / time_s.median_s / copy_rate
        row: dict[str, object] = {"us": round(time_s.median_s * 1e6, 2), "p10_us": round(time_s.p10_s * 1e6, 2)}
        row |= {"p90_us": round(time_s.p90_s * 1e6, 2), "bytes": case.moved_bytes, "copy_share": round(share, 3)}
        if name == "cuda" and (case.most_us or case.least_share):
            met = time_s.median_s * 1e6 <= case.most_us if case.most_us else share >= (case.least_share or 0)
            row |= {"target": f"<= {case.most_us} us" if case.most_us else f">= {case.least_share} of copy", "met": met}
        results.row(kind="kernel", case=case.name, implementation=name, sets=len(inputs), **row)
    return met


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, begin=0, mark="", contenders="cuda,eager,triton,compile",
                               skip="")  # fmt: skip
    results = gpu_timing.Results(found.out)
    if why := cuda_kernels.missing():  # and loads them
        results.row(kind="kernel", result=f"no CUDA kernels: {why}")
    copy_rate = gpu_timing.copy_bytes_per_s()
    results.row(kind="limit", what="copy on the device, read + written", bytes_per_s=round(copy_rate))
    missed = []
    for place, case in enumerate(cases()):
        if place < found.begin:
            continue
        if time.monotonic() > found.end_s:
            results.row(kind="kernel", case=case.name, result=f"not measured: {found.most_s:.0f} s are over")
            continue
        if found.mark:
            Path(found.mark).write_text(f"{place} {case.name}", encoding="utf-8")
        if not measure(case, contenders(case, found.contenders.split(","), found.skip.split(",")), copy_rate, results):
            missed.append(case.name)
        torch.cuda.empty_cache()
        if gpu_timing.broken():
            return 3
    results.row(kind="summary", missed=missed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
