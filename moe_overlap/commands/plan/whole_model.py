"""From a block pair to the step of a whole model: layers, head, pipeline, all-reduce; tokens, FLOPs, money.

layers         M pairs (attention, MLP, attention, experts) and L - 2 M layers of attention and MLP; where experts
               stand in more than every second layer, so many fewer of the latter
head           2 T D V FLOPs forward, or reading its weights where that takes longer
pipeline       1F1B: (micro-batches + stages - 1) times the longest stage, which has as many layers as the others
all-reduce     2 (n - 1) / n of the gradients of what n ranks hold alike, after the last backward, not hidden
memory         weights, gradients, Adam's 12 bytes a parameter, and what backward needs of each micro-batch under
               way; the optimizer's part by replicas where it is sharded; of experts in host memory only the groups
               that are on the device at a time
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_overlap.commands.plan.machine import (
    backbone_s,
    busiest,
    dense_s,
    expert_params,
    inter_rate,
    local_experts,
    routed,
)
from moe_overlap.commands.plan.offload import offloaded
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import Prediction, number_text
from moe_overlap.errors import ConfigError
from moe_overlap.planning.machines import MACHINES
from moe_overlap.planning.offload import OffloadPlan

ADAM_BYTES = 12  # float32 weights and two moments


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of a whole model, with a head apart from the embedding. `active`: those that a token is multiplied by,
    so without the embedding, of which it takes a row. Norms and biases are not counted."""

    total: float
    active: float


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Seconds of a step and its parts, rates, and bytes of one rank's card by what they are for. `mfu`: of the
    machine's peak, None where no machine was named. `money`: of a million tokens, None without a price or tokens."""

    step_s: float
    layers_s: float
    bubble_s: float
    reduce_s: float
    tokens_per_s: float
    mfu: float | None
    money: float | None
    parameters: Parameters
    held: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.held.values())

    def fits(self, memory: float) -> bool | None:
        """None where nobody says how much there is."""
        return self.bytes <= memory if memory else None


def whole_model(options: PlanOptions, point: Prediction) -> WholeModel:
    """Of `options.layers` layers, which must not be 0. ConfigError for a shortcut over pairs that the layers do not
    have: ScMoE takes two layers for each with experts."""
    train = options.phase == "train"
    moe, layers = options.counted_moe_layers, options.layers
    if point.kind.startswith("scmoe") and layers < 2 * moe:
        raise ConfigError("--moe-layers", moe, f"at most half of --layers ({layers}) for {point.kind}")
    passes = 3 if train else 1  # of forward's FLOPs
    attention_s, mlp_s = backbone_s(options)[:2]
    layers_s = moe * point.time_s + (layers - 2 * moe) * passes * (attention_s + mlp_s)
    head = options.hidden * options.vocab
    layers_s += passes * dense_s(options, 2 * options.tokens * head, head)
    if train and options.recompute == "on":
        layers_s += layers_s / 3
    stage_s = layers_s / options.stages
    bubble_s = (options.stages - 1) * stage_s
    reduce_s = _reduce_s(options, point) if train else 0.0
    step_s = options.micro_batches * stage_s + bubble_s + reduce_s
    ranks = point.ranks * options.stages
    tokens_per_s = options.tokens * options.micro_batches * point.ranks / step_s if options.tokens else 0.0
    flops = passes * _forward_flops(options, point)
    machine = MACHINES.get(options.machine or "")
    peak = None if machine is None else ranks * machine.flops[options.dtype]
    return WholeModel(
        step_s=step_s, layers_s=options.micro_batches * stage_s, bubble_s=bubble_s, reduce_s=reduce_s,
        tokens_per_s=tokens_per_s, mfu=None if peak is None else flops * tokens_per_s / peak,
        money=options.price * ranks / 3600 / tokens_per_s * 1e6 if options.price and tokens_per_s else None,
        parameters=parameters(options, point), held=_held(options, point),
    )  # fmt: skip


def _forward_flops(options: PlanOptions, point: Prediction) -> float:
    """Matmul FLOPs of a token, attention's own included."""
    seen = min(options.sequence, options.tokens)
    return 2 * parameters(options, point).active + options.layers * seen * options.attention_block.core


def parameters(options: PlanOptions, point: Prediction) -> Parameters:
    """Of all ranks and stages together; `options.layers` must not be 0."""
    attention, mlp, shared, _ = _params(options, point)
    moe, layers, d = options.counted_moe_layers, options.layers, options.hidden
    dense = layers * attention + (layers - moe) * mlp + moe * (shared + d * options.experts) + options.vocab * d
    expert = expert_params(options)
    return Parameters(total=dense + options.vocab * d + moe * options.experts * expert,
                      active=dense + moe * routed(options, point.kind) * expert)  # fmt: skip


def _params(options: PlanOptions, point: Prediction) -> tuple[float, float, float, float]:
    """Numbers of attention, of a dense MLP, of what stands beside the experts of a layer, and of a rank's experts."""
    d = options.hidden
    shared = 0.0 if point.kind in ("top2", "calibrated") else 3.0 * d * options.shared_width
    return (options.attention_block.params, 3.0 * d * options.ffn, shared,
            float(local_experts(options, point.at) * expert_params(options)))  # fmt: skip


def _by_replicas(options: PlanOptions, point: Prediction) -> tuple[float, float]:
    """Numbers of a rank's part of the model: those that all ranks of a stage hold alike, and its experts'."""
    attention, mlp, shared, experts = _params(options, point)
    moe, layers, d = options.counted_moe_layers, options.layers, options.hidden
    dense = layers * attention + (layers - moe) * mlp + moe * (shared + d * options.experts)
    return (dense + 2 * options.vocab * d) / options.stages, moe * experts / options.stages


def _reduce_s(options: PlanOptions, point: Prediction) -> float:
    dense, experts = _by_replicas(options, point)
    seconds = 0.0
    for numbers, replicas in ((dense, point.ranks), (experts, point.ranks // point.at.group)):
        if replicas > 1:
            inside = point.ranks <= options.ranks_per_node and options.intra_bandwidth is not None
            rate = options.intra_bandwidth if inside else inter_rate(options, point.at)
            assert rate is not None
            seconds += 2 * (replicas - 1) / replicas * numbers * options.dtype_bytes / rate
    return seconds


def _held(options: PlanOptions, point: Prediction) -> dict[str, float]:
    dense, experts = _by_replicas(options, point)
    size, host = options.dtype_bytes, offloaded(options, point)
    if host is not None:
        experts = 0.0
    held = {"weights": (dense + experts) * size}
    if options.phase == "infer":
        kept = options.attention_block.cached * options.tokens * options.layers / options.stages * size
        return _with_host(held, host) | {
            "keys and values": kept, "activations": float(_moe_activations(options, point))}  # fmt: skip
    held["gradients"] = held["weights"]
    if options.optimizer != "none":
        replicas = (point.ranks, point.ranks // point.at.group) if options.optimizer == "sharded" else (1, 1)
        held["optimizer"] = ADAM_BYTES * (dense / replicas[0] + experts / replicas[1])
    d, tokens, moe, layers = options.hidden, options.tokens, options.counted_moe_layers, options.layers
    # Saved by attention: its input, that of its norm, q, k, v, what it gives; by an MLP: its input, gate, up, product.
    attention = tokens * size * (2 * d + options.attention_block.saved)
    mlp = tokens * size * (2 * d + 3 * options.ffn)
    whole = layers * attention + (layers - moe) * mlp + moe * _moe_activations(options, point)
    if options.recompute == "on":
        whole = layers * tokens * size * d + attention + max(mlp, _moe_activations(options, point))
    under_way = min(options.stages, options.micro_batches)
    held["activations"] = whole / options.stages * under_way
    held["logits"] = 4.0 * tokens * options.vocab
    return _with_host(held, host)


def _with_host(held: dict[str, float], host: OffloadPlan | None) -> dict[str, float]:
    return held if host is None else held | {"groups of experts": float(host.device_bytes)}


def _moe_activations(options: PlanOptions, point: Prediction) -> float:
    """Bytes of one layer's experts and shared expert: rows sent, received and returned, and the matmuls' between."""
    rows = options.tokens * routed(options, point.kind) * busiest(options, point.kind, point.at)
    numbers = rows * (3 * options.hidden + options.matrices * options.expert_width)
    if point.kind not in ("top2", "calibrated"):
        numbers += options.tokens * 3 * options.shared_width
    return numbers * options.dtype_bytes


def model_lines(options: PlanOptions, whole: WholeModel) -> list[str]:
    """What `moe-overlap plan` says of it."""
    parts = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in whole.held.items())
    size = whole.parameters
    lines = [
        f"The whole model, {options.layers} layers ({options.counted_moe_layers} with experts) in "
        f"{_counted(options.stages, 'stage')}, {_counted(options.micro_batches, 'micro-batch', 'es')}: a step takes "
        f"{whole.step_s:.4g} s",
        f"  {size.total / 1e9:.4g} billion parameters, {size.active / 1e9:.3g} billion of them in use for a token",
        f"  layers {whole.layers_s:.4g} s, pipeline bubble {whole.bubble_s:.4g} s, all-reduce of gradients "
        f"{whole.reduce_s:.4g} s (taken as not hidden)",
        f"  {number_text(whole.tokens_per_s)} tokens/s"
        + ("" if whole.mfu is None else f", {100 * whole.mfu:.1f} % of the machine's peak (MFU)")
        + ("" if whole.money is None else f", {whole.money:.4g} for a million tokens (--price)"),
        f"  a rank's card holds {whole.bytes / 1e9:.4g} GB: {parts}",
    ]
    return lines


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else plural}"


def fit_line(options: PlanOptions, whole: WholeModel) -> str:
    """The first line where it does not fit, and one of the others where it does; "" where nobody says how much there
    is."""
    fits = whole.fits(options.memory)
    if fits is None:
        return ""
    room = f"{whole.bytes / 1e9:.4g} GB of the {options.memory / 1e9:g} GB of a card"
    if fits:
        return f"It fits: {room}."
    largest = max(whole.held, key=lambda name: whole.held[name])
    return (
        f"DOES NOT FIT: {room} are needed, most of it {largest}. What follows is what it would take with more memory."
    )
