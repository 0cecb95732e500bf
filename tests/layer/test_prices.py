"""Prices of copies from what schedule="auto" has measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, ReplicationRule, ShortcutBlock, measured_costs
from moe_overlap.schedule.weights import row_width
from tests.layers import D, make, tokens
from tests.ranks import virtual_world


def test_a_measured_layer_prices_its_rows_and_its_experts_alike_on_all_ranks():
    def rank(me):
        layer = make(me.transport(), schedule="auto", ranks_per_node=2)
        with pytest.raises(ConfigError, match="no forward call with gradients"):
            measured_costs(layer)
        layer(tokens(40, me.rank)).sum().backward()
        costs = measured_costs(layer)
        (model,) = [found.model for found in layer.schedule.found.values()]
        (line,) = model.exchange.values()  # the nodes are the layer's word: one wire was measured, and prices both
        for phase, size in zip(costs, (8, 4), strict=True):  # weights as they are, gradients in float32
            width = row_width(*layer.expert_weights)
            assert [one.beta_s for one in phase.exchange] == pytest.approx([line.beta_s * D * 8] * 2)
            assert [one.beta_s for one in phase.copy] == pytest.approx([line.beta_s * width * size] * 2)
            assert (phase.chunks, phase.joined) == (layer._last_step.pair.chunks, layer._last_step.pair.joined)
        assert costs[0].row_s == model.experts.beta_s
        layer.dispatcher.rule = ReplicationRule(phases=costs, spare=1, ranks_per_node=2)
        layer(tokens(40, me.rank)).sum().backward()
        assert "predicted" in layer.dispatcher.rule.told()
        with pytest.raises(ConfigError, match="without gradients"):
            measured_costs(layer, training=False)
        with torch.no_grad():
            layer(tokens(40, me.rank))
        assert len(measured_costs(layer, training=False)) == 1
        return [phase.numbers for phase in costs]

    first, second = virtual_world(2).run(rank)
    assert first == second


def test_a_block_has_its_ops_beside_the_exchanges():
    def rank(me):
        torch.manual_seed(0)
        block = ShortcutBlock([nn.Linear(D, D, dtype=torch.float64) for _ in range(3)], make(me.transport()), tap=1,
                              schedule="auto")  # fmt: skip
        block(tokens(40, me.rank)).sum().backward()
        model = next(iter(block.schedule.found.values())).model
        assert measured_costs(block)[0].beside_s == sum(model.backbone_s) > 0

    virtual_world(2).run(rank)


def test_what_measures_nothing_has_no_prices():
    with pytest.raises(ConfigError, match="on several ranks"):
        measured_costs(make(schedule="auto"))
    with pytest.raises(ConfigError, match="schedule = 'chunked'"):
        measured_costs(make(schedule="chunked(2)"))
    with pytest.raises(ConfigError, match="a MoELayer"):
        measured_costs(nn.Linear(2, 2))
