"""The command line of `moe-overlap plan`, as one frozen record in SI units."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moe_overlap.commands.parser import OneLineParser, check_count, check_number, flag_of
from moe_overlap.commands.plan.traffic import saved
from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.window import Slowdown
from moe_overlap.transport.link import LinkSpec

KINDS = ("top2", "shared1", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3")
PHASES = ("infer", "train")
DEDUP = ("off", "on", "auto")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
MAX_FILE_BYTES = 1 << 20
LONGEST_S = 3600.0
FASTEST_FLOPS = 1e24

_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ns|us|ms|s)")
_TIMES = {"ns": "e-9", "us": "e-6", "ms": "e-3", "s": ""}
_FLOPS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([gtp])flops?(?:/s)?")
_NEGATIVE = re.compile(r"-[.\d]")
_FLOPS_UNITS = {"g": "e9", "t": "e12", "p": "e15"}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """One question. Rates are those of one rank, in bytes or FLOPs per second; times in seconds.

    `flops` to `backbone` are assumptions about the machine, which a `cost_model` replaces; beside one, None among the
    wires' figures means what was calibrated. `kind` None: top2.
    """

    ranks: int = 64
    ranks_per_node: int = 8
    tokens: int = 8192
    hidden: int = 4096
    ffn: int = 8192
    experts: int = 64
    top_k: int = 2
    dtype: str = "bf16"
    kind: str | None = None
    phase: str = "train"
    dedup: str = "auto"
    routing: str | None = None
    bandwidth: float | None = 50e9
    latency: float | None = 10e-6
    intra_bandwidth: float | None = 450e9
    flops: float = 400e12
    memory_bandwidth: float = 2.5e12
    message: float = 1e-6
    launch: float = 20e-6
    issue: float = 5e-6
    compute_slowdown: float = 1.1
    wire_slowdown: float = 1.0
    sequence: int = 4096
    backbone: tuple[float, ...] | None = None
    cost_model: CostModel | None = None
    expert_offload: float | None = None
    out: str = "out/plan"

    def __post_init__(self) -> None:
        for name in "ranks ranks_per_node tokens hidden ffn experts top_k sequence".split():
            check_count(name, getattr(self, name))
        larger, smaller = max(self.ranks, self.experts), min(self.ranks, self.experts)
        if larger % smaller:
            expected = f"a multiple or a divisor of --experts ({self.experts}): ranks have equally many experts"
            raise ConfigError("--ranks", self.ranks, expected)
        if self.ranks_per_node < self.ranks and self.ranks % self.ranks_per_node:
            expected = f"a divisor of --ranks ({self.ranks}), or as many and more where one node has them all"
            raise ConfigError("--ranks-per-node", self.ranks_per_node, expected)
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError("--dtype", self.dtype, f"one of {', '.join(DTYPE_BYTES)}")
        if self.phase not in PHASES:
            raise ConfigError("--phase", self.phase, f"one of {', '.join(PHASES)}")
        if self.dedup not in DEDUP:
            raise ConfigError("--dedup", self.dedup, f"one of {', '.join(DEDUP)}")
        if self.dedup == "on" and self.cost_model is not None and self.cost_model.distinct is None:
            expected = "off, or a --cost-model that was calibrated with --dedup"
            raise ConfigError("--dedup", self.dedup, expected)
        for name in ("compute_slowdown", "wire_slowdown"):
            check_number(name, getattr(self, name), 1, 100)
        self._check_kind()
        if self.routing is not None:
            saved(self.routing, self.experts, self.top_k)

    def _check_kind(self) -> None:
        if self.cost_model is not None:
            if self.top_k > self.experts:
                raise ConfigError("--top-k", self.top_k, f"an integer from 1 to --experts ({self.experts})")
            return
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError("--kind", self.kind, f"one of {', '.join(KINDS)}")
        if not 2 <= self.top_k <= self.experts:
            expected = f"an integer from 2 to --experts ({self.experts}); the shared-expert kinds route to one less"
            raise ConfigError("--top-k", self.top_k, expected)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The block pairs to compare, the one that is asked about first."""
        if self.cost_model is not None:
            return ("calibrated",)
        asked = self.kind or KINDS[0]
        return (asked, *(kind for kind in KINDS if kind != asked))

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def slowdown(self) -> Slowdown:
        return Slowdown(compute=self.compute_slowdown, wire=self.wire_slowdown)

    def to_json(self) -> dict[str, Any]:
        """The options as they were understood, in SI units."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return found | {"cost_model": None if self.cost_model is None else self.cost_model.to_json()}


def _rate(flag: str, text: str) -> float:
    expected = "a rate such as 400gbit or 50GB (kbit mbit gbit kB MB GB per second)"
    try:
        link = None if ":" in text else LinkSpec.parse(text)
    except ConfigError:
        link = None
    if link is None:
        raise ConfigError(flag, text, expected)
    return link.bytes_per_s


def _rate_or_none(flag: str, text: str) -> float | None:
    return _rate(flag, text) if text else None


def _seconds(flag: str, text: str) -> float:
    match = _TIME.fullmatch(text.strip().lower())
    seconds = float(match[1] + _TIMES[match[2]]) if match else math.inf  # as text, so that 10us is 1e-5 exactly
    if seconds > LONGEST_S:
        raise ConfigError(flag, text, f"a time from 0 to {LONGEST_S:g}s, such as 10us (ns us ms s)")
    return seconds


def _flops(flag: str, text: str) -> float:
    match = _FLOPS.fullmatch(text.strip().lower())
    flops = float(match[1] + _FLOPS_UNITS[match[2]]) if match else math.inf
    if not 1 <= flops <= FASTEST_FLOPS:
        raise ConfigError(
            flag, text, f"a rate up to {FASTEST_FLOPS:g} a second, such as 400tflops (gflops tflops pflops)"
        )
    return flops


def _backbone(flag: str, text: str) -> tuple[float, ...] | None:
    if text == "auto":
        return None
    words = text.split(",")
    if len(words) != 3:
        raise ConfigError(flag, text, "auto, or the times of attention, MLP, attention, such as 1.2ms,0.8ms,1.2ms")
    return tuple(_seconds(flag, word) for word in words)


def _cost_model(flag: str, path: str) -> CostModel | None:
    if not path:
        return None
    try:
        return CostModel.from_json(json.loads(read_regular(Path(path), most_bytes=MAX_FILE_BYTES)))
    except OSError as error:
        raise ConfigError(flag, path, f"a file that can be read ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(flag, path, f"a cost model: {error}") from None
    except (ValueError, RecursionError):
        raise ConfigError(flag, path, "a JSON file of moe-overlap calibrate") from None


# Option -> (how its text is read, default as text, help).
TEXTS: dict[str, tuple[Any, str, str]] = {
    "bandwidth": (_rate, "400gbit", "of one rank to other nodes"),
    "latency": (_seconds, "10us", "of one exchange, whatever its size"),
    "intra_bandwidth": (_rate, "450GB", "of one rank to the ranks of its node"),
    "flops": (_flops, "400tflops", "assumed: rate that matmuls reach beside nothing, not the peak"),
    "memory_bandwidth": (_rate, "2500GB", "assumed: for permuting, packing and combining rows"),
    "message": (_seconds, "1us", "assumed: of each message of an exchange, one per peer"),
    "launch": (_seconds, "20us", "assumed: fixed cost of the experts on one chunk, of P and of U"),
    "issue": (_seconds, "5us", "assumed: compute-lane time of starting an exchange, and of waiting for it"),
    "backbone": (_backbone, "auto", "auto (from FLOPs), or forward times of attention, MLP, attention: 1ms,2ms,1ms"),
    "cost_model": (_cost_model, "", "calibrated JSON instead of --flops and the other assumptions about compute"),
    "expert_offload": (_rate_or_none, "", "experts in host memory, over a link of this rate in each direction (50GB)"),
}
HELP = {
    "ranks": "ranks; with more than --experts, groups of --experts ranks exchange among themselves",
    "ranks_per_node": "ranks that share a node",
    "tokens": "tokens per rank",
    "hidden": "model width",
    "ffn": "width of the dense MLP, the shared expert and each routed expert (SwiGLU)",
    "experts": "routed experts over all ranks",
    "top_k": "routed experts per token of kind top2; the others route to one less and have a shared expert",
    "dtype": "of weights and rows: " + ", ".join(DTYPE_BYTES),
    "kind": "block pair to explain: " + ", ".join(KINDS) + " (default top2; with --cost-model as calibrated)",
    "dedup": "one row for each (token, rank): off, on, or auto (where it is predicted to be faster)",
    "routing": "saved routing (moe-overlap train --save-routing), whose tokens are taken instead of equally many rows "
    "for every expert",
    "phase": "infer (forward) or train (forward and backward)",
    "compute_slowdown": "assumed: how much longer compute takes while an exchange is under way (16 of 132 SMs: 1.14)",
    "wire_slowdown": "assumed: how much longer an exchange takes beside compute",
    "sequence": "assumed: tokens that attention looks at (causal; at most --tokens)",
    "out": "folder for plan.png and plan.json",
}
# Options about the wires, which replace what a cost model was calibrated with only where they are given.
WIRES = ("bandwidth", "latency", "intra_bandwidth")
# Options that a cost model answers instead.
CALIBRATED = (
    "flops", "memory_bandwidth", "message", "launch", "issue", "compute_slowdown", "wire_slowdown", "backbone", "kind",
    "sequence",
)  # fmt: skip


def parse(argv: Sequence[str]) -> PlanOptions:
    """Options from the command line; ConfigError names the option, the value and what was expected."""
    parser = OneLineParser(
        prog="moe-overlap plan",
        description="Predict, from numbers alone, which schedule of a MoE block pair wins where.",
    )
    defaults = PlanOptions()
    for field in fields(PlanOptions):
        if field.name in TEXTS:
            _, default, text = TEXTS[field.name]
            parser.add_argument(flag_of(field.name), metavar="TEXT", help=f"{text} (default: {default or 'none'})")
        else:
            value = getattr(defaults, field.name)
            said = HELP[field.name] if value is None else f"{HELP[field.name]} (default: {value})"
            parser.add_argument(
                flag_of(field.name), type=str if value is None else type(value), default=value, help=said
            )
    values = vars(parser.parse_args(_with_negative_values(argv)))
    if values["cost_model"] == "":
        raise ConfigError("--cost-model", "", "a file of moe-overlap calibrate --out")
    calibrated = values["cost_model"] is not None
    for name in CALIBRATED:
        if calibrated and values[name] not in (None, getattr(defaults, name)):
            raise ConfigError(flag_of(name), values[name], "no such option beside --cost-model, which says what it is")
    for name, (read, default, _) in TEXTS.items():
        if values[name] is None and calibrated and name in WIRES:
            continue
        values[name] = read(flag_of(name), default if values[name] is None else values[name])
    return PlanOptions(**values)


def _with_negative_values(argv: Sequence[str]) -> list[str]:
    """`--latency -1us` as `--latency=-1us`: argparse takes the second word for an option, and says so."""
    words: list[str] = []
    for word in argv:
        if _NEGATIVE.match(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=" + word
        else:
            words.append(word)
    return words
