"""The command line of `moe-overlap plan`, as one frozen record in SI units."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from moe_overlap.commands.parser import OneLineParser, TypedDefaults, check_count, check_number, flag_of
from moe_overlap.commands.plan.logs import measured_figures
from moe_overlap.commands.plan.model_file import LATENT, model_figures
from moe_overlap.commands.plan.presets import machine_figures
from moe_overlap.commands.plan.texts import TEXTS
from moe_overlap.errors import ConfigError
from moe_overlap.planning.attention import Attention, grouped_query, latent
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.machines import MACHINES
from moe_overlap.planning.window import Slowdown

KINDS = ("top2", "shared1", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3")
CHOICES = {
    "dtype": ("bf16", "fp16", "fp32", "fp64"),
    "phase": ("infer", "train"),
    "dedup": ("off", "on", "node", "auto"),
    "nic": ("rank", "node"),
    "weights": ("beside", "added"),
    "dispatch_dtype": ("same", "fp8"),
    "optimizer": ("sharded", "whole", "none"),
    "recompute": ("off", "on"),
}
# What is asked about a whole model alone, with what says that nobody asks.
WHOLE_MODEL = {"moe_layers": 0, "vocab": 0, "stages": 1, "micro_batches": 1, "optimizer": "sharded", "recompute": "off",
               "price": 0.0}  # fmt: skip
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
MOST_DRAWS = 1000

_NEGATIVE = re.compile(r"-[.\d]")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """One question. Rates are those of one rank, in bytes or FLOPs per second; times in seconds.

    `flops` to `backbone` are assumptions about the machine, which a `cost_model` replaces; beside one, None among the
    wires' figures means what was calibrated. `kind` None: top2. `expert_ffn`, `shared_ffn` 0: as `ffn`;
    `attention_width` 0: as `hidden`. `kv_lora_rank` 0: attention is not latent (MLA). `machine`, `model` and
    `measured`: where figures came from; they are the other fields'.
    """

    ranks: int = 64
    ranks_per_node: int = 8
    tokens: int = 8192
    model: str | None = None
    machine: str | None = None
    measured: str | None = None
    hidden: int = 4096
    ffn: int = 8192
    expert_ffn: int = 0
    shared_ffn: int = 0
    matrices: int = 3
    experts: int = 64
    top_k: int = 2
    heads: int = 1
    kv_heads: int = 1
    attention_width: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    skew: float = 1.0
    dtype: str = "bf16"
    dispatch_dtype: str = "same"
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
    compute_slowdown: float = 1.2
    wire_slowdown: float = 1.2
    nic: str = "rank"
    leaf: int = 16
    spine: float = 1.0
    weights: str = "beside"
    sequence: int = 4096
    backbone: tuple[float, ...] | None = None
    cost_model: CostModel | None = None
    layers: int = 0
    moe_layers: int = 0
    vocab: int = 0
    stages: int = 1
    micro_batches: int = 1
    optimizer: str = "sharded"
    recompute: str = "off"
    memory: float = 0.0
    price: float = 0.0
    draws: int = 20
    replica_slots: int = 1
    expert_offload: float | None = None
    out: str = "out/plan"

    def __post_init__(self) -> None:
        counts = "ranks ranks_per_node hidden ffn experts top_k heads kv_heads leaf sequence stages micro_batches"
        for name in counts.split():
            check_count(name, getattr(self, name))
        check_count("tokens", self.tokens, least=0)
        for name in (
            *("expert_ffn shared_ffn attention_width layers moe_layers vocab draws replica_slots".split()),
            *LATENT,
        ):
            if getattr(self, name):
                check_count(name, getattr(self, name))
        if self.ranks > self.experts and self.ranks % self.experts:
            expected = f"at most --experts ({self.experts}), or a multiple: whole groups of ranks have all experts"
            raise ConfigError("--ranks", self.ranks, expected)
        if self.ranks_per_node < self.ranks and self.ranks % self.ranks_per_node:
            expected = f"a divisor of --ranks ({self.ranks}), or as many and more where one node has them all"
            raise ConfigError("--ranks-per-node", self.ranks_per_node, expected)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(flag_of(name), getattr(self, name), f"one of {', '.join(known)}")
        if self.matrices not in (2, 3):
            raise ConfigError("--matrices", self.matrices, "3 (SwiGLU) or 2 (one activation, no gate)")
        if self.heads % self.kv_heads:
            raise ConfigError("--kv-heads", self.kv_heads, f"a divisor of --heads ({self.heads})")
        self._check_attention()
        check_number("skew", self.skew, 1, 1e4)
        check_number("spine", self.spine, 0.01, 1)
        check_number("price", self.price, 0, 1e6)
        self._check_model()
        if self.dedup == "on" and self.cost_model is not None and self.cost_model.distinct is None:
            expected = "off, or a --cost-model that was calibrated with --dedup"
            raise ConfigError("--dedup", self.dedup, expected)
        for name in ("compute_slowdown", "wire_slowdown"):
            check_number(name, getattr(self, name), 1, 100)
        self._check_kind()
        self._check_together()
        if self.routing is not None:
            from moe_overlap.commands.plan.traffic import saved  # with torch, which nothing else here needs

            saved(self.routing, self.experts, self.top_k)

    def _check_attention(self) -> None:
        """Latent attention has all of its widths, or none."""
        if not self.kv_lora_rank:
            for name in LATENT:
                if getattr(self, name):
                    raise ConfigError(flag_of(name), getattr(self, name), "--kv-lora-rank beside it")
            return
        for name in ("qk_nope_head_dim", "v_head_dim"):
            check_count(name, getattr(self, name))
        if self.attention_width:
            raise ConfigError("--attention-width", self.attention_width, "no such width beside --kv-lora-rank")
        if self.kv_heads not in (1, self.heads):
            expected = f"as many as --heads ({self.heads}) beside --kv-lora-rank, or none said"
            raise ConfigError("--kv-heads", self.kv_heads, expected)

    def _check_model(self) -> None:
        """What is asked about the model around the block pair."""
        if self.layers and self.moe_layers > self.layers:
            raise ConfigError("--moe-layers", self.moe_layers, f"at most --layers ({self.layers})")
        if self.draws > MOST_DRAWS:
            raise ConfigError("--draws", self.draws, f"from 0 to {MOST_DRAWS}")
        if not self.layers:
            for name, default in WHOLE_MODEL.items():
                if getattr(self, name) != default:
                    raise ConfigError(flag_of(name), getattr(self, name), "--layers (or --model) beside it")
        elif self.layers % self.stages:
            raise ConfigError("--stages", self.stages, f"a divisor of --layers ({self.layers})")
        for name in ("optimizer", "recompute") if self.phase == "infer" else ():
            if getattr(self, name) != WHOLE_MODEL[name]:
                raise ConfigError(flag_of(name), getattr(self, name), "--phase train: inference has none")

    def _check_together(self) -> None:
        """What does not go together."""
        if self.expert_offload is not None:
            if not self.tokens:
                raise ConfigError(
                    "--tokens", 0, "at least 1 beside --expert-offload: without rows no expert is fetched"
                )
            if self.dedup in ("on", "node"):
                raise ConfigError("--dedup", self.dedup, "off or auto beside --expert-offload, as layers have it")
        for name, value, default in (("skew", self.skew, 1.0), ("dedup", self.dedup == "node", False)):
            if self.routing is not None and value != default:
                raise ConfigError(flag_of(name), getattr(self, name), "no such value beside --routing")
        if (self.routing is not None or self.cost_model is not None) and self.ranks <= self.experts:
            if self.experts % self.ranks:
                expected = f"a divisor of --experts ({self.experts}) beside --routing and --cost-model"
                raise ConfigError("--ranks", self.ranks, expected)
        if self.cost_model is not None and self.dedup == "node":
            raise ConfigError("--dedup", "node", "off, on or auto beside --cost-model")

    def _check_kind(self) -> None:
        if self.cost_model is not None:
            if self.top_k > self.experts:
                raise ConfigError("--top-k", self.top_k, f"an integer from 1 to --experts ({self.experts})")
            return
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError("--kind", self.kind, f"one of {', '.join(KINDS)}")
        least = 1 if self.kind in (None, "top2") else 2
        if not least <= self.top_k <= self.experts + least - 1:
            expected = (
                f"an integer from {least} to --experts ({self.experts}); the shared-expert kinds route to one less"
            )
            raise ConfigError("--top-k", self.top_k, expected)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The block pairs to compare, the one that is asked about first."""
        if self.cost_model is not None:
            return ("calibrated",)
        asked = self.kind or KINDS[0]
        if self.top_k == 1:
            return (asked,)
        if self.top_k > self.experts:  # all experts and a shared one: no kind without it can be compared
            return (asked, *(kind for kind in KINDS[1:] if kind != asked))
        return (asked, *(kind for kind in KINDS if kind != asked))

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def expert_width(self) -> int:
        return self.expert_ffn or self.ffn

    @property
    def shared_width(self) -> int:
        return self.shared_ffn or self.ffn

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.attention_width or self.hidden

    @property
    def attention_block(self) -> Attention:
        """What attention of one layer has and does."""
        if not self.kv_lora_rank:
            return grouped_query(hidden=self.hidden, width=self.attention, kv_share=self.kv_share)
        return latent(hidden=self.hidden, heads=self.heads, **{name: getattr(self, name) for name in LATENT})

    @property
    def kv_share(self) -> float:
        return self.kv_heads / self.heads

    @property
    def dispatch_row_bytes(self) -> int | None:
        """Of a row on its way to the experts, where that is narrower: a byte a number, a float32 scale for 128."""
        return None if self.dispatch_dtype == "same" else self.hidden + 4 * -(-self.hidden // 128)

    @property
    def uneven(self) -> bool:
        """Whether some ranks' experts are wanted more than others'."""
        return self.skew > 1 or self.routing is not None

    @property
    def slowdown(self) -> Slowdown:
        return Slowdown(compute=self.compute_slowdown, wire=self.wire_slowdown)

    @property
    def counted_moe_layers(self) -> int:
        """Of `layers`, those with experts."""
        return self.moe_layers or self.layers

    def to_json(self) -> dict[str, Any]:
        """The options as they were understood, in SI units."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return found | {"cost_model": None if self.cost_model is None else self.cost_model.to_json()}


HELP = {
    "ranks": "ranks; with more than --experts, groups of --experts ranks exchange among themselves",
    "ranks_per_node": "ranks that share a node",
    "tokens": "tokens per rank; 0: a step in which no rank has any",
    "model": "config.json of a Hugging Face model: sizes, experts, shared expert and layers, where not given here",
    "measured": "output of nccl-tests' alltoall_perf or DeepEP's tests, or a Kineto trace: rates and latency of wires, "
    "where not given here",
    "machine": "whose figures are taken where not given here: " + ", ".join(MACHINES),
    "hidden": "model width",
    "ffn": "width of the dense MLP, and of the shared expert and each routed expert where not given (SwiGLU)",
    "expert_ffn": "width of each routed expert; 0: --ffn",
    "shared_ffn": "width of the shared expert; 0: --ffn",
    "matrices": "of an expert: 3 (SwiGLU) or 2",
    "heads": "query heads of attention, of which only the ratio to --kv-heads counts, unless it is latent",
    "kv_heads": "key and value heads (grouped-query attention)",
    "attention_width": "query heads times the size of one; 0: --hidden",
    "q_lora_rank": "latent attention: numbers of the latent that queries are made of; 0: of the hidden state itself",
    "kv_lora_rank": "latent attention (MLA): numbers of the latent that keys and values are made of; 0: not latent",
    "qk_nope_head_dim": "latent attention: of a head's query and key, the part that does not turn with the position",
    "qk_rope_head_dim": "latent attention: the part that does, one key of it for all heads",
    "v_head_dim": "latent attention: width of a head's value",
    "skew": "assumed: rows of the busiest rank over the mean",
    "dispatch_dtype": "of rows on their way to the experts in forward: same, or fp8 (with a scale for 128 numbers)",
    "nic": "whose --bandwidth is: of each rank, or of its node, whose ranks share it (rank, node)",
    "leaf": "assumed: nodes at one switch of the first level",
    "spine": "assumed: share of --bandwidth left to bytes for nodes beyond that switch",
    "weights": "assumed: experts' weights are read beside their matmuls (GPUs), or added before them (beside, added)",
    "experts": "routed experts over all ranks",
    "top_k": "routed experts per token of kind top2; the others route to one less and have a shared expert",
    "dtype": "of weights and rows: " + ", ".join(CHOICES["dtype"]),
    "kind": "block pair to explain: " + ", ".join(KINDS) + " (default top2; with --cost-model as calibrated)",
    "dedup": "one row for each (token, rank): off, on, node (one for each (token, node) between nodes), or auto (on "
    "where that is predicted to be faster; off beside --expert-offload)",
    "routing": "saved routing (moe-overlap train --save-routing), whose tokens are taken instead of equally many rows "
    "for every expert",
    "phase": "infer (forward) or train (forward and backward)",
    "compute_slowdown": "assumed: how much longer compute takes while an exchange is under way (16 of 132 SMs: 1.14)",
    "wire_slowdown": "assumed: how much longer an exchange takes beside compute",
    "sequence": "assumed: tokens that attention looks at (causal; at most --tokens)",
    "layers": "of the whole model, to forecast its step; 0: the block pair alone",
    "moe_layers": "of --layers, those with experts, where not all have them; 0: all",
    "vocab": "of the whole model: rows of its embedding and of its head",
    "stages": "pipeline stages, which share the layers out (1F1B)",
    "micro_batches": "of a step, each of --tokens tokens a rank",
    "optimizer": "where Adam's 12 bytes a parameter lie: sharded over a parameter's replicas, whole on each, or none",
    "recompute": "activations of a layer are computed again in backward: off, on",
    "price": "of a rank for an hour, in whatever money, to say what tokens cost; 0: nobody asks",
    "draws": "how often the assumptions are drawn anew to say how sure the gain is; 0: never",
    "replica_slots": "of a rank, for copies of experts that are wanted more than others, to say what they would give "
    "beside --skew or --routing; 0: nobody asks",
    "out": "folder for plan.png and plan.json",
}
# Options about the wires, which replace what a cost model was calibrated with only where they are given.
WIRES = ("bandwidth", "latency", "intra_bandwidth")
# Options that a cost model answers instead, or that ask what it does not say.
CALIBRATED = (
    "flops", "memory_bandwidth", "message", "launch", "issue", "compute_slowdown", "wire_slowdown", "backbone", "kind",
    "sequence", "machine", "measured", "weights", "spine", "leaf", "nic", "skew", "shared_ffn", "heads", "kv_heads",
    "dispatch_dtype", "attention_width", *LATENT, "layers", "memory", "draws",
    "replica_slots", *WHOLE_MODEL,
)  # fmt: skip
EXPERT_SIZES = ("ffn", "expert_ffn", "matrices")
ATTENTION = ("sequence", "heads", "kv_heads", "attention_width", *LATENT)


EXAMPLES = """examples:
  moe-overlap plan --kind scmoe_pos2 --bandwidth 100gbit --ranks 64
  moe-overlap plan --machine h100x8 --model config.json --ranks 64  # config.json of a Hugging Face model
  moe-overlap plan --machine a100x8 --layers 32 --memory 80GB"""


def parse(argv: Sequence[str]) -> PlanOptions:
    """Options from the command line; ConfigError names the option, the value and what was expected."""
    parser = OneLineParser(
        prog="moe-overlap plan",
        description="Predict, from numbers alone, which schedule of a MoE block pair wins where.",
        formatter_class=TypedDefaults,
        epilog=EXAMPLES,
    )
    for field in fields(PlanOptions):
        if field.name in TEXTS:
            _, default, text = TEXTS[field.name]
            parser.add_argument(flag_of(field.name), metavar="TEXT", default=argparse.SUPPRESS,
                                help=f"{text} (default: {default or 'none'})")  # fmt: skip
        else:
            value = field.default
            said = HELP[field.name] if value is None else f"{HELP[field.name]} (default: {value})"
            parser.add_argument(flag_of(field.name), type=str if value is None else type(value),
                                default=argparse.SUPPRESS, help=said)  # fmt: skip
    return _filled_in(vars(parser.parse_args(_with_negative_values(argv))))


def _filled_in(given: dict[str, Any]) -> PlanOptions:
    """What was given, and for the rest the model's figures, the machine's, a calibrated model's, or the defaults."""
    if given.get("cost_model") == "":
        raise ConfigError("--cost-model", "", "a file of moe-overlap calibrate --out")
    if given.get("nic") == "node" and not {"ranks_per_node", "machine"} & set(given):
        raise ConfigError("--nic", "node", "--ranks-per-node (or --machine) beside it: the node's ranks share the rate")
    calibrated = "cost_model" in given
    for name in CALIBRATED:
        if calibrated and name in given:
            raise ConfigError(flag_of(name), given[name], "no such option beside --cost-model")
    for name in EXPERT_SIZES if calibrated and "expert_offload" not in given else ():
        if name in given:
            expected = "--expert-offload beside --cost-model, which says what experts take"
            raise ConfigError(flag_of(name), given[name], expected)
    values = {name: read(flag_of(name), given.get(name, default)) for name, (read, default, _) in TEXTS.items()
              if name in given or not (calibrated and name in WIRES)}  # fmt: skip
    values |= {name: None for name in WIRES if name not in values}
    values |= {name: value for name, value in given.items() if name not in TEXTS}
    if "model" in given:
        figures = _without_other_attention(model_figures(given["model"], layers=given.get("layers")), given)
        if calibrated and "kind" in figures:
            figures["top_k"] -= 1  # routed experts alone: the shared one is in the cost model
        values = {name: value for name, value in figures.items() if not calibrated
                  or name not in CALIBRATED} | values  # fmt: skip
    if "machine" in given:
        figures = machine_figures(given["machine"], dtype=values.get("dtype", "bf16"))
        values |= {name: value for name, value in figures.items() if name not in given}
    if "measured" in given:
        per_node = values.get("ranks_per_node", PlanOptions.ranks_per_node)
        figures = measured_figures(given["measured"], ranks_per_node=per_node)
        values |= {name: value for name, value in figures.items() if name not in given}
        if "bandwidth" in figures and not {"bandwidth", "nic"} & set(given):
            values["nic"] = "rank"  # measured while all ranks of a node sent: each has what it has
    if given.keys() & {"memory"} and not values.get("layers"):
        raise ConfigError("--memory", given["memory"], "--layers (or --model) beside it")
    options = PlanOptions(**values)
    for name in ATTENTION if "backbone" in given and not options.layers else ():
        if name in given:
            expected = "--layers (or --model) beside --backbone, which says what attention takes"
            raise ConfigError(flag_of(name), given[name], expected)
    if "leaf" in given and options.spine == 1:
        raise ConfigError("--leaf", options.leaf, "--spine below 1 (or --machine) beside it: else nodes are alike")
    if given.get("replica_slots") and not options.uneven:
        expected = "--skew or --routing beside it: where all experts are wanted alike no copy helps"
        raise ConfigError("--replica-slots", options.replica_slots, expected)
    if given.get("replica_slots") and min(options.ranks, options.experts) == 1:
        raise ConfigError("--replica-slots", options.replica_slots, "several --ranks that share the --experts out")
    if given.get("replica_slots") and options.expert_offload is not None:
        expected = "no such option beside --expert-offload: a layer has no copies of experts in host memory"
        raise ConfigError("--replica-slots", options.replica_slots, expected)
    return options


def _without_other_attention(figures: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A model's figures without its kind of attention, where --kv-lora-rank asks for the other. What was latent has a
    key for each head then."""
    asked = given.get("kv_lora_rank")
    if asked is None or bool(asked) == bool(figures.get("kv_lora_rank")):
        return figures
    dropped = ("kv_heads", "attention_width") if asked else LATENT
    kept = {name: value for name, value in figures.items() if name not in dropped}
    return kept if asked else kept | {"kv_heads": figures["heads"]}


def _with_negative_values(argv: Sequence[str]) -> list[str]:
    """`--latency -1us` as `--latency=-1us`: argparse takes the second word for an option, and says so."""
    words: list[str] = []
    for word in argv:
        if _NEGATIVE.match(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=" + word
        else:
            words.append(word)
    return words
