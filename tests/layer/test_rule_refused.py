"""What a user does wrong with rules and controllers of copies: said by name, on all ranks alike, with nothing sent."""

from __future__ import annotations

import pytest

from moe_overlap import (
    ConfigError,
    ParallelismSwitch,
    PlacementController,
    PlanMismatch,
    ReplicationRule,
    copies_planner,
    nominal_costs,
    set_placement,
)
from moe_overlap.placement import Placement
from moe_overlap.placement.planners import Flex
from tests.layers import D, E, F, make, results, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


def costs(flop_per_s=1e9):
    return nominal_costs(hidden=D, ffn=F, flop_per_s=flop_per_s, inter_bytes_per_s=1e9, intra_bytes_per_s=1e9)


def rule(**options):
    return ReplicationRule(phases=costs(), spare=2, **options)


def raised(error, change, *, world=2, match, **options):
    """`change(layer, rank)`, and then a call raises on every rank; with the change undone the layer goes on."""

    def rank(me):
        layer = make(me.transport(), **options)
        change(layer, me.rank)
        with pytest.raises(error, match=match):
            layer(tokens(5, me.rank))
        if error is ConfigError:
            layer.dispatcher.rule = None
            assert layer(tokens(5, me.rank)).shape == (5, D)

    virtual_world(world).run(rank)


def has(made, on=(0, 1, 2, 3)):
    def change(layer, rank):
        layer.dispatcher.rule = made if rank in on else None

    return change


@pytest.mark.parametrize("made", [ReplicationRule, costs(), lambda counts, base: base])
def test_what_is_no_rule(made):
    raised(ConfigError, has(made), match="rule = .*ReplicationRule\\(...\\)")


def test_a_rule_in_the_wrong_place():
    with pytest.raises(ConfigError, match="layer.dispatcher.rule"):
        make().rule = rule()


def test_what_is_no_rule_on_one_rank_is_heard_on_the_other():
    def rank(me):
        layer = make(me.transport())
        layer.dispatcher.rule = costs() if me.rank else rule()
        with pytest.raises(ConfigError, match="rule = "):
            layer(tokens(5))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("made", [rule(), ParallelismSwitch(phases=costs())])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "static", "static_capacity": "no_drop"}, "static"),
        ({"expert_offload": "host", "schedule": "chunked(2,experts)"}, "expert_offload"),
        ({"ranks_per_node": 2}, "rule.ranks_per_node = 1: expected 2"),
    ],
)
def test_a_rule_beside_what_it_cannot_act_on(made, options, match):
    raised(ConfigError, has(made), match=match, **options)


@pytest.mark.parametrize("made", [rule(ranks_per_node=2), ParallelismSwitch(phases=costs(), ranks_per_node=2)])
def test_a_rule_that_knows_nodes_which_the_layer_does_not(made):
    raised(ConfigError, has(made), match="rule.ranks_per_node = 2: expected 1, as the layer does not know its nodes")


def test_an_expert_twice_on_a_rank_beside_a_rule():
    twice = Placement.of_ranks([[0, 1, 2, 3, 2], [4, 5, 6, 7]], homes=[0] * 4 + [1] * 4)
    raised(ConfigError, has(rule()), match="placement = 'expert 2 twice on rank 0'", placement=twice)


def test_a_rule_on_one_rank_alone_and_prices_that_differ_are_named():
    raised(PlanMismatch, has(rule(), on=(0,)), match="dispatcher.rule and another has none")
    raised(PlanMismatch, lambda layer, rank: has(ReplicationRule(phases=costs(1e9 + rank), spare=2))(layer, rank),
           match="other prices")  # fmt: skip


def test_a_placement_of_one_rank_alone_is_named():
    copied = Placement.of_ranks([[0, 1, 2, 3], [4, 5, 6, 7, 0]], homes=[0] * 4 + [1] * 4)
    raised(PlanMismatch, lambda layer, rank: rank and set_placement(layer, copied), match="set_placement.*all ranks")

    def rank(me):
        layer = make(me.transport(), placement=copied if me.rank else Placement.identity(E, 2))
        with pytest.raises(PlanMismatch, match="placements"):
            layer(tokens(5))

    virtual_world(2).run(rank)


def test_a_switch_beside_a_placement_with_copies():
    copied = Placement.of_ranks([[0, 1, 2, 3], [4, 5, 6, 7, 0]], homes=[0] * 4 + [1] * 4)
    raised(ConfigError, has(ParallelismSwitch(phases=costs())), match="beside a ParallelismSwitch", placement=copied)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"phases": costs()[0]}, "phases = 'PhaseCosts'"),
        ({"phases": [1.0, 2.0]}, "phases = .*float"),
        ({"spare": 2.5}, "spare"),
        ({"spare": True}, "spare"),
        ({"most_copies": 1.0}, "most_copies"),
        ({"ranks_per_node": 1.0}, "ranks_per_node"),
    ],
)
def test_options_of_a_rule(options, named):
    with pytest.raises(ConfigError, match=named):
        ReplicationRule(**{"phases": costs(), "spare": 2, **options})


def test_options_of_a_controller():
    for options in ({"costs": costs()[0]}, {"costs": costs(), "spare": 1.5}):
        with pytest.raises(ConfigError, match="phases|spare"):
            copies_planner(**{"spare": 1, **options})

    def rank(me):
        layer, planner = make(me.transport(), ranks_per_node=2), copies_planner(costs(), spare=1)
        for given, prices, nodes, named in (
            (Flex(), costs(), 2, "planner = 'Flex': .*current=now"),
            (planner, costs()[0], 2, "phases"),
            (planner, costs(), 1, "ranks_per_node = 1: expected 2"),
        ):
            with pytest.raises(ConfigError, match=named):
                PlacementController(layer, given, prices, ranks_per_node=nodes)
        PlacementController(layer, planner, costs(), ranks_per_node=2)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("schedule", ["auto", "chunked(2)"])
def test_on_one_rank_rules_do_nothing(schedule):
    def rank(me):
        layer = make(me.transport(), schedule=schedule)
        layer.dispatcher.rule = ReplicationRule(spare=2)
        for _ in range(2):  # the first call of "auto" measures
            for one, other in zip(results(layer, tokens(12)), results(make(), tokens(12)), strict=True):
                close(one, other)
            layer.zero_grad(set_to_none=True)
        assert layer.dispatcher.rule.told() == ""

    virtual_world(1).run(rank)
