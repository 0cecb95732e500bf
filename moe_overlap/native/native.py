"""The two compiled parts, loaded when first asked for. Nothing here raises because a part is missing or broken.

`planner` is the pybind11 module `_planner`, without torch; `ops` is `_C`, a library against torch's stable ABI that
registers implementations for schemas which Python defines (`moe_overlap/ops`). A part that did not load keeps the
reason.
"""

from __future__ import annotations

import importlib
import importlib.machinery
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from moe_overlap.native import build_info

PACKAGE_DIR = Path(__file__).resolve().parent
STEMS = {"planner": "_planner", "ops": "_C"}


@dataclass(frozen=True)
class NativePart:
    """One compiled part: the file that was loaded (None when there is none) and a printable reason either way."""

    name: str
    loaded: bool
    path: str | None
    reason: str


def planner() -> ModuleType | None:
    """The module `moe_overlap.native._planner`, or None; `reason("planner")` says why."""
    return _load_planner()[0]


def load_ops() -> bool:
    """True when `_C` is loaded, that is when its implementations are registered; `reason("ops")` says why not."""
    return _load_ops().loaded


def reason(name: str) -> str:
    """Why the part ("planner" or "ops") is loaded or is not, in one line."""
    return part(name).reason


def part(name: str) -> NativePart:
    """The state of "planner" or "ops", loaded now if it was not yet."""
    assert name in STEMS, name
    return _load_ops() if name == "ops" else _load_planner()[1]


def parts() -> tuple[NativePart, ...]:
    """The state of every compiled part, loaded now if it was not yet."""
    return tuple(part(name) for name in STEMS)


def why_no_cuda_kernels() -> str:
    """Why the loaded `_C` is one without CUDA kernels."""
    return build_info.why_not_built("cuda")


def kernel_sources() -> str:
    """The digest of the sources from which the CUDA kernels of this install were built ("" without kernels)."""
    return build_info.read().versions.get("kernels", "")


@cache
def _load_planner() -> tuple[ModuleType | None, NativePart]:
    path = _find("planner")
    if path is None:
        return None, _absent("planner")
    try:
        module = importlib.import_module("moe_overlap.native._planner")
    except Exception as error:  # a broken file must not take the pure-Python package down
        return None, _broken("planner", path, error)
    return module, NativePart("planner", True, str(module.__file__), "compiled: pybind11 module")


@cache
def _load_ops() -> NativePart:
    path = _find("ops")
    if path is None:
        return _absent("ops")
    try:
        import torch

        torch.ops.load_library(path)
    except Exception as error:  # an undefined symbol, another architecture, a registration that torch refuses
        return _broken("ops", path, error)
    return NativePart("ops", True, str(path), "compiled: library against torch's stable ABI")


def _find(name: str) -> Path | None:
    """The file for this interpreter: a `_planner` of another Python beside it does not count."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = PACKAGE_DIR / f"{STEMS[name]}{suffix}"
        if path.is_file():
            return path
    return None


def _absent(name: str) -> NativePart:
    return NativePart(name, False, None, build_info.why_not_built(STEMS[name]))


def _broken(name: str, path: Path, error: Exception) -> NativePart:
    text = " ".join(str(error).split())
    return NativePart(name, False, str(path), f"{path.name} failed to load: {type(error).__name__}: {text}")
