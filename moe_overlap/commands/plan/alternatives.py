"""What another choice would give: rows sent once, narrower rows, other numbers of ranks in a group, no exchange.

Each is the question again with something changed, planned anew. Tokens a rank stay; what changes the model says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moe_overlap.commands.plan.machine import (
    Place,
    backbone_s,
    cost_model,
    expert_params,
    local_experts,
    op_verb,
    shapes,
)
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import Prediction, predict
from moe_overlap.errors import ConfigError
from moe_overlap.planning.three_lanes import three_lanes_s

LATENT = 4  # experts of this part of the width, as in LatentMoE


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """seconds: of the block pair. weights: bytes of a rank's experts of one layer."""

    what: str
    seconds: float
    weights: float


def alternatives(options: PlanOptions, point: Prediction) -> list[Alternative]:
    """Those that can be asked for, in the order of `_changes`."""
    found = []
    for what, changes in _changes(options, point):
        try:
            other = replace(options, **changes)  # type: ignore[arg-type]
        except ConfigError:
            continue  # no such place: experts that cannot be shared out like that
        one = predict(other, point.kind, ranks=other.ranks, bytes_per_s=other.bandwidth)
        found.append(Alternative(what=what, seconds=one.time_s, weights=_weights(other, one.at)))
    if len(point.at.peers) == 2 and options.routing is None and options.expert_offload is None:
        found.append(_beside_compute(replace(options, dedup="node"), point))
    return found


def _beside_compute(options: PlanOptions, point: Prediction) -> Alternative:
    """One row for each (token, node) between nodes, passed on there by a lane of its own."""
    at, verb = point.at, op_verb(point.kind, point.model)
    model = cost_model(options, point.kind, at)
    cuts = [cut for cut in shapes(options, point.kind, at, distinct=True) if cut.by == "tokens"]
    seconds = sum(model.deduplicated.outside(phase.phase)
                  + min(three_lanes_s(model, cut, phase.phase, op_verb=verb) for cut in cuts)
                  for phase in point.phases)  # fmt: skip
    what = "one row for each (token, node), passed on inside nodes beside compute (FSMoE; no schedule here does)"
    return Alternative(what=what, seconds=seconds, weights=_weights(options, at))


def _weights(options: PlanOptions, at: Place) -> float:
    return float(local_experts(options, at) * expert_params(options) * options.dtype_bytes)


def _changes(options: PlanOptions, point: Prediction) -> Iterator[tuple[str, dict[str, object]]]:
    at, group = point.at, point.at.group
    if point.deduplicated:
        yield "rows for every choice (--dedup off)", {"dedup": "off"}
    elif group > 1:
        yield "one row for each (token, rank) (--dedup on)", {"dedup": "on"}
    if len(at.peers) == 2 and options.dedup != "node" and options.routing is None:
        yield "one row for each (token, node) between nodes (--dedup node)", {"dedup": "node"}
    if group > 1 and options.dispatch_dtype == "same":
        yield "fp8 rows to the experts (--dispatch-dtype fp8)", {"dispatch_dtype": "fp8"}
    if options.skew > 1 and options.expert_offload is None:
        yield "replicas of wanted experts that even the load out", {"skew": 1.0}
    if options.routing is None:
        for size in (group // 2, group * 2):
            if 1 < size <= options.experts and size != group:
                yield f"groups of {size} ranks", {"ranks": size}
        if group > 1:
            yield "no expert parallelism: all experts on every rank, all-reduced", {"ranks": 1}
        yield from _whole_racks(options, point)
    if options.hidden % LATENT == 0:
        attention_s, mlp_s, second_s, _ = backbone_s(options)  # these, and the shared expert, stay as wide as they are
        down_s = 4 * options.tokens * options.hidden * (options.hidden // LATENT) / options.flops
        changes = {"hidden": options.hidden // LATENT, "backbone": (attention_s, mlp_s, second_s + down_s),
                   "shared_ffn": options.shared_width * LATENT}  # fmt: skip
        yield f"experts in a latent width of {options.hidden // LATENT}, another model", changes


def _whole_racks(options: PlanOptions, point: Prediction) -> Iterator[tuple[str, dict[str, object]]]:
    """As many ranks a node as divide a group, where the nodes as they are do not: "64 of 72"."""
    per_node = options.ranks_per_node
    if point.at.per_node >= min(point.at.group, per_node):
        return
    for fewer in range(per_node - 1, point.at.per_node, -1):
        ranks = point.ranks // per_node * fewer
        group = ranks if ranks <= options.experts else math.gcd(ranks, options.experts)
        if ranks % group == 0 and group == min(ranks, options.experts) and math.gcd(group, fewer) == fewer:
            yield f"{fewer} ranks of each node's {per_node}", {"ranks": ranks, "ranks_per_node": fewer}
            return


def alternative_lines(found: list[Alternative], here_s: float, more: Sequence[str] = ()) -> list[str]:
    """more: lines of the same kind that others have to say."""
    if not found and not more:
        return []
    return ["What else would give, for a block pair at the same tokens a rank:"] + [
        f"  {one.what}: {1e3 * one.seconds:.3f} ms ({here_s / one.seconds:.2f}x as fast), experts "
        f"{one.weights / 1e9:.3g} GB a layer and rank" for one in found
    ] + list(more)  # fmt: skip
