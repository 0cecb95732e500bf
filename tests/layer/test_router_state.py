"""A router's state on its way from layer to layer (RMoE), on every path of a call."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer
from moe_overlap.routing import RecurrentRouter
from tests import oracle
from tests.layer.contract import PATHS, Call
from tests.layers import D, E, F, K, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

R, LAYERS = 6, 3


def new_router(cell):
    one = RecurrentRouter(D, E, K, cell=cell, dtype=torch.float64, renormalize=True)
    nn.init.normal_(one.head.weight)
    return one


class Net:
    """LAYERS calls, each with the state of the one before; on `path`. A block adds its input itself."""

    def __init__(self, path, me, **options):
        torch.manual_seed(1)
        cell = nn.GRUCell(R, R, dtype=torch.float64)
        torch.manual_seed(2)
        routers = [new_router(cell) for _ in range(LAYERS)]
        self.calls = []
        for router in routers:
            self.calls.append(Call(path, me, make_router=lambda router=router: router, top_k=K, **options))
        for at, call in enumerate(self.calls):
            torch.manual_seed(10 + at)
            for weight in call.weights:
                nn.init.normal_(weight, std=0.3)

    def parameters(self):
        return list(nn.ModuleList(call.layer for call in self.calls).parameters())

    def __call__(self, x, wrap=lambda function, *args: function(*args)):
        state = None
        for call in self.calls:
            y, state = wrap(lambda x, state, call=call: call(x, state=state), x, state)
            x = x + call.routed(x, y)
        return x, state


def by_hand(routers, weights, x):
    state = None
    for router, (w_in, w_out) in zip(routers, weights, strict=True):
        decision = router(x, state=state)
        state = decision.state
        x = x + oracle.moe(x, decision.topk_ids_TK, decision.topk_weights_TK, w_in, w_out)
    return x, state


def on(path, check, **options):
    if path in ("inline", "scheduled", "functional"):
        return [check(Net(path, None, **options))]
    return virtual_world(2).run(lambda me: check(Net(path, me, **options)))


def x_of(rank):
    return tokens(9 + 4 * rank, seed=rank).requires_grad_()


def rank_of(net):
    return 0 if net.calls[0].transport is None else net.calls[0].transport.rank


@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients_on_every_path(path):
    def rank(net):
        x = x_of(rank_of(net))
        y, state = net(x)
        routers = [call.layer.router for call in net.calls]
        wanted = [x, *nn.ModuleList(routers).parameters()]
        grads = torch.autograd.grad(y.square().sum() + state.square().sum(), wanted)
        return y.detach(), state.detach(), grads, [[w.detach() for w in call.weights] for call in net.calls]

    results = on(path, rank)
    weights = [[torch.cat([r[3][layer][i] for r in results]) for i in range(2)] for layer in range(LAYERS)]
    routers = [call.layer.router for call in Net("inline", None).calls]
    for me, (y, state, grads, _) in enumerate(results):
        x = x_of(me)
        want_y, want_state = by_hand(routers, weights, x)
        close(y, want_y.detach())
        close(state, want_state.detach())
        loss = want_y.square().sum() + want_state.square().sum()
        for got, want in zip(grads, torch.autograd.grad(loss, [x, *nn.ModuleList(routers).parameters()]), strict=True):
            close(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_a_checkpoint_around_each_layer_gives_the_same_bits(path):
    if path.startswith("functional"):
        pytest.skip("the router is the caller's there")

    def rank(net):
        results = []
        for wrap in (None, lambda function, *args: checkpoint(function, *args, use_reentrant=False)):
            x = x_of(rank_of(net))
            y, state = net(x) if wrap is None else net(x, wrap)
            grads = torch.autograd.grad(y.square().sum() + state.sum(), [x, *net.parameters()])
            results.append([y.detach(), state.detach(), *grads])
        for plain, recomputed in zip(*results, strict=True):
            same_bits(plain, recomputed)

    on(path, rank)


@pytest.mark.parametrize("path", ["inline", "ranks", "block", "tickets"])
def test_a_loss_of_the_last_state_alone_reaches_the_first_layer(path):
    def rank(net):
        x = x_of(rank_of(net))
        _, state = net(x)
        first, last = net.calls[0].layer.router, net.calls[-1].layer.router
        wanted = [x, first.project.weight, last.project.weight]
        assert all(grad.any() for grad in torch.autograd.grad(state.square().sum(), wanted))

    on(path, rank)


def test_a_state_has_the_shape_of_x():
    net = Net("inline", None)
    layer, x = net.calls[0].layer, tokens(12)
    y, state = layer(x)
    y_BSD, state_BSR = layer(x.reshape(3, 4, D), state=None)
    assert y_BSD.shape == (3, 4, D) and state_BSR.shape == (3, 4, R)
    same_bits(state_BSR.reshape(12, R).detach(), state.detach())
    want, _ = layer(x, state=state)
    for given in (state_BSR, state):
        got, _ = layer(x.reshape(3, 4, D), state=given)
        same_bits(got.reshape(12, D).detach(), want.detach())
    y, state = layer(tokens(0))
    assert y.shape == (0, D) and state.shape == (0, R)


@pytest.mark.parametrize("path", ["inline", "scheduled", "ranks", "block", "tickets", "deduplicated"])
def test_a_state_that_does_not_fit_is_refused_on_all_ranks(path):
    def rank(net):
        call, me = net.calls[0], rank_of(net)
        alone = call.transport is None
        for bad in (torch.zeros(6, R + 1).double(), torch.zeros(5, R).double(), torch.zeros(6, R), "state"):
            state = bad if alone or me == 1 else None
            with pytest.raises(ConfigError) as caught:
                call(tokens(6), state=state)
            if alone or me == 1:
                assert caught.value.field == "state"
            assert alone or call.transport.stats.payload_bytes == 0
        y, _ = call(tokens(6))
        assert y.isfinite().all()

    on(path, rank)


def test_padding_has_no_state_of_others():
    net = Net("inline", None)
    mask = torch.arange(12) % 3 > 0
    x = tokens(12)
    junk = x.masked_fill(~mask[:, None], float("nan"))
    layer = net.calls[0].layer
    want_y, want_state = layer(x[mask])
    y, state = layer(junk, token_mask=mask)
    close(y[mask].detach(), want_y.detach())
    close(state[mask].detach(), want_state.detach())


def train(grouped, steps):
    """Losses of a small model whose two layers' routers share a cell, each layer recomputed: 16 tokens a step on all
    ranks of the group together, or on one."""
    torch.manual_seed(0)
    cell = nn.GRUCell(R, R, dtype=torch.float64)
    layers = nn.ModuleList()
    for at in range(2):
        torch.manual_seed(at + 3)
        router = new_router(cell)
        layer = MoELayer(D, F, E, K, group=dist.group.WORLD if grouped else None, router=router, dtype=torch.float64)
        ranks, rank = layer.transport.world_size, layer.transport.rank
        draw = torch.Generator().manual_seed(50 + at)
        for weight in layer.expert_weights:
            full = 0.3 * torch.randn(E, *weight.shape[1:], dtype=torch.float64, generator=draw)
            weight.data.copy_(full.chunk(ranks)[rank])
        layers.append(layer)
    routers = list(nn.ModuleList(layer.router for layer in layers).parameters())
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        x, state = tokens(16, seed=step).chunk(ranks)[rank], None
        for layer in layers:
            y, state = checkpoint(lambda x, s, layer=layer: layer(x, state=s), x, state, use_reentrant=False)
            x = x + y
        loss = x.square().sum() / (16 * D)
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        for one in [total, *(p.grad for p in routers)] if grouped else []:
            dist.all_reduce(one)
        losses.append(total.item())
        optimizer.step()
    return losses


def test_training_on_gloo_ranks_with_recompute_is_training_on_one():
    want = train(False, 4)
    for losses in gloo_pool(2).run(train, True, 4):
        close(torch.tensor(losses, dtype=torch.float64), torch.tensor(want, dtype=torch.float64))
    assert len(set(want)) == 4
