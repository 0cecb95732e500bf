"""The cost model: fits, units, JSON, shapes of a balanced step, and the window made of both."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import MOST, AlphaBeta, CostModel, window
from moe_overlap.planning.search import search
from moe_overlap.planning.shapes import StepShape, balanced_shape
from moe_overlap.planning.window import Slowdown

figures = st.floats(1e-9, 1.0)


def line(alpha_s=0.0, beta_s=0.0):
    return AlphaBeta(alpha_s=alpha_s, beta_s=beta_s)


def model(**changes):
    base = CostModel(
        exchange={"inter": line(1e-4, 1e-8), "intra": line(1e-5, 1e-9)},
        experts=line(1e-5, 1e-6),
        experts_dgrad=line(2e-5, 2e-6),
        experts_wgrad=line(3e-5, 3e-6),
        permute=line(0, 1e-7),
        unpermute=line(0, 2e-7),
        unpermute_backward=line(0, 3e-7),
        permute_backward=line(0, 4e-7),
        backbone_s=(1e-3, 2e-3, 3e-3),
        backbone_backward_s=(2e-3, 4e-3, 6e-3),
        shared_s=5e-3,
        shared_backward_s=7e-3,
        outside_s=1e-2,
        outside_backward_s=2e-2,
        issue_s=1e-5,
        slowdown=Slowdown(compute=1.1, wire=1.2),
        source="made up for a test",
    )
    return replace(base, **changes)


def shape(**changes):
    base = {"tokens": 1024, "top_k": 2, "hidden": 512, "dtype_bytes": 2, "ranks": 8, "ranks_per_node": 4}
    base |= {"local_experts": 4, "chunks": 4, "by": "tokens"}
    return balanced_shape(**(base | changes))


@given(figures, figures, st.lists(st.integers(1, 10**9), min_size=2, max_size=8, unique=True))
def test_a_fit_of_exact_points_is_exact(alpha_s, beta_s, sizes):
    fitted = AlphaBeta.fit((n, alpha_s + beta_s * n) for n in sizes)
    for n in sizes:
        assert fitted(n) == pytest.approx(alpha_s + beta_s * n, rel=1e-6)


def test_a_disturbed_sample_does_not_move_the_fit():
    points = [(n, 1e-3 + 1e-6 * n) for n in (100, 200, 400, 800, 1600)]
    points[2] = (400, 5.0)
    fitted = AlphaBeta.fit(points)
    assert fitted.alpha_s == pytest.approx(1e-3) and fitted.beta_s == pytest.approx(1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**6), figures), min_size=2, max_size=6, unique_by=lambda p: p[0]), figures,
       figures)  # fmt: skip
def test_no_line_has_a_smaller_relative_error_than_the_fit(points, alpha_s, beta_s):
    def error(candidate):
        return sum(abs(candidate(n) - s) / s for n, s in points)

    fitted = AlphaBeta.fit(points)
    assert fitted.alpha_s >= 0 and fitted.beta_s >= 0
    for scale in (0.9, 1.0, 1.1):
        assert error(fitted) <= error(line(fitted.alpha_s * scale, fitted.beta_s)) * (1 + 1e-9)
        assert error(fitted) <= error(line(fitted.alpha_s, fitted.beta_s * scale)) * (1 + 1e-9)
    assert error(fitted) <= error(line(alpha_s, beta_s)) * (1 + 1e-9)


def test_falling_times_are_fitted_by_a_constant():
    assert AlphaBeta.fit([(1, 3.0), (2, 2.0), (3, 1.0)]).beta_s == 0.0


@pytest.mark.parametrize("points", [[], [(1, 1.0)], [(2, 1.0), (2, 2.0)], [(0, 1.0), (1, 1.0)], [(1, 0.0), (2, 1.0)],
                                    [(1, float("nan")), (2, 1.0)]])  # fmt: skip
def test_points_that_fix_no_line_are_refused(points):
    with pytest.raises(ConfigError, match="points"):
        AlphaBeta.fit(points)


def test_nothing_takes_no_time():
    assert line(1.0, 1.0)(0) == 0.0 and line(1.0, 2.0)(3) == 7.0


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), True, "1", 1e10, 1e308, 10**400, -(10**400)])
def test_seconds_are_finite_and_not_negative(bad):
    with pytest.raises(ConfigError, match="beta_s"):
        AlphaBeta(alpha_s=0.0, beta_s=bad)
    with pytest.raises(ConfigError, match="issue_s"):
        model(issue_s=bad)
    with pytest.raises(ConfigError, match="backbone_s"):
        model(backbone_s=(bad, 0.0, 0.0))


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf"), 1e308, 10**400])
def test_a_slowdown_is_a_factor_of_at_least_one_and_not_absurd(bad):
    for name in ("compute", "wire"):
        with pytest.raises(ConfigError, match=f"slowdown.{name}"):
            Slowdown(**{name: bad})


def test_the_most_that_is_allowed_can_be_planned_with():
    most = {"exchange": {"inter": line(MOST, MOST), "intra": line(MOST, MOST)}, "experts": line(MOST, MOST)}
    problem = window(model(**most, slowdown=Slowdown(compute=1e6, wire=1e6)), [shape(chunks=1), shape()], "forward")
    assert all(math.isfinite(found.predicted_s) for found in search(problem))


def test_json_holds_the_whole_model():
    text = json.dumps(model().to_json(), allow_nan=False)
    assert CostModel.from_json(json.loads(text)) == model()


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        (lambda d: d.pop("experts"), "cost model", "no experts"),
        (lambda d: d.update(speed=11), "cost model", "speed unknown"),
        (lambda d: d["permute"].pop("beta_s"), "permute", "no beta_s"),
        (lambda d: d["exchange"]["inter"].update(gamma=1), "exchange.inter", "gamma unknown"),
        (lambda d: d["exchange"].update(pigeon={"alpha_s": 1, "beta_s": 1}), "exchange", "inter, intra"),
        (lambda d: d.update(exchange=[1]), "exchange", "object"),
        (lambda d: d.update(backbone_s=3.0), "backbone_s", "list"),
        (lambda d: d.update(backbone_s=[1.0]), "backbone_backward_s", "1 times"),
        (lambda d: d.update(outside_s="1"), "outside_s", "finite"),
        (lambda d: d.update(slowdown={"compute": 1.0}), "slowdown", "no wire"),
        (lambda d: d.update(source=1), "source", "text"),
    ],
)
def test_a_file_that_is_not_a_model_says_where(change, field, said):
    data = model().to_json()
    change(data)
    with pytest.raises(ConfigError) as error:
        CostModel.from_json(data)
    assert error.value.field == field and said in str(error.value)


def test_an_exchange_takes_as_long_as_its_slowest_wire():
    known = model()
    assert known.exchange_s({"inter": 0, "intra": 0}) == 0.0
    assert known.exchange_s({"inter": 10, "intra": 10**6}) == pytest.approx(1e-5 + 1e-3)
    assert known.exchange_s({"inter": 10**6, "intra": 10**6}) == pytest.approx(1e-4 + 1e-2)
    with pytest.raises(ConfigError, match="intra"):
        model(exchange={"inter": line()}).exchange_s({"intra": 1})


def test_a_balanced_step_by_hand():
    found = shape()
    assert found.rows == (512,) * 4 and found.slots_rows == 2048 and found.row_bytes == 1024
    # Of 512 rows of a chunk, 4 of 8 ranks are on the other node, 3 of 8 are the neighbours.
    assert found.bytes_by_lane == {"inter": (512 * 1024 // 2,) * 4, "intra": (512 * 1024 * 3 // 8,) * 4}
    assert shape(ranks_per_node=8).bytes_by_lane.keys() == {"intra"}
    assert shape(ranks_per_node=1).bytes_by_lane.keys() == {"inter"}
    assert shape(ranks=1, ranks_per_node=1).bytes_by_lane == {}


@given(st.integers(1, 5000), st.integers(1, 16), st.sampled_from(["tokens", "experts"]))
def test_the_chunks_hold_all_rows(tokens, chunks, by):
    found = shape(tokens=tokens, chunks=chunks, by=by, local_experts=16)
    assert sum(found.rows) == found.slots_rows == 2 * tokens and len(found.rows) == chunks


@pytest.mark.parametrize(("by", "chunks"), [("tokens", 17), ("tokens", 0), ("experts", 5), ("rows", 1)])
def test_chunks_that_cannot_be_cut_are_refused(by, chunks):
    with pytest.raises(ConfigError, match="chunks|by"):
        shape(by=by, chunks=chunks)


def test_a_forward_window_has_the_durations_of_the_model():
    found = window(model(), [shape(), shape(chunks=1)], "forward")
    assert (found.phase, found.op_verb, found.ops_s) == ("forward", "B", (1e-3, 2e-3, 3e-3))
    assert found.head_s == pytest.approx(2048e-7) and found.tail_s == pytest.approx(4096e-7)
    assert found.issue_s == 1e-5 and found.slowdown == Slowdown(compute=1.1, wire=1.2)
    four, one = found.chunkings
    assert (four.chunks, one.chunks, four.deferred_s) == (4, 1, ())
    assert four.experts_s == pytest.approx((1e-5 + 512e-6,) * 4)
    assert four.first_s == four.second_s == pytest.approx((1e-4 + 1e-8 * 512 * 512,) * 4)
    assert four.chunk_bytes == (512 * 1024,) * 4


def test_a_backward_window_reverses_the_ops_and_defers_the_weight_gradients():
    found = window(model(), [shape()], "backward", weight_groups=2, num_ops=2)
    assert found.ops_s == (6e-3, 4e-3)
    assert found.head_s == pytest.approx(2048 * 3e-7) and found.tail_s == pytest.approx(2048 * 4e-7)
    assert found.chunkings[0].experts_s == pytest.approx((2e-5 + 512 * 2e-6,) * 4)
    assert found.chunkings[0].deferred_s == pytest.approx((3e-5 + 1024 * 3e-6,) * 2)
    assert model().outside("backward", 2) == pytest.approx(2e-2 + 2e-3)
    assert model().outside("forward", 0) == pytest.approx(1e-2 + 6e-3)
    assert model().outside("forward") == 1e-2


@pytest.mark.parametrize(("phase", "per_row_s", "per_expert_s"), [("forward", 1e-6, 4e-5), ("backward", 2e-6, 9e-5)])
def test_each_expert_of_a_chunk_costs(phase, per_row_s, per_expert_s):
    """Chunks of tokens pass all experts, chunks by groups their own; a chunk without rows passes none."""
    known = model(expert_s=4e-5, expert_dgrad_s=9e-5, experts=line(0, 1e-6), experts_dgrad=line(0, 2e-6))
    groups = replace(shape(local_experts=5, chunks=3, by="experts"), rows=(100, 0, 300))
    assert groups.experts == (1, 2, 2)
    by_groups, by_tokens = window(known, [groups, shape(local_experts=5, chunks=2)], phase).chunkings
    assert by_groups.experts_s == pytest.approx(
        (100 * per_row_s + per_expert_s, 0.0, 300 * per_row_s + 2 * per_expert_s)
    )
    assert by_tokens.experts_s == pytest.approx((1024 * per_row_s + 5 * per_expert_s,) * 2)


def test_a_shared_expert_is_the_only_op_of_its_window():
    assert window(model(), [shape()], "forward", op_verb="S").ops_s == (5e-3,)
    assert window(model(), [shape()], "backward", op_verb="S").ops_s == (7e-3,)


def test_windows_of_nothing_or_of_two_steps_are_refused():
    with pytest.raises(ConfigError, match="shapes"):
        window(model(), [], "forward")
    with pytest.raises(ConfigError, match="shapes"):
        window(model(), [shape(), shape(tokens=8)], "forward")
    with pytest.raises(ConfigError, match="num_ops"):
        window(model(), [shape()], "forward", num_ops=4)
    with pytest.raises(ConfigError, match="rows"):
        StepShape(chunks=2, by="tokens", rows=(1,), experts=(1, 1), bytes_by_lane={}, slots_rows=1, row_bytes=1)


@pytest.mark.parametrize(
    ("agree_s", "options", "seconds"),
    [
        (4e-3, {"num_ops": 2}, 1e-2 + 1e-3),
        (4e-3, {"num_ops": 2, "num_ahead": 1}, 1e-2 + 1e-3),
        (4e-3, {"num_ops": 2, "num_ahead": 2}, 1e-2 + 1e-3 + 1e-3),
        (0.0, {"num_ops": 2, "num_ahead": 2}, 1e-2 + 1e-3 + 5e-3),
        (4e-3, {"num_ops": 0, "op_verb": "S", "num_ahead": 1}, 1e-2 + 6e-3 + 1e-3),
    ],
)
def test_the_agreement_hides_under_the_ops_beside_it_or_they_under_it(agree_s, options, seconds):
    made = model(agree_s=agree_s)
    assert math.isclose(made.outside("forward", **options), seconds)
    assert made.outside("backward", **options) == made.outside("backward", options["num_ops"])
