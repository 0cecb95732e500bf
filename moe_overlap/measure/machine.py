"""What a measurement says about where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from moe_overlap import config


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here(world_size: int) -> int:
    """Ranks that share this machine: torchrun says, otherwise all."""
    return config.torchrun("LOCAL_WORLD_SIZE") or world_size


def hardware() -> str:
    """One line, e.g. "AMD EPYC, 2 cores, 24 GiB"."""
    name = platform.processor() or platform.machine()
    memory = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
        total_kib = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1])
        memory = f", {total_kib / 2**20:.0f} GiB"
    except (OSError, ValueError, IndexError):
        pass
    name = "".join(char for char in name if char.isprintable())[:200]
    return f"{name}, {cores_here()} cores{memory}"


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" when the package has changed since; else None."""
    package = Path(__file__).resolve().parents[1]
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", str(package)],
                ["ls-files", "--", str(package / "__init__.py")],
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    head, changed, tracked = run
    return None if not tracked else head + ("+" if changed else "")
