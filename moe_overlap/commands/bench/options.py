"""The command line of `moe-overlap bench layer`, as one frozen record."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.commands.bench.cases import CASES, HEAD, Sizes
from moe_overlap.commands.bench.phases import PHASES
from moe_overlap.commands.bench.routing import KINDS
from moe_overlap.commands.parser import (
    MOST_THREADS,
    OneLineParser,
    TypedDefaults,
    check_count,
    check_timeout,
    flag_of,
)
from moe_overlap.errors import ConfigError
from moe_overlap.transport.link import LinkSpec

SCHEDULES = ("serial", "chunked", "shared_expert", "shortcut", "auto", "expert_groups", "fastermoe", "lancet")
DEFAULT_SCHEDULES = SCHEDULES[:4]  # "auto" calibrates every case first
CASE_OF = {"chunked": "top2", "expert_groups": "top2", "fastermoe": "top2", "lancet": "top2",
           "shared_expert": "shared1", "shortcut": "scmoe"}  # fmt: skip
DEFAULT_PHASES = ("infer", "train")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
COMPUTE = ("real", "slept")
DEFAULT_CASES = ("top2", "shared1", "scmoe_pos2")
DEDUP = ("off", "on", "hierarchical")
LATENCY_S = 50e-6  # of a link whose rate is solved for


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """One benchmark of a block pair. `tokens` are those of one rank, `experts` those of all ranks. device: of each
    node, whose rate is set to the link's (`shaped.py`); not on the command line."""

    ranks: int = 2
    ranks_per_node: int = 1
    threads: int = 1
    tokens: int = 1024
    hidden: int = 512
    ffn: int = 2048
    experts: int = 8
    top_k: int = 2
    dtype: str = "bf16"
    dedup: str = "off"
    link: str = "none"
    comm_share: float | None = None
    schedules: tuple[str, ...] = DEFAULT_SCHEDULES
    cases: tuple[str, ...] = DEFAULT_CASES
    phases: tuple[str, ...] = DEFAULT_PHASES
    routing: str = "balanced"
    compute: str = "real"
    repeats: int = 20
    out: str = "out/bench"
    timeout_s: float = 120.0
    device: str = ""

    def __post_init__(self) -> None:
        for name in "ranks ranks_per_node tokens hidden ffn experts repeats".split():
            check_count(name, getattr(self, name))
        check_count("threads", self.threads, most=MOST_THREADS)
        if not 2 <= self.top_k <= self.experts:
            expected = f"an integer from 2 to --experts ({self.experts}); the shared-expert cases route to one less"
            raise ConfigError("--top-k", self.top_k, expected)
        if self.hidden % HEAD:
            raise ConfigError("--hidden", self.hidden, f"a multiple of {HEAD}, the size of an attention head")
        if "auto" in self.schedules and self.ranks == 1:
            raise ConfigError("--schedules", ",".join(self.schedules), "no auto with one rank: nothing is exchanged")
        if "auto" in self.schedules and not set(self.phases) <= set(DEFAULT_PHASES):
            raise ConfigError("--schedules", ",".join(self.schedules), "no auto with --phases forward or backward")
        if self.experts % self.ranks:
            raise ConfigError("--experts", self.experts, f"a multiple of --ranks ({self.ranks})")
        if self.ranks_per_node > self.ranks or self.ranks % self.ranks_per_node:
            raise ConfigError("--ranks-per-node", self.ranks_per_node, f"a divisor of --ranks ({self.ranks})")
        if self.dtype not in DTYPES:
            raise ConfigError("--dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.dedup not in DEDUP:
            raise ConfigError("--dedup", self.dedup, f"one of {', '.join(DEDUP)}")
        if self.dedup != "off" and self.ranks == 1:
            raise ConfigError("--dedup", self.dedup, "off with one rank: nothing is exchanged")
        if self.dedup == "hierarchical" and not 1 < self.ranks_per_node < self.ranks:
            raise ConfigError("--dedup", self.dedup, "several ranks on a node (--ranks-per-node), and several nodes")
        if self.compute not in COMPUTE:
            raise ConfigError("--compute", self.compute, f"one of {', '.join(COMPUTE)}")
        for name, known in (("schedules", SCHEDULES), ("cases", CASES), ("phases", PHASES)):
            chosen = getattr(self, name)
            unknown = [word for word in chosen if word not in known]
            if unknown or not chosen:
                raise ConfigError(flag_of(name), ",".join(chosen), f"a comma-separated list out of {', '.join(known)}")
        check_timeout(self.timeout_s)
        self._check_link()

    def has_row(self, case: str, schedule: str) -> bool:
        """Whether a case is measured under a schedule."""
        if schedule == "fastermoe" and self.dedup != "off":
            return False  # there is no such form of a cut by peers
        if schedule == "expert_groups" and self.experts < 2 * self.ranks:
            return False
        return case.startswith(CASE_OF.get(schedule, ""))

    def check_schedules(self) -> None:
        """Refuse a schedule that would have no row. For those that were asked for: not all go with some cases."""
        for schedule in self.schedules:
            if not any(self.has_row(case, schedule) for case in self.cases):
                expected = f"no {schedule}, which --cases {','.join(self.cases)} do not have with these options"
                raise ConfigError("--schedules", ",".join(self.schedules), expected)

    def check_cases(self) -> None:
        """The same of cases."""
        for case in self.cases:
            if not any(self.has_row(case, schedule) for schedule in self.schedules):
                expected = f"no {case} beside --schedules {','.join(self.schedules)}, of which it has none"
                raise ConfigError("--cases", ",".join(self.cases), expected)

    def _check_link(self) -> None:
        try:
            link = LinkSpec.parse(self.link)
        except ConfigError as error:
            raise ConfigError("--link", self.link, error.expected) from None
        if link is not None and self.ranks == self.ranks_per_node:
            expected = f"none with one node (--ranks {self.ranks}, --ranks-per-node {self.ranks_per_node})"
            raise ConfigError("--link", self.link, f"{expected}, over whose link nothing goes")
        if self.comm_share is None:
            return
        if not 0.0 < self.comm_share < 1.0:
            raise ConfigError("--comm-share", self.comm_share, "a number between 0 and 1 (e.g. 0.6)")
        if link is not None:
            expected = f"no --link {self.link} beside it: the rate is solved for"
            raise ConfigError("--comm-share", self.comm_share, expected)
        if self.ranks == self.ranks_per_node:
            expected = f"more than one node (--ranks {self.ranks}, --ranks-per-node {self.ranks_per_node})"
            raise ConfigError("--comm-share", self.comm_share, expected)

    @property
    def sizes(self) -> Sizes:
        return Sizes(tokens=self.tokens, hidden=self.hidden, ffn=self.ffn, experts=self.experts, top_k=self.top_k)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


HELP = {
    "ranks": "processes to spawn (under torchrun: its world size)",
    "ranks_per_node": "ranks that talk at full speed; others talk through the link",
    "threads": "threads per rank",
    "tokens": "tokens per rank",
    "hidden": "model width, a multiple of 64",
    "ffn": "width of the dense MLP, the shared expert and each routed expert",
    "experts": "routed experts over all ranks",
    "top_k": "routed experts per token of case top2; the others route to one less and have a shared expert",
    "dtype": "fp32, bf16 or fp64",
    "dedup": "rows that travel: off (one for each expert), on (for each rank) or hierarchical (one to each node)",
    "link": "none, RATE[:LATENCY] of an emulated link, e.g. 400mbit:50us or 1.5GB, or staged, with --device cuda",
    "comm_share": "solve for the link rate at which communication is this share of serial top2, per phase",
    "schedules": "rows to measure, comma-separated: "
    + ", ".join(SCHEDULES)
    + " (calibrates, predicts every row first)",
    "cases": "block pairs to measure, comma-separated: " + ", ".join(CASES),
    "phases": "comma-separated: " + ", ".join(PHASES),
    "routing": ", ".join(KINDS) + " (OUT/routing.safetensors) or a file of train --save-routing",
    "compute": "real, or slept: ops replaced by sleeps of calibrated length (for more ranks than cores)",
    "repeats": "timed runs per row, interleaved",
    "out": "folder for results.jsonl, timeline.png and trace.json",
    "timeout_s": "longest wait for another rank, seconds",
}


EXAMPLES = """examples:
  moe-overlap bench layer --link 400mbit:50us
  moe-overlap bench layer --comm-share 0.6 --phases infer --repeats 5
  moe-overlap bench layer --ranks 8 --compute slept --schedules serial,shortcut,auto
  moe-overlap bench layer --device cuda --link staged
                             (one card, its exchanges over PCIe with the bytes of --ranks, default 8;
                             --cases qwen3,mixtral; --schedules serial,chunked(2),chunked(4),chunked(8),shortcut)"""


def parse(argv: Sequence[str], *, ranks: int | None = None) -> LayerOptions:
    """Options from the command line; ConfigError for a value out of range. `ranks` (torchrun's) wins over --ranks.
    Those of `--device cuda` are `staged.py`'s, which asks before."""
    parser = _parser()
    add_options(parser, LayerOptions(), HELP)
    values = vars(parser.parse_args(argv))
    del values["device"]
    if ranks is not None:
        values["ranks"] = ranks
    found = LayerOptions(**values)
    if found.schedules != DEFAULT_SCHEDULES:
        found.check_schedules()
    if found.cases != DEFAULT_CASES:
        found.check_cases()
    return found


def given_options(argv: Sequence[str]) -> dict[str, Any]:
    """The options that a command line has, by their fields, without any that it leaves out."""
    parser = _parser()
    add_options(parser, LayerOptions(), HELP)
    nothing = argparse.Namespace(**dict.fromkeys(("device", *HELP), argparse.SUPPRESS))
    return {name: value for name, value in vars(parser.parse_args(argv, nothing)).items() if value != argparse.SUPPRESS}


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="moe-overlap bench layer",
        description="Measure schedules of a Mixture-of-Experts block pair against each other.",
        formatter_class=TypedDefaults,
        epilog=EXAMPLES,
    )
    text = "cuda: a whole layer on one card, with --link staged"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=text)
    return parser


def add_options(parser: argparse.ArgumentParser, defaults: Any, texts: Mapping[str, str]) -> None:
    """An option for each field of `texts`, with the type and the value that it has in `defaults`."""
    for name, text in texts.items():
        default = getattr(defaults, name)
        if isinstance(default, tuple):
            parser.add_argument(flag_of(name), type=words_of, default=default, help=text)
        else:
            kind = float if name == "comm_share" else type(default)
            parser.add_argument(flag_of(name), type=kind, default=default, help=text)


def words_of(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
