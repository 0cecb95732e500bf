"""LossFreeBalancer in layers: what it counts, once; over which ranks; and that all ranks move alike."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from moe_overlap import ConfigError, LossFreeBalancer, MoELayer, ShortcutBlock, sac_policy
from moe_overlap.routing import LinearRouter, update_bias_
from tests.layers import D, E, F, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

SIZES = (7, 0, 12, 5)
U = 0.01


def router(**options):
    torch.manual_seed(3)
    return LinearRouter(D, E, 2, score="sigmoid", bias=True, dtype=torch.float64, **options)


def chosen(*batches):
    """int64 [E]: what the router chooses for all tokens of `batches`."""
    return router()(torch.cat(batches)).tokens_per_expert_E


def moved(counts_E, recentre=False):
    bias_E = torch.zeros(E)
    update_bias_(bias_E, counts_E, U, recentre=recentre)
    return bias_E


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_move_by_the_choices_of_all(ranks, options):
    def rank(me):
        layer = make(me.transport(), router=router(**options))
        balancer = LossFreeBalancer(layer, U)
        for batch in range(2):  # accumulated
            layer(tokens(SIZES[me.rank], seed=10 * batch + me.rank))
        balancer.step()
        after = layer.router.expert_bias_E.clone()
        balancer.step()  # nothing was counted since
        same_bits(layer.router.expert_bias_E, after)
        return after

    batches = [tokens(SIZES[rank], seed=10 * batch + rank) for batch in range(2) for rank in range(ranks)]
    for bias_E in virtual_world(ranks).run(rank):
        same_bits(bias_E, moved(chosen(*batches)))
        assert bias_E.abs().max() > 0


def test_layers_and_routers_of_one_model_in_one_step():
    class Model(nn.Module):
        def __init__(self, transport):
            super().__init__()
            self.first, self.plain = make(transport, router=router()), make(transport)
            self.tied = make(transport, router=self.first.router)
            self.alone = router()

    def rank(me):
        model = Model(me.transport())
        balancer = LossFreeBalancer(model, U)
        assert balancer.routers == [model.first.router, model.alone]
        x = tokens(6, seed=me.rank)
        model.first(x)
        model.tied(x)
        model.plain(x)
        model.alone(x[:3])
        balancer.step()
        return model.first.router.expert_bias_E, model.alone.expert_bias_E

    batches = [tokens(6, seed=rank) for rank in range(2)]
    for rank_of, (tied, alone) in enumerate(virtual_world(2).run(rank)):
        same_bits(tied, moved(2 * chosen(*batches)))
        same_bits(alone, moved(chosen(batches[rank_of][:3])))  # no layer, no group: this rank's


def recomputed(layer, x, **options):
    checkpoint(layer, x, use_reentrant=False, **options).sum().backward()


def recomputed_whole(layer, x):
    """To the end of the call, not only to what backward needs."""
    with set_checkpoint_early_stop(False):
        recomputed(layer, x)


def in_eval(layer, x):
    layer(x)
    layer.eval()
    layer(2 * x)
    layer.train()


def without_gradients(layer, x):
    layer(x)
    with torch.no_grad():
        layer(2 * x)


def by_tickets(layer, x):
    ticket = layer.begin(x)
    layer.run_experts(ticket)
    layer.finish(ticket)


def of_torch_func(layer, x):
    torch.func.grad(lambda x: layer(x).sum())(x)


WAYS = {
    "call": lambda layer, x: layer(x),
    "backward": lambda layer, x: layer(x).sum().backward(),
    "recompute": recomputed,
    "whole recompute": recomputed_whole,
    "selective recompute": partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, sac_policy())),
    "eval beside": in_eval,
    "no_grad beside": without_gradients,
    "tickets": by_tickets,
    "block": lambda layer, x: ShortcutBlock([nn.Identity()], layer, tap=0, slot=0)(x),
}
OF_ONE_RANK = {
    "torch.func": of_torch_func,
    "compiled": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
    "compiled, whole recompute": lambda layer, x: recomputed_whole(torch.compile(layer, backend="aot_eager"), x),
    "compiled, recompute": lambda layer, x: recomputed(torch.compile(layer, backend="aot_eager"), x),
}


@pytest.mark.parametrize("way", [*WAYS, *OF_ONE_RANK])
def test_a_real_forward_counts_once(way):
    torch._dynamo.reset()
    ranks = 1 if way in OF_ONE_RANK else 2

    def rank(me):
        layer = make(None if ranks == 1 else me.transport(), router=router())
        balancer = LossFreeBalancer(layer, U)
        (WAYS | OF_ONE_RANK)[way](layer, tokens(9, seed=me.rank))
        counted = balancer._counted[layer.router].counts_E
        balancer.step()
        return counted, layer.router.expert_bias_E

    batches = [tokens(9, seed=rank) for rank in range(ranks)]
    results = [rank(type("One", (), {"rank": 0}))] if ranks == 1 else virtual_world(2).run(rank)
    for batch, (counted, bias_E) in zip(batches, results, strict=True):
        same_bits(counted, chosen(batch))
        same_bits(bias_E, moved(chosen(*batches)))


def test_a_calibration_is_not_counted():
    def rank(me):
        layer = make(me.transport(), router=router(), schedule="auto")
        balancer = LossFreeBalancer(layer, U)
        layer(tokens(9, seed=me.rank))
        return balancer._counted[layer.router].counts_E

    for rank_of, counted in enumerate(virtual_world(2).run(rank)):
        same_bits(counted, chosen(tokens(9, seed=rank_of)))


def test_a_router_by_itself_counts_as_a_layer_does():
    alone = router()
    balancer = LossFreeBalancer(alone, U)
    x = tokens(9).requires_grad_()
    recomputed_whole(lambda x: alone(x).topk_weights_TK.square(), x)
    alone.eval()(2 * x)
    alone.train()
    with torch.no_grad():
        alone(2 * x)
    same_bits(balancer._counted[alone].counts_E, chosen(tokens(9)))
    balancer.step()
    same_bits(alone.expert_bias_E, moved(chosen(tokens(9))))


def test_a_copy_is_not_counted():
    layer = make(router=router())
    balancer = LossFreeBalancer(layer, U)
    copied = deepcopy(layer)
    copied(tokens(9))
    layer(tokens(5))
    balancer.step()
    same_bits(layer.router.expert_bias_E, moved(chosen(tokens(5))))
    assert not copied.router.expert_bias_E.any()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_the_bias_stays_float32_and_small_steps_are_not_lost(cast):
    layer = make(router=router(), dtype=torch.float64)
    getattr(layer, cast)()
    balancer = LossFreeBalancer(layer, 1e-3, recentre=True)
    assert layer.router.expert_bias_E.dtype == torch.float32
    layer.router.expert_bias_E += torch.linspace(-1, 1, E)
    before = layer.router.expert_bias_E.clone()
    layer(tokens(40).to(layer.experts.down_proj.dtype))
    counts_E = balancer._counted[layer.router].counts_E
    balancer.step()
    want = before + 1e-3 * torch.sign(counts_E.sum() - E * counts_E)
    torch.testing.assert_close(layer.router.expert_bias_E, want - want.mean(), rtol=0, atol=1e-7)
    assert (layer.router.expert_bias_E != before).all()


def test_what_does_not_fit_is_refused():
    for options, field in (({"update_rate": 0}, "update_rate"), ({"update_rate": float("nan")}, "update_rate")):
        with pytest.raises(ConfigError) as caught:
            LossFreeBalancer(router(), **options)
        assert caught.value.field == field
    with pytest.raises(ConfigError) as caught:
        LossFreeBalancer(nn.Sequential(make()))
    assert caught.value.field == "model"
    rounded = router()
    rounded.expert_bias_E = rounded.expert_bias_E.bfloat16()
    with pytest.raises(ConfigError) as caught:
        LossFreeBalancer(rounded)
    assert caught.value.field == "expert_bias_E"


def on_replicas():
    """On a gloo rank of four, a mesh of two replicas of two ranks: the biases of a layer, and of one that knows no
    other rank with the group of all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    x = tokens(SIZES[dist.get_rank()], seed=dist.get_rank())
    found = []
    for layer_group, group in ((mesh, None), (None, dist.group.WORLD)):
        layer = MoELayer(D, F, E, 2, group=layer_group, router=router(), dtype=torch.float64)
        balancer = LossFreeBalancer(layer, U, group=group)
        layer(x)
        balancer.step()
        found.append(layer.router.expert_bias_E)
    return found


def test_replicas_move_alike_and_so_do_the_ranks_of_a_group():
    want = moved(chosen(*(tokens(size, seed=rank) for rank, size in enumerate(SIZES))))
    for of_mesh, of_group in gloo_pool(4).run(on_replicas):
        same_bits(of_mesh, want)
        same_bits(of_group, want)
