"""`make gpu`: build in this environment, check on the GPU, measure. Always brings something home, within five minutes.

    python3 benchmarks/gpu_run.py [--out FOLDER] [--limit-s 300] [--only build,checks,...] [--skip sanitize,...]

Every part (PARTS, in order of worth) has processes of its own and a limit: a crash, a CUDA error that stays or a red
test costs that part alone. Kernels that are right are verified and timed although others are not. Rows are written as
they come to FOLDER/rows.jsonl, what the processes said to FOLDER/log.txt, what was found right to FOLDER/verified.json
(and to the package's own, so that later parts use it). `python3 benchmarks/gpu_take.py FOLDER` copies them into the
tree: results, verified.json, the table of docs/status.md. Every row has date, commit, torch, device and clocks;
MOE_OVERLAP_COMMIT names the commit where the sources travelled without their history. Targets of kernels that move
bytes are shares of what the same run measured of the chip; those of matmuls are printed beside such shares.

Exit status: 0 all is well, 1 a part failed or found something, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_checks  # noqa: E402

LIMIT_S = 300.0
KILLED_S = 10.0  # that the output of a killed command may take
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND_STATUS = 86
"""What compute-sanitizer exits with when it found something: no status of pytest."""
GOOD = "ok"


@dataclass(frozen=True)
class Done:
    """One command: its status (None: it ran past its limit), what it said and how long it took."""

    status: int | None
    text: str
    seconds: float

    @property
    def verdict(self) -> str:
        """GOOD, or how it ended and its last words."""
        if self.status == 0:
            return GOOD
        last = [line.strip() for line in self.text.splitlines() if line.strip()][-1:] or ["it said nothing"]
        return f"{'too long' if self.status is None else f'status {self.status}'}: {last[0][:200]}"


@dataclass
class Run:
    """The clock and the results of one run. `wrong`: (operator, implementation) that are not timed."""

    folder: Path
    about: dict[str, str]
    limit_s: float = LIMIT_S
    outcomes: list[gpu_checks.Outcome] = field(default_factory=list)
    wrong: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.begin_s = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = self.folder / "rows.jsonl", self.folder / "log.txt"
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-run-"))
        for file in (self.file, self.log):
            file.write_text("", encoding="utf-8")
        self._writing = threading.Lock()

    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.begin_s)

    def record(self, **row: object) -> None:
        with self._writing, self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.about | row) + "\n")

    def command(self, *words: str, most_s: float, quiet: bool = False, **environment: str) -> Done:
        """Run one command for at most `most_s` seconds and what is left. What it says goes to the log and, unless
        `quiet`, is shown."""
        begin_s = time.monotonic()
        limit_s = max(1.0, min(most_s, self.left_s()))
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
        # A session of its own: what the command started ends with it, also when its time is over.
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
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
        said = f"\n== {' '.join(words)}\n{text}\n-- status {status}, {time.monotonic() - begin_s:.1f} s\n"
        with self._writing, self.log.open("a", encoding="utf-8") as file:
            file.write(said)
        if not quiet:
            print(said, flush=True)
        return Done(status, text, time.monotonic() - begin_s)

    def script(self, name: str, *words: str, most_s: float) -> Done:
        """One of the benchmarks, which appends its rows itself and begins nothing new near its limit."""
        limit_s = min(most_s, self.left_s())
        return self.command(sys.executable, f"benchmarks/{name}.py", f"--out={self.file}",
                            f"--most-s={max(1.0, 0.8 * limit_s):.0f}", *words, most_s=limit_s)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Something to do for at most `most_s` seconds, and not at all with less than `least_s` left. call: says GOOD, or
    what was wrong."""

    name: str
    most_s: float
    call: Callable[[Run, float], str]
    least_s: float = 8.0


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


def build(run: Run, most_s: float) -> str:
    """The package here, for this GPU alone."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    chosen = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CUDACXX": find_tool("nvcc") or ""} | os.environ
    chosen["MOE_OVERLAP_BUILD"] = "cuda"
    done = run.command(sys.executable, "setup.py", "-q", "build_ext", "--inplace", most_s=most_s, **chosen)
    return done.verdict


def limits(run: Run, most_s: float) -> str:
    return run.script("gpu_probe", "--only=limits", most_s=most_s).verdict


def checks(run: Run, most_s: float) -> str:
    """The essential tests of every kernel that is not yet known to be right here."""
    cases = gpu_checks.collect(run.command, run.scratch, ["tests/gpu"], most_s)
    return check(run, gpu_checks.unverified(gpu_checks.essential(cases)), most_s)


def tests(run: Run, most_s: float) -> str:
    """All of tests/gpu that has not run yet, those of no single kernel first; what does not begin in time is not held
    against a kernel."""
    cases = gpu_checks.collect(run.command, run.scratch, ["tests/gpu"], most_s)
    ran = {one.case.id for one in run.outcomes}
    left = [case for case in cases if case.id not in ran]
    return check(run, sorted(left, key=lambda case: bool(case.covers)), most_s)


def check(run: Run, cases: Sequence[gpu_checks.Case], most_s: float) -> str:
    """Run these tests, record what came of them, and write down what is right by all that has run so far."""
    found = gpu_checks.run(run.command, run.scratch, cases, most_s=most_s - 2.0, each_s=most_s / 2)
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
    run.record(kind="checks", tests=len(begun), cut=len(found) - len(begun), failed_or_lost=bad,
               kernels_right=right, kernels_wrong=wrong)  # fmt: skip
    words = f"{len(begun) - bad} of {len(begun)} tests passed, {right} kernels right, {len(wrong)} not"
    return f"{words}, {len(found) - len(begun)} tests cut" if bad or len(begun) < len(found) else GOOD


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


def nccl(run: Run, most_s: float) -> str:
    return run.script("gpu_nccl", f"--limit-s={0.8 * most_s:.0f}", most_s=most_s).verdict


def probe(run: Run, most_s: float) -> str:
    return run.script("gpu_probe", "--sustained-s=20", most_s=most_s).verdict


def counters(run: Run, most_s: float) -> str:
    """What the hardware counted of three kernels, by Nsight Compute. The card's clocks are left alone."""
    tool = find_tool("ncu")
    if tool is None:
        return "not run: ncu not found"
    end_s, bad = time.monotonic() + min(most_s, run.left_s()), []
    for op, kernel in (("permute", "permute"), ("gate", "gate"), ("mlp", "rows_kernel")):
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
    Part("mlp-qwen3", 35, expert_mlp("Qwen3-30B-A3B T=8192")),
    Part("mlp-mixtral", 30, expert_mlp("Mixtral")),
    Part("mlp-qwen3-long", 30, expert_mlp("T=32768")),
    Part("mlp-deepseek", 30, expert_mlp("DeepSeek")),
    Part("kernels", 60, kernels),
    Part("layer", 45, layer),
    Part("staged", 60, staged),
    Part("counters", 45, counters),
    Part("tests", 90, tests, least_s=20),
    Part("sanitize", 75, sanitize, least_s=30),
    Part("mlp-more", 120, more_expert_mlp, least_s=30),
    Part("kernels-compiled", 90, compiled_kernels, least_s=30),
    Part("nccl", 50, nccl, least_s=30),
    Part("probe", 90, probe, least_s=20),
)
"""In order of worth. Together they may take longer than a run: those at the end are for the time that is left."""


def go(run: Run, parts: Sequence[Part]) -> bool:
    """All of them, whatever becomes of one; True if all that ran went well."""
    well = True
    for part in parts:
        begin_s, limit_s = time.monotonic(), min(part.most_s, run.left_s())
        if limit_s < part.least_s:
            run.record(kind="part", part=part.name, result="not run: the time was over")
            continue
        try:
            result = part.call(run, limit_s)
        except Exception as error:  # the parts after it go on
            result = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = round(time.monotonic() - begin_s, 1)
        run.record(kind="part", part=part.name, seconds=seconds, result=result)
        print(f"== {part.name}: {result} ({seconds} s)", flush=True)
        well = well and result == GOOD
    return well


SHORT = {
    "part": ("part", "seconds", "result"),
    "limit": ("what", "bytes_per_s", "flop_per_s"),
    "probe": ("what", "bytes_per_s", "flop_per_s", "result"),
    "test": ("id", "outcome"),
    "checks": ("tests", "cut", "failed_or_lost", "kernels_right", "kernels_wrong"),
    "expert_mlp": ("case", "routing", "implementation", "phase", "tflops", "ms", "share", "target", "met", "result"),
    "kernel": ("case", "implementation", "us", "copy_share", "target", "met", "result"),
    "layer": ("case", "implementation", "phase", "ms", "times_ours", "peak_gib", "result"),
    "staged": ("case", "implementation", "ms", "serial_ms", "nocomm_ms", "bytes_per_s", "overlap_eff", "allowed",
               "share", "met", "result"),
    "nccl": ("result",),
    "sanitizer": ("tool", "result"),
}  # fmt: skip
"""What the table at the end says of a row, by its kind."""


def digest(run: Run) -> list[str]:
    """The run in short lines, to be read where only the end of the output is at hand."""
    lines = []
    for row in map(json.loads, run.file.read_text(encoding="utf-8").splitlines()):
        wanted = SHORT.get(row["kind"], ())
        lines.append(" ".join([row["kind"], *(f"{row[name]}" for name in wanted if row.get(name) is not None)])[:240])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"some of {', '.join(names)}")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of the whole run (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of everything (default out/gpu)")
    options = parser.parse_args(argv)
    only, skipped = ([word for word in words.split(",") if word] for words in (options.only, options.skip))
    if not {*only, *skipped} <= set(names):
        parser.error(f"--only, --skip = {options.only!r}, {options.skip!r}: expected some of {', '.join(names)}")
    if reason := no_gpu():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    run = Run(options.out, about(), options.limit_s)
    try:
        well = go(run, [part for part in PARTS if part.name not in skipped and (not only or part.name in only)])
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)
    print("\n".join(["", *digest(run)]))
    print(f"{run.folder}: {run.limit_s - run.left_s():.0f} s in all; python3 benchmarks/gpu_take.py {run.folder}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
