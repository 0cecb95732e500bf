"""Whatever was measured, the fitted figures are ones that a model may hold, and that the planner can use."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from moe_overlap.auto.fit import Probe, _experts, fit
from moe_overlap.auto.probe_pairs import CHUNKS, OVERLAPPED
from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import LEAST, MOST, AlphaBeta, CostModel, figure
from moe_overlap.planning.predict import predict
from moe_overlap.planning.shapes import StepShape
from moe_overlap.schedule.builders import SchedulePair, window

EXPERTS = 3  # of a rank: 1/3 of alpha, three times, is more than alpha in some floats


def shape_of(chunks: int, by: str, experts: int, rows: int) -> StepShape:
    each = tuple(rows * (c + 1) // chunks - rows * c // chunks for c in range(chunks))
    count = (experts,) * chunks if by == "tokens" else tuple(
        experts * (c + 1) // chunks - experts * c // chunks for c in range(chunks)
    )  # fmt: skip
    return StepShape(chunks=chunks, by=by, rows=each, experts=count, row_bytes=64, slots_rows=rows,
                     bytes_by_lane={"inter": tuple(64 * n for n in each)})  # fmt: skip


def probe_of(pair: SchedulePair, shape: StepShape, time_of) -> Probe:
    seconds = {action.text: time_of(action.verb) for action in [*pair.forward, *pair.backward]}
    phases = ("forward", "backward")
    return Probe(
        pair=pair, shape=shape, seconds=seconds, host_s={p: time_of("host") for p in phases},
        whole_s={p: time_of("whole") for p in phases}, hidden_s=time_of("hidden"), compute_s=time_of("compute"),
        waited_s=time_of("waited"),
    )  # fmt: skip


def fitted(time_of, *, experts: int = EXPERTS, groups: int = 2, rows: int = 300) -> CostModel:
    joined = [probe_of(window(1, 1, chunks=n).join(), shape_of(n, "tokens", experts, rows), time_of) for n in CHUNKS]
    over = probe_of(window(1, 1, chunks=OVERLAPPED), shape_of(OVERLAPPED, "tokens", experts, rows), time_of)
    cut = window(1, 1, chunks=groups, by="experts").join()
    grouped = probe_of(cut, shape_of(groups, "experts", experts, rows), time_of)
    return fit(joined, over, grouped, source="random")


def usable(model: CostModel) -> bool:
    """It is what a file may hold, and predicts a finite time."""
    assert CostModel.from_json(model.to_json()) == model
    shape = shape_of(4, "tokens", EXPERTS, 300)
    found = predict(model, window(1, 1, chunks=4), {"forward": shape, "backward": shape})
    return all(math.isfinite(one.whole_s) and one.whole_s >= 0 for one in found.values())


KINDS = {
    "ordinary": lambda draw: lambda verb: draw.uniform(1e-6, 1e-3),
    "capped by all of alpha": lambda draw: lambda verb: draw.uniform(1e-6, 1e-3) if verb != "E" else 0.1,
    "tiny": lambda draw: lambda verb: draw.choice([0.0, 5e-324, 1e-310, 1e-200, 1e-40, draw.random() * 1e-30]),
    "clocks that run backwards": lambda draw: lambda verb: draw.uniform(-1e-3, 1e-3),
    "endless": lambda draw: lambda verb: draw.choice([1e8, 1e12, 1e300, math.inf, 1e-6]),
    "no number": lambda draw: lambda verb: draw.choice([math.nan, 1e-4, 2e-4]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_measurement_makes_a_model_that_cannot_be(kind):
    draw = random.Random(kind)
    for _ in range(60 if kind != "capped by all of alpha" else 150):
        assert usable(fitted(KINDS[kind](draw)))


def test_a_thousand_fits_in_which_the_experts_are_all_of_alpha():
    """Of these, 74 had an alpha of -1e-19 or so."""
    draw, below_zero = random.Random(0), 0
    pair = window(1, 1, chunks=1).join()
    for _ in range(1000):
        alpha_s, experts = draw.uniform(1e-6, 1e-3), draw.choice([3, 5, 6, 7])
        joined = [probe_of(pair, shape_of(n, "tokens", experts, 300), lambda _, s=alpha_s: s) for n in (1, 4)]
        joined = [replace(p, seconds={f"E{c}": alpha_s for c in range(n)}) for p, n in zip(joined, (1, 4), strict=True)]
        joined = [replace(p, pair=window(1, 1, chunks=n).join()) for p, n in zip(joined, (1, 4), strict=True)]
        grouped = probe_of(window(1, 1, chunks=2, by="experts"), shape_of(2, "experts", experts, 300), lambda _: 0.0)
        line, expert_s = _experts(joined, grouped, "E", 1.0)
        below_zero += alpha_s - expert_s * experts < 0
        assert expert_s == pytest.approx(alpha_s / experts) and line.alpha_s == pytest.approx(0, abs=1e-18)
    assert below_zero > 10, "otherwise this tests nothing"


@pytest.mark.parametrize("seconds", [-1.08e-19, -1.0, 5e-324, 1e-31, -math.inf, math.nan, 0.0])
def test_what_is_nothing_on_paper_is_nothing(seconds):
    assert figure(seconds) == 0.0


def test_figures_keep_what_a_model_may_hold():
    assert [figure(one) for one in (LEAST, 1e-6, 3, MOST, math.inf)] == [LEAST, 1e-6, 3, MOST, MOST]


@pytest.mark.parametrize("bad", [-1e-19, 5e-324, 1e10, math.nan, math.inf, True, "1", None, [1], 10**400])
def test_a_model_given_by_hand_is_refused_outside_of_that(bad):
    model = fitted(KINDS["ordinary"](random.Random(1)))
    for change in ({"issue_s": bad}, {"backbone_s": (bad,)}, {"measured_rows": bad}):
        with pytest.raises(ConfigError):
            replace(model, **change)
    with pytest.raises(ConfigError):
        AlphaBeta(alpha_s=0.0, beta_s=bad)
