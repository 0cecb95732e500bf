"""schedule="auto": what it says, its budget of bytes, tickets, copies, and one real calibration."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, MoELayer, ShortcutBlock
from moe_overlap.auto import auto
from moe_overlap.auto import calibrate as measuring
from moe_overlap.planning.search import search
from moe_overlap.schedule.nodes import routing_digest
from tests.auto.planted import (
    OPS,
    SHAPES,
    build,
    cost_model,
    distinct_costs,
    layer_of,
    line,
    planted,
    same,
    step,
)
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


@pytest.mark.parametrize("shape", SHAPES)
def test_explain_before_and_after(shape):
    def rank(me):
        model = build(shape, me.transport())
        layer = layer_of(model)
        before = layer.explain()
        assert shape == "block" or "the first forward call calibrates" in before
        with torch.no_grad():
            model(tokens(8))
        text = layer.explain()
        assert "planted" in text and "-- forward --" in text and "-- backward --" not in text
        step(model, me.rank)
        return layer.explain()

    with planted(cost_model(OPS if shape == "block" else 0)):
        for text in virtual_world(2).run(rank):
            assert "-- backward --" in text and "schedule auto: " in text
            assert text.count("Measured ") == 2, "predicted against measured, for both phases"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_without_rows_anywhere_leaves_the_calibration_to_the_next(shape):
    """It runs joined; what it would have measured is nothing."""

    def rank(me):
        model = build(shape, me.transport())
        schedule = model.schedule
        empty = step(model, me.rank, counts=(0, 0))
        found = dict(schedule.found)
        joined = layer_of(model)._last_step.pair.joined
        step(model, me.rank)
        return empty["y"].shape[0], found, joined, len(schedule.found)

    with planted(cost_model(OPS if shape == "block" else 0)) as calls:
        assert virtual_world(2).run(rank) == [(0, {}, True, 1)] * 2
    assert len(calls) == 2, "once on each rank"


def test_a_budget_of_bytes_in_flight_is_kept_or_refused_on_every_rank():
    """Without one the exchanges are chunked; half of all bytes leaves the joined schedules, a byte leaves none."""

    def rank(me):
        def run(budget):
            torch.manual_seed(0)
            layer = MoELayer(8, 12, 4, 2, transport=me.transport(), schedule="auto", max_in_flight_bytes=budget)
            y = layer(torch.randn(64, 8, generator=torch.Generator().manual_seed(me.rank))).detach()
            return y, layer.stats().schedule, layer._last_step.pair.joined

        free, tight = run(None), run(64 * 2 * 8 * 4 // 2)
        with pytest.raises(ConfigError, match="max_in_flight_bytes"):
            run(1)
        return free, tight

    with planted(cost_model()):
        for (y, text, joined), (y_tight, _, joined_tight) in virtual_world(2).run(rank):
            assert "D1" in text and not joined and joined_tight
            torch.testing.assert_close(y, y_tight)


@pytest.mark.parametrize("overlap", [True, False])
def test_tickets(overlap):
    """One chunk, overlapped unless that is off, and no calibration."""

    def rank(me):
        layer = make(me.transport(), schedule="auto", overlap=overlap)
        x = tokens(8, me.rank)
        ticket = layer.begin(x)
        layer.run_experts(ticket)
        close(layer.finish(ticket), make(me.transport())(x))
        pair = layer._last_step.pair
        assert (pair.chunks, pair.joined) == (1, not overlap)

    with planted(cost_model()) as calls:
        virtual_world(2).run(rank)
    assert not calls


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_and_state(shape):
    def rank(me):
        model = build(shape, me.transport())
        fresh = copy.deepcopy(model)
        want = step(model, me.rank)
        used = copy.deepcopy(model)
        for one in (fresh, used):
            one.zero_grad()
            same(step(one, me.rank), want)
        plain = build(shape, me.transport(), "serial")
        assert model.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(model.state_dict())
        assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())

    with planted(cost_model(OPS if shape == "block" else 0)):
        virtual_world(2).run(rank)


def test_words_that_do_not_go_together():
    with pytest.raises(ConfigError, match="slot"):
        ShortcutBlock([nn.Identity()], MoELayer(D, F, E, K), tap=0, slot=0, schedule="auto")
    with pytest.raises(ConfigError, match="'auto'"):
        ShortcutBlock([nn.Identity()], MoELayer(D, F, E, K), tap=0, schedule="serial")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_real_calibration(shape, cache):
    """Nothing planted: it measures, keeps what it found, and the answer is that of the fixed schedule."""

    def rank(me):
        model = build(shape, me.transport())
        same(step(model, me.rank), step(build(shape, me.transport(), "serial"), me.rank), close)
        model = layer_of(model) if shape != "block" else model
        return [found.model for found in model.schedule.found.values()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROUNDS", (1, 2))
        patch.setattr(auto, "MOST_MISFIT", math.inf)  # of so few rounds, beside other tests
        (first,), (second,) = virtual_world(2).run(rank)
    assert first == second and first.source.startswith("measured on ")
    assert first.experts(100) > 0 and first.exchange["inter"](100) > 0
    assert len(first.backbone_s) == (OPS if shape == "block" else 0)
    assert (first.shared_s > 0) == (shape == "shared")
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["model"] == first.to_json()


def test_a_loss_is_attached_after_an_evaluation_that_calibrates():
    """It is the training call's output that the loss has to reach, whatever was measured since."""

    def rank(me):
        layer = make(me.transport(), schedule="auto")
        x = tokens(6, me.rank).requires_grad_()
        y = layer(x)
        with torch.no_grad():
            layer(tokens(4))
        (layer.attach(x.square().sum()) if me.rank else y.square().sum()).backward()
        return x.grad is not None

    with planted(cost_model()):
        assert virtual_world(2).run(rank) == [True, True]


def test_a_recompute_with_another_cut_of_backward_is_told_from_one_with_the_same():
    rows = torch.arange(8).reshape(4, 2)
    assert routing_digest(rows, cut=4) == routing_digest(rows, cut=4) != routing_digest(rows, cut=5)


def test_a_budget_that_buffers_of_gateways_exceed_leaves_one_chunk():
    """Rows cross nodes once: several chunks keep rows and sums at their gateways, one chunk does not."""

    def rank(me):
        def run(budget):
            torch.manual_seed(0)
            layer = MoELayer(64, 12, 8, 4, transport=me.transport(), schedule="auto", dedup="on", hierarchical=True,
                             ranks_per_node=2, max_in_flight_bytes=budget)  # fmt: skip
            y = layer(torch.randn(64, 64, generator=torch.Generator().manual_seed(me.rank))).detach()
            (schedule,) = layer.schedule.found.values()
            return (
                y,
                layer._last_step.pair,
                search(schedule.planned(layer.last_exchange).windows["forward"], max_in_flight_bytes=budget),
            )

        y, pair, candidates = run(None)
        held = {one.in_flight_bytes for one in candidates if one.chunks == 1}
        assert pair.chunks > 1 and candidates[0].in_flight_bytes > max(held), "buffers beside the same rows"
        tight_y, tight, kept = run(max(held))
        assert tight.chunks == 1 and all(one.in_flight_bytes <= max(held) for one in kept)
        torch.testing.assert_close(y, tight_y)
        with pytest.raises(ConfigError, match="max_in_flight_bytes"):
            run(min(held) - 1)
        return True

    with planted(distinct_costs(cost_model(exchange={"inter": line(1e-6), "intra": line(1e-8)}))):
        assert virtual_world(4).run(rank) == [True] * 4
