"""A placement that follows the load while a model trains."""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_overlap import set_placement
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.replicate import ReplicationRule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.controller import PlacementController, copies_planner
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.cost_model import AlphaBeta
from tests.layers import E, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


def line(beta_s):
    return AlphaBeta(alpha_s=0.0, beta_s=beta_s)


def costs(copy_s=0.5):
    one = PhaseCosts(row_s=1.0, exchange=(line(0.1),) * 2, copy=(line(copy_s),) * 2, chunks=2)
    return one, one


def skewed(me, **options):
    """This rank's layer of identical whole layers; its router wants the first experts."""
    layer, whole = make(me.transport(), **options), make()
    homes = list(seats_of(layer.dispatcher.placement).homes[me.rank])
    with torch.no_grad():
        for weight, all_of_it in zip(layer.expert_weights, whole.expert_weights, strict=True):
            weight.copy_(all_of_it[homes])
        layer.router.weight[0] += 3.0 * torch.ones_like(layer.router.weight[0])
    return layer


def train(layer, rank, steps, after=lambda: None):
    optimizer = torch.optim.Adam(layer.experts.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        x = tokens(32, seed=100 * step + rank).abs()  # positive: expert 0 is wanted by all
        loss = (layer(x) - x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after()
    return losses


def test_training_goes_on_as_without_it_while_copies_come():
    def rank(me):
        layer = skewed(me)
        controller = PlacementController(layer, copies_planner(costs(), spare=1), costs(), interval=3)
        changes = []
        losses = train(layer, me.rank, 9, lambda: changes.append(controller.step()))
        close(torch.tensor(losses), torch.tensor(train(skewed(me), me.rank, 9)))
        placement, progress = layer.dispatcher.placement, controller.progress[0]
        assert placement.has_replicas and placement.slots_of_expert[0][1:]
        assert changes[:3] == [[], [], [0]] and progress.changed >= 1 and progress.planned == 3
        assert progress.moved_bytes > 0 and progress.last_change is not None
        return placement.digest, progress.moved_bytes

    assert len(set(virtual_world(2).run(rank))) == 1


def swapped(counts_WE, current):
    """All homes of the two ranks changed over."""
    return Placement.of_ranks(current.experts_of_ranks()[::-1])


def test_homes_move_with_their_optimizer_where_a_planner_moves_them():
    def rank(me):
        layer = skewed(me)
        optimizer = torch.optim.Adam(layer.experts.parameters(), lr=0.05)
        free = PhaseCosts(row_s=1.0, exchange=(line(0.0),) * 2, copy=(line(0.0),) * 2)
        controller = PlacementController(layer, swapped, [free], optimizers=[optimizer], interval=2)
        layer(tokens(16, me.rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller._price = lambda one, counts, placement: 0.0 if placement.slot_to_expert[0] else 1.0
        assert controller.step() == [] and controller.step() == [0]
        assert layer.dispatcher.placement.slot_to_expert[0] == E // 2
        layer(tokens(16, me.rank)).sum().backward()

    virtual_world(2).run(rank)


def test_copies_of_experts_whose_homes_are_in_any_order():
    def rank(me):
        layer = skewed(me, placement=Placement.of_ranks([[3, 1, 0, 2], [4, 5, 7, 6]]))
        controller = PlacementController(layer, copies_planner(costs(1e-3), spare=1), costs(1e-3), interval=1)
        losses = train(layer, me.rank, 3, after=controller.step)
        assert layer.dispatcher.placement.has_replicas and controller.progress[0].changed
        still = skewed(me, placement=Placement.of_ranks([[3, 1, 0, 2], [4, 5, 7, 6]]))
        close(torch.tensor(losses), torch.tensor(train(still, me.rank, 3)))

    virtual_world(2).run(rank)


def test_layers_that_share_experts_are_refused():
    def rank(me):
        first = make(me.transport())
        model = torch.nn.ModuleList([first, make(me.transport(), experts=first.experts)])
        with pytest.raises(ConfigError, match="share their experts"):
            PlacementController(model, copies_planner(costs(), spare=1), costs())

    virtual_world(2).run(rank)


@pytest.mark.parametrize("reason, options", [
    ("does not pay", {"costs": costs(copy_s=1e9)}),
    ("over budget", {"budget_bytes": 1}),
])  # fmt: skip
def test_plans_are_refused_that_do_not_pay_or_are_too_large(reason, options):
    def rank(me):
        layer = skewed(me)
        prices = options.get("costs", costs())
        # The planner takes copies for cheap: the controller has its own prices.
        controller = PlacementController(
            layer, copies_planner(costs(), spare=1), prices, interval=1, budget_bytes=options.get("budget_bytes")
        )
        train(layer, me.rank, 3, controller.step)
        assert controller.progress[0].refused == {reason: 3} and not layer.dispatcher.placement.has_replicas

    virtual_world(2).run(rank)


@pytest.mark.parametrize("options", [{"interval": 2}, {"interval": 100, "threshold": 1.01}])
@pytest.mark.parametrize("calls", [1, 2])
def test_what_a_plan_saves_is_of_steps_and_not_of_their_calls(calls, options):
    """With gradients of two calls accumulated, a step saves twice as much, and its weights move once all the same."""

    def rank(me):
        layer = skewed(me)
        optimizer = torch.optim.Adam(layer.experts.parameters(), lr=0.05)
        x, horizon = tokens(16, me.rank).abs(), 10
        rows = 2 * len(x) * layer.router.top_k  # of one call on both ranks, a second saved for each
        moved = 3 * E // 2  # the weights of each expert, and two states of an optimizer
        costly = PhaseCosts(row_s=1.0, exchange=(line(0.0),) * 2, copy=(line(1.5 * horizon * rows / moved),) * 2)
        controller = PlacementController(layer, swapped, [costly], optimizers=[optimizer], horizon=horizon, **options)
        controller._price = lambda one, counts, placement: 0.0 if placement.slot_to_expert[0] else float(counts.sum())
        for _ in range(2):
            for _ in range(calls):
                layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        return controller.progress[0].changed, controller.progress[0].refused

    assert virtual_world(2).run(rank) == [(0, {"does not pay": 1}) if calls == 1 else (1, {})] * 2


def test_a_byte_budget_commits_layer_by_layer():
    def rank(me):
        layers = torch.nn.ModuleList([skewed(me), skewed(me)])
        probe = PlacementController(layers[0], copies_planner(costs(), spare=1), costs(), interval=1)
        layers[0](tokens(32, me.rank).abs()).sum().backward()
        assert probe.step() == [0]
        size = probe.progress[0].moved_bytes
        set_placement(layers[0], Placement.identity(E, 2))
        controller = PlacementController(
            layers, copies_planner(costs(), spare=1), costs(), interval=1, budget_bytes=size
        )
        for layer in layers:
            layer(tokens(32, me.rank).abs()).sum().backward()
        assert controller.step() == [0] and controller.step() == [1]  # both planned in the first step
        assert [one.planned for one in controller.progress] == [1, 1]

    virtual_world(2).run(rank)


def test_twenty_steps_with_one_layer_moved_in_each_have_the_static_loss_curve():
    """Homes go from rank to rank, with their optimizer's states; the byte budget lets one of two layers move a step."""

    def run(me, moving):
        torch.manual_seed(0)
        model = torch.nn.Sequential(skewed(me), skewed(me))
        optimizer = torch.optim.Adam([*model[0].experts.parameters(), *model[1].experts.parameters()], lr=0.05)
        free = [PhaseCosts(row_s=1.0, exchange=(line(0.0),) * 2, copy=(line(0.0),) * 2)]
        size = 3 * E // 2 * sum(weight[0].numel() * weight.element_size() for weight in model[0].expert_weights)
        controller = PlacementController(model, swapped, free, optimizers=[optimizer], interval=1, budget_bytes=size)
        gains = iter(range(1000))
        controller._price = lambda one, counts, placement: (
            -float(next(gains))
        )  # each plan looks better than what is there
        losses, moved = [], []
        x = tokens(32, seed=me.rank)
        for _ in range(20):
            loss = (model(x) - x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if moving:
                moved.append(controller.step())
        return torch.tensor(losses), moved

    def rank(me):
        losses, moved = run(me, moving=True)
        assert moved == [[0], [1]] * 10
        close(losses, run(me, moving=False)[0])
        return losses[0], losses[-1]

    assert all(first > last for first, last in virtual_world(2).run(rank))


def test_a_threshold_has_hysteresis():
    def rank(me):
        layer = skewed(me)
        planned = []

        def nothing(counts_WE, current):
            planned.append(counts_WE.sum())
            return current

        controller = PlacementController(layer, nothing, costs(), interval=100, threshold=1.2, release=1.1)
        train(layer, me.rank, 4, controller.step)
        assert len(planned) == 1  # above the threshold all the time: planned once
        controller._ratio = lambda one, counts: 1.05
        train(layer, me.rank, 1, controller.step)
        del controller._ratio
        train(layer, me.rank, 2, controller.step)
        assert len(planned) == 2 and controller.progress[0].refused == {"nothing better": 2}

    virtual_world(2).run(rank)


def test_a_controller_that_stands_still_says_so_once():
    def rank(me):
        controller = PlacementController(skewed(me), copies_planner(costs(), spare=1), costs(), patience=3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(5):
                controller.step()
        return [str(one.message) for one in seen]

    (said,) = virtual_world(1 + 1).run(rank)[0] or [""]
    assert "no training call seen in 3 steps" in said


@pytest.mark.parametrize("options", [
    {"interval": 0}, {"horizon": 0}, {"patience": True}, {"threshold": 1.0}, {"threshold": float("nan")},
    {"release": 1.5}, {"threshold": 1.2, "release": 1.3}, {"budget_bytes": 0},
    {"threshold": "high"}, {"threshold": True}, {"threshold": 1.2, "release": "low"}, {"budget_bytes": "1"},
    {"budget_bytes": True}, {"budget_bytes": float("nan")},
])  # fmt: skip
def test_bad_options_are_refused(options):
    def rank(me):
        with pytest.raises(ConfigError, match=list(options)[-1]):
            PlacementController(skewed(me), swapped, costs(), **options)

    virtual_world(2).run(rank)


@pytest.mark.parametrize(
    "planned, field",
    [
        (None, "planner"),
        ([[0, 1], [2, 3]], "planner"),
        (Placement.identity(4, 2), "num_experts"),
        (Placement.of_ranks([[0, 1, 2, 3, 0], [4, 5, 6, 7]]), "placement"),
    ],
)
def test_what_is_no_placement_of_these_experts_is_refused_and_training_goes_on(planned, field):
    def rank(me):
        layer = skewed(me)
        controller = PlacementController(layer, lambda counts_WE, current: planned, costs(), interval=1)
        layer(tokens(9, me.rank)).sum().backward()
        with pytest.raises(ConfigError) as caught:
            controller.step()
        assert caught.value.field == field and layer.dispatcher.placement == Placement.identity(E, 2)
        layer(tokens(9, me.rank)).sum().backward()

    virtual_world(2).run(rank)


@pytest.mark.parametrize("schedule", ["serial", "chunked(3)"])
def test_copies_of_one_step_by_the_decision_change_no_result(schedule):
    def rank(me):
        layer = skewed(me, schedule=schedule)
        layer.dispatcher.rule = rule = ReplicationRule(phases=costs(), spare=2)
        x = tokens(32, me.rank).abs().requires_grad_()
        twin_x = x.detach().clone().requires_grad_()
        y, right = layer(x), (twin := skewed(me))(twin_x)
        assert not rule.last.left
        close(y, right)
        y.square().sum().backward()
        right.square().sum().backward()
        close(x.grad, twin_x.grad)
        for a, b in zip(layer.experts.parameters(), twin.experts.parameters(), strict=True):
            close(a.grad, b.grad)
        placed = layer.last_events and layer.dispatcher.transport.stats.weight_bytes
        assert placed > 0
        text = layer.explain()
        mib = sum(weight[0].numel() for weight in layer.expert_weights) * layer.expert_weights[0].element_size() / 2**20
        assert f"0 kept, 2 for copies of one step, at most, {mib:.3g} MiB of weights each, {2 * mib:.3g} MiB" in text
        set_placement(twin, Placement.of_ranks([*map(list, seats_of(twin.dispatcher.placement).homes[:3]), [6, 7, 0]]))
        kept = 1 if me.rank == 3 else 0
        assert f"slots on this rank: {kept} kept, {mib:.3g} MiB" in twin.explain()
        assert "copy of an expert over inter" in text and "new copies, rows shared out anew" in text
        return rule.digest

    assert len(set(virtual_world(4).run(rank))) == 1


def test_a_rule_gives_each_seat_the_rows_that_it_decided_on():
    counts = np.zeros((4, 16, 8), dtype=np.int64)
    counts[:, :, 0], counts[:, :, 1:] = 12, 1
    base = Placement.identity(8, 4)
    rule = ReplicationRule(phases=costs(), spare=2, ranks_per_node=2)
    placed = rule(counts, base)
    found = placed.physical_counts(counts, range(4)).sum(axis=(0, 1))
    for expert, rank, rows in rule.last.seats:
        (slot,) = [slot for slot in placed.slots_of_expert[expert] if placed.rank_of_slot(slot) == rank]
        assert abs(int(found[slot]) - rows) <= 64  # one for each (source, block)
    again = rule(counts, base)
    assert again == placed and hash(again) == hash(placed)
    assert rule.digest != ReplicationRule(phases=costs(), spare=1, ranks_per_node=2).digest


def test_kept_copies_are_priced_as_they_travel_from_their_homes():
    counts_WE = np.zeros((8, 8), dtype=np.int64)
    counts_WE[:, 0] = 8
    one = PhaseCosts(row_s=1.0, exchange=(line(0.0),) * 2, copy=(line(3.0),) * 2, joined=True)
    base = Placement.identity(8, 8)
    plans = [copies_planner([replace(one, relays=relays)], spare=1)(counts_WE, base) for relays in (False, True)]
    assert plans[0] == plans[1] and plans[0].num_slots == 8 + 3


def test_copies_are_priced_as_the_schedule_sends_them():
    """Expert 0 on all ranks: from its home three times through one port, from rank to rank twice."""
    everywhere = Placement.of_ranks([[0, 1], [2, 3, 0], [4, 5, 0], [6, 7, 0]], homes=[0, 0, 1, 1, 2, 2, 3, 3])
    forward, backward = (replace(one, copy=(line(100.0),) * 2, joined=True) for one in costs())
    counts = np.full((4, E), 8)

    def rank(me):
        layer = skewed(me, schedule="chunked(2)", placement=everywhere)
        controller = PlacementController(
            layer, copies_planner(costs(), spare=1), (replace(forward, relays=True), backward)
        )
        found = []
        for relayed in (None, False, True):
            layer.schedule = replace(layer.schedule, relayed_copies=relayed)
            layer.zero_grad()
            layer.forget_copies()
            layer(tokens(8, me.rank)).sum().backward()
            fetched = {event.action for event in layer.last_events if event.action in ("Wf0", "Wf1")}
            found.append((controller._price(controller._watched[0], counts, everywhere), len(fetched)))
        assert [groups for _, groups in found] == [1, 1, 2]
        assert found[0][0] == found[1][0] == pytest.approx(found[2][0] + 100.0)

    virtual_world(4).run(rank)


def test_a_planner_whose_copies_are_relayed_makes_more_of_them():
    counts = np.zeros((8, 8), dtype=int)
    counts[:, 0] = 8
    forward = replace(costs()[0], copy=(line(3.0),) * 2, exchange=(line(0.0),) * 2, joined=True, relays=True)
    base = Placement.identity(8, 8)
    direct, relayed = (copies_planner([forward], spare=1, relayed=one)(counts, base) for one in (False, True))
    assert (direct.num_slots, relayed.num_slots) == (8 + 3, 8 + 5)


@pytest.mark.parametrize("steps", [10**4, 10**6, 10**9])
def test_copies_for_the_rows_of_many_steps_are_those_of_one(steps):
    base, counts_WE = Placement.identity(E, 4), np.tile([48, 6, 6, 6, 6, 6, 6, 6], (4, 1))
    planner = copies_planner([replace(costs(0.0)[0], chunks=1)], spare=1)
    one, many = planner(counts_WE, base), planner(counts_WE * steps, base)
    assert one.has_replicas and many.experts_of_ranks() == one.experts_of_ranks()
    rows, all_rows = (p.physical_counts((counts_WE * n)[:, None, :], range(4)).sum(axis=(0, 1)) for p, n in
                      ((one, 1), (many, steps)))  # fmt: skip
    assert all_rows.sum() == rows.sum() * steps and all_rows.min() >= 0
    assert abs(all_rows / steps - rows).max() < 2


def test_a_dropped_controller_leaves_no_watchers():
    def rank(me):
        layer = skewed(me)
        kept = PlacementController(layer, copies_planner(costs(), spare=1), costs())
        dropped = PlacementController(layer, copies_planner(costs(), spare=1), costs())
        gone, watched = weakref.ref(dropped), weakref.ref(dropped._watched[0])
        assert len(layer._left.watchers) == 2
        del dropped
        gc.collect()
        assert gone() is None and watched() is None and len(layer._left.watchers) == 1
        layer(tokens(8, me.rank))
        assert kept._watched[0].recent == 1

    virtual_world(2).run(rank)
