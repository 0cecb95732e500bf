"""From measured probes to a cost model. All times are seconds; nothing here measures.

Most figures are differences of measured times, which are never negative on paper: `figure` makes them so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from moe_overlap.planning.cost_model import AlphaBeta, CostModel, DistinctCosts, figure
from moe_overlap.planning.predict import predict
from moe_overlap.planning.shapes import StepShape
from moe_overlap.planning.window import Slowdown
from moe_overlap.schedule.actions import COMP, VERBS, Phase
from moe_overlap.schedule.builders import SchedulePair

MAX_SLOWDOWN = 3.0
MAX_SCALE = 1.5
NOISE = 0.05  # of a step: what the compute lane waits longer than predicted, up to this, shows nothing
HALVINGS = 20  # until the wire's slowdown is known to MAX_SLOWDOWN / 2^20


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The medians of one probe over all ranks, in seconds: of each action by its text, and of what is no action.

    `pair`: what ran. `host_s`, by phase: time of the step with neither compute nor a wait, which is what starting
    exchanges and making autograd nodes takes. `whole_s`, by phase: from start to end. `hidden_s`: exchanges with
    compute under them, of `compute_s`. `waited_s`: how long compute stood still for exchanges, on the rank that waited
    least. `shape`: the rows and bytes of its chunks. `agree_s`: the agreement, of the rank that came last. `inside_s`:
    of `seconds`, those of exchanges inside the nodes, where rows cross them once.
    """

    pair: SchedulePair
    seconds: Mapping[str, float]
    host_s: Mapping[Phase, float]
    whole_s: Mapping[Phase, float]
    hidden_s: float
    compute_s: float
    waited_s: float
    shape: StepShape
    agree_s: float = 0.0
    inside_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return self.pair.chunks


def fit(
    joined: Sequence[Probe],
    overlapped: Probe,
    grouped: Probe | None,
    *,
    distinct: Sequence[Probe] = (),
    within_node: Sequence[tuple[float, float]] = (),
    source: str,
) -> CostModel:
    """The model of the probes: `joined` with different numbers of chunks, `overlapped` with that of one of them,
    `grouped` by expert groups, `distinct` joined and deduplicated. within_node: (bytes, seconds) of exchanges that
    stayed within the nodes."""
    phases = list(joined[0].host_s)
    issues = (_slope([(_issues(p, phase), p.host_s[phase]) for p in joined]) for phase in phases)
    issue_s = figure(sum(issues) / len(phases))
    parts = _Parts(joined, issue_s)
    scale, median_of, per_row, outside = parts.scale, parts.median_of, parts.per_row, parts.outside

    def chain(verb: str) -> tuple[float, ...]:
        words = [word for word in joined[0].seconds if _verb(word) == verb]
        return tuple(median_of(word) for word in sorted(words, key=lambda word: int(word[len(verb) :])))

    ops, slots_rows = chain("B"), joined[0].shape.slots_rows
    experts, expert_s = _experts(joined, grouped, "E", scale["forward"])
    experts_dgrad, expert_dgrad_s = _experts(joined, grouped, "Ed", scale["backward"])
    model = CostModel(
        exchange=_exchange(joined, within_node),
        experts=experts,
        expert_s=expert_s,
        experts_dgrad=experts_dgrad,
        expert_dgrad_s=expert_dgrad_s,
        experts_wgrad=AlphaBeta.measured(0.0, parts.all_of("Ew") / max(1, sum(joined[0].shape.rows))),
        permute=per_row("P", slots_rows),
        unpermute=per_row("U", slots_rows),
        unpermute_backward=per_row("Ut", slots_rows),
        permute_backward=per_row("Pt", slots_rows),
        host_up=_copies(joined, ("Hf", "Hb")),
        host_down=_copies(joined, ("Hg",)),
        backbone_s=ops,
        backbone_backward_s=chain("Bt") or (0.0,) * len(ops),
        shared_s=median_of("S"),
        shared_backward_s=median_of("St"),
        outside_s=outside("forward"),
        outside_backward_s=outside("backward"),
        agree_s=min(outside("forward"), figure(median(p.agree_s for p in joined))),
        measured_rows=figure(slots_rows),
        issue_s=issue_s,
        slowdown=Slowdown(compute=_compute_slowdown(joined, overlapped)),
        source=source,
    )
    model = with_wire(model, _wire_slowdown(model, overlapped))
    model = replace(model, misfit=figure(misfit(model, [*joined, overlapped])))
    return replace(model, distinct=_distinct(model, distinct)) if distinct else model


def misfit(model: CostModel, probes: Sequence[Probe]) -> float:
    """By what share of its time the worst of the probes is predicted wrong by the model that was made of them: more
    than noise where something else ran beside some of them."""

    def off(probe: Probe) -> float:
        found = predict(model, probe.pair, dict.fromkeys(probe.whole_s, probe.shape))
        whole_s = sum(probe.whole_s.values())
        return abs(sum(phase.whole_s for phase in found.values()) / whole_s - 1) if whole_s > 0 else 0.0

    return max(map(off, probes))


class _Parts:
    """What several joined probes say of the parts of a step of one kind."""

    def __init__(self, joined: Sequence[Probe], issue_s: float) -> None:
        self.joined, self.issue_s = joined, issue_s
        self.scale: dict[Phase, float] = {
            phase: median(_scale(p, phase, issue_s) for p in joined) for phase in ("forward", "backward")
        }

    def median_of(self, word: str) -> float:
        return figure(median(p.seconds.get(word, 0.0) for p in self.joined) * self.scale[_phase(word)])

    def all_of(self, verb: str) -> float:
        """Of all actions of a verb together, in the steps with any."""
        sums = [sum(seconds for word, seconds in p.seconds.items() if _verb(word) == verb) for p in self.joined]
        return figure(median(sums) * self.scale[VERBS[verb].phase])

    def per_row(self, word: str, rows: int) -> AlphaBeta:
        return AlphaBeta.measured(0.0, self.median_of(word) / max(1, rows))

    def outside(self, phase: Phase) -> float:
        if phase not in self.joined[0].host_s:
            return 0.0
        rest = median(p.host_s[phase] - _issues_s(p, phase, self.issue_s) for p in self.joined)
        return figure(rest * self.scale[phase])


def _distinct(model: CostModel, joined: Sequence[Probe]) -> DistinctCosts:
    """What differs where steps are deduplicated. What an expert costs by itself (its weights are read) does not."""
    parts = _Parts(joined, model.issue_s)
    # Of several chunks each has the rows of its own busiest rank: together more than any rank has.
    shape = min(joined, key=lambda probe: probe.chunks).shape
    assert shape.distinct is not None
    experts, expert_s = _distinct_experts(parts, "E", "O", model.expert_s)
    experts_dgrad, expert_dgrad_s = _distinct_experts(parts, "Ed", "Od", model.expert_dgrad_s)
    return DistinctCosts(
        experts=experts,
        expert_s=expert_s,
        experts_dgrad=experts_dgrad,
        expert_dgrad_s=expert_dgrad_s,
        experts_wgrad=parts.per_row("Ew0", sum(shape.rows) + shape.distinct.own_rows),
        permute=parts.per_row("P", shape.slots_rows),
        unpermute=parts.per_row("U", shape.slots_rows),
        unpermute_backward=parts.per_row("Ut", shape.slots_rows),
        permute_backward=parts.per_row("Pt", shape.slots_rows),
        outside_s=parts.outside("forward"),
        outside_backward_s=parts.outside("backward"),
        inside=_line([point for p in joined for point in _inside_points(p)]),
    )


def _inside_points(probe: Probe) -> list[tuple[float, float]]:
    """(bytes, seconds) of the exchanges inside the nodes."""
    inside = None if probe.shape.distinct is None else probe.shape.distinct.inside
    if inside is None:
        return []
    sizes = {"M": inside.metadata, "Mt": inside.gradients}
    for verb, of_chunks in (("D", inside.out), ("C", inside.back), ("Ct", inside.out), ("Dt", inside.back)):
        sizes |= {f"{verb}{c}": size for c, size in enumerate(of_chunks)}
    return [(size, probe.inside_s.get(text, 0.0)) for text, size in sizes.items()]


def _distinct_experts(parts: _Parts, verb: str, own: str, expert_s: float) -> tuple[AlphaBeta, float]:
    """(seconds of a chunk and per row, seconds per expert, at most `expert_s`): from the chunks, and from the rows that
    stay, of which there are others."""
    scale = parts.scale[VERBS[verb].phase]
    points: list[tuple[float, float]] = []
    for p in parts.joined:
        assert p.shape.distinct is not None
        points.append((p.shape.distinct.own_rows, p.seconds.get(own, 0.0) * scale))
        points += [(p.shape.rows[c], p.seconds.get(f"{verb}{c}", 0.0) * scale) for c in range(p.chunks)]
    line = _line(points)
    all_experts = parts.joined[0].shape.experts[0]
    expert_s = figure(min(expert_s, line.alpha_s / all_experts))
    return AlphaBeta.measured(line.alpha_s - expert_s * all_experts, line.beta_s), expert_s


def _verb(word: str) -> str:
    return word.rstrip("0123456789")


def _phase(word: str) -> Phase:
    return VERBS[_verb(word)].phase


def _scale(probe: Probe, phase: Phase, issue_s: float) -> float:
    """What the compute of one phase has to be multiplied by for the parts of the joined step to make up the whole."""
    if phase not in probe.whole_s:
        return 1.0
    parts = [(word, seconds) for word, seconds in probe.seconds.items() if _phase(word) == phase]
    issues_s = _issues_s(probe, phase, issue_s)
    wire_s = sum(seconds for word, seconds in parts if VERBS[_verb(word)].lane != COMP) + issues_s
    compute_s = sum(seconds for word, seconds in parts if VERBS[_verb(word)].lane == COMP)
    compute_s += max(0.0, probe.host_s[phase] - issues_s)
    return min(max((probe.whole_s[phase] - wire_s) / compute_s, 1.0), MAX_SCALE) if compute_s > 0 else 1.0


def _issues_s(probe: Probe, phase: Phase, issue_s: float) -> float:
    """Seconds that starting the exchanges of one phase takes, and waiting for them."""
    return issue_s * _issues(probe, phase)


def _issues(probe: Probe, phase: Phase) -> int:
    """How many starts of exchanges, and of copies of experts in host memory, and waits for them a phase has."""
    schedule = probe.pair.forward if phase == "forward" else probe.pair.backward
    return 2 * sum(action.lane != COMP for action in schedule)


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Seconds of one more, from the fewest to the most; never negative."""
    (few, first), (many, last) = points[0], points[-1]
    return max(0.0, (last - first) / (many - few))


def _line(points: Sequence[tuple[float, float]]) -> AlphaBeta:
    """The line through measured (n, seconds); nothing was measured where nothing moved."""
    used = [(n, seconds) for n, seconds in points if n > 0 and 0 < seconds < math.inf]
    if len({n for n, _ in used}) < 2:
        return AlphaBeta.measured(0.0, median(s / n for n, s in used) if used else 0.0)
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
    expert_s = figure(min((line.alpha_s - rest) / (all_experts - few), line.alpha_s / all_experts))
    # All of alpha may be the experts': the rest is then nothing, but for rounding.
    return AlphaBeta.measured(line.alpha_s - expert_s * all_experts, line.beta_s), expert_s


def _copies(joined: Sequence[Probe], verbs: Sequence[str]) -> AlphaBeta:
    """The line of the copies of experts from the host's memory, or to it; nothing where there are none."""
    points = [
        (p.shape.experts[action.index or 0] * p.shape.expert_bytes, p.seconds.get(action.text, 0.0))
        for p in joined
        for action in (*p.pair.forward, *p.pair.backward)
        if action.verb in verbs
    ]
    return _line(points)


def _exchange(probes: Sequence[Probe], within_node: Sequence[tuple[float, float]]) -> dict[str, AlphaBeta]:
    """The line of the wire between nodes, or of the only one there is, from the probes, in which the slower of both was
    measured; and of the wire within a node beside it."""
    lanes = list(probes[0].shape.bytes_by_lane)
    if not lanes:
        return {}
    points = [
        (p.shape.bytes_by_lane[lanes[0]][c], p.seconds.get(f"{verb}{c}", 0.0))
        for p in probes
        for verb in ("D", "C", "Ct", "Dt")
        for c in range(p.chunks)
    ]
    return {lane: _line(points if lane == lanes[0] else within_node) for lane in lanes}


def _compute_slowdown(joined: Sequence[Probe], overlapped: Probe) -> float:
    """By what factor compute takes longer while an exchange is under way.

    Of h seconds of compute beside an exchange, h / factor would have been enough alone; the rest is what the overlapped
    probe computed longer.
    """
    alone = next(p for p in joined if p.chunks == overlapped.chunks)
    if overlapped.hidden_s <= 0:
        return 1.0
    lost = (overlapped.compute_s - alone.compute_s) / overlapped.hidden_s
    return 1 / (1 - min(max(0.0, lost), 1 - 1 / MAX_SLOWDOWN))


def _wire_slowdown(model: CostModel, overlapped: Probe) -> float:
    """By what factor an exchange takes longer while compute is busy.

    While compute runs, nobody sees when an exchange ended; what shows is how long compute then still stood waiting. So
    this is the factor with which the model predicts as long a wait as the overlapped probe had.
    """

    def waits_s(factor: float) -> float:
        found = predict(with_wire(model, factor), overlapped.pair, dict.fromkeys(overlapped.whole_s, overlapped.shape))
        return sum(phase.waited_s for phase in found.values())

    least_s = waits_s(1.0)
    if overlapped.waited_s <= least_s + NOISE * sum(overlapped.whole_s.values()):
        return 1.0
    low, high = 1.0, MAX_SLOWDOWN
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if waits_s(middle) < overlapped.waited_s else (low, middle)
    return high


def with_wire(model: CostModel, factor: float) -> CostModel:
    """The model with this slowdown of the wire."""
    return replace(model, slowdown=replace(model.slowdown, wire=factor))
