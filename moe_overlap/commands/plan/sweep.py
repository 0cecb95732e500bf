"""What the planner finds at one place, and at many: seconds of a step of each block pair, planned and serial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.commands.plan.machine import Place, Routed, cost_model, op_verb, place, routed, shapes
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.planning.cost_model import CostModel, window
from moe_overlap.planning.explain import bound_s, name_of
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import TIE, Candidate, search
from moe_overlap.planning.window import Window
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.builders import SchedulePair

RANKS = tuple(2**power for power in range(1, 13))
# What the letters of `Prediction.code` mean.
CODES = (
    "s serial, r4 four chunks of tokens, e4 four expert groups, k1 one op first, k* ops among chunks, d deduplicated"
)
STEPS_BELOW, STEPS_ABOVE = 6, 4  # bandwidths of the sweep: the one asked for, halved and doubled so often


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase at one place: its window, what the search found (best first) and the seconds in no window."""

    phase: Phase
    window: Window
    candidates: tuple[Candidate, ...]
    outside_s: float

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def serial(self) -> Candidate:
        return next(one for one in self.candidates if one.joined and one.chunks == 1)

    @property
    def name(self) -> str:
        return name_of(self.best, self.window)

    @property
    def code(self) -> str:
        """The best schedule in a few letters, see CODES."""
        cut = f"{'e' if self.best.by == 'experts' else 'r'}{self.best.chunks}"
        if self.best.joined:
            return "s" if self.best.chunks == 1 else f"{cut} joined"
        before = self.best.ops_before
        if self.window.deduplicated:
            before = tuple(max(0, count - 1) for count in before)
        slot = (f"k{before[0]}" if len(set(before)) == 1 else "k*") if self.window.user_ops_s else ""
        return slot + (cut if self.best.chunks > 1 or not slot else "")

    @property
    def compute_s(self) -> float:
        """Seconds of one chunk if exchanges took no time at all: what is left when everything is hidden."""
        one, w = self.window.chunking(1, "tokens"), self.window
        return self.outside_s + sum((w.head_s, *w.ops_s, *one.experts_s, *one.deferred_s, w.tail_s))

    def of_chunks(self, chunks: int, by: ChunkBy | None = None) -> float:
        """Seconds of the best schedule of so many chunks that overlaps; by: None is whichever cut is faster."""
        found = [one for one in self.candidates if one.chunks == chunks and not one.joined and by in (None, one.by)]
        return self.outside_s + min(one.predicted_s for one in found)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One block pair at one place, in the phase that was asked for. `plain`: the plan without deduplication, whose
    serial schedule is what others are compared with. `distinct`: the one with it, where it was asked for and there is
    something that it could save."""

    kind: str
    ranks: int
    at: Place
    model: CostModel
    dedup: str
    plain: tuple[PhasePlan, ...]
    distinct: tuple[PhasePlan, ...] | None

    @cached_property
    def deduplicated(self) -> bool:
        """Whether the plan is: as asked for, or where that is faster."""
        if self.distinct is None or self.dedup == "off":
            return False
        return self.dedup in ("on", "node") or total_s(self.distinct) < total_s(self.plain) * (1 - TIE)

    @property
    def phases(self) -> tuple[PhasePlan, ...]:
        return self.distinct if self.deduplicated and self.distinct is not None else self.plain

    @cached_property
    def time_s(self) -> float:
        return total_s(self.phases)

    @cached_property
    def serial_s(self) -> float:
        return sum(phase.outside_s + phase.serial.predicted_s for phase in self.plain)

    @cached_property
    def compute_s(self) -> float:
        return sum(phase.compute_s for phase in self.plain)

    @property
    def bound_s(self) -> float:
        """No order of any cut is faster."""
        return sum(
            phase.outside_s + min(bound_s(phase.window, one) for one in phase.window.chunkings) for phase in self.phases
        )

    @property
    def pair(self) -> SchedulePair:
        """What runs: the best order of each phase; for inference the backward is the mirror of forward."""
        forward, *rest = self.phases
        verb = op_verb(self.kind, self.model)
        num_ops = len(forward.window.user_ops_s) if verb == "B" else 0
        return pair_of(forward.best, rest[0].best if rest else None, num_ops=num_ops, op_verb=verb)

    @property
    def speedup(self) -> float:
        return self.serial_s / self.time_s if self.time_s else 1.0  # on one rank, a step without tokens

    @property
    def comm_share(self) -> float:
        """Share of the serial time that exchanges add."""
        return (self.serial_s - self.compute_s) / self.serial_s if self.serial_s else 0.0

    @property
    def code(self) -> str:
        return ("d " if self.deduplicated else "") + " ".join(phase.code for phase in self.phases)

    def of_chunks(self, chunks: int, by: ChunkBy | None = None) -> float:
        return sum(phase.of_chunks(chunks, by) for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """One flat row; times in milliseconds."""
        row: dict[str, Any] = {
            "kind": self.kind,
            "ranks": self.ranks,
            "group": self.at.group,
            "bandwidth_bytes_per_s": self.at.bytes_per_s,
            "serial_ms": 1e3 * self.serial_s,
            "predicted_ms": 1e3 * self.time_s,
            "compute_ms": 1e3 * self.compute_s,
            "bound_ms": 1e3 * self.bound_s,
            "speedup_vs_serial": self.speedup,
            "comm_share": self.comm_share,
            "deduplicated": self.deduplicated,
            "plain_ms": 1e3 * total_s(self.plain),
            "deduplicated_ms": None if self.distinct is None else 1e3 * total_s(self.distinct),
        }
        for phase in self.phases:
            row |= {
                phase.phase: phase.name,
                f"{phase.phase}_order": phase.best.order,
                f"{phase.phase}_chunks": phase.best.chunks,
                f"{phase.phase}_by": phase.best.by,
                f"{phase.phase}_ms": 1e3 * (phase.outside_s + phase.best.predicted_s),
            }
        for phase in self.plain:
            row[f"{phase.phase}_serial_ms"] = 1e3 * (phase.outside_s + phase.serial.predicted_s)
        return row


def total_s(phases: Sequence[PhasePlan]) -> float:
    """Seconds of the best schedules of these phases, and of what lies outside their windows."""
    return sum(phase.outside_s + phase.best.predicted_s for phase in phases)


def predict(
    options: PlanOptions, kind: str, *, ranks: int, bytes_per_s: float | None, routing: Routed | None = None
) -> Prediction:
    """Plan one block pair with so many ranks over a link of this rate (None: as calibrated). routing: see `shapes`."""
    at = place(options, ranks=ranks, bytes_per_s=bytes_per_s)
    model = cost_model(options, kind, at)
    wanted: tuple[Phase, ...] = ("forward", "backward") if options.phase == "train" else ("forward",)

    plain = shapes(options, kind, at, routing=routing)
    moves = any(size for cut in plain for sizes in cut.bytes_by_lane.values() for size in sizes)
    if not moves:
        model = replace(model, issue_s=0.0)  # a transport starts nothing where no row leaves its rank

    def planned(*, distinct: bool) -> tuple[PhasePlan, ...]:
        cuts = shapes(options, kind, at, distinct=True, routing=routing) if distinct else plain
        known = model.deduplicated if distinct else model
        phases = []
        for phase in wanted:
            problem = window(model, cuts, phase, op_verb=op_verb(kind, model))
            phases.append(PhasePlan(phase=phase, window=problem, candidates=search(problem),
                                    outside_s=known.outside(phase)))  # fmt: skip
        return tuple(phases)

    could_pay = at.group > 1 and options.experts > at.group and routed(options, kind) > 1
    could_pay = could_pay and options.expert_offload is None  # beside which a layer refuses it
    asked_for = options.dedup in ("on", "node") or (options.dedup == "auto" and could_pay)
    distinct = planned(distinct=True) if asked_for and moves and model.distinct is not None else None
    return Prediction(kind=kind, ranks=ranks, at=at, model=model, dedup=options.dedup, plain=planned(distinct=False),
                      distinct=distinct)  # fmt: skip


def asked(options: PlanOptions, kind: str) -> Prediction:
    """The point of the command line."""
    return predict(options, kind, ranks=options.ranks, bytes_per_s=base_bandwidth(options))


def base_bandwidth(options: PlanOptions) -> float | None:
    """Bytes per second between nodes, asked for or else calibrated; None where nothing says it."""
    if options.bandwidth is not None or options.cost_model is None:
        return options.bandwidth
    line = options.cost_model.exchange.get("inter")
    return 1 / line.beta_s if line is not None and line.beta_s else None


def bandwidths(options: PlanOptions) -> list[float]:
    """The base bandwidth halved and doubled, ascending; empty where there is none."""
    base = base_bandwidth(options)
    return [] if base is None else [base * 2.0**power for power in range(-STEPS_BELOW, STEPS_ABOVE + 1)]


def rank_counts(options: PlanOptions) -> list[int]:
    """From 2 to thousands, those of them that share the experts equally, and the one asked for.

    With more ranks than experts only every second: whole groups exchange there, all alike.
    """
    shared = [ranks for ranks in RANKS if max(ranks, options.experts) % min(ranks, options.experts) == 0]
    more = [ranks for ranks in shared if ranks > options.experts]
    return sorted({*(ranks for ranks in shared if ranks <= options.experts), *more[::-2], options.ranks})


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """`grid[i][j]`: the asked kind at rank_counts()[i] and bandwidths()[j]; `lines[kind]`: every kind at the asked
    number of ranks, over the bandwidths."""

    ranks: list[int]
    bandwidths: list[float]
    grid: list[list[Prediction]]
    lines: dict[str, list[Prediction]]


def sweep(options: PlanOptions) -> Sweep:
    """Ask the planner everywhere; `bandwidths(options)` must not be empty.

    Places that exchange alike (whole groups, one node) are asked once.
    """
    known: dict[tuple[str, Place], Prediction] = {}

    def at(kind: str, ranks: int, rate: float) -> Prediction:
        spot = place(options, ranks=ranks, bytes_per_s=rate)
        key = (kind, spot if "inter" in spot.peers else replace(spot, bytes_per_s=0.0))
        if key not in known:
            known[key] = predict(options, kind, ranks=ranks, bytes_per_s=rate)
        return replace(known[key], ranks=ranks, at=spot)

    rates, ranks = bandwidths(options), rank_counts(options)
    main = options.kinds[0]
    return Sweep(
        ranks=ranks,
        bandwidths=rates,
        grid=[[at(main, count, rate) for rate in rates] for count in ranks],
        lines={kind: [at(kind, options.ranks, rate) for rate in rates] for kind in options.kinds},
    )


def speedups_over(sweep: Sweep, reference: Sequence[Prediction], kind: str) -> list[float]:
    """How much faster the planned `kind` is than the serial schedule of `reference`, at each bandwidth."""
    return [base.serial_s / one.time_s for base, one in zip(reference, sweep.lines[kind], strict=True)]


def rate_text(bytes_per_s: float) -> str:
    """A rate as people say it: 50e9 bytes per second is "400 Gbit/s"."""
    bits, unit = unit_of(bytes_per_s)
    return f"{number_text(bits * bytes_per_s)} {unit}"


def unit_of(bytes_per_s: float) -> tuple[float, str]:
    return (8e-9, "Gbit/s") if bytes_per_s >= 1.25e8 else (8e-6, "Mbit/s")


def number_text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
