"""The commands of `make gpu` and the clock they run by, and what every row of its results carries."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_checks  # noqa: E402

LIMIT_S = 300.0
KILLED_S = 10.0  # that the output of a killed command may take
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
    """The clock and the results of one run. `cases`: the tests of tests/gpu, once they have been looked for, and
    `not_collected`: what was said of those that cannot be imported. `wrong`: (operator, implementation) not timed."""

    folder: Path
    about: dict[str, str]
    limit_s: float = LIMIT_S
    cases: list[gpu_checks.Case] = field(default_factory=list)
    not_collected: str = ""
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
    from moe_overlap.commands.bench import cuda_timing

    return cuda_timing.no_gpu()


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
