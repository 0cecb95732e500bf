"""The norm, clipping, overflow and NaN: what one process with all experts would decide, on every rank."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import ConfigError, GradScaler, MoELayer, clip_grad_norm_, grad_norm, gradients_are_finite, prepare
from tests.parallel.model import EXPERTS, D, F, Model, loss_of, tokens, whole
from tests.parallel.test_fsdp import has_own_meshes, shard
from tests.parallel.test_replicas import average_dense, mesh
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close, same_bits

WAYS = {"loop": 2, "ddp": 2, "ignored": 2, "own_unit": 2, "own_mesh": 2, "replicas": 4, "replicas_sharded": 4}


def backward(way):
    """A model with complete gradients."""
    world = dist.get_world_size()
    model = prepare(Model(mesh() if way.startswith("replicas") else dist.group.WORLD))
    call = model
    if way == "ddp":
        call = DistributedDataParallel(model)
    elif way == "replicas_sharded":
        from tests.parallel.test_replicas import wrap

        call, _ = wrap(model, "fsdp_sharded")
    elif way not in ("loop", "replicas"):
        shard(model, "block" if way != "own_unit" else "layer", way)
    loss_of(call, dist.get_rank()).backward()
    if way == "loop":
        for name, parameter in model.named_parameters():
            if not name.endswith(EXPERTS):
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
    elif way == "replicas":
        average_dense(model)
    return model


def clipped(way, norm_type, foreach, max_norm):
    model = backward(way)
    before = grad_norm(model.parameters(), norm_type)
    norm = clip_grad_norm_(model.parameters(), max_norm, norm_type, foreach=foreach)
    same_bits(norm, before)
    assert type(norm) is torch.Tensor and norm.shape == ()
    return norm, {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@lru_cache(maxsize=32)
def one_process(world, norm_type, max_norm):
    model = Model(None)
    (sum(loss_of(model, rank) for rank in range(world)) / world).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
    return norm, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("norm_type", "foreach"), [(2.0, None), (2, False), (1, True), (3.5, None), (math.inf, None)])
@pytest.mark.parametrize("way", WAYS)
def test_clipping_is_that_of_one_process(way, norm_type, foreach):
    if way == "own_mesh" and not has_own_meshes():
        pytest.skip("this torch has one mesh per unit")
    max_norm = 0.05
    results = gloo_pool(WAYS[way]).run(clipped, way, norm_type, foreach, max_norm)
    want, grads = one_process(WAYS[way], norm_type, max_norm)
    assert want > max_norm
    for norm, got in results:
        close(norm, want)
        same_bits(norm, results[0][0])
        for name, grad in grads.items():
            if not name.endswith(EXPERTS):
                close(got[name], grad)
    for name, grad in grads.items():
        if name.endswith(EXPERTS):
            close(torch.cat([results[rank][1][name] for rank in range(2)]), grad)


def below_the_limit():
    model = backward("loop")
    before = [parameter.grad.clone() for parameter in model.parameters()]
    clip_grad_norm_(model.parameters(), 1e6)
    for parameter, want in zip(model.parameters(), before, strict=True):
        same_bits(parameter.grad, want)


def test_a_small_norm_changes_nothing():
    gloo_pool(2).run(below_the_limit)


def test_on_virtual_ranks_and_one():
    torch.manual_seed(0)
    whole_layer = MoELayer(D, F, 4, 2, dtype=torch.float64)

    def rank(me):
        layer = MoELayer(D, F, 4, 2, dtype=torch.float64, transport=me.transport())
        layer.load_state_dict(whole_layer.state_dict())
        layer(tokens(me.rank)).square().sum().backward()
        return clip_grad_norm_(layer.experts.parameters(), 1.0)

    results = virtual_world(2).run(rank)
    sum(whole_layer(tokens(r)).square().sum() for r in range(2)).backward()
    want = torch.nn.utils.clip_grad_norm_(whole_layer.experts.parameters(), 1.0)
    for norm in results:
        close(norm, want)


def test_arguments():
    layer = MoELayer(D, F, 4, 2)
    for bad in (0, -1, math.nan):
        with pytest.raises(ConfigError, match="norm_type"):
            clip_grad_norm_(layer.parameters(), 1.0, bad)
    assert clip_grad_norm_([], 1.0) == 0 and clip_grad_norm_(layer.parameters(), 1.0) == 0
    layer(torch.ones(3, D)).sum().backward()
    (parameter,) = [p for p in layer.parameters() if p is layer.experts.down_proj]
    want = torch.linalg.vector_norm(parameter.grad)
    assert clip_grad_norm_(parameter, 1.0) == want


# ---------------------------------------------------------------- NaN and overflow on one rank alone


def poisoned(value, where):
    """Rank 1's experts, or the dense part of all, have `value` in a gradient."""
    model = backward("loop")
    assert gradients_are_finite(model.parameters())
    if where == "experts" and dist.get_rank() == 1:
        model.moe.experts.down_proj.grad[0, 0, 0] = value
    if where == "dense":
        model.entry.weight.grad[0, 0] = value
    assert not gradients_are_finite(model.parameters())
    norm = grad_norm(model.parameters())
    assert not norm.isfinite()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    for parameter, want in zip(model.parameters(), before, strict=True):
        same_bits(parameter.grad, want)


@pytest.mark.parametrize("where", ["experts", "dense"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_all_ranks_hear_of_one_bad_gradient(value, where):
    gloo_pool(2).run(poisoned, value, where)


def scaled(where, way):
    """Weights after a step with a scaler whose first scale overflows in rank 1's experts alone."""
    model = backward(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for parameter in model.parameters():
        parameter.grad.mul_(1024.0)
    if where == "experts" and dist.get_rank() % 2 == 1:
        model.moe.experts.down_proj.grad[0, 0, 0] = math.inf
    if where == "no gradients":
        for parameter in model.parameters():
            parameter.grad = None if dist.get_rank() == 1 else parameter.grad.fill_(math.inf)
    scaler.scale(torch.ones(()))
    before = [whole(p.detach()).clone() for p in model.parameters()]
    if where != "no gradients":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    changed = [not torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True)]
    return scaler.get_scale(), any(changed), all(changed)


@pytest.mark.parametrize(
    ("where", "way", "want"),
    [
        ("nowhere", "loop", (2048.0, True, True)),
        ("experts", "loop", (512.0, False, False)),
        ("experts", "ignored", (512.0, False, False)),
        ("experts", "replicas", (512.0, False, False)),
        ("no gradients", "loop", (512.0, False, False)),
    ],
)
def test_a_scaler_skips_on_all_ranks(where, way, want):
    """Without it rank 0 would step and double its scale, and rank 1 neither."""
    results = gloo_pool(WAYS[way]).run(scaled, where, way)
    assert results == [want] * WAYS[way]


def other_scaler():
    """What torch's own does: the reason for ours."""
    model = backward("loop")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    if dist.get_rank() == 1:
        model.moe.experts.down_proj.grad[0, 0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale()


def test_torchs_own_scaler_lets_the_ranks_drift_apart():
    assert gloo_pool(2).run(other_scaler) == [1024.0, 512.0]
