"""`moe-overlap bench ops`: every fused op against plain PyTorch, and against torch.compile of it, in one process.

The ways are timed one after the other in every round, so that what disturbs a round disturbs all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moe_overlap.commands.bench.ops_cases import NAMES, Case, cases
from moe_overlap.commands.bench.ops_report import print_rows, verdict, write_picture
from moe_overlap.commands.parser import (
    MOST_THREADS,
    OneLineParser,
    TypedDefaults,
    check_count,
    flag_of,
    fresh_folder,
)
from moe_overlap.errors import ConfigError
from moe_overlap.measure.machine import commit, hardware
from moe_overlap.measure.report import Row, write_jsonl
from moe_overlap.ops import registry

PROGRAM = "moe-overlap bench ops"
OUTPUTS = ("results.jsonl", "ops.png")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("forward", "forward+backward")
WARM = 2  # rounds that do not count
FAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest difference over the largest value


@dataclass(frozen=True, kw_only=True)
class OpsOptions:
    """The sizes of one call of each op; `repeats` timed rounds."""

    ops: str = ",".join(NAMES)
    device: str = "cpu"
    dtype: str = "bf16"
    tokens: int = 1024
    hidden: int = 512
    ffn: int = 1024
    experts: int = 16
    top_k: int = 2
    threads: int = 1
    repeats: int = 9
    compile: str = "on"
    out: str = "out/bench-ops"

    def __post_init__(self) -> None:
        for name in "tokens hidden ffn experts top_k repeats".split():
            check_count(name, getattr(self, name), most=1 << 20)
        check_count("threads", self.threads, most=MOST_THREADS)
        if self.top_k > self.experts:
            raise ConfigError("--top-k", self.top_k, f"an integer from 1 to --experts ({self.experts})")
        if self.dtype not in DTYPES:
            raise ConfigError("--dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.compile not in ("on", "off"):
            raise ConfigError("--compile", self.compile, "on or off")
        if unknown := [name for name in self.names if name not in NAMES]:
            raise ConfigError("--ops", unknown[0], f"names among {', '.join(NAMES)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError("--device", self.device, "cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device", self.device, f"cpu: torch {torch.__version__} sees no CUDA device")

    @property
    def names(self) -> list[str]:
        return self.ops.split(",")


HELP = {
    "ops": "which ops, separated by commas",
    "device": "cpu or cuda",
    "dtype": f"of the rows and weights: {', '.join(DTYPES)} (router logits are float32)",
    "tokens": "tokens T",
    "hidden": "model width D",
    "ffn": "width of an expert F",
    "experts": "experts E",
    "top_k": "experts per token K",
    "threads": "threads of torch",
    "repeats": "timed rounds",
    "compile": "on: time torch.compile of the plain form too, which compiles first; off: not",
    "out": "folder for results.jsonl and ops.png",
}
EXAMPLES = """examples:
  moe-overlap bench ops
  moe-overlap bench ops --ops combine,expert_mlp --dtype fp32 --tokens 4096 --compile off
  moe-overlap bench ops --device cuda --tokens 8192 --hidden 2048"""


def parse(argv: Sequence[str]) -> OpsOptions:
    """Options from the command line; ConfigError for a value out of range."""
    parser = OneLineParser(prog=PROGRAM, description="Time every fused op against plain PyTorch and torch.compile.",
                           formatter_class=TypedDefaults, epilog=EXAMPLES)  # fmt: skip
    defaults = OpsOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        parser.add_argument(flag_of(name), type=type(default), default=default, help=text)
    return OpsOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0, or 1 where an op differs from its plain form. ConfigError for bad input."""
    options = parse(argv)
    out = fresh_folder("--out", options.out, OUTPUTS)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run(options, out)
    finally:
        torch.set_num_threads(threads_before)


def run(options: OpsOptions, out: Path) -> int:
    """Check and time each op; rows, table and picture."""
    begin_s, device = time.perf_counter(), torch.device(options.device)
    found = cases(tokens=options.tokens, hidden=options.hidden, ffn=options.ffn, experts=options.experts,
                  top_k=options.top_k, dtype=DTYPES[options.dtype], device=device)  # fmt: skip
    rows: list[Row] = []
    for case in found:
        if case.name not in options.names:
            continue
        print(f"{PROGRAM} [{time.perf_counter() - begin_s:5.1f} s] {case.name}", file=sys.stderr, flush=True)
        compiled = torch.compile(case.plain, dynamic=False) if options.compile == "on" and not case.why_not else None
        far = distance(case)
        if far > FAR.get(case.dtype, 0.0):
            print(f"{PROGRAM}: correctness: {case.name} is {far:.1e} from its plain form", file=sys.stderr, flush=True)
            return 1
        for phase in PHASES[: 1 + bool(case.grads)]:
            rows.append(_row(case, phase, measured(case, compiled, phase, options.repeats), far, options))
            write_jsonl(out / OUTPUTS[0], rows)  # what was measured is there, however the run ends
    write_picture(out / OUTPUTS[1], rows)
    print_rows(rows)
    print(f"wrote {', '.join(str(out / name) for name in OUTPUTS)}")
    print(verdict(rows))
    return 0


def distance(case: Case) -> float:
    """How far the fused op is from the plain one: the largest difference over the largest value; of integers the number
    of different ones."""
    with torch.no_grad():
        got, want = case.fused(*case.args), case.plain(*case.args)
    if not got.is_floating_point():
        return float((got != want).sum())
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def measured(
    case: Case, compiled: Callable[..., torch.Tensor] | None, phase: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each round, by way: "fused", "plain", "compiled". Interleaved; the first WARM rounds do not count."""
    ways = {"fused": case.fused, "plain": case.plain} | ({} if compiled is None else {"compiled": compiled})
    calls = {name: _call(case, function, phase) for name, function in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(WARM + repeats):
        for name, call in calls.items():
            seconds = _seconds(call, case.args[0].device)
            if number >= WARM:
                taken[name].append(seconds)
    return taken


def _call(case: Case, function: Callable[..., torch.Tensor], phase: str) -> Callable[[], object]:
    if phase == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*case.args)

        return forward
    args = tuple(value.detach().requires_grad_(place in case.grads) for place, value in enumerate(case.args))
    leaves = [args[place] for place in case.grads]
    like = case.plain(*case.args)
    pull = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)
    return lambda: torch.autograd.grad(function(*args), leaves, pull)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start_s = now()
    call()
    return now() - start_s


def _row(case: Case, phase: str, taken: dict[str, list[float]], far: float, options: OpsOptions) -> Row:
    """Medians in ms, and the medians of the ratios of each round."""

    def ratio(way: str) -> float | None:
        if way not in taken:
            return None
        return round(median(other / fused for other, fused in zip(taken[way], taken["fused"], strict=True)), 3)

    row: dict[str, Any] = {"op": case.name, "phase": phase, "shape": case.shape, "dtype": str(case.dtype)[6:]}
    for way in ("fused", "plain", "compiled"):
        row[f"{way}_ms"] = round(1e3 * median(taken[way]), 4) if way in taken else None
    row |= {"speedup_vs_plain": ratio("plain"), "speedup_vs_compiled": ratio("compiled")}
    device = torch.device(options.device)
    row |= {"impl": registry.choose(case.name, device=device, dtype=case.dtype).impl, "max_rel_err": far}
    row |= {"not_compiled": case.why_not, "device": options.device, "threads": options.threads}
    row |= {"repeats": options.repeats, "hardware": hardware(), "torch": torch.__version__, "commit": commit()}
    return row | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
