"""Copies that go from rank to rank in two groups of Wf: the bits of copies that come from their homes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ShortcutBlock
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.replicate import ReplicationRule
from moe_overlap.errors import MoeTransportError, PlanMismatch
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.schedule.builders import SchedulePair, parse_choice, window, with_copies
from moe_overlap.schedule.check import check, makespan_s
from moe_overlap.schedule.fetching import fetching
from tests.layers import D, E, F, exchange_fails, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

RANKS = 4
# Expert 0 is everywhere: its home sends it once, and the rank that got it passes it on; expert 3 is also on rank 0.
COPIED = Placement.of_ranks([[0, 1, 3], [2, 3, 0], [4, 5, 0], [6, 7, 0]], homes=[0, 0, 1, 1, 2, 2, 3, 3])
EXPERT_BYTES = 3 * F * D * 8


def placed(me, *, relayed, schedule: str | SchedulePair = "chunked(2)", **options):
    """This rank's layer with the same weights in either form."""
    pair = parse_choice(schedule) if isinstance(schedule, str) else schedule
    options = {"placement": COPIED, **options}
    layer = make(me.transport(), schedule=replace(pair, relayed_copies=relayed), **options)
    with torch.no_grad():
        homes = list(seats_of(options["placement"]).homes[me.rank])
        for weight, whole in zip(layer.expert_weights, make().expert_weights, strict=True):
            weight.copy_(whole[homes])
    return layer


def results(call, layer, rank):
    """Output and gradients of two calls, behind which the weights have changed once."""
    found = []
    for step in range(2):
        x = tokens(9 + rank, 10 * step + rank).requires_grad_()
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(weight.grad.clone() for weight in layer.experts.parameters())]
        with torch.no_grad():
            for weight in layer.expert_weights:
                weight.mul_(0.9)
    return found


@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("schedule", ["serial", "chunked(3)", "chunked(2,experts)"])
def test_both_forms_have_the_same_bits(schedule, dedup):
    def rank(me):
        layers = [placed(me, relayed=relayed, schedule=schedule, dedup=dedup) for relayed in (False, True)]
        for one, other in zip(*(results(layer, layer, me.rank) for layer in layers), strict=True):
            same_bits(one, other)
        texts = [layer.stats().schedule for layer in layers]
        assert "Wf1" not in texts[0] and texts[1].startswith("Wf0 P Wf1 ")
        sent = [layer.transport.stats.weight_bytes for layer in layers]
        assert sum(sent) > 0
        return sent

    direct, relayed = zip(*virtual_world(RANKS, seed=1).run(rank), strict=True)
    assert sum(direct) == sum(relayed)
    # Rank 0 sends expert 0 once less in each of two fetches, and the rank that passes it on once more.
    assert direct[0] - relayed[0] == 2 * EXPERT_BYTES == sum(relayed[1:]) - sum(direct[1:])


def test_kept_copies_are_fetched_once_and_only_what_changed_is_relayed():
    def rank(me):
        layer = placed(me, relayed=True)
        texts = []
        with torch.no_grad():
            for changed in (None, None, 1, 0):  # the rank whose weights are others than before
                if me.rank == changed:
                    layer.experts.down_proj.add_(1.0)
                y, twin = layer(tokens(9, me.rank)), copy.deepcopy(layer)
                twin.schedule = replace(layer.schedule, relayed_copies=False)
                same_bits(twin(tokens(9, me.rank)), y)
                texts.append(layer.stats().schedule.split(" D0")[0])
        # Of rank 1 one expert is on one other rank: there is nothing to pass on.
        assert texts == ["Wf0 P Wf1", "P", "Wf0 P", "Wf0 P Wf1"]

    virtual_world(RANKS).run(rank)


@pytest.mark.parametrize("dedup", ["off", "on"])
def test_a_recompute_fetches_in_the_form_of_its_forward(dedup):
    def rank(me):
        layer, twin = (placed(me, relayed=True, dedup=dedup, placement=Placement.identity(E, RANKS)) for _ in range(2))
        for one in (layer, twin):
            one.dispatcher.rule = Everywhere(relayed=True)
        right = results(twin, twin, me.rank)
        found = results(lambda x: checkpoint(layer, x, use_reentrant=False), layer, me.rank)
        assert layer.stats().schedule.startswith("Wf0 P Wf1 ")
        for one, other in zip(found, right, strict=True):
            same_bits(one, other)

    virtual_world(RANKS).run(rank)


class Everywhere:
    """The expert that is wanted most, on all ranks in this step."""

    digest = 9

    def __init__(self, *, relayed):
        self.relayed = relayed

    def __call__(self, counts, base):
        hot = int(counts.sum(axis=(0, 1)).argmax())
        ranks = [own if hot in own else [*own, hot] for own in base.experts_of_ranks()]
        return Placement.of_ranks(ranks, homes=base.home_ranks, selector=LocalFirst())


@pytest.mark.parametrize("of_schedule, of_rule, groups", [
    (None, True, 2), (None, False, 1), (True, False, 2), (False, True, 1),
])  # fmt: skip
def test_the_schedule_says_it_or_else_the_rule(of_schedule, of_rule, groups):
    def rank(me):
        layer = placed(me, relayed=of_schedule, placement=Placement.identity(E, RANKS))
        layer.dispatcher.rule = Everywhere(relayed=of_rule)
        layer(tokens(9, me.rank)).sum().backward()
        fetched = [event.action for event in layer.last_events if event.lane == "wire" and event.action[:2] == "Wf"]
        assert fetched == [f"Wf{group}" for group in range(groups)]

    virtual_world(RANKS).run(rank)


@pytest.mark.parametrize("relays", [False, True])
def test_the_decision_of_a_step_relays_what_it_copies(relays):
    line = AlphaBeta(alpha_s=0.0, beta_s=0.1)
    forward = PhaseCosts(row_s=1.0, exchange=(line, line), copy=(line, line), joined=True, relays=relays)

    def rank(me):
        options = {"placement": Placement.identity(E, RANKS), "top_k": 1}
        layer, twin = (placed(me, relayed=None, **options) for _ in range(2))
        x = tokens(32, me.rank).abs()  # positive: expert 0 is wanted by all
        with torch.no_grad():
            for one in (layer, twin):
                one.router.weight[0] += 3.0
            layer.dispatcher.rule = rule = ReplicationRule(phases=[forward, replace(forward, relays=False)], spare=1)
            close(layer(x), twin(x))
        assert rule.last.relayed == relays == layer.stats().schedule.startswith("Wf0 P Wf1 ")
        assert (" ms with copies that go from rank to rank, " in layer.explain()) == relays
        if relays:  # the schedule has the last word: what is told is a price, and not what travelled
            layer.schedule = replace(layer.schedule, relayed_copies=False)
            with torch.no_grad():
                layer(x)
            assert "Wf1" not in layer.stats().schedule and "in two groups" not in rule.told()

    virtual_world(RANKS).run(rank)


def test_in_a_window_each_group_is_under_ops_of_its_own():
    def rank(me):
        found = []
        for joined in (False, True):
            ops = [torch.nn.Linear(D, D, dtype=torch.float64) for _ in range(3)]
            for op in ops:
                torch.nn.init.eye_(op.weight)
                torch.nn.init.zeros_(op.bias)
            layer = placed(me, relayed=None, schedule="serial")
            pair = replace(window(3, 3, chunks=2), relayed_copies=True, joined=joined)
            block = ShortcutBlock(ops, layer, tap=0, schedule=pair)
            x = tokens(9, me.rank).requires_grad_()
            y = block(x)
            y.square().sum().backward()
            assert layer.stats().schedule == "Wf0 P D0 D1 B0 Wf1 B1 B2 E0 C0 E1 C1 U"
            found.append((y.detach(), x.grad, *(weight.grad for weight in layer.experts.parameters())))
        for hidden, waited in zip(*found, strict=True):
            same_bits(hidden, waited)

    virtual_world(RANKS).run(rank)


def test_the_second_group_stands_behind_the_first_and_is_simulated_so():
    pair = with_copies(window(2, 2), 2, returns=True)
    check(pair)
    assert pair.forward.text == "Wf0 P D0 B0 Wf1 B1 E0 C0 U"
    # P and B0 run beside Wf0; what follows waits for it, and the experts for Wf1.
    seconds = {"Wf0": 5.0, "Wf1": 3.0, "B0": 1.0, "B1": 2.0, "E0": 1.0}
    assert makespan_s(pair.forward, seconds) == 9.0
    assert makespan_s(pair.forward, {**seconds, "B0": 7.0, "B1": 4.0}) == 12.0
    one = fetching(window(2, 2).forward, 1)
    assert makespan_s(one, {**seconds, "B0": 4.0, "B1": 4.0}) == 9.0


@pytest.mark.parametrize("action", ["Wf0", "Wf1"])
@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_rank_that_fails_in_either_group_leaves_no_rank_with_half_an_expert(action, fails):
    """Rank 0 is the home, rank 1 passes on, rank 3 only receives."""

    def rank(me):
        layer = placed(me, relayed=True)
        before = [weight.detach().clone() for weight in layer.expert_weights]
        transport = layer.transport
        broken = exchange_fails(transport, action) if me.rank == fails else nullcontext()
        with broken, pytest.raises(OSError if me.rank == fails else MoeTransportError, match="no memory"):
            layer(tokens(9, me.rank)).sum().backward()
        for weight, old in zip(layer.expert_weights, before, strict=True):
            same_bits(weight.detach(), old)
        assert layer.dispatcher.copy_store.held is None and layer.dispatcher.copy_store.experts == ()
        transport.reopen()
        layer.zero_grad()
        twin = placed(me, relayed=False)
        y = layer(tokens(9, me.rank))
        assert layer.stats().schedule.startswith("Wf0 P Wf1 ")
        same_bits(y, twin(tokens(9, me.rank)))
        y.sum().backward()

    virtual_world(RANKS).run(rank)


def test_ranks_that_relay_and_ranks_that_do_not_are_told():
    def rank(me):
        layer = placed(me, relayed=me.rank == 0)
        with pytest.raises(PlanMismatch, match="schedule"):
            layer(tokens(9, me.rank))

    virtual_world(RANKS).run(rank)
