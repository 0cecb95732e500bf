"""Calibration: what the exchanges, the experts and the ops beside them cost here, fitted to a `CostModel`.

A probe is one real step of a layer, forward and backward, under a known schedule. In three probes (1, 4 and 16 chunks)
every exchange is joined where it starts, so that each action is measured with nothing beside it; a fourth, in chunks by
expert groups, tells what each expert costs from what each row costs; a fifth, overlapped, shows by how much compute is
slower while the wire is busy. All ranks run the same probes, gather what they measured and
fit the same model from it: planners that disagree would deadlock.

Of a compute action the slowest rank counts. Of an exchange the rank that waited least counts: it came last, so it
waited for the transfer alone. The quicker half of the rounds counts, since what disturbs a round only slows it; and a
sum of medians is less than the median of a sum, so compute is scaled to what the whole step took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np
import torch

from moe_overlap.measure.timeline import TimelineEvent, overlap
from moe_overlap.plan import BLOCKS, ChunkBy, ChunkPlan, ExchangePlan
from moe_overlap.planning.cost_model import AlphaBeta, CostModel, StepShape, experts_per_chunk
from moe_overlap.planning.window import Slowdown
from moe_overlap.schedule.actions import VERBS, Action
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.transport.base import Transport

BUDGET_S = 15.0  # seconds that the timed rounds may take; the limit of the whole is 20 s
ROUNDS = (3, 9)  # fewest and most timed rounds
CHUNKS = (1, 4, BLOCKS)
OVERLAPPED = 4
MAX_GROUPS = 4
MAX_SLOWDOWN = 3.0
MAX_SCALE = 1.5


@dataclass(frozen=True, eq=False, kw_only=True)
class StepTimes:
    """One probe on this rank: its events, its seconds from start to end, and the counts that were agreed on."""

    events: Sequence[TimelineEvent]
    forward_s: float
    backward_s: float
    exchange: ExchangePlan


RunStep = Callable[[SchedulePair], StepTimes]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The medians of one probe over all ranks, in seconds: of each action by its text, and of what is no action.

    `host_s`, by phase: time of the step with neither compute nor a wait, which is what starting exchanges and making
    autograd nodes takes. `whole_s`, by phase: from start to end. `hidden_s`: exchanges with compute under them, of
    `compute_s`. `shape`: the rows and bytes of its chunks.
    """

    chunks: int
    seconds: Mapping[str, float]
    host_s: Mapping[str, float]
    whole_s: Mapping[str, float]
    hidden_s: float
    compute_s: float
    shape: StepShape


NodeOf = Callable[[int], int]


def step_shape(plan: ChunkPlan, *, row_bytes: int, node_of: NodeOf | None = None, joined: bool = False) -> StepShape:
    """The integers of one step that durations depend on. `node_of`: the node of a rank (None: each has its own).

    `joined`: the ranks meet after every exchange, so each chunk has the rows of its own busiest rank. Otherwise a rank
    with much in one chunk has less in others, and the busiest rank of the whole step counts, its rows spread over the
    chunks as all ranks' are.
    """
    world, chunks = plan.world_size, plan.chunks
    pairs = plan.matrix.reshape(chunks, world, world, plan.local_slots).sum(axis=3)  # [C, from, to]

    def busiest(*of_ranks: np.ndarray) -> tuple[int, ...]:
        """Per chunk, from int64 [C, W] of rows out and rows in."""
        if joined:
            return tuple(int(n) for n in np.maximum.reduce(of_ranks).max(axis=1))
        most, all_ranks = max(int(part.sum(axis=0).max()) for part in of_ranks), of_ranks[0].sum(axis=1)
        ends = most * np.cumsum(all_ranks) // max(1, int(all_ranks.sum()))
        return tuple(int(n) for n in np.diff(ends, prepend=0))

    lanes: dict[str, tuple[int, ...]] = {}
    for lane, moves in _moves(world, node_of).items():
        moved = pairs * moves
        lanes[lane] = tuple(rows * row_bytes for rows in busiest(moved.sum(axis=2), moved.sum(axis=1)))
    return StepShape(
        chunks=chunks,
        by=plan.by,
        rows=busiest(pairs.sum(axis=1)),
        experts=experts_per_chunk(plan.local_slots, chunks, plan.by),
        bytes_by_lane=lanes,
        slots_rows=int(plan.exchange.counts.sum(axis=(1, 2)).max()),
        row_bytes=row_bytes,
    )


@lru_cache(maxsize=64)
def _moves(world: int, node_of: NodeOf | None) -> dict[str, np.ndarray]:
    """By wire, bool [W, W]: whether rows from one rank to another take it. Only wires that some pair of ranks takes."""
    ranks = np.arange(world)
    node = ranks if node_of is None else np.array([node_of(rank) for rank in range(world)])
    same = node[:, None] == node[None, :]
    found = {"inter": ~same, "intra": same & (ranks[:, None] != ranks[None, :])}
    return {lane: moves for lane, moves in found.items() if moves.any()}


# ---------------------------------------------------------------- measuring


def calibrate(
    run: RunStep,
    pair_of: Callable[[int, ChunkBy], SchedulePair],
    transport: Transport,
    *,
    groups: int,
    row_bytes: int,
    device: torch.device,
    source: str,
    node_of: NodeOf | None = None,
    budget_s: float = BUDGET_S,
) -> CostModel:
    """The cost model of the step that `run` executes. Collective: all ranks call it alike and get the same model.

    pair_of(chunks, by): the schedules of the step in so many chunks. groups: into how many groups a rank's experts are
    cut for the probe of that (1: no such probe). row_bytes: bytes of one exchanged row. source: where it was measured,
    in words. Takes about `budget_s` seconds, and at least four rounds of all probes.
    """
    pairs = [pair_of(chunks, "tokens").join() for chunks in CHUNKS] + [pair_of(OVERLAPPED, "tokens")]
    pairs += [pair_of(groups, "experts").join()] if groups > 1 else []
    runs: list[list[StepTimes]] = [[] for _ in pairs]
    start_s = time.perf_counter()
    for pair in pairs:
        run(pair)  # warm: first calls make buffers, connections and caches
    warm_s = time.perf_counter()
    rounds = ROUNDS[0]
    done = 0
    while done < rounds:
        for pair, found in zip(pairs, runs, strict=True):
            found.append(run(pair))
        done += 1
        if done == 1:
            now_s = time.perf_counter()
            slowest = gathered(
                transport, torch.tensor([now_s - warm_s, now_s - start_s], dtype=torch.float64, device=device)
            )
            round_s, used_s = (float(value) for value in slowest.amax(dim=0))
            rounds = min(max(1 + int((budget_s - used_s) / round_s), ROUNDS[0]), ROUNDS[1])
    probes = [
        _probe(pair, found, transport, row_bytes=row_bytes, device=device, node_of=node_of)
        for pair, found in zip(pairs, runs, strict=True)
    ]
    joined, (overlapped, *grouped) = probes[: len(CHUNKS)], probes[len(CHUNKS) :]
    return fit(joined, overlapped, grouped[0] if grouped else None, source=source)


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
    node_of: NodeOf | None,
) -> Probe:
    """Gather one probe's runs. Collective."""
    backward = runs[0].backward_s > 0
    actions = [*pair.forward, *(pair.backward if backward else ())]
    own = torch.tensor([[*_seconds(run, actions), *_rest(run)] for run in runs], dtype=torch.float64, device=device)
    table = gathered(transport, own.reshape(-1)).reshape(transport.world_size, len(runs), -1)
    whole = table[:, :, -2:].sum(dim=2).amax(dim=0)
    table = table[:, whole.argsort(stable=True)[: -(-len(runs) // 2)]]
    most, least = table.amax(dim=0).median(dim=0).values, table.amin(dim=0).median(dim=0).values
    chosen = [float((least if action.lane == "wire" else most)[i]) for i, action in enumerate(actions)]
    *host, hidden, compute, forward_s, backward_s = (float(value) for value in most[len(actions) :])
    phases = ("forward", "backward") if backward else ("forward",)
    plan = runs[0].exchange.chunked(pair.chunks, pair.by)
    return Probe(
        chunks=pair.chunks,
        seconds={action.text: seconds for action, seconds in zip(actions, chosen, strict=True)},
        host_s=dict(zip(phases, host, strict=False)),
        whole_s=dict(zip(phases, (forward_s, backward_s), strict=False)),
        hidden_s=hidden,
        compute_s=compute,
        shape=step_shape(plan, row_bytes=row_bytes, node_of=node_of, joined=True),
    )


def _seconds(run: StepTimes, actions: Sequence[Action]) -> list[float]:
    """Seconds of each action of one run: compute, or the time its bytes were under way (else that of the wait)."""
    lanes: dict[tuple[str, str], float] = {}
    for event in run.events:
        key = (event.action, event.lane)
        lanes[key] = lanes.get(key, 0.0) + event.end_s - event.start_s
    return [
        lanes.get((action.text, "wire"), 0.0) or lanes.get((action.text, "wait"), 0.0)
        if action.lane == "wire"
        else lanes.get((action.text, "comp"), 0.0)
        for action in actions
    ]


def _rest(run: StepTimes) -> list[float]:
    """[host seconds of forward, of backward, exchanges hidden under compute, compute, all of forward, of backward]."""
    busy = {"forward": 0.0, "backward": 0.0}
    for event in run.events:
        if event.lane in ("comp", "wait") and event.phase in busy:
            busy[event.phase] += event.end_s - event.start_s
    found = overlap([event for event in run.events if event.action != "N"])
    host_s = [run.forward_s - busy["forward"], run.backward_s - busy["backward"]]
    return [*host_s, found.hidden_s, found.compute_s, run.forward_s, run.backward_s]


# ---------------------------------------------------------------- fitting


def fit(joined: Sequence[Probe], overlapped: Probe, grouped: Probe | None, *, source: str) -> CostModel:
    """The model of the probes: `joined` with different numbers of chunks, `overlapped` with that of one of them,
    `grouped` by expert groups."""
    phases = list(joined[0].host_s)
    issue_s = sum(_slope([(p.chunks, p.host_s[phase]) for p in joined]) / 4 for phase in phases) / len(phases)
    scale = {phase: median(_scale(p, phase, issue_s) for p in joined) for phase in ("forward", "backward")}

    def median_of(word: str) -> float:
        return median(p.seconds.get(word, 0.0) for p in joined) * scale[_phase(word)]

    def chain(verb: str) -> tuple[float, ...]:
        words = [word for word in joined[0].seconds if _verb(word) == verb]
        return tuple(median_of(word) for word in sorted(words, key=lambda word: int(word[len(verb) :])))

    def per_row(word: str, rows: int) -> AlphaBeta:
        return AlphaBeta(alpha_s=0.0, beta_s=median_of(word) / max(1, rows))

    def outside(phase: str) -> float:
        if phase not in phases:
            return 0.0
        rest = median(p.host_s[phase] - 4 * issue_s * p.chunks for p in joined)
        return max(0.0, rest) * scale[phase]

    ops, slots_rows = chain("B"), joined[0].shape.slots_rows
    experts, expert_s = _experts(joined, grouped, "E", scale["forward"])
    experts_dgrad, expert_dgrad_s = _experts(joined, grouped, "Ed", scale["backward"])
    return CostModel(
        exchange=_exchange(joined),
        experts=experts,
        expert_s=expert_s,
        experts_dgrad=experts_dgrad,
        expert_dgrad_s=expert_dgrad_s,
        experts_wgrad=per_row("Ew0", sum(joined[0].shape.rows)),
        permute=per_row("P", slots_rows),
        unpermute=per_row("U", slots_rows),
        unpermute_backward=per_row("Ut", slots_rows),
        permute_backward=per_row("Pt", slots_rows),
        backbone_s=ops,
        backbone_backward_s=chain("Bt") or (0.0,) * len(ops),
        shared_s=median_of("S"),
        shared_backward_s=median_of("St"),
        outside_s=outside("forward"),
        outside_backward_s=outside("backward"),
        issue_s=issue_s,
        slowdown=Slowdown(compute=_slowdown(joined, overlapped)),
        source=source,
    )


def _verb(word: str) -> str:
    return word.rstrip("0123456789")


def _phase(word: str) -> str:
    return VERBS[_verb(word)].phase


def _scale(probe: Probe, phase: str, issue_s: float) -> float:
    """What the compute of one phase has to be multiplied by for the parts of the joined step to make up the whole."""
    if phase not in probe.whole_s:
        return 1.0
    parts = [(word, seconds) for word, seconds in probe.seconds.items() if _phase(word) == phase]
    wire_s = sum(seconds for word, seconds in parts if VERBS[_verb(word)].lane == "wire") + 4 * issue_s * probe.chunks
    compute_s = sum(seconds for word, seconds in parts if VERBS[_verb(word)].lane != "wire")
    compute_s += max(0.0, probe.host_s[phase] - 4 * issue_s * probe.chunks)
    return min(max((probe.whole_s[phase] - wire_s) / compute_s, 1.0), MAX_SCALE) if compute_s > 0 else 1.0


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Seconds per chunk, from the fewest chunks to the most; never negative."""
    (few, first), (many, last) = points[0], points[-1]
    return max(0.0, (last - first) / (many - few))


def _line(points: Sequence[tuple[float, float]]) -> AlphaBeta:
    """The line through measured (n, seconds); nothing was measured where nothing moved."""
    used = [(n, seconds) for n, seconds in points if n > 0 and seconds > 0]
    if len({n for n, _ in used}) < 2:
        return AlphaBeta(alpha_s=0.0, beta_s=median(s / n for n, s in used) if used else 0.0)
    return AlphaBeta.fit(used)


def _experts(joined: Sequence[Probe], grouped: Probe | None, verb: str, scale: float) -> tuple[AlphaBeta, float]:
    """(seconds of a chunk and per row, seconds per expert). Chunks of tokens, which all pass all experts, give the
    seconds per row and the sum of the rest; those by groups, which pass fewer, part the rest."""
    points = [(p.shape.rows[c], p.seconds.get(f"{verb}{c}", 0.0) * scale) for p in joined for c in range(p.chunks)]
    line = _line(points)
    if grouped is None or not line.alpha_s:
        return line, 0.0
    rest = median(
        grouped.seconds.get(f"{verb}{c}", 0.0) * scale - line.beta_s * grouped.shape.rows[c]
        for c in range(grouped.chunks)
    )
    all_experts, few = joined[0].shape.experts[0], grouped.shape.experts[0]
    expert_s = min(max(0.0, line.alpha_s - rest) / (all_experts - few), line.alpha_s / all_experts)
    return AlphaBeta(alpha_s=line.alpha_s - expert_s * all_experts, beta_s=line.beta_s), expert_s


def _exchange(probes: Sequence[Probe]) -> dict[str, AlphaBeta]:
    """The line of the wire between nodes, or of the only one there is. Beside it, the wire within a node is free: what
    was measured is the slower of both."""
    lanes = list(probes[0].shape.bytes_by_lane)
    if not lanes:
        return {}
    points = [
        (p.shape.bytes_by_lane[lanes[0]][c], p.seconds.get(f"{verb}{c}", 0.0))
        for p in probes
        for verb in ("D", "C", "Ct", "Dt")
        for c in range(p.chunks)
    ]
    return {lane: _line(points) if lane == lanes[0] else AlphaBeta(alpha_s=0.0, beta_s=0.0) for lane in lanes}


def _slowdown(joined: Sequence[Probe], overlapped: Probe) -> float:
    """By what factor compute takes longer while an exchange is under way.

    Of h seconds of compute beside an exchange, h / factor would have been enough alone; the rest is what the overlapped
    probe computed longer.
    """
    alone = next(p for p in joined if p.chunks == overlapped.chunks)
    if overlapped.hidden_s <= 0:
        return 1.0
    lost = (overlapped.compute_s - alone.compute_s) / overlapped.hidden_s
    return 1 / (1 - min(max(0.0, lost), 1 - 1 / MAX_SLOWDOWN))
