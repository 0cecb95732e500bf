"""The parts of `make gpu`: what each one runs, and how it says what came of it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_checks  # noqa: E402
from benchmarks.gpu_process import GOOD, Done, Part, Run, find_tool  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND_STATUS = 86
"""What compute-sanitizer exits with when it found something: no status of pytest."""
NOT_YET_RUN = tuple(
    f"tests/gpu/test_gpu_{name}.py" for name in ("static", "virtual", "layer", "staged", "offload", "dealt")
)
"""What was written, or written anew, since a card was to be had."""


def build(run: Run, most_s: float) -> str:
    """The package here, for this GPU alone; without nvcc what needs none, since layers run by Triton's kernels too."""
    import torch

    nvcc = find_tool("nvcc")
    major, minor = torch.cuda.get_device_capability(0)
    chosen = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CUDACXX": nvcc or ""} | os.environ
    chosen["MOE_OVERLAP_BUILD"] = "cuda" if nvcc else "cpu"
    done = run.command(sys.executable, "setup.py", "-q", "build_ext", "--inplace", most_s=most_s, **chosen)
    return done.verdict if nvcc else f"no CUDA kernels, as nvcc was not found; the rest: {done.verdict}"


def limits(run: Run, most_s: float) -> str:
    return run.script("gpu_probe", "--only=limits", most_s=most_s).verdict


def checks(run: Run, most_s: float) -> str:
    """The essential tests of every kernel that is not yet known to be right here."""
    return check(run, lambda cases: gpu_checks.unverified(gpu_checks.essential(cases)), most_s)


def layers(run: Run, most_s: float) -> str:
    """The tests of no single kernel: layers, wires, graphs, experts in host memory. Those that no card has run come
    first, since the time may not be enough for all."""

    def chosen(cases: Sequence[gpu_checks.Case]) -> list[gpu_checks.Case]:
        return sorted((case for case in cases if not case.covers), key=lambda case: case.file not in NOT_YET_RUN)

    return check(run, chosen, most_s)


def tests(run: Run, most_s: float) -> str:
    """All of tests/gpu that has not run yet; what does not begin in time is not held against a kernel."""
    ran = {one.case.id for one in run.outcomes}
    return check(run, lambda cases: [case for case in cases if case.id not in ran], most_s)


def check(run: Run, chosen: Callable[[Sequence[gpu_checks.Case]], Sequence[gpu_checks.Case]], most_s: float) -> str:
    """Run some of the tests, record what came of them, and write down what is right by all that has run so far."""
    end_s = time.monotonic() + most_s
    if not run.cases:  # looked for once in a run
        run.cases, run.not_collected = gpu_checks.collect(run.command, run.scratch, ["tests/gpu"], most_s)
        if run.not_collected:
            run.record(kind="test", id="tests/gpu", outcome="not collected", text=run.not_collected[-1500:])
    cases, left_s = chosen(run.cases), end_s - time.monotonic()
    found = gpu_checks.run(run.command, run.scratch, cases, most_s=left_s - 2.0, each_s=most_s / 2)
    begun = [one for one in found if one.outcome != "cut"]
    run.outcomes += begun
    for one in begun:
        if one.outcome != "passed":
            run.record(kind="test", id=one.case.id, outcome=one.outcome, text=one.text[-1500:])
    verdicts = gpu_checks.verdicts(run.outcomes)
    run.wrong = gpu_checks.wrong_pairs(verdicts)
    right = gpu_checks.verify(verdicts, run.about["commit"], run.about["date"])
    save_verified(run)
    bad = sum(one.outcome in ("failed", "lost") for one in begun)
    wrong = {" ".join(kernel): verdict for kernel, verdict in verdicts.items() if verdict != "right"}
    run.record(kind="checks", architecture=gpu_checks.architecture(), tests=len(begun), cut=len(found) - len(begun),
               failed_or_lost=bad, kernels_right=right, kernels_wrong=wrong)  # fmt: skip
    if not bad and len(begun) == len(found) and not run.not_collected:
        return GOOD
    words = f"{len(begun) - bad} of {len(begun)} tests passed, {right} kernels right, {len(wrong)} not"
    return f"{words}, {len(found) - len(begun)} tests cut" + (", some not collected" if run.not_collected else "")


def save_verified(run: Run) -> None:
    """The record as it stands in the package now, beside the rows."""
    from moe_overlap.ops import verified

    shutil.copy(verified.FILE, run.folder / "verified.json")


def expert_mlp(case: str) -> Callable[[Run, float], str]:
    def part(run: Run, most_s: float) -> str:
        words = (f"--only={case}", "--ways=triton,grouped_mm,loop", "--routings=uniform", "--sustained-s=2",
                 "--profile")  # fmt: skip
        return run.script("gpu_expert_mlp", *words, most_s=most_s).verdict

    return part


def more_expert_mlp(run: Run, most_s: float) -> str:
    """Uneven routing, budgets, and the contenders that compile at their first call."""
    return run.script("gpu_expert_mlp", "--budgets", "--sustained-s=2", most_s=most_s).verdict


def kernels(run: Run, most_s: float) -> str:
    return each_case(run, most_s, "cuda,eager,triton")


def compiled_kernels(run: Run, most_s: float) -> str:
    return each_case(run, most_s, "cuda,compile")


def each_case(run: Run, most_s: float, contenders: str) -> str:
    """gpu_kernels.py, begun again behind a case that took its process down."""
    end_s, place, bad = time.monotonic() + min(most_s, run.left_s()), 0, []
    mark = run.scratch / "case.txt"
    while (left_s := end_s - time.monotonic()) > 5.0:
        mark.unlink(missing_ok=True)
        skip = ",".join(sorted(":".join(pair) for pair in run.wrong))
        words = (f"--begin={place}", f"--mark={mark}", f"--contenders={contenders}", f"--skip={skip}")
        done = run.script("gpu_kernels", *words, most_s=left_s)
        if done.status == 0:
            return "; ".join(bad) or GOOD
        place, _, name = mark.read_text(encoding="utf-8").partition(" ") if mark.is_file() else ("", "", "")
        if not name:
            return done.verdict
        bad.append(f"{name}: {done.verdict}")
        run.record(kind="kernel", case=name, result=f"its process ended: {done.verdict}")
        place = int(place) + 1
    return "; ".join([*bad, "the time was over"])


def layer(run: Run, most_s: float) -> str:
    return run.script("gpu_layer", "--profile", most_s=most_s).verdict


def staged(run: Run, most_s: float) -> str:
    return run.script("gpu_staged", f"--timeline={run.folder / 'staged.png'}", most_s=most_s).verdict


def offload(run: Run, most_s: float) -> str:
    return run.script("gpu_offload", most_s=most_s).verdict


def nccl(run: Run, most_s: float) -> str:
    return run.script("gpu_nccl", f"--limit-s={0.8 * most_s:.0f}", most_s=most_s).verdict


def probe(run: Run, most_s: float) -> str:
    return run.script("gpu_probe", "--sustained-s=20", most_s=most_s).verdict


def counters(run: Run, most_s: float) -> str:
    """What the hardware counted of four kernels, by Nsight Compute. The card's clocks are left alone."""
    tool = find_tool("ncu")
    if tool is None:
        return "not run: ncu not found"
    end_s, bad = time.monotonic() + min(most_s, run.left_s()), []
    for op, kernel in (("permute", "permute"), ("gate", "gate"), ("row_map", "place"), ("mlp", "rows_kernel")):
        left_s = end_s - time.monotonic()
        if left_s < 8:
            bad.append(f"{op}: the time was over")
            continue
        sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
        done = run.command(
            tool, "--clock-control", "none", "--kernel-name", f"regex:{kernel}", "--launch-count", "1",
            *(word for section in sections for word in ("--section", section)),
            sys.executable, "benchmarks/gpu_counters.py", op, most_s=min(left_s, 30.0),
        )  # fmt: skip
        found = counted(done.text)
        run.record(kind="counters", op=op, **found or {"result": done.verdict})
        if not found:
            bad.append(f"{op}: {done.verdict}")
    return "; ".join(bad) or GOOD


def counted(text: str) -> dict[str, str]:
    """Nsight Compute's table: metric -> value with its unit."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\s{4}(\S.*?)\s{2,}(\S+)?\s{2,}([\d.,]+)\s*", line)
        if match:
            found[match[1]] = " ".join(filter(None, (match[3], match[2])))
    return found


def sanitizer_result(tool: str, done: Done) -> dict[str, object]:
    """The row of one sanitizer run: clean, found (with the first finding), or not run with the reason."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.text) or re.search(
        r"RACECHECK SUMMARY: (\d+) hazard", done.text
    )
    row: dict[str, object] = {"kind": "sanitizer", "tool": tool, "seconds": round(done.seconds, 1)}
    if done.status == FOUND_STATUS or (summary and int(summary[1]) > 0):
        first = next((line for line in done.text.splitlines() if line.startswith("=========") and "at " in line), "")
        return row | {"result": "found", "first": first.strip("= ")[:300]}
    if done.status == 0 and summary:
        return row | {"result": "clean"}
    last = [line for line in done.text.splitlines() if line.strip()][-1:] or ["it said nothing"]
    return row | {"result": f"not run: {last[0].strip('= ')[:300]}"}


def sanitize(run: Run, most_s: float) -> str:
    """compute-sanitizer's three tools on small cases, side by side. A tool that cannot start is recorded, not red."""
    program = find_tool("compute-sanitizer")

    def row(tool: str) -> dict[str, object]:
        if program is None:
            return {"kind": "sanitizer", "tool": tool, "result": "not run: compute-sanitizer not found"}
        # Calls of the driver that torch expects to fail are no findings. Without the caching allocator each tensor is
        # an allocation of its own, so that its end is known.
        more = ["--report-api-errors", "no"] if tool == "memcheck" else []
        done = run.command(
            program, "--tool", tool, *more, "--error-exitcode", str(FOUND_STATUS), sys.executable, "-m", "pytest",
            "-q", "-m", "gpu", "tests/gpu/test_gpu_small.py", most_s=most_s, quiet=True,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        return sanitizer_result(tool, done)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = list(pool.map(row, TOOLS))
    for one in found:
        run.record(**one)
    bad = [f"{one['tool']}: {one['result']}" for one in found if one["result"] == "found"]
    return "; ".join(bad) or GOOD


PARTS = (
    Part("build", 70, build),
    Part("limits", 15, limits),
    Part("checks", 90, checks),
    Part("layers", 75, layers),
    Part("layer", 50, layer),
    Part("staged", 60, staged),
    Part("offload", 40, offload),
    Part("kernels", 60, kernels),
    Part("mlp-qwen3", 35, expert_mlp("Qwen3-30B-A3B T=8192")),
    Part("mlp-mixtral", 30, expert_mlp("Mixtral")),
    Part("mlp-qwen3-long", 30, expert_mlp("T=32768")),
    Part("mlp-deepseek", 30, expert_mlp("DeepSeek")),
    Part("counters", 45, counters),
    Part("tests", 90, tests, least_s=20),
    Part("sanitize", 75, sanitize, least_s=30),
    Part("mlp-more", 120, more_expert_mlp, least_s=30),
    Part("kernels-compiled", 90, compiled_kernels, least_s=30),
    Part("nccl", 50, nccl, least_s=30),
    Part("probe", 90, probe, least_s=20),
)
"""In order of worth: what no card has said yet comes before what one has. Together they may take longer than a run:
those at the end are for the time that is left."""
