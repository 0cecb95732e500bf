"""What slots for copies of wanted experts would give: the decision of `planning/replication.py`, planned anew.

The counts are those of the saved routing, or such as have the skew that was asked for (`skewed_counts`). In inference
copies stay: they travel once, and a step pays nothing for them. In training an optimizer changes the weights, so that
every step fetches them (Wf) and sends their gradients home in float32 (Wg), as a layer's copies do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from moe_overlap.agreement.relays import Order, Ports, direct_ports, relays_of
from moe_overlap.commands.plan.machine import (
    busiest,
    distinct_rows,
    expert_params,
    local_experts,
    routed,
    traffic_of,
    weights_read_s,
)
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import Prediction, predict
from moe_overlap.commands.plan.whole_model import WholeModel
from moe_overlap.planning.copied import with_copies_priced
from moe_overlap.planning.copy_costs import FREE, GRADIENT_BYTES, PhaseCosts, costs_of
from moe_overlap.planning.copy_load import Load, rank_rows
from moe_overlap.planning.cost_model import WIRES
from moe_overlap.planning.replication import Decision, decide

STEEPEST, HALVINGS = 50.0, 60  # exponents of Zipf's law that are looked at
UNCOUNTED = 1e-9  # of a row's time, where it is hidden: not 0, as its parts say what of a backward is weight gradients


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """`copies`: of one layer, on all ranks. `before`, `after`: rows of the busiest rank over the mean. `seconds`: of
    the block pair. `moved_bytes`: of all copies of a layer, once in inference and in every step of training, with their
    gradients. `held_bytes`: of the copies on the rank that has most, in one layer."""

    copies: int
    before: float
    after: float
    seconds: float
    moved_bytes: int
    held_bytes: int


def skewed_counts(*, tokens: int, top_k: int, ranks: int, experts: int, local: int, share: float) -> np.ndarray | None:
    """int64 [W, E]: choices of each rank's tokens, all ranks alike, for experts that are wanted by Zipf's law in their
    order, no one more than once by a token. Its exponent is the one at which the first `local` experts, those of rank
    0, get this `share` of all choices. None: no exponent gives them so many.

    >>> skewed_counts(tokens=60, top_k=1, ranks=2, experts=4, local=2, share=0.75).tolist()
    [[31, 14, 9, 6], [31, 14, 9, 6]]
    """
    flat, steep = 0.0, STEEPEST
    if _zipf(steep, experts, top_k)[:local].sum() < share * (1 - 1e-9):
        return None
    for _ in range(HALVINGS):
        middle = (flat + steep) / 2
        if _zipf(middle, experts, top_k)[:local].sum() < share:
            flat = middle
        else:
            steep = middle
    wanted = _zipf(steep, experts, top_k) * tokens * top_k
    counts = np.floor(wanted).astype(np.int64)
    missing = tokens * top_k - int(counts.sum())
    counts[np.argsort(counts - wanted, kind="stable")[:missing]] += 1
    return np.tile(np.minimum(counts, tokens), (ranks, 1))


def _zipf(exponent: float, experts: int, top_k: int) -> np.ndarray:
    """[E], the share of all choices that each expert gets: at most 1 / top_k, what is over goes to those behind."""
    weights = np.arange(1.0, experts + 1) ** -exponent
    full = 0
    while True:
        rest = weights[full:] / weights[full:].sum() * (1 - full / top_k)
        if full >= top_k or rest[0] * top_k <= 1:
            return np.concatenate([np.full(full, 1 / top_k), rest])
        full += 1


def replicas(options: PlanOptions, point: Prediction) -> Replicas | None:
    """What `options.replica_slots` slots on each rank give: the fastest of leaving it and of what is decided where
    copies are hidden, or exposed, each planned anew. None where no choice of experts has the skew asked for."""
    counts = _counts(options, point)
    if counts is None:
        return None
    at, local = point.at, local_experts(options, point.at)
    homes = [expert // local for expert in range(counts.shape[1])]
    load = Load.at_home(counts, homes, [options.replica_slots] * at.group, ranks_per_node=at.per_node)
    best_s, best, before = point.time_s, load.seats, _over_mean(load.seats, at.group)
    for exposed in (False, True) if options.phase == "train" else (False,):
        found = decide(load, [replace(cost, exposed_copies=exposed) for cost in _costs(options, point)])
        if found.left:
            continue
        seconds = _replanned_s(options, point, load, found, _over_mean(found.seats, at.group) / before)
        if seconds < best_s:
            best_s, best = seconds, found.seats
    copies, params = best[len(load.seats) :], expert_params(options)
    sent = params * options.dtype_bytes + (params * GRADIENT_BYTES if options.phase == "train" else 0)
    most = max(sum(rank == one for _, one, _ in copies) for rank in range(at.group))
    return Replicas(copies=len(copies), before=before, after=_over_mean(best, at.group), seconds=best_s,
                    moved_bytes=len(copies) * sent, held_bytes=most * params * options.dtype_bytes)  # fmt: skip


def _counts(options: PlanOptions, point: Prediction) -> np.ndarray | None:
    if options.routing is not None:
        return traffic_of(options, point.kind, point.at).rows_WE
    return skewed_counts(tokens=options.tokens, top_k=routed(options, point.kind), ranks=point.at.group,
                         experts=options.experts, local=local_experts(options, point.at),
                         share=busiest(options, point.kind, point.at) / point.at.group)  # fmt: skip


def _over_mean(seats: Sequence[tuple[int, int, int]], ranks: int) -> float:
    loads = rank_rows(seats, ranks)
    return max(loads) * ranks / max(1, sum(loads))


def _costs(options: PlanOptions, point: Prediction) -> list[PhaseCosts]:
    """Of each phase with its cut. Where weights are read beside the matmuls, only the longer of both counts; rows that
    are sent once for several choices weigh less."""
    row_bytes, params = options.hidden * options.dtype_bytes, expert_params(options)
    top_k, group = routed(options, point.kind), point.at.group
    if point.deduplicated:
        row_bytes = round(row_bytes * distinct_rows(options, point.kind, point.at) * group / (top_k * (group - 1)))
    read_s = local_experts(options, point.at) * weights_read_s(options)
    found = []
    for phase in point.phases:
        best = phase.best
        (cost,) = costs_of(point.model, (phase.phase,), row_bytes=max(1, row_bytes), expert_params=params,
                           param_bytes=options.dtype_bytes, chunks=best.chunks, joined=best.joined)  # fmt: skip
        if options.weights == "beside":
            by_rows = cost.row_s * options.tokens * top_k * busiest(options, point.kind, point.at) >= read_s
            hidden = replace(cost, row_s=UNCOUNTED * cost.row_s, wgrad_row_s=UNCOUNTED * cost.wgrad_row_s)
            cost = replace(cost, expert_s=0.0) if by_rows else hidden
        found.append(cost if options.phase == "train" else replace(cost, copy=(FREE, FREE)))
    return found


def _replanned_s(options: PlanOptions, point: Prediction, load: Load, found: Decision, evened: float) -> float:
    """Seconds with the copies, the schedule searched anew; in training with Wf and Wg in it. evened: what is left of
    the busiest rank's rows."""
    at, routing = point.at, None
    if options.routing is not None:
        from moe_overlap.commands.plan.traffic import seats_with_copies  # with torch, as the routing was read

        routing = traffic_of(options, point.kind, at, seats=seats_with_copies(load, found))
    else:
        options = replace(options, skew=max(1.0, options.skew * evened))
    other = predict(options, point.kind, ranks=point.ranks, bytes_per_s=at.bytes_per_s, routing=routing)
    if options.phase == "infer":
        return other.time_s
    orders = tuple(Order(expert, load.seats[expert][1], rank) for expert, rank in found.copies(load))
    direct, relays = direct_ports(orders, load.ranks_per_node), relays_of(orders, load.ranks_per_node)
    seconds = 0.0
    for phase in other.phases:
        size = expert_params(options) * (options.dtype_bytes if phase.phase == "forward" else GRADIENT_BYTES)
        ways: list[Sequence[Ports]] = [[direct]]
        if phase.phase == "forward" and relays is not None:
            ways.append(relays.ports)
        wires_s = [[_exchange_s(point, ports, size) for ports in groups] for groups in ways]
        seconds += phase.outside_s + with_copies_priced(phase.window, phase.candidates, wires_s)[0].predicted_s
    return seconds


def _exchange_s(point: Prediction, ports: Ports, size: int) -> float:
    """Of so many copies through the busiest port, by wire (inter, intra), each of `size` bytes."""
    return point.model.exchange_s({wire: count * size for wire, count in zip(WIRES, ports, strict=True) if count})


def replica_line(options: PlanOptions, point: Prediction, whole: WholeModel | None) -> str:
    """What `moe-overlap plan` says of it, among what else would give; "" where nobody asks, where nothing is uneven, or
    experts are in host memory, of which a layer has no copies."""
    if not _are_asked(options, point):
        return ""
    slots = options.replica_slots
    asked = f"  {slots} slot{'s' if slots > 1 else ''} a rank for copies of wanted experts (--replica-slots)"
    found = replicas(options, point)
    if found is None:
        return f"{asked}: not said, since no choice of experts has such a --skew"
    if not found.copies:
        return f"{asked}: no copy pays; the busiest rank keeps {found.before:.2f}x the mean rows"
    how = "fetched in every step, their gradients sent home" if options.phase == "train" else "sent once"
    return (
        f"{asked}: {_ms(found, point)}; {found.copies} copies take the busiest rank from {found.before:.2f}x to "
        f"{found.after:.2f}x the mean rows, {found.moved_bytes / 1e9:.3g} GB a layer {how}, at most "
        f"{found.held_bytes / 1e9:.3g} GB a layer and rank{_fits(options, found, whole)}"
    )


def replica_record(options: PlanOptions, point: Prediction) -> dict[str, float] | None:
    """The same for plan.json; None where nothing is said, or not how much."""
    found = replicas(options, point) if _are_asked(options, point) else None
    return None if found is None else {"slots": options.replica_slots, **asdict(found)}


def _are_asked(options: PlanOptions, point: Prediction) -> bool:
    """Whether anybody asks, and something is uneven; experts in host memory have no copies."""
    asked = options.expert_offload is None and bool(options.replica_slots)
    return asked and options.uneven and point.at.group > 1


def _ms(found: Replicas, point: Prediction) -> str:
    return f"{1e3 * found.seconds:.3f} ms ({point.time_s / found.seconds:.2f}x as fast)"


def _fits(options: PlanOptions, found: Replicas, whole: WholeModel | None) -> str:
    """Whether the copies of all layers have room beside the rest; "" where nobody says how much there is."""
    if whole is None or not options.memory:
        return ""
    need = whole.bytes + copies_bytes(options, found)
    verb = "fits" if need <= options.memory else "does NOT fit"
    return f"; it {verb}: {need / 1e9:.4g} GB of {options.memory / 1e9:g} GB"


def copies_bytes(options: PlanOptions, found: Replicas) -> float:
    """Of the copies of a card's layers, and in training of the float32 gradients of one layer's."""
    gradients = found.held_bytes / options.dtype_bytes * GRADIENT_BYTES if options.phase == "train" else 0.0
    return found.held_bytes * options.counted_moe_layers / options.stages + gradients
