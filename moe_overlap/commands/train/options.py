"""The command line of `moe-overlap train`, as one frozen record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_overlap.commands.parser import (
    MOST_THREADS,
    OneLineParser,
    TypedDefaults,
    check_count,
    check_number,
    check_timeout,
    flag_of,
)
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.builders import parse_choice
from moe_overlap.transport.link import LinkSpec

MOST_SEED = 2**64 - 1
MOST_VOCAB = 1 << 20
MOST_LAYERS = 4096
MOST_SLOTS = 1 << 16
MOST_SAMPLE = 65536
KINDS = ("top2", "shared1", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3")

# How experts are kept balanced, and the coefficient where none is asked for: of the auxiliary loss, at one of three
# levels, or what a bias moves in a step (arXiv 2408.15664).
BALANCE = {"micro": 0.01, "sequence": 0.01, "global": 0.01, "loss-free": 0.001}

ROUTERS = ("linear", "switch", "hash", "locmoe", "locmoe+", "smile")
TEXT_BY = ("even", "domain")
PLACEMENTS = ("static", "flex", "eplb", "proportional")

# The options that decide a run's numbers, bit for bit (the overlap does not).
IDENTITY = (
    "kind steps batch seq layers hidden ffn experts vocab ranks seed lr warmup weight_decay schedule chunks slot "
    "balance balance_coef router mu locality_bias text_by"
).split()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run. Sizes in tokens or elements; `batch` counts sequences over all ranks."""

    kind: str = "scmoe_pos2"
    text: str | None = None
    out: str = "out/train"
    steps: int = 200
    batch: int = 8
    seq: int = 256
    layers: int = 4
    hidden: int = 128
    ffn: int = 512
    experts: int = 8
    vocab: int = 4096
    ranks: int = 2
    threads: int = 0
    seed: int = 0
    lr: float = 5e-3
    warmup: int = 20
    weight_decay: float = 0.1
    router: str = "linear"
    mu: float = 0.0
    locality_bias: bool = False
    ranks_per_node: int = 1
    text_by: str = "even"
    balance: str = "micro"
    balance_coef: float | None = None
    placement: str = "static"
    placement_every: int = 10
    placement_slots: int = 1
    overlap: str = "on"
    schedule: str | None = None
    chunks: int = 1
    slot: int | None = None
    link: str = "none"
    compare_overlap: bool = False
    eval_tokens: int = 65536
    checkpoint_every: int = 0
    resume: str | None = None
    save_routing: str | None = None
    sample: int = 0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.kind not in KINDS:
            raise ConfigError("--kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.overlap not in ("on", "off"):
            raise ConfigError("--overlap", self.overlap, "on or off")
        if self.balance not in BALANCE:
            raise ConfigError("--balance", self.balance, f"one of {', '.join(BALANCE)}")
        check_number("balance_coef", self.coefficient, 1e-9 if self.balance == "loss-free" else 0.0, 1e3)
        if self.layers % 2:
            raise ConfigError("--layers", self.layers, "an even number (blocks come in pairs, the second with experts)")
        if self.batch % self.ranks:
            raise ConfigError("--batch", self.batch, f"a multiple of --ranks ({self.ranks})")
        if self.experts % self.ranks:
            raise ConfigError("--experts", self.experts, f"a multiple of --ranks ({self.ranks})")
        if self.hidden % self.head_size or self.head_size % 2:
            raise ConfigError("--hidden", self.hidden, "a multiple of 64, or an even number below 64")
        if self.experts < self.routing_width:
            raise ConfigError("--experts", self.experts, f"at least {self.routing_width}")
        if self.compare_overlap and (self.resume or self.checkpoint_every):
            raise ConfigError("--compare-overlap", True, "a run without --resume and --checkpoint-every")
        self._check_nodes()
        self._check_placement()
        self._check_router()
        self._check_schedule()
        self._check_link()

    def _check_nodes(self) -> None:
        if self.ranks % self.ranks_per_node:
            raise ConfigError("--ranks-per-node", self.ranks_per_node, f"a divisor of --ranks ({self.ranks})")
        if self.text_by not in TEXT_BY:
            raise ConfigError("--text-by", self.text_by, f"one of {', '.join(TEXT_BY)}")
        if self.text_by == "domain" and self.nodes == 1:
            raise ConfigError("--text-by", self.text_by, "even with one node, which has all of the text")

    def _check_placement(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError("--placement", self.placement, f"one of {', '.join(PLACEMENTS)}")
        if self.placement != "static" and self.ranks == 1:
            raise ConfigError("--placement", self.placement, "static on one rank, which has all experts")
        free = self.experts - self.experts // self.ranks
        if self.placement != "static" and self.placement_slots > free:
            raise ConfigError("--placement-slots", self.placement_slots, f"at most {free}: all experts on each rank")

    def _check_router(self) -> None:
        if self.router not in ROUTERS:
            raise ConfigError("--router", self.router, f"one of {', '.join(ROUTERS)}")
        local = self.router.startswith("locmoe")
        if self.mu and not local:
            raise ConfigError("--mu", self.mu, f"0 with --router {self.router}, which has no locality loss")
        if self.locality_bias and not local:
            raise ConfigError("--locality-bias", True, "a run with --router locmoe or locmoe+")
        if self.router == "smile" and (self.experts % self.nodes or self.experts // self.nodes < self.top_k):
            expected = f"a multiple of the {self.nodes} nodes, {self.top_k} for each at least, with --router smile"
            raise ConfigError("--experts", self.experts, expected)
        possible = {"hash": ("micro",), "smile": ("micro", "global")}.get(self.router, tuple(BALANCE))
        if self.balance not in possible:
            raise ConfigError("--balance", self.balance, f"{' or '.join(possible)} with --router {self.router}")
        if self.router == "hash" and self.balance_coef is not None:
            raise ConfigError("--balance-coef", self.balance_coef, "none with --router hash, which has no such loss")

    def _check_schedule(self) -> None:
        if self.kind.startswith("scmoe"):
            if self.schedule == "auto" and (self.slot is not None or self.chunks != 1):
                raise ConfigError("--schedule", self.schedule, "no --slot and no --chunks beside it: it chooses both")
            if self.schedule not in (None, "auto"):
                raise ConfigError("--schedule", self.schedule, "auto for a scmoe kind, which takes --slot and --chunks")
            if self.slot is not None and self.slot > self.window_ops:
                raise ConfigError("--slot", self.slot, f"an integer from 0 to {self.window_ops} for --kind {self.kind}")
        elif self.slot is not None or self.chunks != 1:
            name, value = ("--slot", self.slot) if self.slot is not None else ("--chunks", self.chunks)
            raise ConfigError(name, value, f"a scmoe kind (--kind {self.kind} takes --schedule)")
        elif self.schedule not in (None, "auto"):
            try:
                parse_choice(self.schedule, shared=self.kind == "shared1")
            except NotImplementedError as missing:
                raise ConfigError("--schedule", self.schedule, str(missing)) from None
            except ConfigError as error:
                raise ConfigError("--schedule", self.schedule, error.expected) from None

    def _check_link(self) -> None:
        try:
            link = LinkSpec.parse(self.link)
        except ConfigError as error:
            raise ConfigError("--link", self.link, error.expected) from None
        if link is not None and self.ranks == 1:
            raise ConfigError("--link", self.link, "none for one rank, which sends nothing")
        if link is not None and self.nodes == 1:
            expected = f"none with one node (--ranks-per-node {self.ranks_per_node}), over whose link nothing goes"
            raise ConfigError("--link", self.link, expected)

    @property
    def coefficient(self) -> float:
        """That of the balance, as asked for or as usual."""
        return BALANCE[self.balance] if self.balance_coef is None else self.balance_coef

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    @property
    def top_k(self) -> int:
        """Routed experts per token; the other kinds have a shared expert in the second one's place."""
        return 2 if self.kind == "top2" else 1

    @property
    def routing_width(self) -> int:
        """Experts per token in a file of --save-routing."""
        return max(2, self.top_k)

    @property
    def head_size(self) -> int:
        return min(64, self.hidden)

    @property
    def position(self) -> int:
        """ScMoE's Pos-1/2/3; 0 for the kinds without a shortcut."""
        return int(self.kind[-1]) if self.kind.startswith("scmoe") else 0

    @property
    def window_ops(self) -> int:
        """Backbone ops (the shared expert included) that run beside the exchanges of a shortcut."""
        return self.position + 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq

    @property
    def threads_per_rank(self) -> int:
        """--threads, else the cores divided over the ranks; one where that would exceed the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.threads or max(1, cores // self.ranks)
        return threads if threads * self.ranks <= cores else 1


def _check_ranges(options: TrainOptions) -> None:
    for name in "ranks ranks_per_node steps batch seq hidden ffn experts eval_tokens placement_every".split():
        check_count(name, getattr(options, name))
    check_count("placement_slots", options.placement_slots, least=0, most=MOST_SLOTS)
    for name in "warmup checkpoint_every".split():
        check_count(name, getattr(options, name), least=0)
    check_count("layers", options.layers, most=MOST_LAYERS)
    check_count("sample", options.sample, least=0, most=MOST_SAMPLE)
    check_count("threads", options.threads, least=0, most=MOST_THREADS)
    check_count("seed", options.seed, least=0, most=MOST_SEED)
    check_count("chunks", options.chunks, most=16)
    if not 257 <= options.vocab <= MOST_VOCAB:
        expected = f"an integer from 257 (all bytes and the end of a document) to {MOST_VOCAB}"
        raise ConfigError("--vocab", options.vocab, expected)
    if options.slot is not None and options.slot < 0:
        raise ConfigError("--slot", options.slot, "an integer of at least 0")
    check_number("lr", options.lr, 1e-12, 1e3)
    check_number("mu", options.mu, 0.0, 1e3)
    check_number("weight_decay", options.weight_decay, 0.0, 1e3)
    check_timeout(options.timeout_s)


HELP = {
    "kind": f"block pair: {', '.join(KINDS)}",
    "text": "file or folder of text; default: Debian's python3.11-doc if installed, else Python's own sources",
    "out": "folder for the log, the tokenizer and the checkpoints",
    "steps": "optimizer steps",
    "batch": "sequences per step over all ranks",
    "seq": "tokens per sequence",
    "layers": "blocks, even: every second one has experts",
    "hidden": "model width",
    "ffn": "width of the dense MLPs, the shared expert and each routed expert",
    "experts": "routed experts over all ranks",
    "vocab": "tokens of the byte-level BPE vocabulary",
    "ranks": "processes to spawn (under torchrun: its world size)",
    "threads": "threads per rank; 0 = cores / ranks",
    "seed": "seed of the parameters and of the order of the data",
    "lr": "peak learning rate of the cosine schedule",
    "warmup": "steps of linear warm-up",
    "weight_decay": "AdamW weight decay of matrices",
    "router": f"router: {', '.join(ROUTERS)} (switch with capacity 1.25; locmoe is balanced best by --balance global)",
    "mu": "locmoe, locmoe+: factor of the locality loss",
    "locality_bias": "locmoe, locmoe+: a learned bias for each (node, expert)",
    "ranks_per_node": "so many ranks in a row share a node: for --link, routers and --text-by",
    "text_by": "even: every rank draws from all of the text; domain: each node has folders of its own, in training and "
    "held out (resume on as many nodes)",
    "balance": "what keeps the experts balanced: an auxiliary loss over a rank's tokens of a step (micro), over each "
    "sequence (sequence) or over all ranks' tokens (global), or a bias on the selection (loss-free)",
    "balance_coef": "coefficient of the auxiliary loss (default 0.01), or what a bias moves in a step (default 0.001)",
    "placement": f"where experts are: {', '.join(PLACEMENTS)}; all but static follow the load while the model trains, "
    "and a run may be resumed with another one (equal to it but for rounding)",
    "placement_every": "steps after which a layer's placement is planned anew, from the load of these",
    "placement_slots": "slots of each rank beside those of its share of the experts: for copies, and for experts that "
    "move in",
    "overlap": "on, or off: the same schedule with every exchange joined right after its start",
    "schedule": "auto: measure at the first step, then run the fastest found; top2, shared1 also: serial, chunked(r), "
    "chunked(r,experts), shared_expert; default by kind (a run that is resumed with auto may choose others)",
    "chunks": "scmoe: chunks per exchange",
    "slot": "scmoe: backbone ops issued before the experts; default the middle",
    "link": "none, or RATE[:LATENCY] of an emulated link between the ranks, such as 400mbit:50us",
    "compare_overlap": "run overlap off, then on, and compare losses and parameters bit for bit; exit 1 if they differ",
    "eval_tokens": "held-out tokens to evaluate",
    "checkpoint_every": "steps between checkpoints; 0 = none",
    "resume": "the --out of a run, one of its checkpoints or a folder of them (the newest complete one); --ranks may "
    "be another number, "
    "and --steps a larger one (the learning rates are then those of the longer run)",
    "save_routing": "write the routing of one MoE layer on the held-out text to this safetensors file",
    "sample": "at the end write a text of so many tokens, drawn from the model, to stdout; 0 = none",
    "timeout_s": "longest wait for another rank, seconds",
}
_TYPES = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str, "str | None": str}


EXAMPLES = """examples:
  moe-overlap train --kind scmoe_pos2 --steps 200 --checkpoint-every 200
  moe-overlap train --resume out/train --steps 400
  moe-overlap train --resume out/train --steps 400 --sample 200
  torchrun --nproc-per-node 2 -m moe_overlap train --kind top2"""


def parse(argv: Sequence[str] | None, *, ranks: int | None = None) -> TrainOptions:
    """Options from the command line; ConfigError for a value out of range. `ranks` (torchrun's) wins over --ranks."""
    parser = OneLineParser(
        prog="moe-overlap train",
        description="Train a small Mixture-of-Experts language model on real text, expert-parallel.",
        formatter_class=TypedDefaults,
        epilog=EXAMPLES,
    )
    for field in fields(TrainOptions):
        if field.type == "bool":
            parser.add_argument(flag_of(field.name), action="store_true", help=HELP[field.name])
        else:
            kind = _TYPES[str(field.type)]
            parser.add_argument(flag_of(field.name), type=kind, default=field.default, help=HELP[field.name])
    values = vars(parser.parse_args(argv))
    if ranks is not None:
        values["ranks"] = ranks
    return TrainOptions(**values)
