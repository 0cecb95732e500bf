"""Which implementation of an operator runs, and why.

Each operator has implementations in order of preference. `choose` takes the first one that can run here and says why;
`force` fixes one for tests and benchmarks; `explain` lists the state. Nothing falls back silently: asking for an
implementation that cannot run raises ConfigError with the reason. An implementation that was compiled but never checked
on the hardware at hand has a reservation: it runs when forced, and by default only where nothing else can. And one that
can run may be a misfit for the arguments of a call: then the next one goes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops.devices import as_device, check_device

Obstacle = Callable[[torch.device, torch.dtype], "str | None"]
Limit = Callable[..., "str | None"]


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Each of these is None where all is well, else the reason: `obstacle(device, dtype)` why it cannot run there,
    `reservation(device, dtype)` why it is not to be the default where it can run, `limit(*arguments)` why it does not
    take them, `misfit(*arguments)` why another one is the better choice for them where it can run.
    """

    name: str
    call: Callable[..., Any]
    merit: str
    obstacle: Obstacle
    reservation: Obstacle
    limit: Limit | None
    misfit: Limit | None


@dataclass(frozen=True)
class Choice:
    """What was chosen (`impl` is the name of the implementation) and the reason in words."""

    impl: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """An implementation that can run, why it comes where it does, and whether that is for want of anything better."""

    entry: Implementation
    choice: Choice
    reserved: bool = False


# In order of preference.
Candidates = tuple[Candidate, ...]

_implementations: dict[str, list[Implementation]] = {}
_forced: dict[str, str] = {}
_chosen: dict[tuple[str, torch.device, torch.dtype], Candidates] = {}
_lock = threading.RLock()


def add(
    op: str,
    name: str,
    call: Callable[..., Any],
    *,
    merit: str,
    obstacle: Obstacle | None = None,
    reservation: Obstacle | None = None,
    limit: Limit | None = None,
    misfit: Limit | None = None,
    preferred: bool = False,
) -> None:
    """Make an implementation known. `merit` says why one would take it; `preferred` puts it before the others."""
    with _lock:
        known = _implementations.setdefault(op, [])
        entry = Implementation(name, call, merit, obstacle or _nothing, reservation or _nothing, limit, misfit)
        known.insert(0 if preferred else len(known), entry)
        _chosen.clear()


def choose(
    op: str, *, device: torch.device | str, dtype: torch.dtype, arguments: Sequence[Any] | None = None
) -> Choice:
    """The implementation of `op` that runs for a first argument of this device and dtype, with the reason.

    `arguments` are those of one call, for implementations that take or suit only some sizes; None: any that fit. Raises
    ConfigError for an operator that does not exist and for a forced implementation that cannot run.
    """
    candidates = _candidates(op, as_device(device), dtype)
    if arguments is None:
        return candidates[0].choice
    best, passed_over = _best(op, candidates, arguments)
    return Choice(best.choice.impl, "; ".join([best.choice.reason, *passed_over]))


def kernel(op: str) -> Callable[..., Any]:
    """The function registered with the dispatcher: looks up the choice for its arguments and calls it.

    The first argument is a tensor, or an object that has a device and a dtype.
    """

    def run(*args: Any) -> Any:
        return chosen(op, *args)(*args)

    return run


def chosen(op: str, first: Any, *args: Any) -> Callable[..., Any]:
    """What `kernel(op)` calls for these arguments."""
    candidates = _candidates(op, first.device, first.dtype)
    entry = candidates[0].entry
    # What `_best` asks of the first one, without its notes: this runs several times in every call.
    if (entry.limit is not None and entry.limit(first, *args) is not None) or (
        entry.misfit is not None and entry.misfit(first, *args) is not None
    ):
        entry = _best(op, candidates, (first, *args))[0].entry
    return entry.call


def function(op: str, impl: str) -> Callable[..., Any]:
    """What an implementation calls, without the dispatcher: for benchmarks. Raises ConfigError where there is none."""
    for entry in _known(op):
        if entry.name == impl:
            return entry.call
    raise ConfigError("impl", impl, f"an implementation of {op}: {', '.join(entry.name for entry in _known(op))}")


@contextmanager
def force(op: str, impl: str) -> Iterator[None]:
    """Run `op` by `impl` inside the block, in the whole process (backward may run in other threads).

    Raises ConfigError at once when the implementation does not exist; one that exists but cannot run for the
    arguments at hand raises when it is called.
    """
    function(op, impl)
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
    at = _present(device)
    lines = []
    for op in sorted(_implementations):
        choice = choose(op, device=at, dtype=dtype)
        lines.append(f"{op}: {choice.impl} ({choice.reason})")
        for entry in _implementations[op]:
            why = entry.obstacle(at, dtype) or entry.reservation(at, dtype)
            if entry.name != choice.impl and why is not None:
                lines.append(f"{op}: not {entry.name} ({why})")
    return lines


def grouped(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """What runs on this device, a line for each implementation: "on cpu: reference for 9 ops (gate_topk, ...)". The
    reasons are `explain`'s."""
    at = _present(device)
    ops_of: dict[str, list[str]] = {}
    for op in sorted(_implementations):
        ops_of.setdefault(choose(op, device=at, dtype=dtype).impl, []).append(op)
    by_count = sorted(ops_of.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"on {at}: {impl} for {len(ops)} op{'s' if len(ops) > 1 else ''} ({', '.join(ops)})"
            for impl, ops in by_count]  # fmt: skip


def _present(device: torch.device | str) -> torch.device:
    check_device(device)
    return as_device(device)


def _nothing(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _known(op: str) -> list[Implementation]:
    if op not in _implementations:
        raise ConfigError("op", op, f"one of {', '.join(sorted(_implementations))}")
    return _implementations[op]


def _candidates(op: str, device: torch.device, dtype: torch.dtype) -> Candidates:
    key = (op, device, dtype)
    found = _chosen.get(key)
    if found is None:
        with _lock:
            found = _chosen[key] = _decide(op, device, dtype)
    return found


def _best(op: str, candidates: Candidates, arguments: Sequence[Any]) -> tuple[Candidate, list[str]]:
    """The first that takes the arguments and suits them, else the first that takes them; and why not the others."""
    passed_over: list[str] = []
    able: Candidate | None = None
    for candidate in candidates:
        entry = candidate.entry
        if entry.limit is not None and (why_not := entry.limit(*arguments)) is not None:
            passed_over.append(f"{entry.name} does not take these arguments: {why_not}")
        elif candidate.reserved and able is not None:
            break
        elif entry.misfit is not None and (why_not := entry.misfit(*arguments)) is not None:
            able = able or candidate
            passed_over.append(f"{entry.name} does not suit these arguments: {why_not}")
        else:
            able = candidate
            break
    if able is None:
        expected = f"an implementation of {op} for these arguments: {passed_over[0]}"
        raise ConfigError("impl", candidates[0].entry.name, expected)
    return able, passed_over


def _decide(op: str, device: torch.device, dtype: torch.dtype) -> Candidates:
    wanted = _forced.get(op)
    if wanted is not None:
        (entry,) = (entry for entry in _known(op) if entry.name == wanted)
        why_not = entry.obstacle(device, dtype)
        if why_not is not None:
            raise ConfigError("impl", wanted, f"an implementation of {op} that can run on {device}: {why_not}")
        return (Candidate(entry, Choice(wanted, "forced")),)
    passed_over: list[str] = []
    able: list[Candidate] = []
    reserved: list[Implementation] = []
    for entry in _known(op):
        if (why_not := entry.obstacle(device, dtype)) is not None:
            passed_over.append(f"{entry.name} cannot run: {why_not}")
        elif (doubt := entry.reservation(device, dtype)) is not None:
            passed_over.append(f"{entry.name} is not the default: {doubt}")
            reserved.append(entry)
        else:
            able.append(Candidate(entry, Choice(entry.name, "; ".join([entry.merit, *passed_over]))))
    last_resort = "; ".join(["nothing else can run", *passed_over])
    able += [Candidate(entry, Choice(entry.name, last_resort), reserved=True) for entry in reserved]
    if not able:
        raise ConfigError("device", str(device), f"a device on which {op} can run: {'; '.join(passed_over)}")
    return tuple(able)
