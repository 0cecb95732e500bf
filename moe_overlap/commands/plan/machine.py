"""From the figures of a machine and a model to the seconds of a step: a `CostModel` for any block pair and place.

The timed unit is that of `moe-overlap bench layer`: attention, dense MLP, attention, experts; MLPs are SwiGLUs, experts
too or of two matrices (M = 3 or 2). D hidden, F width (experts, MLP and shared expert may differ), T tokens of a rank,
S tokens that attention looks at, A the width of all its query heads, K experts per token, g key heads for each query
head.

    matmul FLOPs forward   attention 4 (1 + g) T D A + 2 T S A (causal), or as in `planning/attention.py` with latents;
                           MLP 6 T D F   experts 2 M D F for each row
    backward               twice as many; of the experts half for the input, half for the weights
    rows moved             P, U and Pt read and write each row, Ut moves 3 D; the experts unpack and pack theirs
    weights read           M D F of every expert that has rows, in every chunk, beside its matmuls (the longer of both
                           counts) or before them (--weights added): chunks of tokens read all experts' weights each,
                           chunks by expert groups only those of the group
                           of an op that all tokens pass, where that takes longer than its FLOPs
    deduplicated           rows moved follow from the rows for each choice; P, Ut, Pt, M and Mt also run small operators
                           on the ids, which were counted (SMALL_OPS, SMALL_BYTES), for a part of --launch each
    inside nodes           with --dedup node, rows are passed on by the wire inside a node and added up on their way
                           back, read and written in memory; compute waits for that
    exchange               latency + one message per peer + bytes / bandwidth, for each wire; a NIC of the node is
                           shared by its ranks, and bytes for nodes beyond the first switch have --spine of the rate
    agreement              messages and bytes of `agreement/cost.py`, on the wire between nodes, before the rows move
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moe_overlap.agreement.cost import AgreementCost, agreement_cost
from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import AlphaBeta, CostModel, DistinctCosts, OpVerb
from moe_overlap.planning.shapes import (
    MetadataBytes,
    StepShape,
    balanced_shape,
    chance_of_none,
    distinct_ranks,
    metadata_bytes,
    with_narrow_rows,
    with_rows_for_nodes,
)

CHUNKS = (1, 2, 4, 8, 16)
GROUPS = (2, 4, 8)
# Kind -> how many ops of the block pair (attention, MLP, attention, shared expert) run beside the exchanges.
WINDOW_OPS = {"top2": 0, "shared1": 1, "scmoe_pos1": 2, "scmoe_pos2": 3, "scmoe_pos3": 4}
OP_NAMES = ("attn1", "mlp", "attn2", "shared")
# Operators on ids and weights in deduplicated steps, by action (M and Mt: before and after the exchange); how many
# bytes for each choice they read and write; and what one of them costs, as a part of --launch.
SMALL_OPS = {"P": 57, "M": 27, "Ut": 67, "Mt": 17, "Pt": 16}
SMALL_BYTES = {"P": 410, "M": 250, "Ut": 530, "Mt": 145, "Pt": 185}
SMALL_LAUNCH = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step runs: ranks that exchange among themselves, those of them on a node, and the rate between nodes."""

    group: int
    per_node: int
    bytes_per_s: float | None

    @property
    def peers(self) -> dict[str, int]:
        """How many ranks one rank talks to, by wire."""
        found = {"inter": self.group - self.per_node, "intra": self.per_node - 1}
        return {wire: count for wire, count in found.items() if count}

    @property
    def nodes(self) -> int:
        return self.group // self.per_node


class Routed(Protocol):
    """The traffic of a saved routing: `traffic.Traffic`, which knows torch."""

    @property
    def rows_per_token(self) -> float: ...
    @property
    def distinct_rows_per_token(self) -> float: ...
    @property
    def rows_WE(self) -> np.ndarray: ...
    @property
    def kept(self) -> float: ...
    @property
    def max_over_mean(self) -> float: ...
    @property
    def local_share(self) -> float: ...
    def shape(self, chunks: int, by: ChunkBy, *, row_bytes: int, metadata: MetadataBytes | None) -> StepShape: ...
    def to_json(self) -> dict[str, float]: ...


def place(options: PlanOptions, *, ranks: int, bytes_per_s: float | None) -> Place:
    """With more ranks than experts, groups of as many ranks as there are experts exchange among themselves.

    Where groups and nodes do not fit into each other, every rank has as few others on its node as the fewest. Experts
    that so many ranks do not divide: all ranks exchange, and some have an expert more (`local_experts`).
    """
    group = ranks if ranks <= options.experts else math.gcd(ranks, options.experts)
    one_node = options.ranks_per_node >= ranks
    per_node = group if one_node else math.gcd(group, options.ranks_per_node)
    return Place(group=group, per_node=per_node, bytes_per_s=bytes_per_s)


def local_experts(options: PlanOptions, at: Place) -> int:
    """Of the rank that has most."""
    return -(-options.experts // at.group)


def routed(options: PlanOptions, kind: str) -> int:
    """Experts that a token is sent to."""
    return options.top_k if kind in ("top2", "calibrated") else options.top_k - 1


def busiest(options: PlanOptions, kind: str, at: Place) -> float:
    """Rows of the busiest rank's experts over the mean: by the skew asked for, and by the experts that it has more; at
    most as many as there can be, since a token goes to different experts."""
    local = local_experts(options, at)
    most = at.group * min(1.0, local / max(1, routed(options, kind)))
    return min(options.skew * local * at.group / options.experts, most)


def op_verb(kind: str, model: CostModel) -> OpVerb:
    """Whether backbone ops or the shared expert stand beside the exchanges."""
    if kind == "calibrated":
        return "S" if not model.backbone_s and model.shared_s else "B"
    return "S" if kind == "shared1" else "B"


def op_names(kind: str, model: CostModel) -> dict[str, str]:
    """Names of the backbone ops B0, B1, ... for the picture."""
    if kind == "calibrated":
        return {}
    count = len(model.backbone_s)
    return {f"B{index}": name for index, name in enumerate(OP_NAMES[len(OP_NAMES) - count :] if count else ())}


def metadata(options: PlanOptions, kind: str) -> MetadataBytes:
    """What goes beside a row, and comes back for it."""
    return metadata_bytes(routed(options, kind), max(4, options.dtype_bytes))  # weights are float32, or as fp64 rows


def shapes(
    options: PlanOptions, kind: str, at: Place, *, distinct: bool = False, routing: Routed | None = None
) -> list[StepShape]:
    """One for every chunk count by tokens, and by expert groups where a rank has so many experts. `distinct`: of the
    deduplicated step. routing: in the place of the saved one, the same with copies of experts."""
    local = local_experts(options, at)
    for_nodes = distinct and options.dedup == "node" and len(at.peers) == 2
    cuts: list[tuple[int, ChunkBy]] = [(chunks, "tokens") for chunks in CHUNKS]
    cuts += [(groups, "experts") for groups in GROUPS if groups <= local and not for_nodes]
    beside = metadata(options, kind) if distinct else None
    if options.routing is not None:
        found, row_bytes = routing or traffic_of(options, kind, at), options.hidden * options.dtype_bytes
        saved_ones = [found.shape(chunks, by, row_bytes=row_bytes, metadata=beside) for chunks, by in cuts]
        return [_narrowed(options, shape) for shape in saved_ones]
    balanced = [
        balanced_shape(
            tokens=options.tokens,
            top_k=routed(options, kind),
            hidden=options.hidden,
            dtype_bytes=options.dtype_bytes,
            ranks=at.group,
            ranks_per_node=at.per_node,
            local_experts=local,
            chunks=chunks,
            by=by,
            metadata=beside,
            busiest=busiest(options, kind, at),
        )
        for chunks, by in cuts
    ]
    if for_nodes:
        nodes = distinct_ranks(at.group * local, at.nodes, routed(options, kind)) * busiest(options, kind, at)
        nodes = min(nodes, at.nodes - 1)  # a token crosses to each of the others once
        balanced = [with_rows_for_nodes(shape, distinct_nodes=nodes, tokens=options.tokens,
                                        ranks_per_node=at.per_node) for shape in balanced]  # fmt: skip
    return [_narrowed(options, shape) for shape in balanced]


def _narrowed(options: PlanOptions, shape: StepShape) -> StepShape:
    return shape if options.dispatch_row_bytes is None else with_narrow_rows(shape, options.dispatch_row_bytes)


def traffic_of(options: PlanOptions, kind: str, at: Place, *, seats: object = None) -> Routed:
    """The saved routing at a place, which is read with torch: a plan without one starts without it. seats: where the
    experts are (`agreement.seats.Seats`); None: in order."""
    from moe_overlap.commands.plan.traffic import saved, traffic

    assert options.routing is not None
    file = saved(options.routing, options.experts, options.top_k)
    return traffic(file, options.routing, experts=options.experts, top_k=routed(options, kind), tokens=options.tokens,
                   ranks=at.group, per_node=at.per_node, distinct=options.dedup != "off", seats=seats)  # fmt: skip


def distinct_rows(options: PlanOptions, kind: str, at: Place) -> float:
    """Other ranks that a token goes to: of the saved routing, or expected where all sets of experts are equally
    likely."""
    if options.routing is not None:
        return traffic_of(options, kind, at).distinct_rows_per_token
    return distinct_ranks(at.group * local_experts(options, at), at.group, routed(options, kind))


def cost_model(options: PlanOptions, kind: str, at: Place) -> CostModel:
    """The calibrated model with the rates asked for, or one from the figures of a machine."""
    if options.cost_model is not None:
        return replace(options.cost_model, exchange=_calibrated_wires(options, options.cost_model, at))
    flop_s, row_bytes = 1 / options.flops, options.hidden * options.dtype_bytes
    row_s = row_bytes / options.memory_bandwidth
    matmul_s = 2 * expert_params(options) * flop_s
    ops_s = backbone_s(options)
    inside = WINDOW_OPS[kind] if kind.startswith("scmoe") else 0
    whole_s = ops_s if kind.startswith("scmoe") else ops_s[:3]
    outside_s = sum(whole_s[: len(whole_s) - inside])
    router_s = 2 * options.tokens * options.hidden * options.experts * flop_s
    shared_s = ops_s[3] if kind == "shared1" else 0.0
    window_s = whole_s[len(whole_s) - inside :]

    def rows(passes: float) -> AlphaBeta:
        return AlphaBeta(alpha_s=options.launch, beta_s=passes * row_s)

    def experts(passes: float) -> AlphaBeta:
        return AlphaBeta(alpha_s=options.launch, beta_s=matmul_s + passes * row_s)

    return CostModel(
        exchange=_wires(options, at),
        experts=experts(4),
        experts_dgrad=experts(4),
        experts_wgrad=experts(0),
        expert_s=weights_read_s(options),
        expert_dgrad_s=weights_read_s(options),
        permute=rows(2),
        unpermute=rows(2),
        unpermute_backward=rows(3),
        permute_backward=rows(2),
        backbone_s=window_s,
        backbone_backward_s=tuple(2 * seconds for seconds in window_s),
        shared_s=shared_s,
        shared_backward_s=2 * shared_s,
        outside_s=outside_s + router_s + agreement_s(options, at),
        agree_s=agreement_s(options, at),
        distinct=_distinct_costs(options, kind, at, outside_s + router_s),
        outside_backward_s=2 * (outside_s + router_s),
        issue_s=options.issue if at.peers else 0.0,
        weights_hidden=1.0 if options.weights == "beside" else 0.0,
        slowdown=options.slowdown,
        source="from numbers",
    )


def _distinct_costs(options: PlanOptions, kind: str, at: Place, outside_s: float) -> DistinctCosts:
    """What differs where steps are deduplicated. outside_s: of forward, without the agreement."""
    row_s = options.hidden * options.dtype_bytes / options.memory_bandwidth
    matmul_s = 2 * expert_params(options) / options.flops
    top_k = routed(options, kind)
    # Rows for each choice, those that stay included: 1 where no two experts of a token are on one rank.
    local = local_experts(options, at)
    kept = at.group * (1 - chance_of_none(at.group * local, local, top_k)) / top_k
    if options.routing is not None and options.dedup != "off":
        kept = traffic_of(options, kind, at).kept

    def rows(passes: float, verb: str = "") -> AlphaBeta:
        small_s = SMALL_LAUNCH * options.launch * SMALL_OPS.get(verb, 0)
        read_s = SMALL_BYTES.get(verb, 0) / options.memory_bandwidth
        return AlphaBeta(alpha_s=options.launch + small_s, beta_s=passes * kept * row_s + read_s)

    def beside_s(verb: str) -> float:
        choices = options.tokens * top_k
        return SMALL_LAUNCH * options.launch * SMALL_OPS[verb] + SMALL_BYTES[verb] * choices / options.memory_bandwidth

    # Unpacking reads and writes each row that arrives; the sum reads what each expert wrote, and writes each row.
    experts = AlphaBeta(alpha_s=options.launch, beta_s=matmul_s + (1 + 3 * kept) * row_s)
    return DistinctCosts(
        experts=experts,
        experts_dgrad=experts,
        experts_wgrad=AlphaBeta(alpha_s=options.launch, beta_s=matmul_s),
        expert_s=weights_read_s(options),
        expert_dgrad_s=weights_read_s(options),
        permute=rows(2, "P"),
        unpermute=rows(2),
        unpermute_backward=rows(2, "Ut"),
        permute_backward=rows(2, "Pt"),
        outside_s=outside_s + agreement_s(options, at, distinct=True) + beside_s("M"),
        outside_backward_s=2 * outside_s + beside_s("Mt"),
        inside=_wires(options, at)["intra"]
        if options.dedup == "node" and len(at.peers) == 2
        else AlphaBeta.measured(0, 0),
        gateway_byte_s=1 / options.memory_bandwidth,
    )


def backbone_s(options: PlanOptions) -> tuple[float, ...]:
    """Forward seconds of attention, MLP, attention, shared expert; the first three may have been given."""
    t, attention = options.tokens, options.attention_block
    mlp_s, shared_s = (
        dense_s(options, 2 * t * params, params)
        for params in (3 * options.hidden * width for width in (options.ffn, options.shared_width))
    )
    if options.backbone is not None:
        return (*options.backbone, shared_s)
    attention_s = dense_s(options, attention.flops(t, min(options.sequence, t)), attention.params)
    return attention_s, mlp_s, attention_s, shared_s


def dense_s(options: PlanOptions, flops: float, params: float) -> float:
    """Seconds of an op that all tokens of a rank pass: of its FLOPs, or of reading its weights where that takes longer,
    as with the few tokens of a decoder; none where there are no tokens."""
    read_s = params * options.dtype_bytes / options.memory_bandwidth
    return max(flops / options.flops, read_s) if options.tokens else 0.0


def agreement(options: PlanOptions, at: Place, *, distinct: bool = False) -> AgreementCost:
    """What it costs to agree on the counts of a step. `distinct`: of one that may be deduplicated."""
    return agreement_cost(ranks=at.group, experts=at.group * local_experts(options, at), dedup=int(distinct))


def agreement_s(options: PlanOptions, at: Place, *, distinct: bool = False) -> float:
    """Seconds of the agreement that begins every step."""
    if at.group == 1:
        return 0.0
    assert at.bytes_per_s is not None and options.intra_bandwidth is not None and options.latency is not None
    rate = inter_rate(options, at) if "inter" in at.peers else options.intra_bandwidth
    cost = agreement(options, at, distinct=distinct)
    return cost.seconds(latency_s=options.latency, message_s=options.message, bytes_per_s=rate)


def expert_params(options: PlanOptions) -> int:
    """Numbers of one expert's weights."""
    return options.matrices * options.hidden * options.expert_width


def weights_read_s(options: PlanOptions) -> float:
    """How long reading one expert's weights takes, beside its matmuls or before them (--weights)."""
    return expert_params(options) * options.dtype_bytes / options.memory_bandwidth


def inter_rate(options: PlanOptions, at: Place) -> float:
    """Bytes per second of one rank to other nodes, all of them in use: its share of a NIC of the node, and less of it
    for bytes that leave the first switch."""
    assert at.bytes_per_s is not None
    rate = at.bytes_per_s / (min(at.per_node, options.ranks_per_node) if options.nic == "node" else 1)
    beyond = max(0, at.nodes - options.leaf) / max(1, at.nodes - 1)
    return rate / (1 - beyond + beyond / options.spine)


def _wires(options: PlanOptions, at: Place) -> dict[str, AlphaBeta]:
    assert options.intra_bandwidth is not None and options.latency is not None
    rates = {"inter": inter_rate(options, at), "intra": options.intra_bandwidth}
    return {
        wire: AlphaBeta(alpha_s=options.latency + count * options.message, beta_s=1 / rates[wire])
        for wire, count in at.peers.items()
    }


def _calibrated_wires(options: PlanOptions, model: CostModel, at: Place) -> dict[str, AlphaBeta]:
    """The calibrated wires. A rate or latency that was asked for replaces the calibrated one."""
    rates = {"inter": at.bytes_per_s, "intra": options.intra_bandwidth}
    found = {}
    for wire in at.peers:
        line, rate = model.exchange.get(wire), rates[wire]
        if line is None:
            if rate is None or options.latency is None:
                flag = "--bandwidth" if wire == "inter" else "--intra-bandwidth"
                where = f"{at.group} ranks, {at.per_node} per node"
                raise ConfigError(flag, rate, f"a rate, and --latency: --cost-model has no wire {wire!r} for {where}")
            line = AlphaBeta(alpha_s=options.latency, beta_s=1 / rate)
        alpha_s = line.alpha_s if options.latency is None else options.latency
        found[wire] = AlphaBeta(alpha_s=alpha_s, beta_s=line.beta_s if rate is None else 1 / rate)
    return found
