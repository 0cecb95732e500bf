"""`make gpu`: build in this environment, test on the GPU, sanitize, measure. Everything within nine minutes.

    python benchmarks/gpu_run.py [--skip sanitize,probe,kernels,expert_mlp] [--tests PATH ...] [--out FOLDER]

Correctness comes first: after a failing test or a finding no kernel of ours is timed (the probe, which has none, still
runs), and after a failing test nothing is recorded as verified. When the tests pass, the pairs of operator and dtype
that they cover go into moe_overlap/ops/verified.json (this is the only writer) with architecture and sources, and from
there into docs/status.md. compute-sanitizer runs on small cases; a tool that cannot start is recorded as `not run` with
its reason, only findings are failures. Results are JSON lines in benchmarks/results/<gpu>/, one file for a run; every
row has the date, commit, torch, device and clocks. MOE_OVERLAP_COMMIT names the commit where the sources travelled
without their history. From another machine these have to come back: the results, verified.json and docs/status.md.

Exit status: 0 all is well, 1 a test or a sanitizer found something, 2 there is no GPU or no build.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STATUS = ROOT / "docs/status.md"
TABLE_BEGIN, TABLE_END = "<!-- from moe_overlap/ops/verified.json -->", "<!-- end -->"
LIMIT_S = 540.0
BUILD_S, TESTS_S, SANITIZE_S = 120.0, 190.0, 75.0  # the most of each
KILLED_S = 10.0  # that the output of a killed command may take
TEST_PROCESSES = 6  # on one GPU: compiling and the references take most of the time
SHARES = {"probe": 11, "kernels": 8, "expert_mlp": 14}
"""The benchmarks, and how they share the time that is left; what one does not need goes to those after it."""
FINISH_S = 25.0  # for what was begun before nothing new is begun
PARTS = ("sanitize", *SHARES)
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND_STATUS = 86
"""What compute-sanitizer exits with when it found something: no status of pytest."""


@dataclass(frozen=True)
class Done:
    """One command: its status (None: it ran past its limit), what it said and how long it took."""

    status: int | None
    text: str
    seconds: float


class Run:
    """The clock and the results of one run."""

    def __init__(self, folder: Path, about: dict[str, str]) -> None:
        self.begin_s = time.monotonic()
        self.about = about
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{about['date']}-{time.strftime('%H%M')}-gpu.jsonl"
        self.file.write_text("", encoding="utf-8")

    def left_s(self) -> float:
        return LIMIT_S - (time.monotonic() - self.begin_s)

    def record(self, **row: object) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.about | row) + "\n")

    def command(self, *words: str, most_s: float, **environment: str) -> Done:
        """Run one command for at most `most_s` seconds and what is left, and show what it says."""
        begin_s = time.monotonic()
        limit_s = max(1.0, min(most_s, self.left_s()))
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
        # A session of its own: what the command started ends with it, also when its time is over.
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        status: int | None = None
        try:
            text = process.communicate(timeout=limit_s)[0]
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            try:
                text = process.communicate(timeout=KILLED_S)[0]
            except subprocess.TimeoutExpired:  # something that left the session still holds its output
                text = ""
            text += f"\nstopped after {limit_s:.0f} s"
        print(f"\n== {' '.join(words)}\n{text}", flush=True)
        return Done(status, text, time.monotonic() - begin_s)


def no_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is a build without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device found"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, or where toolkits are installed unless told otherwise."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    folders = [os.environ.get("PATH", os.defpath), *(str(Path(home, "bin")) for home in homes)]
    return shutil.which(name, path=os.pathsep.join(folders))


def commit() -> str:
    """Of the sources, with "+changes" where they differ; "unknown" where they travelled without their history."""
    if told := os.environ.get("MOE_OVERLAP_COMMIT"):
        return told
    git = shutil.which("git")
    if git is None:
        return "unknown"
    words = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    head, changed = (
        subprocess.run([git, *more], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
        for more in words
    )
    return head + ("+changes" if changed else "") if head else "unknown"


def about() -> dict[str, str]:
    """What every row carries."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0),
        "clocks": clocks(),
    }


def clocks() -> str:
    """SM and memory clock, power and temperature at this moment, as nvidia-smi says."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    done = subprocess.run([tool, f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"],
                          capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    return done.stdout.strip() or f"unknown: {done.stderr.strip()[:200]}"


def slug(device: str) -> str:
    """The folder of a device's results: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")


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


def sanitize(run: Run) -> bool:
    """The three tools on small cases, side by side; True unless one found something."""
    program = find_tool("compute-sanitizer")

    def row(tool: str) -> dict[str, object]:
        if program is None:
            return {"kind": "sanitizer", "tool": tool, "result": "not run: compute-sanitizer not found"}
        # Calls of the driver that torch expects to fail are no findings. Without the caching allocator each tensor is
        # an allocation of its own, so that its end is known.
        more = ["--report-api-errors", "no"] if tool == "memcheck" else []
        done = run.command(
            program, "--tool", tool, *more, "--error-exitcode", str(FOUND_STATUS), sys.executable, "-m", "pytest",
            "-q", "-m", "gpu", "tests/gpu/test_gpu_small.py", most_s=SANITIZE_S, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        return sanitizer_result(tool, done)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = list(pool.map(row, TOOLS))
    for one in found:
        print(f"{one['tool']}: {one['result']}")
        run.record(**one)
    return all(one["result"] != "found" for one in found)


def status_table() -> list[str]:
    """The table of docs/status.md: each kernel, and on which hardware it has been checked."""
    from moe_overlap.ops import cuda_kernels, expert_mlp_contract, expert_mlp_grouped, triton_kernels, verified

    kernels = [(op, "cuda", cuda_kernels.dtypes(op)) for op in cuda_kernels.OPS]
    kernels += [(op, "triton", kernel.dtypes) for op, kernel in triton_kernels.KERNELS.items()]
    kernels += [(op, "grouped_mm", expert_mlp_grouped.CUDA_DTYPES) for op in expert_mlp_contract.OPS]
    lines = ["| operator | kernel | dtypes | verified on a GPU |", "|---|---|---|---|"]
    for op, implementation, dtypes in kernels:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = [r for r in verified.read() if (r.op, r.implementation) == (op, implementation)]
        checks = "; ".join(f"{r.architecture} {r.dtype} ({r.commit}, {r.date})" for r in found)
        lines.append(f"| `{op}` | {implementation} | {names} | {checks or '**no**'} |")
    return lines


def with_table(text: str) -> str:
    """docs/status.md with the table of today between its two marks."""
    before, rest = text.split(TABLE_BEGIN)
    _, after = rest.split(TABLE_END)
    return "\n".join([before + TABLE_BEGIN, *status_table(), TABLE_END + after])


def verify(run: Run, record: Path, done: Done) -> bool:
    """Read what the tests covered; if all passed, write verified.json and the table of docs/status.md."""
    import torch

    from moe_overlap.native import native
    from moe_overlap.ops import expert_mlp_grouped, hardware, triton_kernels, verified

    told = (
        json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"covered": [], "failed": ["no record"]}
    )
    run.record(kind="tests", seconds=round(done.seconds, 1), status=done.status, **told)
    if done.status != 0 or told["failed"] or not told["covered"]:
        return False
    here = hardware.architecture(torch.device("cuda", 0))
    sources = {
        "cuda": native.kernel_sources(),
        "triton": triton_kernels.sources(),
        "grouped_mm": expert_mlp_grouped.sources(),
    }
    when = (run.about["commit"], run.about["date"])
    new = [
        verified.Record(op, implementation, here, dtype, sources[implementation], *when)
        for op, implementation, dtype in told["covered"]
    ]
    replaced = {(r.op, r.implementation, r.dtype) for r in new}
    kept = [r for r in verified.read() if r.architecture != here or (r.op, r.implementation, r.dtype) not in replaced]
    verified.write([*kept, *new])
    STATUS.write_text(with_table(STATUS.read_text(encoding="utf-8")), encoding="utf-8")
    return True


def build(run: Run) -> bool:
    """The package here, for this GPU alone."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    chosen = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CUDACXX": find_tool("nvcc") or ""} | os.environ
    chosen["MOE_OVERLAP_BUILD"] = "cuda"
    done = run.command(sys.executable, "setup.py", "build_ext", "--inplace", most_s=BUILD_S, **chosen)
    run.record(kind="build", seconds=round(done.seconds, 1), status=done.status)
    return done.status == 0


def test(run: Run, paths: Sequence[str]) -> bool:
    """The tests that need a GPU, and the record of what they covered; True if all passed."""
    several = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
    record = run.file.with_suffix(".tests.json")
    done = run.command(
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=5", *several, "-m", "gpu", *paths,
        f"--gpu-record={record}", most_s=TESTS_S, OMP_NUM_THREADS="2",
    )  # fmt: skip
    passed = verify(run, record, done)
    record.unlink(missing_ok=True)
    return passed


def measure(run: Run, parts: Sequence[str]) -> None:
    """These benchmarks, one after the other, each within its limit."""
    for place, part in enumerate(parts):
        limit_s = run.left_s() * SHARES[part] / sum(SHARES[later] for later in parts[place:])
        new_s = max(1.0, limit_s - FINISH_S)
        words = (f"benchmarks/gpu_{part}.py", f"--out={run.file}", f"--most-s={new_s:.0f}")
        done = run.command(sys.executable, *words, most_s=limit_s)
        run.record(kind=part, seconds=round(done.seconds, 1), status=done.status)


def digest(run: Run) -> list[str]:
    """The run in short lines, to be read where only the end of the output is at hand."""
    lines = []
    for row in map(json.loads, run.file.read_text(encoding="utf-8").splitlines()):
        told = {name: value for name, value in row.items() if name not in run.about and name not in ("time", "covered")}
        lines.append(" ".join(f"{name}={value}" for name, value in told.items())[:200])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--skip", default="", help=f"parts to leave out: {', '.join(PARTS)}")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], metavar="PATH", help="default: all in tests/gpu")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results/<gpu>)")
    options = parser.parse_args(argv)
    skipped = [word for word in options.skip.split(",") if word]
    if not set(skipped) <= set(PARTS):
        parser.error(f"--skip = {options.skip!r}: expected some of {', '.join(PARTS)}")
    if reason := no_gpu():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    told = about()
    run = Run(options.out or ROOT / "benchmarks/results" / slug(told["device"]), told)
    if not build(run):
        return 2
    passed = test(run, options.tests)
    clean = sanitize(run) if "sanitize" not in skipped else True
    begun = [part for part in SHARES if part not in skipped and (passed and clean or part == "probe")]
    measure(run, begun)
    print("\n".join(["", *digest(run)]))
    if not (passed and clean):
        print("make gpu: a test or a sanitizer found something: no kernel of ours was timed", file=sys.stderr)
    print(f"{run.file}: {LIMIT_S - run.left_s():.0f} s in all")
    return 0 if passed and clean else 1


if __name__ == "__main__":
    sys.exit(main())
