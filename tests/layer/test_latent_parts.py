"""Latent experts in a training job: whose gradients they are, what the projections are called, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import ConfigError, Experts, MoELayer, RemoteAbort, prepare
from moe_overlap.placement.placement import Placement
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.transport.local import LocalTransport
from tests import oracle
from tests.layer.latents import E, L, dense, make, same, step
from tests.layers import D, F, K, tokens
from tests.parallel.model import whole
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close

# ---------------------------------------------------------------- gradients that are not wanted, or missing


@pytest.mark.parametrize("frozen", [False, True])
def test_a_rank_whose_input_needs_no_gradient(frozen):
    """Its projection does need one, unless it is frozen; and the other ranks' rows come back to it anyway."""

    def rank(me, everywhere):
        layer = make(me.transport(), schedule="chunked(2)")
        layer.latent_in.requires_grad_(not frozen)
        return step(layer, me.rank, count=6, wants=everywhere or me.rank == 1)

    partly, wholly = (virtual_world(2).run(lambda me, e=everywhere: rank(me, e)) for everywhere in (False, True))
    assert partly[0].pop("dx") is None and wholly[0].pop("dx") is not None
    assert (partly[0]["latent_in.weight"] is None) == frozen
    for got, want in zip(partly, wholly, strict=True):
        same(got, want)


@pytest.mark.parametrize("how", ["aux", "aux, x without gradient", "attach"])
def test_a_loss_that_does_not_reach_the_output_runs_the_pending_exchanges(how):
    """Experts then have the gradients of the other rank's tokens alone, and the projections zeros or none."""

    def rank(me, how):
        layer = make(me.transport(), schedule="chunked(2)", aux_loss_coef=0.1)
        x = tokens(6, me.rank).requires_grad_("without" not in how)
        y = layer(x)
        loss = layer.take_aux_loss()
        if me.rank == 1:
            loss = y.square().sum()
        elif how == "nothing":
            loss = 0 * y.sum()
        elif how == "attach":
            loss = layer.attach(torch.ones((), dtype=torch.float64, requires_grad=True).clone())
        loss.backward()
        if me.rank == 0:
            assert layer.latent_in.weight.grad is not None and not layer.latent_in.weight.grad.any()
            assert (layer.latent_out.weight.grad is None) == how.startswith("aux")
        if me.rank == 1 or not how.startswith("aux"):
            assert layer.attach(x) is x, "the engine has freed the call's graph"
        return [p.grad for p in layer.expert_weights]

    with_zeros = virtual_world(2).run(lambda me: rank(me, "nothing"))
    assert with_zeros[0][0].any()
    for got, want in zip(virtual_world(2).run(lambda me: rank(me, how)), with_zeros, strict=True):
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)  # not bit for bit: a zero gradient may be -0.0


def test_a_second_derivative_is_refused():
    layer = make(schedule="chunked(2)", shared_expert_size=F)
    x = tokens(4).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- in a training job


def mean_gradients(ranks):
    """One process with all experts: the gradient of the mean over the ranks of the ranks' losses."""
    layer = make(shared_expert_size=F)
    losses = [layer(tokens(5 + rank, rank)).square().mean() for rank in range(ranks)]
    (sum(losses) / ranks).backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def trained(wrapper, replicas):
    """One backward, wrapped; with `replicas`, expert parallel inside data parallel on a mesh of two dimensions."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if replicas == 1 else init_device_mesh("cpu", (replicas, ranks // replicas))
    torch.manual_seed(3)
    layer = MoELayer(D, F, E, K, group=group, dtype=torch.float64, latent_size=L, shared_expert_size=F,
                     schedule="shared_expert")  # fmt: skip
    prepare(layer)
    if wrapper == "ddp":
        assert set(layer._ddp_params_and_buffers_to_ignore) == {"experts.gate_up_proj", "experts.down_proj"}
        call = DistributedDataParallel(layer)
    else:
        mesh = init_device_mesh("cpu", (ranks,))
        call = fully_shard(layer, mesh=mesh, ignored_params=set(layer.experts.parameters()))
        assert isinstance(layer.latent_in.weight, DTensor)
    call(tokens(5 + rank, rank)).square().mean().backward()
    return layer.ownership.expert_ids, {name: whole(p.grad) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 2)], ids=["spread", "replicas"])
def test_projections_are_reduced_as_every_dense_weight(ranks, replicas, wrapper):
    want = mean_gradients(ranks)
    for ids, got in gloo_pool(ranks).run(trained, wrapper, replicas):
        for name, grad in got.items():
            close(grad, want[name][list(ids)] if name.startswith("experts.") else want[name])


# ---------------------------------------------------------------- what there is of it, and what is refused


def test_names_shapes_and_start_of_the_projections():
    layer = make(shared_expert_size=F)
    state = layer.state_dict()
    assert {name: tuple(state[name].shape) for name in state if name.startswith("latent")} == {
        "latent_in.weight": (L, D), "latent_out.weight": (D, L)}  # fmt: skip
    assert tuple(layer.experts.down_proj.shape) == (E, L, F)
    assert layer.router.weight.shape[1] == layer.shared_expert.up.weight.shape[1] == D
    for weight in (layer.latent_in.weight, layer.latent_out.weight):
        limit = weight.shape[1] ** -0.5  # nn.Linear's
        assert 0.5 * limit < weight.abs().max() <= limit
    other = make(shared_expert_size=F, schedule="chunked(2)")
    torch.manual_seed(4)
    other.reset_parameters()
    assert not torch.equal(other.latent_in.weight, layer.latent_in.weight)
    other.load_state_dict(state)
    for same_layer in (other, copy.deepcopy(layer)):
        assert same_layer.latent_in.weight is not layer.latent_in.weight
        close(same_layer(tokens(5)), layer(tokens(5)).detach())


def test_a_layer_without_has_no_such_modules():
    layer = make(latent_size=None)
    assert {name for name, _ in layer.named_children()} == {"experts", "router"}
    assert layer.latent_in is None and layer.latent_out is None
    assert not [name for name in layer.state_dict() if "latent" in name]
    assert "latent" not in layer.explain()


def test_it_says_so():
    layer = make()
    layer(tokens(5))
    for text in (layer.explain(), "\n".join(layer.stats().implementation)):
        assert f"latents of width {L} instead of {D}" in text


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "6"])
def test_a_size_that_is_none(value):
    with pytest.raises(ConfigError) as caught:
        make(latent_size=value)
    assert caught.value.field == "latent_size"


def test_given_parts_have_the_width_of_the_latents():
    def experts(width):
        return Experts(width, F, E, dtype=torch.float64)

    def dispatcher(width):
        transport = LocalTransport()
        return Dispatcher(transport=transport, placement=Placement.identity(E, 1), hidden=width, ffn_hidden=F, top_k=K,
                          activation="swiglu", dtype=torch.float64)  # fmt: skip

    layer = make(experts=experts(L), dispatcher=dispatcher(L))
    close(layer(tokens(5)), dense(layer, tokens(5)))
    for field, parts in (("gate_up_proj", {"experts": experts(D)}),
                         ("dispatcher.hidden", {"dispatcher": dispatcher(D)})):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            make(**parts)
        assert caught.value.field == field


def test_a_projection_may_be_replaced():
    """By what an adapter library puts there, say: it is called as a module."""
    layer = make()
    layer.latent_in = nn.Sequential(layer.latent_in, nn.Tanh())
    x = tokens(5)
    routing = layer.router(x)
    rows = torch.tanh(x @ layer.latent_in[0].weight.T)
    want = oracle.moe(rows, routing.topk_ids_TK, routing.topk_weights_TK, *layer.expert_weights)
    close(layer(x), want @ layer.latent_out.weight.T)


@pytest.mark.parametrize("world", [1, 2])
def test_a_projection_to_another_width_is_refused_on_all_ranks_before_anything_is_sent(world):
    def rank(me):
        layer = make(me.transport() if world > 1 else None)
        right = layer.latent_in
        if me.rank == 0:
            layer.latent_in = nn.Linear(D, L + 1, bias=False, dtype=torch.float64)
        with pytest.raises(ConfigError) as caught:
            layer(tokens(5, me.rank))
        assert layer.transport.stats.exchanges == 0
        layer.latent_in = right
        layer(tokens(5, me.rank))  # and the next call is right
        return caught.value.field

    assert virtual_world(world).run(rank)[0] == "latent_in"


def test_a_projection_back_to_another_width_is_named_and_the_peer_learns_of_it():
    def rank(me):
        layer = make(me.transport())
        for _ in range(2):  # calls in which weights are compared
            layer(tokens(5, me.rank))
        if me.rank == 0:
            layer.latent_out = nn.Linear(L, 1, bias=False, dtype=torch.float64)
            with pytest.raises(ConfigError) as caught:
                layer(tokens(5))
            assert caught.value.field == "latent_out"
        else:
            with pytest.raises(RemoteAbort, match="latent_out"):
                for _ in range(2):  # the first may be over before the other rank has failed
                    layer(tokens(5, 1))

    virtual_world(2).run(rank)
