"""Tutel's switch: in every step, how many groups of ranks have all experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_overlap.auto.parallelism import MOST_RELAYED, ParallelismSwitch
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_costs import PhaseCosts
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.cost_model import AlphaBeta
from moe_overlap.planning.replication import price, priced
from tests.layers import E, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close


def line(beta_s):
    return AlphaBeta(alpha_s=0.0, beta_s=beta_s)


def costs(copy_s=0.5, *, row_s=1.0, rows=(0.1, 0.1), inside=None):
    copies = line(copy_s), line(copy_s if inside is None else inside)
    one = PhaseCosts(row_s=row_s, exchange=(line(rows[0]), line(rows[1])), copy=copies, chunks=2, expert_s=0.01)
    return one, one


def random_counts(seed, ranks, experts, blocks=16):
    return np.random.default_rng(seed).integers(0, 6, (ranks, blocks, experts)) * (
        np.random.default_rng(seed + 1).random((ranks, 1, experts)) < 0.7
    )


def placed_layer(me, placement, **options):
    """This rank's layer of identical whole layers, and a twin that has no rule."""
    pair = []
    for _ in range(2):
        layer, whole = make(me.transport(), placement=placement, **options), make()
        homes = [expert for expert, rank in enumerate(placement.home_ranks) if rank == me.rank]
        with torch.no_grad():
            for weight, all_of_it in zip(layer.expert_weights, whole.expert_weights, strict=True):
                weight.copy_(all_of_it[homes])
        pair.append(layer)
    return pair


PLACEMENTS = {
    "identity": Placement.identity(E, 4),
    "uneven": Placement.of_ranks([[5, 1, 0], [2], [3, 6, 7], [4]]),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("schedule", ["serial", "chunked(3)"])
@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_no_degree_changes_a_result(placement, schedule, dedup, degree):
    def rank(me):
        layer, twin = placed_layer(me, PLACEMENTS[placement], schedule=schedule, dedup=dedup)
        layer.dispatcher.rule = rule = ParallelismSwitch(phases=costs(), degrees=[degree])
        x = tokens(24 + me.rank, me.rank).requires_grad_()
        twin_x = x.detach().clone().requires_grad_()
        y, right = layer(x), twin(twin_x)
        assert rule.last.degree == degree and f"degree {degree} of data parallelism" in layer.explain()
        close(y, right)
        y.square().sum().backward()
        right.square().sum().backward()
        close(x.grad, twin_x.grad)
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            close(a.grad, b.grad)
        stats = layer.dispatcher.transport.stats
        assert (stats.weight_bytes > 0) == (degree > 1) or not rule.last.copies
        return stats.payload_bytes

    left_rank = sum(virtual_world(4).run(rank))
    assert (left_rank == 0) == (degree == 4)


@pytest.mark.parametrize("ranks, degree, node", [(4, 4, 1), (4, 4, 2), (4, 2, 2), (8, 4, 2), (8, 2, 4), (6, 3, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_prices_are_those_of_the_same_copies_decided_one_by_one(ranks, degree, node, seed):
    """`priced` shares the rows of an expert out by rank, then by node: where a group is a rank or a node, as here."""
    experts = 12
    base = Placement.identity(experts, ranks)
    counts = random_counts(seed, ranks, experts)
    phases = costs(0.7, rows=(0.3, 0.05), inside=0.2)
    rule = ParallelismSwitch(phases=phases, degrees=[degree], ranks_per_node=node)
    placed = rule(counts, base)
    counts_WE, group = counts.sum(axis=1), ranks // degree
    homes = [(e, r, int(counts_WE[r // group * group : (r // group + 1) * group, e].sum()))
             for e, r in enumerate(base.home_ranks)]  # fmt: skip
    copies = [(e, int(host), int(counts_WE[q * group : (q + 1) * group, e].sum()))
              for q, hosts in enumerate(rule.last.hosts) for e, host in enumerate(hosts)
              if host >= 0 and host != base.home_ranks[e]]  # fmt: skip
    at_home = Load.at_home(counts_WE, base.home_ranks, [experts] * ranks, ranks_per_node=node)
    right = priced(at_home, [*homes, *copies], phases)
    assert rule.last.seconds == pytest.approx(right, rel=1e-12)
    assert rule.last.copies == len(copies) == placed.num_slots - placed.num_experts
    found = placed.physical_counts(counts, range(ranks)).sum(axis=1)
    for slot, (expert, rank) in enumerate(zip(placed.slot_to_expert, placed.rank_of_slots, strict=True)):
        inside = slice(rank // group * group, (rank // group + 1) * group)
        assert (found[inside, slot] == counts_WE[inside, expert]).all()
        assert found[:, slot].sum() == found[inside, slot].sum()


def test_a_degree_relays_where_that_is_faster():
    """Two nodes of two ranks: at degree 4 an expert crosses to the other node once, and is passed on inside."""
    base, ones = Placement.identity(E, 4), costs(2.0, row_s=0.0, inside=0.01)
    forward, backward = (replace(one, expert_s=0.0, joined=True) for one in ones)
    phases = (replace(forward, relays=True), backward)

    def rank(me):
        layer, twin = placed_layer(me, base, schedule="chunked(2)", ranks_per_node=2)
        options = {"degrees": [4], "ranks_per_node": 2}
        layer.dispatcher.rule = rule = ParallelismSwitch(phases=phases, **options)
        x = tokens(64, me.rank)
        close(layer(x), twin(x))
        assert rule.relayed and layer.stats().schedule.startswith("Wf0 P Wf1 ")
        assert "24 copies that go from rank to rank" in layer.explain()
        counts = np.ones((4, 16, E), dtype=np.int64)
        rule(counts, base)
        seats = [(e, r, 16) for e, r in enumerate(base.home_ranks)]
        seats += [(e, r, 16) for e, home in enumerate(base.home_ranks) for r in range(4) if r != home]
        load = Load.at_home(counts.sum(axis=1), base.home_ranks, [E] * 4, ranks_per_node=2)
        right = price(load, seats, phases)
        assert right == (pytest.approx(rule.last.seconds), True)
        direct = ParallelismSwitch(phases=(forward, backward), **options)
        direct(counts, base)
        assert not direct.relayed and direct.last.seconds > rule.last.seconds

    virtual_world(4).run(rank)


def test_many_copies_come_from_their_homes():
    ranks, experts = 16, 16
    forward = replace(costs(2.0, inside=0.01)[0], joined=True, relays=True)
    rule = ParallelismSwitch(phases=[forward], degrees=[ranks], ranks_per_node=4)
    rule(np.ones((ranks, 16, experts), dtype=np.int64), Placement.identity(experts, ranks))
    assert rule.last.copies > MOST_RELAYED and not rule.relayed


def test_the_degree_follows_the_prices():
    base, counts = Placement.identity(8, 8), random_counts(0, 8, 8)
    light, heavy = ParallelismSwitch(phases=costs(1e-3)), ParallelismSwitch(phases=costs(1e6))
    light(counts, base)
    assert heavy(counts, base) is base
    assert (light.last.degree, heavy.last.degree) == (8, 1)
    assert list(light.seconds) == [1, 2, 4, 8] and light.last.seconds == min(light.seconds.values())
    # A slow wire for rows between nodes and none for weights: whole inside of each node.
    nodes = ParallelismSwitch(phases=costs(0.0, row_s=1e-3, rows=(5.0, 1e-6), inside=20.0), ranks_per_node=4)
    nodes(counts, base)
    assert nodes.last.degree == 2
    everything = costs(1e-3)
    close_call = ParallelismSwitch(phases=everything, margin=0.99)
    assert close_call(counts, base) is base


def test_a_step_without_rows_has_no_copies():
    base = Placement.identity(4, 4)
    rule = ParallelismSwitch(phases=costs(), degrees=[4])
    assert rule(np.zeros((4, 16, 4), dtype=np.int64), base).num_slots == 4 and rule.last.copies == 0


def test_the_digest_is_of_what_decides():
    one = ParallelismSwitch(phases=costs(), degrees=[1, 2])
    assert one.digest == ParallelismSwitch(phases=costs(), degrees=[2, 1]).digest
    others = [{"degrees": None}, {"degrees": [2]}, {"ranks_per_node": 2}, {"margin": 0.5}, {"phases": costs(0.6)}]
    for other in others:
        assert one.digest != ParallelismSwitch(**{"phases": costs(), "degrees": [1, 2], **other}).digest


@pytest.mark.parametrize("options", [
    {"degrees": []}, {"degrees": [0]}, {"degrees": [True]}, {"degrees": [1.5]}, {"ranks_per_node": 0}, {"margin": 1.0},
    {"degrees": 2}, {"degrees": "2"}, {"degrees": np.array([1, 2])}, {"margin": "x"}, {"margin": None},
    {"phases": ()},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match=list(options)[0]):
        ParallelismSwitch(**{"phases": costs(), **options})


def test_what_fits_no_layer_is_refused_on_all_ranks_before_a_row_moves():
    def rank(me):
        for options, placement, field in (
            ({"degrees": [3]}, Placement.identity(E, 2), "degrees"),
            ({"ranks_per_node": 3}, Placement.identity(E, 2), "ranks_per_node"),
            ({}, Placement.of_ranks([[0, 1, 2, 3], [4, 5, 6, 7, 0]]), "placement"),
        ):
            layer, _ = placed_layer(me, placement)
            layer.dispatcher.rule = ParallelismSwitch(phases=costs(), **options)
            with pytest.raises(ConfigError, match=field):
                layer(tokens(8, me.rank))
            assert layer.dispatcher.transport.stats.payload_bytes == 0

    virtual_world(2).run(rank)
