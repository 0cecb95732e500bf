"""`ReplicationRule(spare=...)` beside schedule="auto": copies by measured prices, in the cut that suits them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, ReplicationRule
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.auto.kinds import CUTS
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.auto.replicate import costs_by_cut, load_of
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import costs_of
from moe_overlap.planning.replication import decide, priced
from moe_overlap.schedule.weights import row_width
from tests.auto.planted import cost_model, distinct_costs, line, planted
from tests.layers import D, E, F, make, tokens
from tests.planning.test_replication import best_of_all
from tests.ranks import virtual_world
from tests.tolerances import close

WORLD = 4
# A row in an expert costs what a hundred on the wire do, so that a full rank is worth a copy.
MODEL = cost_model(exchange={"inter": line(1e-10, 1e-6)}, experts=line(1e-5), experts_dgrad=line(1e-5),
                   experts_wgrad=line(1e-5))  # fmt: skip
WIDTH = 3 * D * F


def schedule(model=MODEL, **options):
    return PlannedSchedule(model=model, num_ops=0, row_bytes=8 * D, expert_bytes=(8 * WIDTH, 8 * WIDTH), **options)


def skewed(layer, rank, step, hot=0):
    """Tokens of which most want the hot expert first; its bias is moved, as a router that is trained moves it."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.linspace(-1, 1, E, dtype=torch.float64).roll(hot)
    return tokens(37 + 5 * rank, 100 * step + rank).abs()


@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_copies_by_measured_prices_and_the_results_of_one_slot_each(dedup, checkpointed):
    def rank(me):
        layer, plain = (make(me.transport(), schedule=word, dedup=dedup) for word in ("auto", "serial"))
        layer.dispatcher.rule = rule = ReplicationRule(spare=2)
        decided = []
        for step in range(4):
            found = []
            for one in (layer, plain):
                one.zero_grad()
                x = skewed(one, me.rank, step, hot=step).requires_grad_()
                y = checkpoint(one, x, use_reentrant=False) if checkpointed else one(x)
                y.square().sum().backward()
                found.append([y.detach(), x.grad, *(p.grad for p in one.parameters())])
            for got, want in zip(*found, strict=True):
                close(got, want)
            assert len(rule.priced) == 2, "forward and backward"
            decided.append((rule.last.seats, rule.last.predicted_s, rule.priced[0].chunks, layer._last_step.pair))
        assert "copy of an expert over" in layer.explain() and "chunk(s)" in rule.told()
        with torch.no_grad():
            layer(skewed(layer, me.rank, 9))
        assert len(rule.priced) == 1, "forward alone"
        return decided

    with planted(distinct_costs(MODEL)):
        found = virtual_world(WORLD).run(rank)
    assert all(one == found[0] for one in found)
    assert all(len(seats) > E for seats, *_ in found[0]), "copies in every step"


def test_without_measurements_rows_are_left_and_another_schedule_is_refused():
    def rank(me):
        layer = make(me.transport(), schedule="auto")
        layer.dispatcher.rule = rule = ReplicationRule(spare=2)
        layer(tokens(0))  # no rank has a row: nothing is measured
        assert rule.last is None and rule.told() == "" and "no prices yet" in layer.explain()
        for word in ("serial", "chunked(2)"):
            other = make(me.transport(), schedule=word)
            other.dispatcher.rule = ReplicationRule(spare=2)
            with pytest.raises(ConfigError, match="rule.phases = None: expected prices, or None beside"):
                other(tokens(9, me.rank))
            other.dispatcher.rule = None
            assert other(tokens(9, me.rank)).shape == (9, D)
        with pytest.raises(ConfigError, match="phases = None"):
            rule(np.ones((WORLD, BLOCKS, E), dtype=np.int64), Placement.identity(E, WORLD))

    with planted(MODEL):
        virtual_world(2).run(rank)


def test_ranks_with_other_options_are_told_apart():
    counts = [ReplicationRule(spare=spare, margin=margin) for spare in (1, 2) for margin in (0.0, 0.1)]
    plans = [schedule(), schedule(replace(MODEL, experts=line(2e-5)))]
    digests = [rule.under(plan, grad=grad).digest for rule in counts for plan in plans for grad in (False, True)]
    assert len(set(digests)) == len(digests)
    one = ReplicationRule(spare=1)
    assert one.under(plans[0], grad=True) is one.under(plans[0], grad=True)


def test_prices_are_those_of_the_model_in_each_cut():
    cuts = costs_by_cut(schedule(), grad=True)
    assert [(one[0].chunks, one[0].joined) for one in cuts] == [(1, True), *((chunks, False) for chunks in CUTS)]
    assert [one[0].joined for one in costs_by_cut(schedule(overlap=False), grad=False)] == [True]
    layer = make()
    width = row_width(*layer.expert_weights)
    assert width == WIDTH
    for forward, backward in cuts:
        same = costs_of(MODEL, ("forward",), row_bytes=8 * D, expert_params=WIDTH, param_bytes=8,
                        chunks=forward.chunks, joined=forward.joined)  # fmt: skip
        assert forward.row_s == same[0].row_s and forward.copy[0].beta_s == pytest.approx(same[0].copy[0].beta_s)
        assert backward.copy[0].beta_s == pytest.approx(8 * WIDTH * 1e-10), "gradients in float64 here"
        assert backward.wgrad_row_s == MODEL.experts_wgrad.beta_s


@pytest.mark.parametrize("seed", range(8))
def test_copies_and_cut_together_are_as_fast_as_the_best_of_all_cuts_and_decisions(seed):
    """Never slower than either alone; and close to the best of all possible seats in the best of all cuts."""
    rng = np.random.default_rng(seed)
    ranks, counts = 2, np.zeros((2, BLOCKS, 3), dtype=np.int64)
    counts[:, 0] = rng.integers(0, 5, (2, 3)) * np.array([4, 1, 1])
    model = replace(MODEL, exchange={"inter": line(*(10.0 ** rng.uniform((-10, -7), (-7, -4))))})
    cuts = costs_by_cut(schedule(model), grad=bool(seed % 2))
    base, rule = Placement.of_ranks([[0, 1], [2]]), ReplicationRule(spare=1, margin=0.0)
    rule.decided(counts, base, cuts)
    load = load_of(counts, base, [1] * ranks, 1)
    alone = [decide(load, phases, margin=0.0) for phases in cuts]
    assert rule.last.predicted_s == min(one.predicted_s for one in alone)
    assert rule.last.left_s == min(priced(load, load.seats, phases) for phases in cuts) >= rule.last.predicted_s
    assert rule.last.predicted_s == min(priced(load, rule.last.seats, phases) for phases in cuts)
    everything = min(best_of_all(load, phases, ranks) for phases in cuts)
    assert everything <= rule.last.predicted_s <= 1.35 * everything


def test_leaving_the_rows_wins_over_all_cuts_by_the_margin():
    """In one cut copies are 3 % faster than leaving it in that cut, and not than leaving it in another."""
    rng, seen = np.random.default_rng(0), set()
    base = Placement.identity(4, 2)
    for beta, alpha in itertools.product((1e-9, 1e-8, 1e-7), (1e-7, 1e-5)):
        counts = rng.integers(0, 8, (2, BLOCKS, 4)) * np.array([4, 1, 1, 1])
        cuts = costs_by_cut(schedule(replace(MODEL, exchange={"inter": line(beta, alpha)})), grad=True)
        for margin in (0.0, 0.05, 0.3):
            rule = ReplicationRule(spare=1, margin=margin)
            rule.decided(counts, base, cuts)
            assert rule.last.left or rule.last.predicted_s < rule.last.left_s * (1 - margin)
            seen.add(rule.last.left)
    assert seen == {False, True}
