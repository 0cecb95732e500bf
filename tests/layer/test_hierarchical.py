"""Layers whose rows cross nodes once: what they are refused, what they send, and every way of calling them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, PlanMismatch, ShortcutBlock, aux_loss
from moe_overlap.layer.explain import measured_durations
from moe_overlap.measure.timeline import record
from moe_overlap.schedule.builders import chunked, deduplicate
from moe_overlap.schedule.words import from_text
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.auto.planted import one_round
from tests.layers import D, F, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

E, K = 12, 5
COUNTS = (11, 0, 24, 7, 3, 16)
BY_EXPERTS = chunked(2, "experts")
UNORDERED = from_text("P M D0 D1 O E0 E1 C1 C0 U", "Ut Ct0 Ct1 Od Ed0 Dt0 Ed1 Mt Dt1 Ew0 Pt", by="experts")


def layer_of(transport, *, top_k=K, dedup="on", hierarchical=True, node=2, dtype=torch.float64, **options):
    """With the same weights on every rank for the router, and each rank's own experts."""
    torch.manual_seed(5)
    layer = MoELayer(D, F, E, top_k, transport=transport, dedup=dedup, hierarchical=hierarchical, ranks_per_node=node,
                     dtype=dtype, **options)  # fmt: skip
    generator = torch.Generator().manual_seed(50 + transport.rank)
    with torch.no_grad():
        for weight in layer.expert_weights:
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 4)
    return layer


def results_of(layer, x, y):
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def both_ways(run, world=4):
    """What `run(me, hierarchical)` gives on all ranks, hierarchical and direct."""
    return [virtual_world(world, seed=3).run(lambda me, h=h: run(me, h)) for h in (True, False)]


def equal_bits(hierarchical, direct):
    for mine, theirs in zip(hierarchical, direct, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("schedule", ["chunked(3)", BY_EXPERTS])
def test_a_checkpoint_recomputes_it(schedule):
    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, schedule=schedule)
        x = tokens(COUNTS[me.rank], me.rank).requires_grad_()
        return results_of(layer, x, checkpoint(layer, x, use_reentrant=False))

    equal_bits(*both_ways(run))


@pytest.mark.parametrize("schedule", ["chunked(3)", BY_EXPERTS])
def test_ranks_that_do_not_know_all_counts_run_it_too(schedule):
    """The agreement of many ranks, in which each hears what concerns it."""

    def run(me, hierarchical):
        transport = me.transport()
        transport.gathered_ranks = 1 if hierarchical else 64
        layer = layer_of(transport, hierarchical=hierarchical, schedule=schedule)
        x = tokens(COUNTS[me.rank], me.rank).requires_grad_()
        return results_of(layer, x, layer(x))

    equal_bits(*both_ways(run, world=6))


def test_gradients_accumulate_over_calls():
    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, schedule="chunked(2)", dtype=torch.float32)
        x = tokens(COUNTS[me.rank], me.rank, dtype=torch.float32).requires_grad_()
        results_of(layer, x, layer(x))
        return results_of(layer, x, layer(x + 1))

    equal_bits(*both_ways(run, world=6))


def test_tickets_run_it():
    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, schedule="chunked(2)")
        x = tokens(COUNTS[me.rank], me.rank).requires_grad_()
        ticket = layer.begin(x)
        layer.run_experts(ticket)
        found = results_of(layer, x, layer.finish(ticket))
        return [*found, torch.tensor(layer.transport.stats.exchanges)]

    hierarchical, direct = both_ways(run)
    # M, D and C twice, backward the same: each once more inside the nodes.
    assert [[int(found.pop()) for found in both] for both in (hierarchical, direct)] == [[20] * 4, [10] * 4]
    equal_bits(hierarchical, direct)


def test_a_loss_that_some_ranks_do_not_have_runs_it_with_zeros():
    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, aux_loss_coef=0.1)
        x = tokens(COUNTS[me.rank], me.rank).requires_grad_()
        y = layer(x)
        loss = aux_loss(layer)
        loss = layer.attach(loss) if me.rank == 2 else loss + y.square().sum()
        loss.backward()
        return [x.grad, *(parameter.grad for parameter in layer.parameters())]

    equal_bits(*both_ways(run))


def test_payload_in_bfloat16_rounds_once_more_for_each_hop():
    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, dtype=torch.float32, payload_dtype=torch.bfloat16)
        x = tokens(COUNTS[me.rank], me.rank, dtype=torch.float32).requires_grad_()
        return results_of(layer, x, layer(x))

    for mine, theirs in zip(*both_ways(run), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            close(a, b.double(), torch.bfloat16)


def test_an_exchange_takes_as_long_as_both_of_its_parts():
    def run(me):
        layer = layer_of(me.transport())
        with record():
            layer(tokens(COUNTS[me.rank], me.rank))
        parts = [event for event in layer.last_events if (event.action, event.lane) == ("D0", "wire")]
        durations = measured_durations(layer.last_events, "forward")
        assert durations["D0"] == pytest.approx(sum(part.end_s - part.start_s for part in parts))
        assert "simulated from the last measured durations" in layer.explain()
        return len(parts)

    assert virtual_world(4).run(run) == [2] * 4


# ---------------------------------------------------------------- what is sent


def pairs_of(ids_TK, groups):
    """How many (token, group) pairs there are, of experts in equal groups, for each group."""
    group_TK = torch.where(ids_TK >= 0, ids_TK // (E // groups), -1)
    return np.array([int((group_TK == group).any(dim=1).sum()) for group in range(groups)])


@pytest.mark.parametrize("schedule", ["serial", "chunked(5)", BY_EXPERTS])
@pytest.mark.parametrize(("world", "node"), [(4, 2), (6, 2), (6, 3)])
def test_one_row_for_each_token_and_node_crosses_nodes_each_way(world, node, schedule):
    """Payload across nodes, rank by rank: its own pairs on the way out, those of its counterparts on the way back, in
    forward and in backward. Ids, weights and their gradients go beside the same rows."""

    def run(me, hierarchical):
        layer = layer_of(me.transport(), hierarchical=hierarchical, node=node, schedule=schedule)
        x = tokens(COUNTS[me.rank], me.rank).requires_grad_()
        layer(x).sum().backward()
        return layer.transport.stats, layer._last_step.topk_ids_TK

    nodes = world // node
    hierarchical, direct = both_ways(run, world)
    ids = [found[1] for found in hierarchical]
    per_node, per_rank = ([pairs_of(one, groups) for one in ids] for groups in (nodes, world))
    for rank in range(world):
        home = rank // node
        others = [other for other in range(nodes) if other != home]
        away = [r for r in range(world) if r // node != home]
        sent = sum(int(per_node[rank][other]) for other in others)
        back = sum(int(per_node[other * node + rank % node][home]) for other in others)
        stats = hierarchical[rank][0]
        assert stats.inter_node_bytes == 2 * (sent + back) * D * 8
        assert stats.inter_node_meta_bytes == sent * K * 12 + back * K * 8
        sent = sum(int(per_rank[rank][r]) for r in away)
        back = sum(int(per_rank[r][rank]) for r in away)
        assert direct[rank][0].inter_node_bytes == 2 * (sent + back) * D * 8
        assert direct[rank][0].inter_node_meta_bytes == sent * K * 12 + back * K * 8
    crossing = [sum(stats.inter_node_bytes for stats, _ in found) for found in (hierarchical, direct)]
    assert 0 < crossing[0] < crossing[1]


def over_a_link(schedule):
    """On a rank of gloo: results and counters of a layer that hears of nodes from its transport, both ways."""
    found = []
    for hierarchical in (True, False):
        core = ProcessGroupTransport(timeout_s=30.0)
        topology = NodeTopology(world_size=dist.get_world_size(), ranks_per_node=2)
        transport = EmulatedLinkTransport(core, LinkSpec.parse("1gbit:100us"), topology)
        layer = layer_of(transport, hierarchical=hierarchical, node=None, schedule=schedule)
        x = tokens(COUNTS[dist.get_rank()], dist.get_rank()).requires_grad_()
        results = results_of(layer, x, layer(x))
        found.append((results, transport.stats.inter_node_bytes, layer._last_step.topk_ids_TK))
    return found


def test_over_an_emulated_link_which_knows_the_nodes():
    for rank, ((mine, sent, ids), (theirs, sent_directly, _)) in enumerate(gloo_pool(4).run(over_a_link, "chunked(3)")):
        equal_bits([mine], [theirs])
        assert sent <= sent_directly
        if rank == 2:  # the one with most tokens: it sends them, and back those of rank 0
            assert 0 < 2 * int(pairs_of(ids, 2)[0]) * D * 8 < sent < sent_directly


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "field", "expected"),
    [
        ({"dedup": "off"}, "hierarchical = True", "dedup"),
        ({"node": None}, "ranks_per_node = None", "the ranks of a node"),
        ({"node": 3}, "ranks_per_node = 3", "a divisor of the 4 ranks"),
        ({"node": 0}, "ranks_per_node = 0", "at least 1"),
        ({"hierarchical": "yes"}, "hierarchical = 'yes'", "False or True"),
        ({"schedule": UNORDERED}, "schedule = 'P M", "in ascending order"),
    ],
)
def test_what_does_not_go_together_is_named(options, field, expected):
    def run(me):
        with pytest.raises(ConfigError, match=f"{field}.*{expected}"):
            layer_of(me.transport(), **options)

    virtual_world(4).run(run)


def test_sums_that_would_come_in_another_order_are_refused_where_the_schedule_is_set_later():
    def run(me):
        layer = layer_of(me.transport())
        layer.schedule = UNORDERED
        with pytest.raises(ConfigError, match="in ascending order: gateways"):
            layer(tokens(5, me.rank))
        layer.schedule = deduplicate(BY_EXPERTS)
        return layer(tokens(5, me.rank)).shape

    assert virtual_world(4).run(run) == [(5, D)] * 4


@pytest.mark.parametrize("known", [True, False])
def test_auto_prices_it_and_gives_the_bits_of_direct_exchanges(known):
    """known: the transport says which ranks share a node, so that both wires have their own prices."""

    def run(me):
        transport = knowing(me.transport(), 2) if known else me.transport()
        layer = layer_of(transport, schedule="auto")
        x = tokens(20 + me.rank, me.rank).requires_grad_()
        mine = results_of(layer, x, layer(x))
        planned = layer.schedule.get(layer.dispatcher.openings, x.dtype).planned(layer.last_exchange)
        assert "simulated" in layer.explain()
        x, direct = x.detach().requires_grad_(), layer_of(me.transport(), hierarchical=False, schedule=planned.pair)
        for a, b in zip(mine, results_of(direct, x, direct(x)), strict=True):
            same_bits(a, b)
        model = layer.schedule.get(layer.dispatcher.openings, x.dtype).model
        return planned.pair.forward.text, model.distinct.inside

    with one_round():
        found = virtual_world(4).run(run)
    assert len({text for text, _ in found}) == 1 and "M" in found[0][0].split()
    assert found[0][1].alpha_s + found[0][1].beta_s > 0


def test_auto_takes_it_in_a_shortcut_block():
    def run(me):
        block = ShortcutBlock([torch.nn.Linear(D, D, dtype=torch.float64)], layer_of(me.transport()), tap=0,
                              schedule="auto")  # fmt: skip
        block(tokens(9, me.rank)).sum().backward()
        return block.stats().schedule.split()[0]

    with one_round():
        assert virtual_world(4).run(run) == ["P"] * 4


def knowing(transport, ranks_per_node):
    transport.topology = NodeTopology(world_size=transport.world_size, ranks_per_node=ranks_per_node)
    return transport


def test_nodes_that_the_transport_knows_need_no_argument_and_allow_no_other():
    def run(me):
        assert layer_of(knowing(me.transport(), 2), node=None).dispatcher.ranks_per_node == 2
        with pytest.raises(ConfigError, match="ranks_per_node = 1.*None or 2"):
            layer_of(knowing(me.transport(), 2), node=1)

    virtual_world(4).run(run)


@pytest.mark.parametrize("node", [1, 4])
def test_without_ranks_to_share_a_node_or_without_other_nodes_rows_go_directly(node):
    def run(me):
        layer = layer_of(me.transport(), node=node)
        layer(tokens(5, me.rank))
        return layer.last_exchange.node_rows, layer.transport.stats.exchanges

    assert virtual_world(4).run(run) == [(None, 3)] * 4


def test_one_rank_has_nobody_to_pass_rows_to():
    x = tokens(9)
    layer = layer_of(LocalTransport(), node=1)
    same_bits(layer(x), layer_of(LocalTransport(), node=None, hierarchical=False, dedup="off")(x))


def test_ranks_that_differ_in_it_are_told():
    def run(me, different):
        options = different if me.rank == 1 else {}
        with pytest.raises(PlanMismatch, match="ranks disagree about ranks_per_node|another configuration"):
            layer_of(me.transport(), **options)(tokens(4))

    virtual_world(4).run(lambda me: run(me, {"hierarchical": False}))
    virtual_world(4).run(lambda me: run(me, {"hierarchical": False, "node": 1}))
