"""The expert MLP, forward and backward, against other ways to compute it, in one process.

    python benchmarks/gpu_expert_mlp.py [--out FILE] [--only Qwen3] [--ways triton,loop] [--routings uniform]
                                        [--budgets] [--tune]

From the tokens to the tokens: rows are gathered, multiplied, weighted and summed, and backward makes the gradient of
everything; contenders are those of gpu_expert_mlp_ways.py. Each is compared with float64 first, in memory that holds
NaN; a wrong one has no speed. Rows: TFLOP/s (6 R D F forward, 12 backward), `share` of the matmul rate that the chip
sustains at the start of the same run, memory beside the inputs (`saved_gib` between the phases, result included,
`peak_gib` at most), block shapes of the Triton kernels, target and whether it was `met`; `chosen`: what `auto` would
take. --budgets: rows with `num_sms`, ours on fewer multiprocessors, one with `tiles` dealt out by a counter, which
alone on a GPU shows what that costs, and liger-kernel. --tune measures other block
shapes too (minutes) and prints lines for the committed table; --profile: rows with the time of every kernel.
A last row sums up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_expert_mlp_cases as cases  # noqa: E402
from benchmarks import gpu_expert_mlp_ways as ways  # noqa: E402
from benchmarks import gpu_probe, gpu_process, gpu_timing  # noqa: E402
from benchmarks.gpu_expert_mlp_cases import PHASES, Inputs, Right, Shape  # noqa: E402
from benchmarks.gpu_expert_mlp_ways import Way  # noqa: E402
from moe_overlap.ops import registry  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
MAIN = (Way("triton"), Way("grouped_mm"), Way("compile"), Way("loop"))
LEFT_TO_OTHERS = (16, 32)
"""Multiprocessors that a budget leaves: 116 and 100 of the 132 of an H200."""
MUCH_FASTER = 1.05


@dataclass
class Bench:
    """One run: where rows go, when to begin nothing new, and what was found."""

    results: gpu_timing.Results
    end_s: float
    matmul_rate: float
    double_rate: float
    profile: bool = False
    measured: dict[Any, Any] = field(default_factory=dict)
    tflops: dict[tuple[Shape, str, str], dict[str, float]] = field(default_factory=dict)

    def row(self, shape: Shape, routing: str, way: Way, **values: object) -> None:
        about = {"case": shape.name, "routing": routing, "implementation": way.name}
        about |= {"num_sms": way.num_sms} if way.num_sms else {}
        about |= {"tuned": True} if way.tuned else {}
        about |= {"tiles": "dealt"} if way.dealt else {}
        self.results.row(kind="expert_mlp", **about, **values)


@dataclass(frozen=True)
class Checked:
    """A contender that ran: memory it took, and how far each result is from right (at most 1 is right)."""

    contender: ways.Contender
    saved_bytes: int
    peak_bytes: int
    errors: Mapping[str, float]

    def wrong(self, phase: str) -> dict[str, float]:
        """The results of forward, or of both phases, that are wrong."""
        counted = ("out",) if phase == "forward" else tuple(self.errors)
        return {name: self.errors[name] for name in counted if not self.errors[name] <= 1}


def sustained(seconds: float) -> float:
    """The bf16 matmul rate at the end of that time."""
    multiply, flop, begin_s, rate = gpu_probe.matmul(), 2 * 8192**3, time.monotonic(), 0.0
    while rate == 0.0 or time.monotonic() - begin_s < seconds:
        rate = 100 * flop / gpu_timing.once(lambda: [multiply() for _ in range(100)], repeats=2).median_s
    return rate


def double_rate(size: int = 4096) -> float:
    """The float64 matmul rate, which decides how much is compared with float64."""
    a = torch.randn(size, size, device=DEVICE, dtype=torch.float64)
    return 2 * size**3 / gpu_timing.once(lambda: a @ a, repeats=2).median_s


def poison(size_bytes: int) -> None:
    """What is allocated next holds NaN, in every dtype of floats."""
    torch.full((size_bytes,), 255, dtype=torch.uint8, device=DEVICE)


def check(contender: ways.Contender, inputs: Inputs, want: Right) -> Checked:
    """Run it twice, in fresh memory and in memory full of NaN, and compare the second results."""

    def both() -> dict[str, torch.Tensor]:
        out_TD, saved = contender.forward()
        return {"out": out_TD.detach(), **contender.backward(saved)}

    first_bytes = gpu_timing.peak_bytes(both)[1]
    poison(first_bytes)
    found, peak_bytes = gpu_timing.peak_bytes(both)
    errors = {name: cases.error(want, name, value, inputs) for name, value in found.items()}
    assert errors.keys() == want.values.keys(), (errors.keys(), want.values.keys())
    del found
    before = memory()
    held = contender.forward()
    saved_bytes = memory() - before
    del held
    return Checked(contender, saved_bytes, peak_bytes, errors)


def profile(contender: ways.Contender) -> dict[str, object]:
    """The time of every kernel, forward and backward apart."""
    _, saved = contender.forward()
    return {
        "forward": gpu_timing.kernel_times(contender.forward),
        "backward": gpu_timing.kernel_times(lambda: contender.backward(saved)),
    }


def memory() -> int:
    """Bytes that tensors hold."""
    return torch.cuda.memory_allocated()


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure(bench: Bench, shape: Shape, routing: str, wanted: Sequence[Way]) -> None:
    """Check and time these contenders on one case; every one has rows, with its speed or the reason why not."""
    inputs = cases.make(shape, routing, device=DEVICE, dtype=DTYPE)
    want = cases.right(inputs, cases.check_every(shape, bench.double_rate))
    ready: dict[Way, Checked] = {}
    for way in wanted:
        if time.monotonic() > bench.end_s:
            bench.row(shape, routing, way, result="not measured: the time is over")
            continue
        try:
            ready[way] = check(ways.contender(way, inputs, bench.measured), inputs, want)
            if bench.profile:
                bench.results.row(kind="profile", case=shape.name, implementation=way.name,
                                  **profile(ready[way].contender))  # fmt: skip
        except Exception as error:  # the others go on
            bench.row(shape, routing, way, result=f"{_verb(error)}: {reason(error)}")
    del want
    phases = {way: (found.contender.forward, found.contender.backward) for way, found in ready.items()}
    try:
        times = gpu_timing.two_phases(phases)
    except Exception as error:
        for way in ready:
            bench.row(shape, routing, way, result=f"not measured: {reason(error)}")
        return
    counts_E = inputs.offs.diff(prepend=inputs.offs.new_zeros(1)).double()
    state = {"clocks": gpu_process.clocks(), "most_rows_over_mean": round(float(counts_E.max() / counts_E.mean()), 2)}
    for way, both in times.items():
        blocks = block_shapes(bench, way, inputs)
        for phase, time_s in zip(PHASES, both, strict=True):
            row = numbers(bench, shape, routing, way, phase, time_s, ready[way])
            bench.row(shape, routing, way, phase=phase, **row, **state, **blocks)


def _verb(error: Exception) -> str:
    return "not run" if isinstance(error, ImportError) else "not measured"


def numbers(
    bench: Bench, shape: Shape, routing: str, way: Way, phase: str, time_s: gpu_timing.Time, found: Checked
) -> dict[str, object]:
    """What a row says of one phase: no speed where a result of it was wrong."""
    if wrong := found.wrong(phase):
        return {"result": f"wrong: error over tolerance {wrong}"}
    worst = found.errors["out"] if phase == "forward" else max(found.errors.values())
    tflops = shape.flop(phase) / time_s.median_s / 1e12
    row: dict[str, object] = {"tflops": round(tflops, 1), "ms": round(time_s.median_s * 1e3, 4)}
    row |= {"p10_ms": round(time_s.p10_s * 1e3, 4), "p90_ms": round(time_s.p90_s * 1e3, 4)}
    row |= {"share": round(tflops * 1e12 / bench.matmul_rate, 3), "error_over_tolerance": round(worst, 4)}
    row |= {"saved_gib": round(found.saved_bytes / 2**30, 3), "peak_gib": round(found.peak_bytes / 2**30, 3)}
    if way == Way(way.name):
        bench.tflops.setdefault((shape, routing, phase), {})[way.name] = tflops
        if way.name in ways.IMPLEMENTATIONS:
            row |= {"chosen": way.name == ways.chosen(DTYPE)} | verdict(shape, phase, tflops)
    return row


def verdict(shape: Shape, phase: str, tflops: float) -> dict[str, object]:
    """Target, best published figure, and whether the target was met; nothing where there is no target."""
    if phase not in shape.targets:
        return {}
    target = shape.targets[phase]
    return {"target": target, "public": shape.public.get(phase, "none"), "met": tflops >= target}


def block_shapes(bench: Bench, way: Way, inputs: Inputs) -> dict[str, object]:
    """The block shape of each Triton kernel in a contender that has them."""
    if way.name != "triton":
        return {}
    from moe_overlap.ops.expert_mlp_blocks_triton import STAGES, block_shape, use
    from moe_overlap.ops.expert_mlp_triton import problem_of

    problem = problem_of(inputs.x, inputs.w_out, inputs.row_to_slot.shape[0])
    with use(bench.measured if way.tuned else {}):
        return {"blocks": {stage: asdict(block_shape(stage, problem)) for stage in STAGES}}


def tune(bench: Bench, shape: Shape) -> tuple[Way, ...]:
    """Look for faster block shapes, print them as lines for the table, and return what measures them."""
    try:
        from moe_overlap.ops import expert_mlp_tune_triton

        given = cases.make(shape, "uniform", device=DEVICE, dtype=DTYPE)
        found = expert_mlp_tune_triton.tune(
            given.x, given.w_in, given.w_out, given.offs, kind="swiglu", row_to_token=given.row_to_token
        )
    except Exception as error:
        bench.results.row(kind="tuned", case=shape.name, result=f"{_verb(error)}: {reason(error)}")
        return ()
    bench.measured.update(found)
    lines = expert_mlp_tune_triton.table_lines(found)
    bench.results.row(kind="tuned", case=shape.name, lines=lines)
    print("\n".join(lines), flush=True)
    return (Way("triton", tuned=True),)


def summary(bench: Bench) -> dict[str, object]:
    """Targets that the choice missed, and where another contender of ours was faster than it."""
    missed, better = [], []
    for (shape, routing, phase), tflops in bench.tflops.items():
        choice, case = ways.chosen(DTYPE), f"{shape.name}, {routing}, {phase}"
        got, target = tflops.get(choice, 0.0), shape.targets.get(phase, 0.0)
        if got < target:
            missed.append(f"{case}: {choice} {got:.0f} of {target:.0f}" if got else f"{case}: {choice} has no figure")
        ours = {name: value for name, value in tflops.items() if name in ways.IMPLEMENTATIONS}
        best = max(ours, key=ours.__getitem__, default=choice)
        if ours.get(best, 0.0) > MUCH_FASTER * got:
            better.append(f"{case}: {best} {ours[best]:.0f}, {choice} {got:.0f}")
    return {"missed": missed, "another_is_faster_than_the_choice": better}


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, sustained_s=5.0, only="", tune=False, budgets=False,
                               profile=False,
                               ways=",".join(way.name for way in MAIN), routings=",".join(cases.ROUTINGS))  # fmt: skip
    results = gpu_timing.Results(found.out)
    bench = Bench(results, found.end_s, sustained(found.sustained_s), double_rate(), found.profile)
    results.row(kind="limit", what=f"bf16 matmul 8192, {found.sustained_s:.0f} s", flop_per_s=round(bench.matmul_rate),
                float64_flop_per_s=round(bench.double_rate), rows_moved_by=ways.moving_rows(DEVICE))  # fmt: skip
    shapes = [shape for shape in cases.SHAPES if found.only.lower() in shape.name.lower()]
    main_ways = tuple(Way(name) for name in found.ways.split(","))
    with ExitStack() as stack:
        for op in ("activation", "activation_backward"):
            stack.enter_context(registry.force(op, ways.moving_rows(DEVICE)))
        for shape in shapes:
            more = (budgets() if found.budgets else ()) + (tune(bench, shape) if found.tune else ())
            for place, routing in enumerate(found.routings.split(",")):
                run_case(bench, shape, routing, main_ways if place else main_ways + more)
        # It tunes at its first call, for minutes: after everything else.
        for shape in shapes if found.budgets else ():
            run_case(bench, shape, "uniform", (Way("triton"), Way("liger")))
    results.row(kind="summary", **summary(bench))
    return 3 if DEVICE == "cuda" and gpu_timing.broken() else 0


def budgets() -> tuple[Way, ...]:
    count = multiprocessors()
    fewer = tuple(Way("triton", num_sms=count - left) for left in (0, *LEFT_TO_OTHERS) if left < count)
    return (Way("triton", dealt=True), *fewer)


def run_case(bench: Bench, shape: Shape, routing: str, wanted: Sequence[Way]) -> None:
    """`measure`, unless the time is over; a case that fails leaves the others to go on."""
    if time.monotonic() > bench.end_s:
        bench.results.row(kind="expert_mlp", case=shape.name, routing=routing, result="not measured: the time is over")
        return
    try:
        measure(bench, shape, routing, wanted)
        torch.cuda.empty_cache()
    except Exception as error:
        bench.results.row(kind="expert_mlp", case=shape.name, routing=routing, result=f"not measured: {reason(error)}")


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


if __name__ == "__main__":
    sys.exit(main())
