"""Backwards that are not one loss through everything: frozen parts, losses that reach part of the model, two passes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import prepare
from tests.parallel.expected import WORLD, run_once, unwrapped
from tests.parallel.model import EXPERTS, MODES, Model, loss_of, meshes, tokens, whole
from tests.ranks import gloo_pool
from tests.tolerances import same_bits

WRAPPERS = ("bare", "ddp", "fsdp")


def wrap(model, wrapper):
    """What to call in the model's place."""
    prepare(model)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp":
        mesh = meshes()["data"]
        for unit in (model.moe, model.shells[0].block, model.shells[1].block, model):
            fully_shard(unit, mesh=mesh, ignored_params=model.expert_parameters())
    return model


def all_gradients(model):
    return {name: p.grad if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}


def frozen(wrapper, mode, which):
    model = Model(dist.group.WORLD, mode)
    parts = {"entry": [model.entry], "before_moe": [model.entry, model.shells[0].block.op], "experts": []}[which]
    for part in parts:
        part.requires_grad_(False)
    if which == "experts":
        for weight in model.expert_parameters():
            weight.requires_grad_(False)
    call = wrap(model, wrapper)
    loss_of(call, dist.get_rank()).backward()
    return all_gradients(model)


@pytest.mark.parametrize("which", ["entry", "before_moe", "experts"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_frozen_parts(wrapper, mode, which):
    """With everything before a layer frozen its input needs no gradient, and no unit has an input that does."""
    results = gloo_pool(WORLD).run(frozen, wrapper, mode, which)
    own = unwrapped()
    for rank, got in enumerate(results):
        for name, grad in got.items():
            is_expert = name.endswith(EXPERTS)
            is_frozen = (
                is_expert
                if which == "experts"
                else name.startswith("entry") or (which == "before_moe" and name.startswith("shells.0.block.op"))
            )
            assert (grad is None) == is_frozen, name
            if grad is not None:
                averaged = not is_expert and wrapper != "bare"
                same_bits(grad, (own[0][name] + own[1][name]) / WORLD if averaged else own[rank][name])


def without_tokens(wrapper, mode):
    """Rank 1 has no tokens: its experts serve rank 0."""
    model = Model(dist.group.WORLD, mode)
    call = wrap(model, wrapper)
    rank = dist.get_rank()
    call(tokens(rank)[: 0 if rank else None]).square().sum().backward()
    return all_gradients(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rank_without_tokens(wrapper, mode):
    plain = run_once(without_tokens, "bare", "none")
    assert plain[1]["shells.0.block.moe.experts.down_proj"].any() and not plain[1]["entry.weight"].any()
    for rank, got in enumerate(gloo_pool(WORLD).run(without_tokens, wrapper, mode)):
        for name, grad in got.items():
            averaged = not name.endswith(EXPERTS) and wrapper != "bare"
            same_bits(grad, (plain[0][name] + plain[1][name]) / WORLD if averaged else plain[rank][name])


def twice_through_one_graph(mode):
    model = Model(dist.group.WORLD, mode)
    prepare(model)
    loss = loss_of(model, dist.get_rank())
    loss.backward(retain_graph=True)
    first = {name: grad.clone() for name, grad in all_gradients(model).items()}
    loss.backward()
    return first, all_gradients(model)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "selective"])
def test_backward_twice_through_one_graph(mode):
    """Selective checkpoints are for one backward only: torch says so."""
    for (first, both), want in zip(gloo_pool(WORLD).run(twice_through_one_graph, mode), unwrapped(), strict=True):
        for name in want:
            same_bits(first[name], want[name])
            same_bits(both[name], want[name] + want[name])


def loss_of_first_block(model, rank, reaches):
    """The loss of the first block alone; on rank 0 it may reach the layer past its output only."""
    h = model.entry(tokens(rank))
    y = model.shells[0](h)
    aux = model.moe.take_aux_loss()
    if rank == 1:
        return y.square().mean() + aux
    return {
        "output": 0 * y.square().mean() + aux,
        "router": aux,
        "attach": model.moe.attach(aux),
        "attach_alone": model.moe.attach(h.square().mean() * 0),
    }[reaches]


def first_block(mode, reaches):
    model = Model(dist.group.WORLD, mode, aux_loss_coef=0.1)
    prepare(model)
    loss_of_first_block(model, dist.get_rank(), reaches).backward()
    exchanges = model.moe.transport.stats.exchanges
    return {name: p.grad for name, p in model.shells[0].named_parameters()}, exchanges


@pytest.mark.parametrize("reaches", ["router", "attach", "attach_alone"])
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_whose_loss_passes_the_experts_by(mode, reaches):
    """Its peers' rows still get their gradients, and no exchange is sent that a loss through the output would not."""
    results = gloo_pool(WORLD).run(first_block, mode, reaches)
    wanted = run_once(first_block, mode, "output")
    for rank, ((got, sent), (want, want_sent)) in enumerate(zip(results, wanted, strict=True)):
        assert sent == want_sent
        for name, grad in want.items():
            if rank == 1 or name.endswith(EXPERTS) or (name.startswith("block.moe.router") and reaches == "router"):
                assert torch.equal(got[name], grad), name  # not bit for bit: a zero gradient may be -0.0
