"""Run the checks: `run` on the ranks of a group that is there, `check` on ranks that it starts."""

from __future__ import annotations

import faulthandler
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World, spawn
from moe_overlap.verify import checks, checks_of_training, checks_of_use
from moe_overlap.verify.kit import KINDS, Factory, Kit, Note, Setup, break_off, new_group
from moe_overlap.verify.report import Finding, Report
from moe_overlap.verify.tolerances import TOLERANCES

TIMEOUT_S = 15.0
LIMIT_S = 120.0
REPORT = "report.json"
MOST_APART = 2  # each costs a timeout
PROGRAM = "moe-overlap verify"


@dataclass(frozen=True)
class Check:
    """What is done under which name, and when not.

    needs: optional methods of the adapter. own: only where ranks have tokens of their own. empty: only where a rank may
    have none. first: without it right, nothing can be said about the rest. apart: it compares n ranks with n ranks, so
    that what another check found does not show in it. steps: it compares what came of whole steps.
    """

    title: str
    run: Callable[[Kit], None]
    needs: tuple[str, ...] = ()
    own: bool = False
    empty: bool = False
    first: bool = False
    apart: bool = False
    steps: bool = False


CHECKS = (
    Check("values", checks.values, first=True),
    Check("routing", checks.routing, first=True),
    Check("output", checks.output),
    Check("gradients", checks.gradients),
    Check("norm and clip", checks.clip, ("clip",), steps=True),
    Check("AdamW step", checks_of_training.adamw_step, ("optimizer_step",), steps=True),
    Check("save, reshard, load", checks_of_training.reshard, ("save", "load", "optimizer_step"), apart=True),
    Check("recompute", checks_of_training.recompute, ("checkpointed",), apart=True),
    Check("two micro-batches", checks.micro_batches),
    Check("a rank without tokens", checks.no_tokens, own=True, empty=True),
    Check("uneven tokens", checks.uneven_tokens, own=True),
    Check("idle experts", checks_of_use.idle_experts),
    Check("two forwards", checks_of_use.two_forwards),
    Check("evaluation", checks_of_use.evaluation),
    Check("auxiliary loss", checks.auxiliary_loss, ("aux_loss",)),
    Check("training", checks_of_training.training, ("optimizer_step",), steps=True),
    Check("determinism", checks_of_training.determinism, apart=True),
)


def run(
    factory: Factory,
    group: dist.ProcessGroup | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    timeout_s: float = TIMEOUT_S,
    keep: Path | None = None,
) -> Report:
    """Compare the adapter's module on the ranks of `group` (None: all) with that on one rank; the same report on every
    rank. Collective; CPU and gloo, at least two ranks. timeout_s: longest wait for another rank within a check.
    keep: a folder for what is known so far, in case that some rank never comes back: error-RANK, what the module raised
    on that rank, and report.json, which rank 0 writes after every check.

    Raises ConfigError for what cannot be run. Whatever the module raises is a finding.
    """
    world = _world(group, timeout_s)
    adapter = factory()
    _check_arguments(adapter.experts, world.size, dtype)
    precision = max(dtype, adapter.coarsest or dtype, key=lambda one: TOLERANCES[one].rtol)
    setup = Setup(
        factory=factory, dtype=dtype, precision=precision, same_tokens=adapter.same_tokens, timeout_s=timeout_s
    )
    report = Report(adapter=adapter.name, ranks=world.size, dtype=str(dtype).removeprefix("torch."))
    start_s = time.perf_counter()
    stop, apart = "", 0
    for check in CHECKS:
        missing = [name for name in check.needs if not adapter.has(name)]
        reason = stop or (f"the adapter has no {', '.join(missing)}" if missing else "")
        if check.own and adapter.same_tokens:
            reason = reason or "all ranks compute the same tokens"
        if check.empty and not adapter.may_be_empty:
            reason = reason or "the adapter's ranks always have tokens"
        if reason:
            report.not_checked.append(f"{check.title} ({reason})")
            continue
        found, lost = _one_check(check, setup, world, keep)
        known = {finding.topic for finding in report.findings}
        report.findings += [replace(finding, follows=_follows(finding, check, known)) for finding in found]
        if not found:
            report.passed.append(check.title)
        elif check.first:
            stop = f"no verdict, as {check.title} {'differs' if check.title == 'routing' else 'differ'}"
        apart += lost
        if apart == MOST_APART:
            stop = f"the ranks went apart in {MOST_APART} checks, the last of them {check.title}"
        _keep(report, keep if world.rank == 0 else None, start_s)
    _keep(report, keep if world.rank == 0 else None, start_s)
    dist.destroy_process_group(world.group)
    return report


def check(
    factory: Factory,
    ranks: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    timeout_s: float = TIMEOUT_S,
    limit_s: float = LIMIT_S,
) -> Report:
    """`run` in `ranks` new processes on this machine. factory: an adapter's class, or a function of a module, since the
    processes import it. limit_s: after that many seconds a rank shows its stack and ends, and so do all.

    A rank that ends without a report is a finding too. Raises ConfigError for what cannot be run.
    """
    _check_arguments(factory().experts, ranks, dtype)
    with tempfile.TemporaryDirectory(prefix="moe_overlap-verify-") as folder:
        keep = Path(folder)
        main = partial(_rank, factory=factory, dtype=dtype, timeout_s=timeout_s, limit_s=limit_s, keep=keep)
        status = spawn(main, (), ranks, timeout_s=limit_s, program=PROGRAM)
        report = Report(adapter=factory().name, ranks=ranks, dtype=str(dtype).removeprefix("torch."))
        if (keep / REPORT).exists():
            report = Report.from_json((keep / REPORT).read_text(encoding="utf-8"))
        said = "; ".join(path.read_text(encoding="utf-8") for path in sorted(keep.glob("error-*")))
    if status:
        last = report.passed[-1] if report.passed else "the beginning"
        how = f"ended with status {status} after {last} ({said or 'no rank raised: see the stacks it wrote to stderr'})"
        report.findings.append(Finding(check="the run", what="a rank", how=how, look="what that rank does there",
                                       ranks=tuple(range(ranks)), topic="lost"))  # fmt: skip
    return report


def _rank(
    world: World,
    _: Sequence[str],
    *,
    factory: Factory,
    dtype: torch.dtype,
    timeout_s: float,
    limit_s: float,
    keep: Path,
) -> int:
    """What a new process does."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(limit_s, exit=True)
    run(factory, world.group, dtype=dtype, timeout_s=timeout_s, keep=keep)
    faulthandler.cancel_dump_traceback_later()
    return 0


def _keep(report: Report, folder: Path | None, start_s: float) -> None:
    """What the report is so far."""
    report.seconds = round(time.perf_counter() - start_s, 2)
    if folder is None:
        return
    part = folder / f"{REPORT}.part"
    part.write_text(report.to_json(), encoding="utf-8")
    part.replace(folder / REPORT)


def _world(group: dist.ProcessGroup | None, timeout_s: float) -> World:
    """The ranks, with a group of their own on which findings are exchanged."""
    if not dist.is_initialized():
        raise ConfigError(
            "group", group, "torch.distributed initialised (torchrun), or verify.check, which starts ranks"
        )
    there = group or dist.group.WORLD
    assert there is not None
    # A check has some waits in a row, and one rank may be in the last of them when the other is through.
    control = new_group(there, there.size(), 10 * timeout_s + 60)
    return World(rank=control.rank(), size=control.size(), group=control)


def _check_arguments(experts: int, ranks: int, dtype: torch.dtype) -> None:
    if ranks < 2:
        raise ConfigError("ranks", ranks, "at least 2, since one is what they are compared with")
    if experts % ranks:
        raise ConfigError("ranks", ranks, f"a divisor of the adapter's {experts} experts")
    if dtype not in TOLERANCES:
        raise ConfigError("dtype", dtype, f"one of {', '.join(map(str, TOLERANCES))}")


def _one_check(check: Check, setup: Setup, world: World, keep: Path | None) -> tuple[list[Finding], bool]:
    """What all ranks found, and whether they went apart: one raised and another one did not, or waited in vain."""
    assert world.group is not None
    raised, raised_s, notes = "", 0.0, []
    kit = Kit(setup, world.group)
    try:
        check.run(kit)
        notes = kit.notes
    except Exception as error:
        raised, raised_s = _in_words(error), time.monotonic()
        break_off(kit.group)
        if keep is not None:
            (keep / f"error-{world.rank}").write_text(
                f"{check.title}: rank {world.rank} raised {raised}", encoding="utf-8"
            )
    mine = {"raised": raised, "raised_s": raised_s, "notes": [asdict(note) for note in notes]}
    everyone = [json.loads(text) for text in world.gather_text(json.dumps(mine))]
    kit.close()
    found = _joined(check.title, [[Note(**note) for note in one["notes"]] for one in everyone])
    failed = {rank: one for rank, one in enumerate(everyone) if one["raised"]}
    if failed:
        texts = {one["raised"] for one in failed.values()}
        first = min(failed, key=lambda rank: failed[rank]["raised_s"])
        ranks = tuple(failed) if len(texts) == 1 else (first,)
        look = "the traceback of that rank's error, its last line in the module"
        how = f"raised {failed[first]['raised']}"
        found.append(Finding(check=check.title, what="the module", how=how, look=look, ranks=ranks, topic=how))
    return found, 0 < len(failed) and (len(failed) < world.size or len({one["raised"] for one in failed.values()}) > 1)


def _follows(finding: Finding, check: Check, known: Set[str]) -> bool:
    """Whether what was found in earlier checks, topics `known`, explains this."""
    if check.apart or finding.topic == "norm":
        return False
    if "output" in known or finding.topic in known:
        return True
    return check.steps and finding.topic in KINDS and bool(known & {"input", *KINDS})


def _in_words(error: Exception) -> str:
    """Type, text and place of an error, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} ({text}) at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _joined(title: str, notes: Sequence[Sequence[Note]]) -> list[Finding]:
    """The ranks' notes: one finding for each key, in the words of the first rank that has it."""
    first: dict[str, Note] = {}
    ranks: dict[str, list[int]] = {}
    for rank, its in enumerate(notes):
        for note in its:
            first.setdefault(note.key, note)
            ranks.setdefault(note.key, [])
            if rank not in ranks[note.key]:
                ranks[note.key].append(rank)
    return [
        Finding(check=title, what=note.what, how=note.how, look=note.look, ranks=tuple(ranks[key]), topic=note.topic)
        for key, note in first.items()
    ]
