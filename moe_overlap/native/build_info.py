"""What the build made, what it left out and why: reads the `_build_info.json` that `setup.py` writes into the package.

Run as a file it prints that record; it imports nothing of the package, so it works whatever state that is in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

VERSION = "0.1.0"  # of this package, once: pyproject.toml reads it here, without importing anything
FILE = Path(__file__).resolve().parent / "_build_info.json"


@dataclass(frozen=True)
class BuildInfo:
    """mode: MOE_OVERLAP_BUILD as it was (None: never built). built: part -> file name. left_out: part -> reason.
    versions: of what the build used."""

    mode: str | None
    built: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


NOT_BUILT = BuildInfo(mode=None)


def read(path: Path | None = None) -> BuildInfo:
    """The build's record (None: of this package). A missing or unreadable file is "not built", never an error."""
    try:
        raw = json.loads((path or FILE).read_text(encoding="utf-8"))
        return BuildInfo(
            mode=str(raw["mode"]),
            built={str(part): str(name) for part, name in raw["built"].items()},
            left_out={str(part): str(reason) for part, reason in raw["left_out"].items()},
            versions={str(name): str(text) for name, text in raw["versions"].items()},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return NOT_BUILT


def why_not_built(part: str) -> str:
    """One line: why the file of this part is not there."""
    info = read()
    if info.mode is None:
        return "not built: the package is used from its sources (pip install --no-build-isolation -e . builds it)"
    if part in info.left_out:
        return f"left out by the build (MOE_OVERLAP_BUILD={info.mode}): {info.left_out[part]}"
    if part in info.built:
        return f"{info.built[part]} was built, but the file is gone or is for another Python"
    return f"unknown to the build (MOE_OVERLAP_BUILD={info.mode}): build again"


def lines() -> list[str]:
    """The record as text, one fact a line."""
    info = read()
    if info.mode is None:
        return ["build: not built, pure Python from the sources"]
    text = [f"build: MOE_OVERLAP_BUILD={info.mode}"]
    text += [f"  built     {part}: {name}" for part, name in info.built.items()]
    text += [f"  left out  {part}: {reason}" for part, reason in info.left_out.items()]
    if info.versions:
        text.append("  with " + ", ".join(f"{name} {number}" for name, number in info.versions.items()))
    return text


if __name__ == "__main__":
    print("\n".join(lines()))
