"""Calibration: what the exchanges, the experts and the ops beside them cost here, fitted to a `CostModel`.

A probe is one real step of a layer, forward and backward, under a known schedule. In three probes (1, 4 and 16 chunks)
every exchange is joined where it starts, so that each action is measured with nothing beside it; a fourth, in chunks by
expert groups, tells what each expert costs from what each row costs; a fifth, overlapped, shows by how much compute is
slower while the wire is busy. Where steps may be deduplicated, two more (1 and 4 chunks, joined) tell what differs in
those. All ranks run the same probes, gather what they measured and
fit the same model from it: planners that disagree would deadlock.

Every probe runs once to warm up, then round by round, as often as fits the budget. Where steps are so slow that a
warm-up and a round of all would not fit it, the probes in 16 chunks, by expert groups and deduplicated in 1 chunk are
left out: six steps are the least that a model is made from, eight with deduplication.

Where experts are in host memory all cuts are by experts, in 1, 4 and 16 groups of them or as many as there are (more
where fewer would not keep within a limit of the device's memory), joined, and in 4 overlapped. Their copies are
measured in these steps, of the slowest rank, each alone on its link; what is waited for them is noted beside the
experts' own time.

Of a compute action the slowest rank counts. Of an exchange the rank that waited least counts: it came last, so it
waited for the transfer alone. The quicker half of the rounds counts, since what disturbs a round only slows it; and a
sum of medians is less than the median of a sum, so compute is scaled to what the whole step took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from moe_overlap.agreement.loads import KINDS, LANES, Counts, Nodes, moves
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.auto.fit import Probe, fit
from moe_overlap.auto.probe_pairs import CHUNKS, PairOf, offloaded_pairs, plain_pairs
from moe_overlap.measure.timeline import TimelineEvent, overlap
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.shapes import MetadataBytes, StepShape, experts_per_chunk, without_own
from moe_overlap.schedule.actions import Action, Phase
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.lanes import RETURNING
from moe_overlap.transport.base import Transport

BUDGET_S = 15.0  # seconds that the probes may take; the limit of the whole is 20 s
ROUNDS = (1, 9)  # fewest and most timed rounds
ALONE = 5  # most rounds of the exchanges within the nodes


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTimes:
    """One probe on this rank: its events, its seconds from start to end, and the counts that were agreed on."""

    events: Sequence[TimelineEvent]
    forward_s: float
    backward_s: float
    exchange: ExchangePlan


RunStep = Callable[[SchedulePair], StepTimes]


def step_shape(
    plan: ChunkPlan, *, row_bytes: int, nodes: Nodes | None = None, joined: bool = False, expert_bytes: int = 0
) -> StepShape:
    """The integers of one step that durations depend on. `nodes`: the node of each rank (None: each has its own).
    expert_bytes: of an expert in host memory, 0 where they are not there.

    `joined`: the ranks meet after every exchange, so each chunk has the rows of its own busiest rank. Otherwise a rank
    with much in one chunk has less in others, and the busiest rank of the whole step counts, its rows spread over the
    chunks as all ranks' are.
    """
    chunks, loads = plan.chunks, plan.exchange.counts.loads(nodes)

    def busiest(kind: str) -> tuple[int, ...]:
        """Per chunk, rows."""
        if joined:
            return tuple(int(n) for n in loads.busiest(kind, chunks, plan.by))
        most, all_ranks = int(loads.busiest(kind, 1, "tokens")[0]), loads.total(kind, chunks, plan.by)
        ends = most * np.cumsum(all_ranks) // max(1, int(all_ranks.sum()))
        return tuple(int(n) for n in np.diff(ends, prepend=0))

    lanes = {lane: tuple(rows * row_bytes for rows in busiest(lane)) for lane in wires(plan.world_size, nodes)}
    return StepShape(
        chunks=chunks,
        by=plan.by,
        rows=busiest("rows"),
        experts=experts_per_chunk(plan.local_slots, chunks, plan.by),
        bytes_by_lane=lanes,
        slots_rows=plan.exchange.counts.most_sent,
        row_bytes=row_bytes,
        expert_bytes=expert_bytes,
    )


def distinct_shape(
    plan: ChunkPlan,
    *,
    row_bytes: int,
    metadata: MetadataBytes,
    nodes: Nodes | None = None,
    joined: bool = False,
) -> StepShape:
    """`step_shape` where the step is deduplicated. Of the busiest rank's rows as many stay as of all ranks' do."""
    exchange, chunks, by = plan.exchange, plan.chunks, plan.by
    first, last = travelling(exchange)
    node_rows = exchange.node_rows

    def shape_of(counts: Counts) -> StepShape:
        counted = replace(exchange, counts=counts).chunked(chunks, by)
        return step_shape(counted, row_bytes=row_bytes, nodes=nodes, joined=joined)

    shape, loads = shape_of(exchange.counts), exchange.counts.loads(nodes)
    total, *away = (loads.total(kind, chunks, by) for kind in KINDS)
    stay = total - sum(away)
    others = tuple(int(n - n * stay[c] // max(1, total[c])) for c, n in enumerate(shape.rows))
    out_by_lane = shape_of(first).bytes_by_lane
    return without_own(
        shape,
        own_rows=sum(shape.rows) - sum(others),
        rows=others,
        out_by_lane=out_by_lane,
        back_by_lane=shape_of(last).bytes_by_lane,
        metadata=metadata,
        inside=None if node_rows is None else (_inside(shape_of(node_rows.inside[0])),
                                                _inside(shape_of(node_rows.inside[1]))),
        kept=gateways_keep(exchange, sum(out_by_lane.get("inter", ())), row_bytes),
    )  # fmt: skip


def gateways_keep(exchange: ExchangePlan, crossing: int, row_bytes: int) -> int:
    """Bytes that the busiest gateway keeps in a step of several chunks, at most: the rows that came across, of which
    `crossing` bytes leave or enter the busiest rank, and the sums of those that it passes on, its own experts' too."""
    return 0 if exchange.node_rows is None else crossing + exchange.node_rows.inside[1].most_sent * row_bytes


def travelling(exchange: ExchangePlan) -> tuple[Counts, Counts]:
    """Rows of a deduplicated step by the first and by the last slot that needs them: those that cross nodes once, or
    one for each rank."""
    if exchange.node_rows is not None:
        return exchange.node_rows.across
    assert exchange.first is not None and exchange.last is not None, "agreed on with deduplication"
    return exchange.first, exchange.last


def _inside(shape: StepShape) -> tuple[int, ...]:
    """Bytes of each chunk on whatever wire."""
    return tuple(map(sum, zip(*shape.bytes_by_lane.values(), strict=True)))


def wires(world: int, nodes: Sequence[int] | None) -> tuple[str, ...]:
    """The wires that ranks on these nodes take to each other."""
    taken = moves(world, None if nodes is None else tuple(nodes))
    return tuple(lane for lane, pairs in zip(LANES, taken, strict=True) if pairs.any())


# ---------------------------------------------------------------- measuring


def calibrate(
    run: RunStep,
    pair_of: PairOf,
    transport: Transport,
    *,
    groups: int,
    row_bytes: int,
    device: torch.device,
    source: str,
    nodes: Nodes | None = None,
    metadata: MetadataBytes | None = None,
    expert_bytes: int = 0,
    device_limit_bytes: int | None = None,
    budget_s: float = BUDGET_S,
) -> CostModel:
    """The cost model of the step that `run` executes. Collective: all ranks call it alike and get the same model.

    pair_of(chunks, by): the schedules of the step in so many chunks. groups: the most groups of experts that there may
    be, the slots of a rank. row_bytes: bytes of one exchanged row. source: where it was measured, in words. metadata:
    of a row of a deduplicated step, which `run` executes too then. expert_bytes: of the weights of one expert, where
    they are in host memory; device_limit_bytes: the most bytes of these on the device in a probe. Ends within
    `budget_s` seconds and a third, or with two runs of the fewest probes where these take longer.
    """
    if expert_bytes:
        limit = None if device_limit_bytes is None else device_limit_bytes // expert_bytes
        pairs, more = offloaded_pairs(pair_of, groups, limit)
    else:
        pairs, more = plain_pairs(pair_of, groups, dedup=metadata is not None)
    runs = _run_probes(run, pairs, more, transport, device=device, budget_s=budget_s)
    probes = [
        _probe(pair, found, transport, row_bytes=row_bytes, device=device, nodes=nodes, metadata=metadata,
               expert_bytes=expert_bytes)
        for pair, found in runs
    ]  # fmt: skip
    distinct = [probe for probe in probes if probe.pair.deduplicated]
    one, four, overlapped, *others = (probe for probe in probes if not probe.pair.deduplicated)
    joined = [one, four, *others[:1]]
    first = runs[0][1]
    alone = _within_node(first[0].exchange, transport, row_bytes=row_bytes, device=device, nodes=nodes,
                         cuts=[probe.chunks for probe in joined], rounds=min(len(first), ALONE))  # fmt: skip
    return fit(joined, overlapped, others[1] if others[1:] else None, distinct=distinct, within_node=alone,
               source=source)  # fmt: skip


def _run_probes(
    run: RunStep,
    pairs: list[SchedulePair],
    more: Sequence[SchedulePair],
    transport: Transport,
    *,
    device: torch.device,
    budget_s: float,
) -> list[tuple[SchedulePair, list[StepTimes]]]:
    """The runs of each probe, of those in `more` too where the budget allows all of them. Collective: which run, and
    how often, follows from the slowest rank's seconds."""
    start_s = time.perf_counter()

    def timed(pair: SchedulePair) -> tuple[StepTimes, float]:
        before_s = time.perf_counter()
        return run(pair), time.perf_counter() - before_s

    def slowest(*seconds: float) -> list[float]:
        """The most that any rank has of each, then of the time since the start."""
        values = [*seconds, time.perf_counter() - start_s]
        table = gathered(transport, torch.tensor(values, dtype=torch.float64, device=device))
        return [float(most) for most in table.amax(dim=0)]

    # Warm: first calls make buffers, connections and caches.
    *warm_s, used_s = slowest(*(timed(pair)[1] for pair in pairs))
    if used_s + _all_probes_s(warm_s, len(more)) <= budget_s:
        for pair in more:
            run(pair)
        pairs = [*pairs, *more]
    first = [timed(pair) for pair in pairs]
    runs = [(pair, [times]) for pair, (times, _) in zip(pairs, first, strict=True)]
    round_s, used_s = slowest(sum(seconds for _, seconds in first))
    for _ in range(1, min(max(1 + int((budget_s - used_s) / max(round_s, 1e-6)), ROUNDS[0]), ROUNDS[1])):
        for pair, found in runs:
            found.append(run(pair))
    return runs


def _all_probes_s(warm_s: Sequence[float], others: int) -> float:
    """Seconds that the other probes' first runs and a round of all would take, by the first runs of those in one chunk,
    in four, and overlapped (and deduplicated in four). What a first run alone needs is taken for a part of the step,
    so this is on the safe side.
    """
    one_s, four_s, overlapped_s, *distinct_s = warm_s
    one_s = min(one_s, four_s)
    sixteen_s = four_s + (four_s - one_s) * (CHUNKS[2] - CHUNKS[1]) / (CHUNKS[1] - CHUNKS[0])
    return 2 * (sixteen_s + (others - 1) * four_s) + one_s + four_s + overlapped_s + sum(distinct_s)


def _within_node(
    exchange: ExchangePlan,
    transport: Transport,
    *,
    row_bytes: int,
    device: torch.device,
    nodes: Nodes | None,
    cuts: Sequence[int],
    rounds: int,
) -> list[tuple[float, float]]:
    """(bytes, seconds) of the step's exchanges without what goes between nodes, where both wires are taken. Collective.

    In the step itself the slower of both wires is what one sees. Of each exchange the rank that waited least counts,
    and the median of the rounds. cuts: numbers of chunks.
    """
    if len(wires(exchange.world_size, nodes)) < 2:
        return []
    sizes_of = exchange.counts.loads(nodes)
    inside = moves(exchange.world_size, nodes)[LANES.index("intra")]
    clock, layout = clock_for(device), RowLayout(width=row_bytes, dtype=torch.uint8)
    assert clock is not None, "probes are recorded"
    points = []
    for chunks in cuts:
        plan = _only(exchange.chunked(chunks, "tokens"), inside[exchange.rank])
        rows = torch.zeros(max(plan.send_rows), row_bytes, dtype=torch.uint8, device=device)
        taken = []
        for _ in range(rounds):
            stamps = [clock.now()]
            for c in range(chunks):
                transport.start(rows[: plan.send_rows[c]], plan, layout, c, action="calibrate").wait()
                stamps.append(clock.now())
            ends_s = [clock.seconds(stamp) for stamp in stamps]
            taken.append([after - before for before, after in pairwise(ends_s)])
        table = gathered(transport, torch.tensor(taken, dtype=torch.float64, device=device).reshape(-1))
        seconds = table.reshape(-1, rounds, chunks).amin(dim=0).median(dim=0).values
        sizes = sizes_of.busiest("intra", chunks, "tokens") * row_bytes
        points += [(float(size), float(one)) for size, one in zip(sizes, seconds, strict=True)]
    return points


def _only(plan: ChunkPlan, ranks: np.ndarray) -> ChunkPlan:
    """The exchanges of `plan` with some ranks alone, bool [W], on all ranks alike."""
    sent = plan.sent * np.repeat(ranks, plan.local_slots)
    return replace(plan, sent=sent, received=plan.received * ranks[:, None])


def gathered(transport: Transport, values: torch.Tensor) -> torch.Tensor:
    """[W, n]: the numbers `values` [n] of every rank. Collective."""
    table = values.new_zeros(transport.world_size, values.numel())
    table[transport.rank] = values
    return transport.all_reduce(table, action="calibrate").wait().cpu()


def _probe(
    pair: SchedulePair,
    runs: Sequence[StepTimes],
    transport: Transport,
    *,
    row_bytes: int,
    device: torch.device,
    nodes: Nodes | None,
    metadata: MetadataBytes | None = None,
    expert_bytes: int = 0,
) -> Probe:
    """Gather one probe's runs. Collective."""
    backward = runs[0].backward_s > 0
    actions = [*pair.forward, *(pair.backward if backward else ())]
    numbers = [[*_inside_s(run, actions), *_seconds(run, [*actions, Action("N")]), *_rest(run)] for run in runs]
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    table = gathered(transport, own.reshape(-1)).reshape(transport.world_size, len(runs), -1)
    whole = table[:, :, -2:].sum(dim=2).amax(dim=0)
    table = table[:, whole.argsort(stable=True)[: -(-len(runs) // 2)]]
    most, least = table.amax(dim=0).median(dim=0).values, table.amin(dim=0).median(dim=0).values
    inside, least, most = least[: len(actions)].tolist(), least[len(actions) :], most[len(actions) :]
    chosen = [float((least if action.lane == "wire" else most)[i]) for i, action in enumerate(actions)]
    *host, hidden, compute, _, forward_s, backward_s = (float(value) for value in most[len(actions) + 1 :])
    phases: tuple[Phase, ...] = ("forward", "backward") if backward else ("forward",)
    plan = runs[0].exchange.chunked(pair.chunks, pair.by)
    shape = (
        step_shape(plan, row_bytes=row_bytes, nodes=nodes, joined=pair.joined, expert_bytes=expert_bytes)
        if metadata is None or not pair.deduplicated
        else distinct_shape(plan, row_bytes=row_bytes, nodes=nodes, joined=pair.joined, metadata=metadata)
    )
    return Probe(
        pair=pair,
        seconds={action.text: seconds for action, seconds in zip(actions, chosen, strict=True)},
        inside_s={action.text: seconds for action, seconds in zip(actions, inside, strict=True)},
        host_s=dict(zip(phases, host, strict=False)),
        whole_s=dict(zip(phases, (forward_s, backward_s), strict=False)),
        hidden_s=hidden,
        compute_s=compute,
        waited_s=float(least[-3]),
        agree_s=float(least[len(actions)]),
        shape=shape,
    )


def _seconds(run: StepTimes, actions: Sequence[Action]) -> list[float]:
    """Seconds of each action of one run: compute, a copy, or the time its bytes were under way (else that of the wait),
    inside the nodes too."""
    lanes: dict[tuple[str, str], float] = {}
    for event in run.events:
        key = (event.action, event.lane)
        lanes[key] = lanes.get(key, 0.0) + event.end_s - event.start_s
    return [
        lanes.get((action.text, "wire"), 0.0) or lanes.get((action.text, "wait"), 0.0)
        if action.lane == "wire"
        else lanes.get((action.text, action.lane), 0.0)
        for action in actions
    ]


def _inside_s(run: StepTimes, actions: Sequence[Action]) -> list[float]:
    """Of each action the part that stayed inside the nodes: the second of two, of rows that come back the first."""
    parts: dict[str, list[float]] = {}
    for event in run.events:
        if event.lane == "wire":
            parts.setdefault(event.action, []).append(event.end_s - event.start_s)
    found = [parts.get(action.text, []) for action in actions]
    return [both[0 if action.verb in RETURNING else 1] if len(both) == 2 else 0.0
            for action, both in zip(actions, found, strict=True)]  # fmt: skip


def _rest(run: StepTimes) -> list[float]:
    """[host seconds of forward, of backward, exchanges hidden under compute, compute, waits, all of forward, of
    backward]."""
    busy = {"forward": 0.0, "backward": 0.0}
    waited_s = 0.0
    events = [event for event in run.events if event.action != "N"]  # which lies outside of the windows
    for event in events:
        if event.lane in ("comp", "wait") and event.phase in busy:
            busy[event.phase] += event.end_s - event.start_s
        if event.lane == "wait":
            waited_s += event.end_s - event.start_s
    found = overlap(events)
    host_s = [run.forward_s - busy["forward"], run.backward_s - busy["backward"]]
    return [*host_s, found.hidden_s, found.compute_s, waited_s, run.forward_s, run.backward_s]
