"""The command line of `moe-overlap bench balance`, as one frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.commands.bench.cases import HEAD
from moe_overlap.commands.bench.options import DTYPES
from moe_overlap.commands.bench.workloads import WORKLOADS, Sizes
from moe_overlap.commands.parser import OneLineParser, TypedDefaults, check_count, check_number, check_timeout, flag_of
from moe_overlap.errors import ConfigError

KEPT = ("flex", "eplb", "proportional")  # placements made once from the load of earlier steps; homes stay
PLANNERS = ("static", "replicate", "switch", "shadow", *KEPT)
# The dense op runs before the layer, or beside it (ScMoE); with "exposed" copies alone are waited for where they start.
SCHEDULES = ("serial", "chunked", "auto", "shortcut", "shortcut_exposed")
LIVE_SCHEDULE = "chunked"  # of --live-steps
NOT_LIVE = {
    "planners": "compares homes alone with FlexMoE's planner",
    "oracle_s": "searches for no best copies",
    "repeats": "times each of its steps once",
}
COMPUTE = ("slept", "real")
MOST_SEED = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """One layer behind a dense op. `tokens` are those of one rank, `experts` those of all ranks."""

    ranks: int = 8
    ranks_per_node: int = 4
    tokens: int = 512
    hidden: int = 64
    ffn: int = 256
    experts: int = 16
    top_k: int = 2
    dtype: str = "fp32"
    slots: int = 2
    chunks: int = 4
    workloads: tuple[str, ...] = ("balanced", "zipf1.0")
    planners: tuple[str, ...] = ("static", "replicate", "shadow", "flex")
    schedules: tuple[str, ...] = ("serial", "chunked")
    live_steps: int = 0
    recorded: str = ""
    compute: str = "slept"
    comm_share: float = 0.3
    moe_share: float = 0.85
    compute_ms: float = 60.0
    latency_us: float = 200.0
    oracle_s: float = 60.0
    seed: int = 0
    repeats: int = 5
    out: str = "out/balance"
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in "ranks ranks_per_node tokens hidden ffn experts chunks repeats".split():
            check_count(name, getattr(self, name))
        check_count("slots", self.slots, least=0)
        check_count("live_steps", self.live_steps, least=0)
        check_count("seed", self.seed, least=0, most=MOST_SEED)
        check_count("chunks", self.chunks, most=16)
        if self.ranks < 2 or self.ranks % self.ranks_per_node or self.ranks == self.ranks_per_node:
            raise ConfigError("--ranks-per-node", self.ranks_per_node, f"a divisor of --ranks ({self.ranks}), below it")
        if self.experts % self.ranks:
            raise ConfigError("--experts", self.experts, f"a multiple of --ranks ({self.ranks})")
        if self.hidden % HEAD:
            raise ConfigError("--hidden", self.hidden, f"a multiple of {HEAD}, as for the calibration of sleeps")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError("--top-k", self.top_k, f"an integer from 1 to --experts ({self.experts})")
        if self.compute not in COMPUTE:
            raise ConfigError("--compute", self.compute, f"one of {', '.join(COMPUTE)}")
        if self.dtype not in DTYPES:
            raise ConfigError("--dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for name, known in (("workloads", tuple(WORKLOADS)), ("planners", PLANNERS), ("schedules", SCHEDULES)):
            chosen = getattr(self, name)
            if not chosen or any(word not in known for word in chosen):
                raise ConfigError(flag_of(name), ",".join(chosen), f"a comma-separated list out of {', '.join(known)}")
        if self.live_steps and self.schedules not in (type(self).schedules, (LIVE_SCHEDULE,)):
            expected = f"{LIVE_SCHEDULE}, which is what --live-steps runs"
            raise ConfigError("--schedules", ",".join(self.schedules), expected)
        self._check_ignored()
        if "recorded" in self.workloads and not self.recorded:
            raise ConfigError("--recorded", self.recorded, "a routing file (moe-overlap train --save-routing FILE)")
        if self.recorded and "recorded" not in self.workloads:
            raise ConfigError("--recorded", self.recorded, "recorded among --workloads beside it")
        check_number("comm_share", self.comm_share, 0.01, 0.95)
        check_number("moe_share", self.moe_share, 0.05, 1.0)
        check_number("compute_ms", self.compute_ms, 1.0, 10000.0, " milliseconds")
        check_number("latency_us", self.latency_us, 0.0, 1e6, " microseconds")
        check_number("oracle_s", self.oracle_s, 0.0, 3600.0, " seconds")
        check_timeout(self.timeout_s)

    def _check_ignored(self) -> None:
        """Refuses what nothing would look at, where it is not the default."""
        ignored = {name: f"--live-steps, which {why}" for name, why in NOT_LIVE.items() if self.live_steps}
        if self.compute == "real":
            ignored |= dict.fromkeys(("moe_share", "compute_ms"), "--compute real, which takes as long as it takes")
        if set(self.schedules) == {"serial"}:
            ignored["chunks"] = "--schedules serial, which has one"
        for name, why in ignored.items():
            given = getattr(self, name)
            if given != getattr(type(self), name) and given != 0.0:  # 0: no search, as it is
                text = ",".join(given) if isinstance(given, tuple) else given
                raise ConfigError(flag_of(name), text, f"no such option beside {why}")

    @property
    def sizes(self) -> Sizes:
        return Sizes(ranks=self.ranks, ranks_per_node=self.ranks_per_node, tokens=self.tokens, experts=self.experts,
                     top_k=self.top_k)  # fmt: skip

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


HELP = {
    "ranks": "processes to spawn (under torchrun: its world size)",
    "ranks_per_node": "ranks that talk at full speed; others talk through the emulated link",
    "tokens": "tokens per rank",
    "hidden": "model width",
    "ffn": "width of each expert",
    "experts": "experts over all ranks, a multiple of --ranks",
    "top_k": "experts per token",
    "dtype": "fp32, bf16 or fp64",
    "slots": "slots for copies on each rank, beside its own experts",
    "chunks": "chunks of the overlapped schedules",
    "workloads": "comma-separated: " + ", ".join(WORKLOADS),
    "planners": "rows of each workload, comma-separated: " + ", ".join(PLANNERS),
    "schedules": "of each planner, comma-separated: " + ", ".join(SCHEDULES) + "; auto: planned from the slept prices; "
    "in a shortcut the dense op is beside the layer, exposed: copies are waited for where they start",
    "live_steps": "instead: so many chunked steps in a row, with homes alone and with a placement of FlexMoE's planner "
    "that follows the load (refuses --planners, --oracle-s, --repeats)",
    "recorded": "routing file of workload recorded (moe-overlap train --save-routing)",
    "compute": "slept: experts and dense op sleep; real: they compute, which takes a core for each rank",
    "comm_share": "share of the exchanges in a serial step with balanced load: sets the rate of the link",
    "moe_share": "slept: share of the layer in a serial step with balanced load, which sets the dense op",
    "compute_ms": "slept: milliseconds of a rank's experts in a step with balanced load, both phases together",
    "latency_us": "latency of the emulated link, microseconds",
    "oracle_s": "longest search for the best copies of each workload and schedule (oracle_ms, of_oracle), by rank 0 "
    "after all measurements, seconds; 0: none",
    "seed": "of popularity, tokens and weights",
    "repeats": "timed steps per row, interleaved",
    "out": "folder for results.jsonl and balance.png",
    "timeout_s": "longest wait for another rank, seconds",
}
EXAMPLES = """examples:
  moe-overlap bench balance --workloads zipf1.0,one_hot_expert --planners static,replicate,shadow,flex
  moe-overlap bench balance --ranks 2 --ranks-per-node 1 --compute real --repeats 5
  moe-overlap bench balance --live-steps 100"""


def parse(argv: Sequence[str], *, ranks: int | None = None) -> BalanceOptions:
    """Options from the command line; ConfigError for a value out of range. `ranks` (torchrun's) wins over --ranks."""
    parser = OneLineParser(
        prog="moe-overlap bench balance",
        description="Measure placements and copies of experts under skewed routing.",
        formatter_class=TypedDefaults,
        epilog=EXAMPLES,
    )
    defaults = BalanceOptions()
    for name, text in HELP.items():
        default = getattr(defaults, name)
        if isinstance(default, tuple):
            parser.add_argument(flag_of(name), type=_words, default=default, help=text)
        else:
            parser.add_argument(flag_of(name), type=type(default), default=default, help=text)
    values = vars(parser.parse_args(argv))
    if ranks is not None:
        values["ranks"] = ranks
    return BalanceOptions(**values)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
