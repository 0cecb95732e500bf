"""Whose weight is this: every way in which a wrapper could take experts of one rank for those of all is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from moe_overlap import ConfigError, MoELayer, ignore_experts_for_ddp, param_groups, prepare
from moe_overlap.parallel.ownership import mark_parameter, owned_tensors, owners
from tests.parallel.model import EXPERTS, D, F, Model, gradients, loss_of, meshes, tokens
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

WORLD = 2


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class LowRank(nn.Module):
    """weight + b a, of each expert: an adapter."""

    def __init__(self, weight):
        super().__init__()
        self.a = nn.Parameter(torch.ones(weight.shape[0], 1, weight.shape[2], dtype=weight.dtype) / 7)
        self.b = nn.Parameter(torch.full((weight.shape[0], weight.shape[1], 1), 0.1, dtype=weight.dtype))

    def forward(self, weight):
        return weight + self.b @ self.a


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def adapt(model):
    for layer in model.layers:
        parametrize.register_parametrization(layer.experts, "down_proj", LowRank(layer.experts.down_proj))
    return model


def scale(model):
    for layer in model.layers:
        layer.experts.register_buffer("scale", torch.full((4, 1, 1), 1.0 + dist.get_rank(), dtype=torch.float64))
    return model


def checkpointed(model):
    model.shells[0] = checkpoint_wrapper(model.shells[0])
    return model


def replaced(model):
    for layer in model.layers:
        layer.experts = copy.deepcopy(layer.experts)
    return model


def pruned(model):
    prune.l1_unstructured(model.moe.experts, "down_proj", amount=1)
    return model


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.moe.experts, "down_proj", dim=0)
    return model


# ---------------------------------------------------------------- DDP: refused

# What is done to the model after prepare(), so that the names that DDP looks up are others.
AFTER = {
    "not prepared": None,
    "compiled": torch.compile,
    "outer module": Outer,
    "sequential": lambda model: nn.Sequential(OrderedDict(model=model)),
    "checkpoint wrapper": checkpointed,
    "adapter": adapt,
    "buffer": scale,
    "weight norm": weight_norm,
    "pruned": pruned,
}


def wrapped_wrongly(how):
    change = AFTER[how]
    model = Model(dist.group.WORLD)
    ddp = DistributedDataParallel(model if change is None else change(prepare(model)))
    with pytest.raises(ConfigError) as caught:
        ddp(tokens(dist.get_rank()))
    text = str(caught.value)
    assert "averages experts" in text and "prepare(model)" in text and "load the weights again" in text, text


@pytest.mark.parametrize("how", AFTER)
def test_ddp_that_takes_experts_of_one_rank_for_those_of_all_is_refused(how):
    gloo_pool(WORLD).run(wrapped_wrongly, how)


def prepared_too_late():
    ddp = DistributedDataParallel(Model(dist.group.WORLD))
    for model in (ddp, Outer(ddp)):
        with pytest.raises(ConfigError, match="load the weights again"):
            prepare(model)


def test_preparing_what_ddp_has_overwritten_is_refused():
    gloo_pool(WORLD).run(prepared_too_late)


def ignored_by_hand():
    model = Model(dist.group.WORLD)
    model._ddp_params_and_buffers_to_ignore = [n for n, _ in model.named_parameters() if n.endswith(EXPERTS)]
    ddp = DistributedDataParallel(model)
    with pytest.raises(ConfigError, match="gradients are sums"):
        ddp(tokens(0))


def test_experts_that_were_ignored_by_hand_would_have_other_gradients_than_the_rest():
    """World size times too large: nothing in the loss shows it."""
    gloo_pool(WORLD).run(ignored_by_hand)


def replicas_that_drift(how):
    """Every rank has all experts, so DDP has to average them."""
    layer = MoELayer(D, F, 4, 2, dtype=torch.float64)
    model = nn.Sequential(layer)
    if how == "one":
        model._ddp_params_and_buffers_to_ignore = ["0.experts.down_proj"]
    else:
        model._ddp_params_and_buffers_to_ignore = [n for n, _ in model.named_parameters() if "experts" in n]
    ddp = DistributedDataParallel(model)
    with pytest.raises(ConfigError, match="drift apart"):
        ddp(tokens(dist.get_rank()))
    good = DistributedDataParallel(prepare(nn.Sequential(MoELayer(D, F, 4, 2, dtype=torch.float64))))
    good(tokens(dist.get_rank())).sum().backward()
    return [parameter.grad for parameter in good.parameters()]


@pytest.mark.parametrize("how", ["one", "all"])
def test_a_layer_without_a_group_under_ddp_is_averaged(how):
    first, second = gloo_pool(WORLD).run(replicas_that_drift, how)
    for got, want in zip(first, second, strict=True):
        same_bits(got, want)


# ---------------------------------------------------------------- DDP: right, in each of these orders

RIGHT = {
    "compiled": lambda model: prepare(torch.compile(model, backend="eager")),
    "outer module": lambda model: prepare(Outer(model)),
    "checkpoint wrapper": lambda model: prepare(checkpointed(model)),
    "wrapped whole": lambda model: prepare(checkpoint_wrapper(model)),
    "adapter": lambda model: prepare(adapt(model)),
    "buffer": lambda model: prepare(scale(model)),
    "replaced by a copy": lambda model: replaced(prepare(model)),
    "twice": lambda model: prepare(Outer(prepare(model))),
}


def wrapped_rightly(how, ddp):
    """Gradients by the parameters' place: names differ."""
    torch.manual_seed(5)
    model = Model(dist.group.WORLD)
    call = RIGHT[how](model)
    if ddp:
        call = DistributedDataParallel(call)
    scales = [b.clone() for n, b in model.named_buffers() if n.endswith("scale")]
    loss_of(call, dist.get_rank()).backward()
    assert all(bool((b == 1.0 + dist.get_rank()).all()) for b in scales)
    expert = {id(p) for layer in model.layers for p in layer.experts.parameters()}
    return [(id(p) in expert, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("how", RIGHT)
def test_prepared_last_every_wrapper_is_right(how):
    alone, got = (gloo_pool(WORLD).run(wrapped_rightly, how, ddp) for ddp in (False, True))
    for rank in range(WORLD):
        for at, (is_expert, grad) in enumerate(got[rank]):
            if is_expert:
                same_bits(grad, alone[rank][at][1])
            else:
                close(grad, (alone[0][at][1] + alone[1][at][1]) / WORLD)


def ddp_over_replicas_of_experts():
    """DDP over a group in which nobody holds other experts averages them: that is right."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    found = []
    for wrap in (lambda model: DistributedDataParallel(model, process_group=alone), lambda model: model):
        model = Model(dist.group.WORLD)
        loss_of(wrap(model), dist.get_rank()).backward()
        found.append(gradients(model))
    for name, want in found[1].items():
        same_bits(found[0][name], want)


def test_ddp_over_other_ranks_is_none_of_our_business():
    gloo_pool(WORLD).run(ddp_over_replicas_of_experts)


# ---------------------------------------------------------------- optimizers


def sharding_optimizer(which):
    model = prepare(Model(dist.group.WORLD))
    ddp = DistributedDataParallel(model)
    groups = param_groups(model, expert={"lr": 0.01}, dense={"lr": 0.1})
    parameters = groups[0]["params"] if which == "dense" else list(model.parameters())
    optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1)
    loss_of(ddp, dist.get_rank()).backward()
    before = [weight.detach().clone() for weight in model.expert_parameters()]
    if which == "dense":
        optimizer.step()
    else:
        with pytest.raises(ConfigError, match="dense parameters only"):
            optimizer.step()
    for got, want in zip(model.expert_parameters(), before, strict=True):
        same_bits(got.detach(), want)


@pytest.mark.parametrize("which", ["dense", "all"])
def test_an_optimizer_that_shards_over_all_ranks_gets_dense_parameters_only(which):
    gloo_pool(WORLD).run(sharding_optimizer, which)


def sums_beside_means(gradients):
    model = Model(dist.group.WORLD)
    experts = model.expert_parameters()
    for unit in (model.moe, model):
        fully_shard(unit, mesh=meshes()["data"], ignored_params=experts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    loss_of(model, dist.get_rank()).backward()
    if gradients is None:
        with pytest.raises(ConfigError, match=r"prepare\(model\), for means as FSDP2"):
            optimizer.step()
    prepare(model, gradients=gradients or "mean")
    model.zero_grad()
    loss_of(model, dist.get_rank()).backward()
    optimizer.step()
    return [weight.grad for weight in model.moe.experts.parameters()]


@pytest.mark.parametrize("gradients", [None, "mean", "sum"])
def test_fsdp_makes_means_and_the_experts_too_or_the_caller_says_so(gradients):
    results = gloo_pool(WORLD).run(sums_beside_means, gradients)
    whole = Model(None)
    sum(loss_of(whole, rank) for rank in range(WORLD)).backward()
    for at, weight in enumerate(whole.moe.experts.parameters()):
        close(torch.cat([result[at] for result in results]), weight.grad / (1 if gradients == "sum" else WORLD))


def groups():
    model = Model(dist.group.WORLD)
    model.entry.bias.requires_grad_(False)
    dense, expert = param_groups(model, expert={"lr": 1e-3, "weight_decay": 0.0}, dense={"lr": 1e-2})
    assert (dense["lr"], expert["lr"], expert["weight_decay"], "weight_decay" in dense) == (1e-2, 1e-3, 0.0, False)
    assert set(expert["params"]) == model.expert_parameters()
    assert set(dense["params"]) == set(model.parameters()) - model.expert_parameters() - {model.entry.bias}
    torch.optim.AdamW(param_groups(model), lr=0.1)


def test_groups_of_parameters():
    gloo_pool(WORLD).run(groups)


# ---------------------------------------------------------------- the marks themselves


def marks():
    model = adapt(Model(dist.group.WORLD))
    names = {name for name, p in model.named_parameters() if "experts" in name}
    assert len(names) == 2 * 4 and any(name.endswith("parametrizations.down_proj.0.a") for name in names)
    for one in (model, copy.deepcopy(model), AveragedModel(model), torch.compile(model), Outer(model)):
        found = owned_tensors(one)
        assert {name for name, p in one.named_parameters() if p in found} == {
            name for name, _ in one.named_parameters() if "experts" in name
        }
        assert set(owners(one.parameters())) == set(found)
    owner = model.moe.ownership
    assert owner.expert_ids == ((0, 1, 2, 3), (4, 5, 6, 7))[dist.get_rank()]
    assert owner.expert_ranks == (0, 1) and owner.others == {1 - dist.get_rank()}
    loose = nn.Parameter(torch.zeros(2))
    assert not owners([loose])
    mark_parameter(loose, owner)
    assert owners([loose]) == {loose: owner}


def test_marks_are_found_through_copies_wrappers_and_parametrizations():
    gloo_pool(WORLD).run(marks)


def test_marks_live_as_long_as_their_modules():
    import gc

    from moe_overlap.parallel import ownership

    before = len(ownership._marked)
    layers = [MoELayer(D, F, 4, 2) for _ in range(3)]
    assert len(ownership._marked) == before + 3
    del layers
    gc.collect()
    assert len(ownership._marked) <= before


def old_name():
    model = Model(dist.group.WORLD)
    with pytest.warns(DeprecationWarning, match="prepare"):
        names = ignore_experts_for_ddp(model)
    assert set(names) == {name for name, _ in model.named_parameters() if name.endswith(EXPERTS)}
    assert all(layer.ownership.mean for layer in model.layers)
    DistributedDataParallel(model)(tokens(dist.get_rank()))


def test_the_old_name_of_prepare():
    gloo_pool(WORLD).run(old_name)


def test_one_rank_needs_nothing():
    layer = MoELayer(D, F, 4, 2)
    with_call, without = copy.deepcopy(layer), layer
    prepare(with_call)
    for one in (with_call, without):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(torch.ones(3, D)).sum().backward()
        optimizer.step()
    for got, want in zip(with_call.parameters(), without.parameters(), strict=True):
        same_bits(got.detach(), want.detach())
    with pytest.raises(ConfigError, match="mean"):
        prepare(layer, gradients="average")


# ---------------------------------------------------------------- FSDP2 over ranks that hold other experts


class Foreign(nn.Module):
    """Experts of another class, which the layer does not know by heart."""

    activation = "relu"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(4, *s, dtype=torch.float64)) for s in ((F, D), (D, F)))


def mixed_by_fsdp(which, last):
    """`last`: what notices it, an optimizer's step or prepare()."""
    experts = Foreign() if which == "foreign" else None
    layer = MoELayer(D, F, 8, 2, group=dist.group.WORLD, experts=experts, dtype=None if experts else torch.float64)
    if which == "parametrized":
        parametrize.register_parametrization(layer.experts, "down_proj", Halved())
    if last == "step":
        prepare(layer)
    if which == "adapter":
        parametrize.register_parametrization(layer.experts, "down_proj", LowRank(layer.experts.down_proj))
    with pytest.raises(ConfigError, match="hold other experts"):
        fully_shard(layer, mesh=meshes()["data"])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(tokens(0)).sum().backward()
        if last == "prepare":
            prepare(layer)
        optimizer.step()


@pytest.mark.parametrize("last", ["step", "prepare"])
@pytest.mark.parametrize("which", ["own", "foreign", "parametrized", "adapter"])
def test_fsdp_over_ranks_with_other_experts_is_noticed_before_a_step(which, last):
    gloo_pool(WORLD).run(mixed_by_fsdp, which, last)
