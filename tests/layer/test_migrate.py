"""Experts that move while a model trains: the training stays what it was, and a failure leaves everybody whole."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import experts_in_order, migrate, set_placement
from moe_overlap.agreement.seats import seats_of
from moe_overlap.errors import ConfigError, MoeTransportError, PlanMismatch
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.layers import D, E, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def model_of(transports, placement):
    """Two layers, the second of which reads what the first adds; equal experts whatever the placement."""
    layers = [make(transport, placement=placement) for transport in transports]
    whole = [make() for _ in transports]
    homes = list(seats_of(placement).homes[transports[0].rank])
    for layer, reference in zip(layers, whole, strict=True):
        with torch.no_grad():
            for weight, value in zip(layer.expert_weights, reference.expert_weights, strict=True):
                weight.copy_(value[homes])
    return nn.ModuleList(layers)


def somewhere(world, seed):
    """A placement drawn by a seed: any homes, any copies, ranks without experts too."""
    draw = random.Random(seed)
    homes = [draw.randrange(world) for _ in range(E)]
    ranks = [[expert for expert in range(E) if homes[expert] == rank] for rank in range(world)]
    for _ in range(draw.randrange(4)):
        rank, expert = draw.randrange(world), draw.randrange(E)
        if expert not in ranks[rank]:
            ranks[rank].append(expert)
    selector = LocalFirst() if draw.random() < 0.5 else None
    return Placement.of_ranks(ranks, homes=homes, selector=selector)


def train(transports, optimizer, *, steps, moves):
    """The losses of some steps, between which one of the layers moves."""
    world, rank = transports[0].world_size, transports[0].rank
    model = model_of(transports, Placement.identity(E, world))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for step in range(steps):
        x = tokens(13, seed=rank)
        y = x
        for layer in model:
            y = y + layer(y)
        loss = (y - x.roll(1, dims=1)).square().mean()
        loss.backward()
        for layer in model:
            weight = layer.router.weight
            weight.grad = layer.transport.all_reduce(weight.grad).wait()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if moves:
            migrate(model[step % 2], somewhere(world, step), optimizer)
    return torch.tensor(losses)


@pytest.mark.parametrize(("world", "optimizer"), [(2, "adam"), (3, "sgd")])
def test_twenty_steps_with_one_layer_moved_in_each_are_those_of_a_static_run(world, optimizer):
    def rank(me):
        moved = train([me.transport(), me.transport()], optimizer, steps=20, moves=True)
        static = train([me.transport(), me.transport()], optimizer, steps=20, moves=False)
        assert static[-1] < static[0]
        close(moved, static)

    virtual_world(world, seed=world).run(rank)


def gloo_training():
    def transports():
        return [ProcessGroupTransport(dist.group.WORLD, timeout_s=20.0) for _ in range(2)]

    moved = train(transports(), "adam", steps=6, moves=True)
    static = train(transports(), "adam", steps=6, moves=False)
    close(moved, static)


def test_the_same_over_gloo():
    gloo_pool(2).run(gloo_training)


def test_parameters_states_and_names_follow_and_come_back():
    uneven = Placement.of_ranks([[7], [3, 1, 0, 2, 4, 5, 6]])

    def rank(me):
        layer = make(me.transport(), placement=Placement.identity(E, 2))
        optimizer = torch.optim.Adam(layer.experts.parameters())
        layer(tokens(9, me.rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        parameter = layer.experts.down_proj
        before, moment = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
        sent = migrate(layer, uneven, optimizer)
        parameter = layer.experts.down_proj
        assert parameter.shape[0] == (1, 7)[me.rank] and parameter.requires_grad
        assert any(one is parameter for one in optimizer.param_groups[0]["params"])
        assert layer.experts.expert_ids == layer.ownership.expert_ids == uneven_ids(uneven, me.rank)
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert "7 of 8" in repr(layer.experts) if me.rank else "1 of 8" in repr(layer.experts)
        assert sent > 0
        layer(tokens(9, me.rank)).sum().backward()
        optimizer.zero_grad()
        migrate(layer, Placement.identity(E, 2), [optimizer])
        parameter = layer.experts.down_proj
        same_bits(parameter.detach(), before)
        same_bits(optimizer.state[parameter]["exp_avg"], moment)
        assert layer.dispatcher.placement.epoch == 2

    virtual_world(2).run(rank)


UNEVEN = Placement.of_ranks([[0, 1], [2, 3, 4, 5, 6, 7]])


def around(layer):
    with experts_in_order(layer):
        pass


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("start, move", [(Placement.identity(E, 2), lambda layer: migrate(layer, UNEVEN)),
                                         (UNEVEN, around)])  # fmt: skip
def test_an_optimizer_that_was_not_given_does_not_step_what_was_replaced(kind, start, move):
    """It has no state of the experts yet, so nothing tells of it before it steps."""

    def rank(me):
        layer = make(me.transport(), placement=start)
        optimizer = kind(layer.parameters(), lr=0.1)
        move(layer)
        layer(tokens(9, me.rank)).sum().backward()
        with pytest.raises(ConfigError, match="experts that have moved"):
            optimizer.step()

    virtual_world(2).run(rank)


def test_layers_that_share_experts_move_together():
    def rank(me):
        first = make(me.transport(), placement=Placement.identity(E, 2))
        second = make(me.transport(), placement=Placement.identity(E, 2), experts=first.experts)
        x = tokens(9, me.rank)
        with torch.no_grad():
            before = second(x)
        migrate(first, UNEVEN)
        with pytest.raises(ConfigError, match="another layer with them was migrated"):
            second(x)
        migrate(first, Placement.identity(E, 2))
        with torch.no_grad():
            close(second(x), before)
        both = nn.ModuleList([first, second])
        with pytest.raises(ConfigError, match="the same homes"):
            migrate(both, [UNEVEN, Placement.identity(E, 2)])
        migrate(both, UNEVEN)
        set_placement(both, [UNEVEN, Placement.of_ranks([[0, 1, 7], [2, 3, 4, 5, 6, 7]], homes=UNEVEN.home_ranks)])
        around(both)  # other copies, the same homes
        with torch.no_grad():
            close(second(x), before)

    virtual_world(2).run(rank)


def test_what_only_looks_like_a_stack_of_experts_is_not_cut_up():
    def rank(me):
        layer = make(me.transport(), placement=Placement.identity(E, 2))
        optimizer = torch.optim.Adam(layer.experts.parameters())
        layer(tokens(9, me.rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[layer.experts.down_proj]
        state["table"] = torch.arange(256.0)
        with pytest.raises(ConfigError, match="table of .*not cut up"):
            migrate(layer, UNEVEN, optimizer)
        del state["table"]
        layer.experts.register_buffer("codes", torch.arange(8))
        with pytest.raises(ConfigError, match="codes .*not cut up"):
            migrate(layer, UNEVEN, optimizer)
        assert torch.equal(layer.experts.codes, torch.arange(8))
        layer.experts.codes = torch.tensor(layer.ownership.expert_ids)
        migrate(layer, UNEVEN, optimizer)
        assert tuple(layer.experts.codes.tolist()) == layer.ownership.expert_ids

    virtual_world(2).run(rank)


def uneven_ids(placement, rank):
    return tuple(placement.experts_of_ranks()[rank])


def test_set_placement_sends_nothing_until_the_next_call_and_keeps_valid_copies():
    more = Placement.of_ranks([[0, 1, 2, 3, 7], [4, 5, 6, 7, 0]], homes=[0] * 4 + [1] * 4)
    most = Placement.of_ranks([[0, 1, 2, 3, 7, 6], [4, 5, 6, 7, 0]], homes=[0] * 4 + [1] * 4)

    def rank(me):
        layer = make(me.transport(), placement=Placement.identity(E, 2))
        x = tokens(9, me.rank)
        with torch.no_grad():
            wanted, sizes = layer(x), []
            for placement in (more, most, more):
                set_placement(layer, placement)
                before = layer.transport.stats.weight_bytes
                close(layer(x), wanted)
                sizes.append(layer.transport.stats.weight_bytes - before)
        expert = 3 * layer.dispatcher.ffn_hidden * D * 8
        assert sizes == [expert, expert if me.rank else 0, 0]

    virtual_world(2).run(rank)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    identity, other = Placement.identity(E, 2), Placement.of_ranks([[0, 1, 2, 7], [4, 5, 6, 3]])

    def rank(me):
        layer = make(me.transport(), placement=identity)
        optimizer = torch.optim.Adam(layer.experts.parameters())
        x = tokens(9, me.rank)
        with pytest.raises(ConfigError, match="migrate"):
            set_placement(layer, other)
        for wrong in (Placement.identity(E, 3), Placement.identity(4, 2), [identity] * 2, "identity"):
            with pytest.raises(ConfigError, match="placement = "):
                set_placement(layer, wrong)
        y = layer(x)
        with pytest.raises(ConfigError, match="waits for its backward"):
            set_placement(layer, identity)
        with pytest.raises(ConfigError, match="waits for its backward"):
            migrate(layer, other, optimizer)
        y.sum().backward()
        with pytest.raises(ConfigError, match="a gradient of .*zero_grad"):
            migrate(layer, other, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(ConfigError, match="Adam, which keeps states"):
            migrate(layer, other)
        with pytest.raises(ConfigError, match="MoELayer"):
            migrate(nn.Linear(2, 2), other)
        if me.rank == 0:  # one rank alone: the other one hears of it
            layer.experts.down_proj.grad = torch.zeros_like(layer.experts.down_proj)
        with pytest.raises(ConfigError, match="zero_grad" if me.rank == 0 else "what rank 0 has"):
            migrate(layer, other, optimizer)
        layer.zero_grad()
        assert layer.dispatcher.placement == identity and layer.experts.expert_ids == seats_of(identity).homes[me.rank]
        layer(x)

    virtual_world(2).run(rank)


def test_ranks_that_mean_different_placements_all_raise():
    def rank(me):
        layer = make(me.transport(), placement=Placement.identity(E, 2))
        mine = Placement.of_ranks([[0, 1, 2, 7], [4, 5, 6, 3]] if me.rank else [[0, 1, 6, 7], [4, 5, 2, 3]])
        with pytest.raises(PlanMismatch, match="different placements"):
            migrate(layer, mine)
        with torch.no_grad():
            layer(tokens(4))
        copies = Placement.of_ranks([[0, 1, 2, 3], [4, 5, 6, 7, me.rank]], homes=[0] * 4 + [1] * 4)
        set_placement(layer, copies)
        with pytest.raises(PlanMismatch, match="config_digest"):
            layer(tokens(4))

    virtual_world(2).run(rank)


@pytest.mark.parametrize("start", range(1, 5))
def test_a_rank_that_fails_on_the_way_leaves_all_experts_where_they_were(start):
    """It fails at its first, second ... exchange: two weights, each with two moments."""
    other = Placement.of_ranks([[0, 1, 2, 7], [4, 5, 6, 3]])

    def rank(me):
        layer = make(me.transport(), placement=Placement.identity(E, 2))
        optimizer = torch.optim.Adam(layer.experts.parameters())
        layer(tokens(9, me.rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = [weight.detach().clone() for weight in layer.expert_weights]
        moments = [optimizer.state[weight]["exp_avg"].clone() for weight in layer.expert_weights]
        if me.rank == 1:
            transport, begun, plain = layer.transport, [], layer.transport.start

            def failing(*args, **kwargs):
                begun.append(1)
                if len(begun) == start:
                    raise OSError("no memory")
                return plain(*args, **kwargs)

            transport.start = failing
        with pytest.raises(OSError if me.rank else MoeTransportError, match="no memory"):
            migrate(layer, other, optimizer)
        if me.rank == 1:
            del layer.transport.start
        for weight, moment, w, m in zip(layer.expert_weights, (optimizer.state[w]["exp_avg"] for w in
                                        layer.expert_weights), weights, moments, strict=True):  # fmt: skip
            same_bits(weight.detach(), w)
            same_bits(moment, m)
        assert layer.dispatcher.placement == Placement.identity(E, 2)
        layer.transport.reopen()
        migrate(layer, other, optimizer)
        layer(tokens(9, me.rank)).sum().backward()

    virtual_world(2).run(rank)
