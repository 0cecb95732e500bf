"""Which implementation of an operator runs, and why.

Each operator has implementations in order of preference. `choose` takes the first one that can run here and says why;
`force` fixes one for tests and benchmarks; `explain` lists the state. Nothing falls back silently: asking for an
implementation that cannot run raises ConfigError with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.errors import ConfigError

Obstacle = Callable[[torch.device, torch.dtype], "str | None"]


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. `obstacle(device, dtype)` is None where it can run, else the reason why not."""

    name: str
    call: Callable[..., Any]
    obstacle: Obstacle
    merit: str


@dataclass(frozen=True)
class Choice:
    """What was chosen (`impl` is the name of the implementation) and the reason in words."""

    impl: str
    reason: str


_implementations: dict[str, list[Implementation]] = {}
_forced: dict[str, str] = {}
_chosen: dict[tuple[str, str, torch.dtype], tuple[Implementation, Choice]] = {}
_lock = threading.RLock()


def add(
    op: str,
    name: str,
    call: Callable[..., Any],
    *,
    obstacle: Obstacle | None = None,
    merit: str,
    preferred: bool = False,
) -> None:
    """Make an implementation known. `merit` says why one would take it; `preferred` puts it before the others."""
    with _lock:
        known = _implementations.setdefault(op, [])
        entry = Implementation(name, call, obstacle or (lambda device, dtype: None), merit)
        known.insert(0 if preferred else len(known), entry)
        _chosen.clear()


def choose(op: str, *, device: torch.device | str, dtype: torch.dtype, **shape: int) -> Choice:
    """The implementation of `op` that runs for these arguments, with the reason.

    `shape` is there for implementations whose worth depends on sizes; none of today's does. Raises ConfigError for an
    operator that does not exist and for a forced implementation that cannot run.
    """
    return _choose(op, torch.device(device), dtype)[1]


def kernel(op: str) -> Callable[..., Any]:
    """The function registered with the dispatcher: looks up the choice for its first argument and calls it."""

    def run(first: torch.Tensor, *args: Any) -> Any:
        return _choose(op, first.device, first.dtype)[0].call(first, *args)

    return run


@contextmanager
def force(op: str, impl: str) -> Iterator[None]:
    """Run `op` by `impl` inside the block, in the whole process (backward may run in other threads).

    Raises ConfigError at once when the implementation does not exist; one that exists but cannot run for the
    arguments at hand raises when it is called.
    """
    names = [entry.name for entry in _known(op)]
    if impl not in names:
        raise ConfigError("impl", impl, f"an implementation of {op}: {', '.join(names)}")
    with _lock:
        before = _forced.get(op)
        _forced[op] = impl
        _chosen.clear()
    try:
        yield
    finally:
        with _lock:
            if before is None:
                _forced.pop(op, None)
            else:
                _forced[op] = before
            _chosen.clear()


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """One line per operator and one per implementation that was passed over: what runs on this device and why."""
    at = torch.device(device)
    lines = []
    for op in sorted(_implementations):
        choice = choose(op, device=at, dtype=dtype)
        lines.append(f"{op}: {choice.impl} ({choice.reason})")
        for entry in _implementations[op]:
            why = entry.obstacle(at, dtype)
            if entry.name != choice.impl and why is not None:
                lines.append(f"{op}: not {entry.name} ({why})")
    return lines


def _known(op: str) -> list[Implementation]:
    if op not in _implementations:
        raise ConfigError("op", op, f"one of {', '.join(sorted(_implementations))}")
    return _implementations[op]


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, Choice]:
    key = (op, device.type, dtype)
    found = _chosen.get(key)
    if found is None:
        with _lock:
            found = _chosen[key] = _decide(op, device, dtype)
    return found


def _decide(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, Choice]:
    known = _known(op)
    wanted = _forced.get(op)
    passed_over: list[str] = []
    for entry in known:
        if wanted is not None and entry.name != wanted:
            continue
        why_not = entry.obstacle(device, dtype)
        if why_not is None:
            reason = "forced" if wanted is not None else "; ".join([entry.merit, *passed_over])
            return entry, Choice(entry.name, reason)
        if wanted is not None:
            raise ConfigError("impl", wanted, f"an implementation of {op} that can run on {device}: {why_not}")
        passed_over.append(f"{entry.name} cannot run: {why_not}")
    raise ConfigError("device", str(device), f"a device on which {op} can run: {'; '.join(passed_over)}")
