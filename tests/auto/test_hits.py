"""When schedule="auto" searches: where a search can gain more than it costs, alike on all ranks; and a recompute runs
what its forward ran."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, PlanMismatch
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.auto import planned as planning
from moe_overlap.auto.planned import PlannedSchedule, _faster, _plans
from moe_overlap.planning.shapes import MetadataBytes
from tests.auto.planted import choices, cost_model, distinct_costs, exchange, line, planted, routed
from tests.layers import make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits

ROW_BYTES = 128
MODEL = cost_model(3, backbone_s=(3e-4,) * 3, exchange={"inter": line(1e-9, 1e-5)}, issue_s=5e-6)
NEVER = 1e9  # seconds of a search that is never worth it


def planned(search_s, model=MODEL, **options):
    return PlannedSchedule(model=model, row_bytes=ROW_BYTES, search_s=search_s, **{"num_ops": 3, **options})


def searched(schedule, step):
    """What a search finds for one step."""
    return _faster(_plans(schedule, schedule._kinds(step)))


def step_of(number, rows, **options):
    return replace(exchange(rows=rows, **options), step=number)


# ---------------------------------------------------------------- when there is a search


def test_the_first_step_is_searched_for_and_the_next_kind_runs_what_it_ran():
    schedule = planned(NEVER)
    first, second = (schedule.planned(one) for one in run(schedule, [step_of(1, 40), step_of(2, 50)]))
    assert first.could_gain_s is None and second.could_gain_s >= 0
    assert second.pair == first.pair and second.windows != first.windows
    for phase, window in second.windows.items():
        assert second.best(phase).order == first.best(phase).order
        fits = [one for one in planning.search(window) if one.order == first.best(phase).order]
        assert second.best(phase).predicted_s in [one.predicted_s for one in fits], "simulated in its own window"
    assert (schedule.tally["searched"], schedule.tally["taken over"], schedule.hit_rate) == (1, 1, 0.5)


def run(schedule, steps):
    for step in steps:
        schedule.pair_for(step)
        schedule.begins_backward(step)
    return steps


@pytest.mark.parametrize("times", [1, 2.5, 7])
def test_a_kind_is_searched_for_when_it_has_come_often_enough(times):
    """As skis are bought when they have been hired for their price."""
    known, other = step_of(1, 2), step_of(2, 90)
    probe = planned(NEVER)
    run(probe, [known, other])
    gain_s = probe.planned(other).could_gain_s
    assert gain_s > 0
    schedule = planned(times * gain_s)
    run(schedule, [known])
    for visit in range(1, 12):
        run(schedule, [replace(other, step=1 + visit)])
        bought = visit > times
        assert schedule.tally["searched"] == 1 + bought
        assert (schedule.planned(other).could_gain_s is None) == bought
    assert schedule.planned(other).pair == searched(schedule, other).pair


@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_that_is_taken_over_is_slower_than_the_bound_says(seed):
    chance, schedule = random.Random(seed), planned(NEVER)
    for number in range(1, 30):
        step = step_of(number, chance.randrange(1, 200), grad=True)
        run(schedule, [step])
        ran, best = schedule.planned(step), searched(schedule, step)
        if ran.could_gain_s is not None:
            assert ran.predicted_s - best.predicted_s <= ran.could_gain_s * (1 + 1e-9)
    assert schedule.tally["taken over"] > 10


def test_a_search_that_costs_nothing_makes_it_a_function_of_the_counts_alone():
    steps = [step_of(number, rows) for number, rows in enumerate((3, 90, 3, 40, 90), start=1)]
    forwards, backwards = planned(0.0), planned(0.0)
    for one, other in zip(steps, reversed(steps), strict=True):
        run(forwards, [one]), run(backwards, [other])
    assert all(forwards.planned(one).pair == backwards.planned(one).pair for one in steps)
    assert forwards.tally["taken over"] == 0
    assert planned(0.0).digest != planned(1e-3).digest, "ranks that would choose otherwise are told apart"


# ---------------------------------------------------------------- what may be taken over


def test_what_does_not_fit_is_not_taken_over():
    """Groups of experts that a rank does not have, a half of own rows where there is one part, bytes over the budget,
    a phase that was not planned."""
    groups = replace(MODEL, expert_s=2e-5, expert_dgrad_s=4e-5)
    schedule = planned(NEVER, groups, num_ops=0)
    many = exchange(rows=12, slots=16)
    run(schedule, [many])
    assert schedule.planned(many).pair.by == "experts"
    few = replace(exchange(rows=12, slots=2), step=2)
    run(schedule, [few])
    assert schedule.tally["searched"] == 2 and schedule.planned(few).could_gain_s is None

    least = sum(schedule.planned(many).windows["forward"].chunking(2, "tokens").chunk_bytes)
    tight = planned(NEVER, max_in_flight_bytes=least)
    run(tight, [step_of(1, 3), step_of(2, 180)])
    for step in (step_of(1, 3), step_of(2, 180)):
        assert all(tight.planned(step).best(phase).in_flight_bytes <= least for phase in ("forward", "backward"))

    phases = planned(NEVER)
    run(phases, [step_of(1, 20, grad=False), step_of(2, 20, grad=True)])
    assert phases.tally["searched"] == 2, "no backward was there to take over"
    run(phases, [step_of(3, 30, grad=False)])
    assert phases.tally["searched"] == 2, "and a forward is there in both"


@pytest.mark.parametrize("dedup", ["on", "auto"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_plain_and_deduplicated_plans_are_taken_over_by_their_like(dedup, top_k):
    model = distinct_costs(replace(MODEL, backbone_s=(), backbone_backward_s=()))
    schedule = planned(NEVER, model, num_ops=0, dedup=dedup, metadata=MetadataBytes(out=8 * top_k, back=4 * top_k))
    for number in range(1, 8):
        step = routed([choices(32 * number + rank, top_k, seed=10 * number + rank) for rank in range(2)])
        step = replace(step, step=number)
        pair = schedule.pair_for(step)
        found = schedule.planned(step)
        deduplicated = pair.deduplicated
        assert deduplicated or dedup == "auto"
        assert all(window.deduplicated == deduplicated for window in found.windows.values())
        assert found.predicted_s >= searched(schedule, step).predicted_s * (1 - 1e-9)
    assert schedule.tally["searched"] < 7


# ---------------------------------------------------------------- all ranks, and recomputes


def views(counts, number, phase="forward", grad=True):
    """One agreed step as each rank knows it."""
    return [
        replace(exchange(counts, grad=grad), rank=rank, step=number, phase=phase, counts=Counts.of(counts, rank))
        for rank in range(len(counts))
    ]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("remembered", [2, 256])
def test_all_ranks_choose_alike_and_recomputes_find_what_their_forwards_ran(world, remembered, monkeypatch):
    """Any order of forwards with and without gradients, recomputes and backwards; what is asked between, on some ranks
    alone, changes nothing. Few kinds are kept, or all."""
    monkeypatch.setattr(planning, "REMEMBERED", remembered)
    chance, draw = random.Random(world), np.random.default_rng(world)
    loads = [draw.integers(0, most, (world, BLOCKS, 4 * world)) for most in (2, 5, 20, 80, 300, 900)]
    ranks = [planned(2e-4) for _ in range(world)]
    waiting, ran = [], {}
    for number in range(1, 160):
        load = chance.randrange(len(loads))
        grad = chance.random() < 0.8
        pairs = [one.pair_for(view) for one, view in zip(ranks, views(loads[load], number, grad=grad), strict=True)]
        assert all(pair == pairs[0] for pair in pairs)
        if grad:
            waiting.append((number, load, pairs[0]))
            ran.setdefault(load, set()).add(pairs[0].digest)
        chance.choice(ranks).planned(views(loads[chance.randrange(len(loads))], number)[0])
        while len(waiting) > 4 or (waiting and chance.random() < 0.4):
            before, load, pair = waiting.pop(chance.randrange(len(waiting)))
            for _ in range(chance.randrange(3)):
                again = views(loads[load], number, phase="recompute")
                assert all(one.pair_for(view) == pair for one, view in zip(ranks, again, strict=True))
            for one, view in zip(ranks, views(loads[load], before), strict=True):
                one.begins_backward(view)
                if chance.random() < 0.2:
                    one.begins_backward(view)  # as two parts of one graph do
    assert any(len(digests) > 1 for digests in ran.values()), "schedules taken over, and then searched for"
    assert len({one.tally["searched"] for one in ranks}) == 1 < ranks[0].tally["searched"]


def test_steps_with_equal_counts_run_the_same_while_one_of_them_waits():
    known, other = step_of(1, 2), step_of(2, 90)
    slow = planned(NEVER)
    run(slow, [known, other])
    lazy = planned(1.5 * slow.planned(other).could_gain_s)
    run(lazy, [known])
    pairs = [lazy.pair_for(replace(other, step=number)) for number in range(2, 9)]
    assert all(pair == pairs[0] for pair in pairs) and lazy.tally["searched"] == 1
    for number in range(2, 9):
        assert lazy.pair_for(replace(other, step=8, phase="recompute")) == pairs[0]
        lazy.begins_backward(replace(other, step=number))
    run(lazy, [replace(other, step=9)])
    assert lazy.tally["searched"] == 2


def test_a_recompute_long_after_its_forward_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(planning, "FORWARDS", 3)
    schedule = planned(1e-3)
    for number in range(1, 6):
        schedule.pair_for(step_of(number, 10 * number))
    assert schedule.pair_for(replace(step_of(5, 30), phase="recompute"))
    with pytest.raises(ConfigError, match="at most 3 forward calls of a layer between"):
        schedule.pair_for(replace(step_of(5, 10), phase="recompute"))
    assert len(schedule._ran) == len(schedule._waiting) == 3


def test_a_forward_whose_backward_never_comes_waits_no_longer_than_it_is_remembered(monkeypatch):
    monkeypatch.setattr(planning, "FORWARDS", 3)
    schedule = planned(1e-3)
    for number, rows in ((1, 10), (2, 20), (3, 30), (4, 10)):  # the first one's counts come again
        schedule.pair_for(step_of(number, rows))
    schedule.begins_backward(step_of(4, 10))
    assert sum(ran.waiting for ran in schedule._ran.values()) == len(schedule._waiting) == 2
    schedule.pair_for(step_of(5, 50))
    assert [ran.waiting for ran in schedule._ran.values()] == [1, 0, 1]


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dedup", ["off", "auto"])
def test_layers_choose_alike_with_checkpoints_and_have_the_bits_of_a_fixed_schedule(world, dedup, monkeypatch):
    """Routing that changes from step to step, two micro-batches in flight, a search that is dear on one rank."""
    monkeypatch.setattr(PlannedSchedule, "measure_search", lambda schedule, exchange: 1e-5 * (1 + exchange.rank))

    def rank(me):
        auto, fixed = (make(me.transport(), schedule=word, dedup=dedup) for word in ("auto", "serial"))
        check = same_bits if dedup == "off" else torch.testing.assert_close
        pairs, chance = [], random.Random(1)
        for step in range(8):
            sizes = [chance.randrange(1, 60) for _ in range(2)]
            for layer in (auto, fixed):
                layer.zero_grad()
            batches = [tokens(size, 7 * step + me.rank + number) for number, size in enumerate(sizes)]
            found = []
            for layer in (auto, fixed):
                xs = [x.clone().requires_grad_() for x in batches]
                ys = [checkpoint(layer, x, use_reentrant=False) for x in xs]
                if layer is auto:
                    pairs.append(layer._last_step.pair)
                for number in (0, 1) if step % 2 else (1, 0):
                    ys[number].square().sum().backward()
                found.append([*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters())])
            for one, other in zip(*found, strict=True):
                check(one, other)
        (schedule,) = auto.schedule.found.values()
        assert schedule.search_s == 1e-5 * world
        assert "hits)" in auto.explain() and auto.stats().hit_rate == schedule.hit_rate
        assert "not searched for" in str(auto.stats()) and fixed.stats().hit_rate is None
        return [pair.digest for pair in pairs], schedule.tally["searched"], schedule.tally["taken over"]

    model = cost_model(exchange={"inter": line(1e-7, 2e-6)}, hide=("experts", "experts_dgrad"))
    with planted(distinct_costs(model) if dedup == "auto" else model):
        found = virtual_world(world).run(rank)
    assert all(one == found[0] for one in found)
    assert found[0][2] > 0


def test_two_backwards_of_a_checkpointed_step_with_one_of_equal_counts_between():
    """The step between would be searched for, and gets what the one runs that is still to be computed again."""

    def loss_of(layer, count, rank):
        x = tokens(count, rank).requires_grad_()
        return checkpoint(layer, x, use_reentrant=False).square().sum()

    def rank(me):
        layer = make(me.transport(), schedule="auto", shared_expert_size=8)
        loss_of(layer, 3, me.rank).backward()  # the first kind is searched for, and the next one takes that over
        layer.zero_grad()
        loss = loss_of(layer, 60, me.rank)
        ran = layer._last_step.pair
        loss.backward(retain_graph=True)
        (schedule,) = layer.schedule.found.values()
        for known in schedule._found.values():
            known.owed_s = NEVER  # what a search could have gained so far: to search pays at once
        searched = schedule.tally["searched"]
        between = loss_of(layer, 60, me.rank)
        assert layer._last_step.pair == ran and schedule.tally["searched"] == searched
        between.backward()
        two = [p.grad.clone() for p in layer.parameters()]
        loss.backward()
        for one, three in zip(two, layer.parameters(), strict=True):
            torch.testing.assert_close(three.grad, 1.5 * one)  # of three equal losses
        loss_of(layer, 60, me.rank)  # nothing waits any longer
        assert schedule.tally["searched"] == searched + 1

    with planted(cost_model()):
        virtual_world(2).run(rank)


def test_ranks_that_retain_their_graphs_unlike_each_other_are_refused_where_schedules_depend_on_it():
    def rank(me):
        layer = make(me.transport(), schedule="auto")
        y = layer(tokens(8, me.rank)).sum()
        with pytest.raises(PlanMismatch, match="different backwards .* retain_graph: rank 0 has 1, rank 1 has 0"):
            y.backward(retain_graph=me.rank == 0)
        fixed = make(me.transport())
        fixed(tokens(8, me.rank)).sum().backward(retain_graph=me.rank == 0)

    with planted(cost_model()):
        virtual_world(2).run(rank)


def test_a_new_opening_begins_anew():
    def rank(me):
        layer = make(me.transport(), schedule="auto")
        first = layer(tokens(20, me.rank)).sum()
        first.backward()
        (before,) = layer.schedule.found.values()
        layer.transport.close("test")
        layer.transport.reopen()
        layer(tokens(20, me.rank)).sum().backward()
        after = layer.schedule.get(layer.dispatcher.openings, torch.float64)
        assert after is not before and after.tally["steps"] == 1
        return math.isfinite(after.search_s)

    with planted(cost_model()):
        assert all(virtual_world(2).run(rank))
