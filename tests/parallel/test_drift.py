"""Ways in which replicas of experts would drift apart, or ranks decide differently: each is an error, or is right."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import (
    ConfigError,
    MoELayer,
    PlanMismatch,
    clip_grad_norm_,
    gradients_are_finite,
    no_sync,
    param_groups,
    prepare,
    reopen,
)
from moe_overlap.errors import MoeTransportError
from moe_overlap.parallel.ownership import mark_parameter
from tests.parallel.model import D, F
from tests.parallel.test_replicas import RANKS, SPREAD, mesh, rows
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits


def layer(group, experts=4, dtype=torch.float64, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, experts, 2, group=group, dtype=dtype, **options)


def data_mesh():
    return init_device_mesh("cpu", (RANKS,))


def dense_and(group):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(D, D, dtype=torch.float64), layer(group))


def loss(model, rank=None):
    return model(rows(dist.get_rank() if rank is None else rank)).square().sum()


def whole_layer_gradients(experts=4):
    one = layer(None, experts)
    sum(loss(one, rank) for rank in range(RANKS)).backward()
    return [p.grad for p in one.experts.parameters()]


# ---------------------------------------------------------------- means over more ranks than the experts are


def forgotten_replicas(way):
    model = prepare(dense_and(mesh()["experts"]))
    if way == "ddp":
        with pytest.raises(ConfigError, match="replicate_group="):
            loss(DistributedDataParallel(model))
        return
    fully_shard(model, mesh=data_mesh(), ignored_params=set(model[1].experts.parameters()))
    optimizer = torch.optim.SGD(param_groups(model) if way == "groups" else model.parameters(), lr=0.1, foreach=False)
    loss(model).backward()
    with pytest.raises(ConfigError, match="replicate_group="):
        optimizer.step()


@pytest.mark.parametrize("way", ["ddp", "fsdp", "groups"])
def test_replicas_that_the_layer_was_not_told_of(way):
    gloo_pool(RANKS).run(forgotten_replicas, way)


def some_replicas():
    """Two of DDP's four ranks."""
    model = prepare(nn.Sequential(layer(None, replicate_group=mesh()["experts"])))
    with pytest.raises(ConfigError, match="replicate_group="):
        loss(DistributedDataParallel(model))


def test_replicas_that_the_layer_was_told_half_of():
    gloo_pool(RANKS).run(some_replicas)


def sharded_sums():
    model = prepare(layer(mesh()["experts"]), gradients="sum")
    for child in model.children():
        if child is not model.experts:
            fully_shard(child, mesh=data_mesh())
    fully_shard(model, mesh=mesh()["replicas"])
    loss(model).backward()
    with pytest.raises(ConfigError, match="sums, of experts that fully_shard has spread"):
        torch.optim.SGD(model.experts.parameters(), lr=0.1, foreach=False).step()


def test_sums_of_sharded_experts_need_to_know_their_replicas():
    gloo_pool(RANKS).run(sharded_sums)


# ---------------------------------------------------------------- one decision


def nan_in_a_shard(where):
    model = prepare(dense_and(mesh()))
    experts = set(model[1].experts.parameters())
    if where == "expert shard":
        for child in model[1].children():
            if child is not model[1].experts:
                fully_shard(child, mesh=data_mesh())
        fully_shard(model[1], mesh=mesh()["replicas"])
        experts = set()
    fully_shard(model, mesh=data_mesh(), ignored_params=experts)
    loss(model).backward()
    assert gradients_are_finite(model.parameters())
    grad = model[1].experts.down_proj.grad if "expert" in where else model[0].weight.grad
    if dist.get_rank() == 3:
        (grad.to_local() if hasattr(grad, "to_local") else grad)[0, 0] = torch.nan
    return gradients_are_finite(model.parameters())


@pytest.mark.parametrize("where", ["dense shard", "expert shard", "expert"])
def test_one_nan_is_heard_of_by_all(where):
    """What rank 3 alone sees: in a shard of a dense weight, of an expert, or in an expert."""
    results = gloo_pool(RANKS).run(nan_in_a_shard, where)
    # The experts of one rank are seen by those that share experts with it; a replica has the same gradient in a run.
    assert results == [False] * 4 if where != "expert" else results[2:] == [False, False]


# ---------------------------------------------------------------- replicas that are not alike


def rearranged(how):
    one = prepare(layer(mesh()))
    second = dist.get_rank() >= SPREAD
    loss(one).backward()
    with torch.no_grad():
        for parameter in one.experts.parameters():
            if second:
                if how == "experts":
                    parameter.copy_(parameter.roll(1, 0))
                elif how == "columns":
                    parameter.copy_(parameter.flip(-1))
                elif how == "one bit":
                    parameter[0, 0, 0] = torch.nextafter(parameter[0, 0, 0], torch.tensor(9.0, dtype=torch.float64))
                else:
                    one.load_state_dict({name: value * 2 for name, value in one.state_dict().items()})
    with pytest.raises(PlanMismatch, match="differ in the values of an expert parameter"):
        loss(one).backward()
    reopen(one)


@pytest.mark.parametrize("how", ["experts", "columns", "one bit", "loaded"])
def test_replicas_whose_weights_differ_are_told_at_any_time(how):
    gloo_pool(RANKS).run(rearranged, how)


def hook_of_the_user(what):
    one = prepare(layer(mesh()))

    def hook(parameter):
        if what == "in place":
            parameter.grad.zero_()
        elif what == "none":
            parameter.grad = None
        else:
            parameter.grad = parameter.grad * 2

    for parameter in one.experts.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    with pytest.raises((ConfigError, MoeTransportError), match="a hook changed|rank . closed"):
        loss(one).backward()
    dist.barrier()
    reopen(one)
    plain = prepare(layer(mesh()))
    loss(plain).backward()
    for parameter in plain.experts.parameters():  # one that runs before
        parameter.register_hook(lambda grad: grad * 2)
    got = [p.grad.clone() for p in plain.experts.parameters()]
    plain.zero_grad()
    loss(plain).backward()
    for parameter, want in zip(plain.experts.parameters(), got, strict=True):
        same_bits(parameter.grad, want * 2)


@pytest.mark.parametrize("what", ["in place", "none", "another"])
def test_a_hook_whose_work_would_be_overwritten(what):
    gloo_pool(RANKS).run(hook_of_the_user, what)


def replicas_alone(gradients):
    one = layer(None, replicate_group=dist.group.WORLD)
    if gradients is not None:
        prepare(one, gradients=gradients)
    loss(one).backward()
    return [p.grad for p in one.experts.parameters()]


@pytest.mark.parametrize("gradients", [None, "sum", "mean"])
def test_a_layer_that_every_rank_has_whole(gradients):
    results = gloo_pool(RANKS).run(replicas_alone, gradients)
    for at, want in enumerate(whole_layer_gradients()):
        for got in results:
            close(got[at], want / RANKS if gradients == "mean" else want)


def half(reduced):
    torch.manual_seed(3)
    group = {"group": mesh(4)} if reduced else {}
    one = prepare(MoELayer(D, F, 4, 2, dtype=torch.bfloat16, **group))
    one(rows(dist.get_rank(), torch.bfloat16)).square().sum().backward()
    return [p.grad for p in one.experts.parameters()]


def test_four_bfloat16_gradients_are_summed_in_float32():
    """In bfloat16 the sum of four rounds otherwise; in another order of the replicas too."""
    own, got = (gloo_pool(RANKS).run(half, reduced) for reduced in (False, True))
    for at in range(2):
        total = own[0][at].float()
        for rank in range(1, RANKS):
            total = total + own[rank][at].float()
        for rank in range(RANKS):
            same_bits(got[rank][at], (total / RANKS).to(torch.bfloat16))
        rounded = (((own[0][at] + own[1][at]) + own[2][at]) + own[3][at]) / RANKS
        assert not torch.equal(rounded, got[0][at])


# ---------------------------------------------------------------- tied, copied, prepared again


def tied(how):
    first, second = layer(dist.group.WORLD), layer(dist.group.WORLD)
    if how == "assigned":
        second.experts = first.experts
    elif how == "added":
        second.add_module("experts", first.experts)
    else:
        torch.manual_seed(3)
        second = MoELayer(D, F, 4, 2, group=dist.group.WORLD, experts=first.experts)
    if how == "added":
        second(rows(0))
    model = prepare(nn.Sequential(first, second))
    assert first.ownership.mean and second.ownership.mean
    ddp = DistributedDataParallel(model)
    loss(ddp).backward()
    return [p.grad for p in first.experts.parameters()]


@pytest.mark.parametrize("how", ["assigned", "added", "given"])
def test_tied_experts_are_prepared_together(how):
    results = gloo_pool(2).run(tied, how)
    first, second = layer(None), layer(None)
    second.experts = first.experts
    (sum(loss(nn.Sequential(first, second), rank) for rank in range(2)) / 2).backward()
    for at, parameter in enumerate(first.experts.parameters()):
        close(torch.cat([result[at] for result in results]), parameter.grad)


def prepared_again():
    one = prepare(layer(mesh()), gradients="sum")
    prepare(one)
    assert not one.ownership.mean
    other = copy.deepcopy(one)
    prepare(other, gradients="mean")
    assert other.ownership.mean and not one.ownership.mean
    loss(one).backward()
    return [p.grad for p in one.experts.parameters()]


def test_what_was_said_of_gradients_stays_said():
    results = gloo_pool(RANKS).run(prepared_again)
    for at, want in enumerate(whole_layer_gradients()):
        close(torch.cat([results[0][at], results[1][at]]), want)


def summed_by_a_hook():
    model = prepare(dense_and(dist.group.WORLD), gradients="sum")
    ddp = DistributedDataParallel(model)

    def total(_, bucket):
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, total)
    loss(ddp).backward()
    return [p.grad for p in model[1].experts.parameters()], model[0].weight.grad


def test_ddp_may_make_sums_where_the_caller_says_so():
    results = gloo_pool(2).run(summed_by_a_hook)
    one = dense_and(None)
    sum(loss(one, rank) for rank in range(2)).backward()
    close(results[0][1], one[0].weight.grad)
    for at, parameter in enumerate(one[1].experts.parameters()):
        close(torch.cat([result[0][at] for result in results]), parameter.grad)


# ---------------------------------------------------------------- optimizers


def closure(inside):
    one = prepare(layer(mesh()))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)

    def evaluate():
        optimizer.zero_grad()
        with no_sync(one) if inside else nullcontext():
            value = loss(one)
            value.backward()
        return value

    if inside:
        with pytest.raises(ConfigError, match="one replica alone"):
            optimizer.step(evaluate)
        with pytest.raises(ConfigError, match="one replica alone"):
            optimizer.step(closure=evaluate)
    else:
        assert optimizer.step(evaluate) > 0


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_that_a_closure_makes_are_looked_at_too(inside):
    gloo_pool(RANKS).run(closure, inside)


def wide_for_ever():
    """Also in the second step, in a copy, and after a step that failed."""
    one = prepare(layer(mesh(), dtype=torch.bfloat16), accumulate_fp32=True)
    optimizer = torch.optim.SGD(one.experts.parameters(), lr=0.01)

    def step():
        one(rows(dist.get_rank(), torch.bfloat16)).square().sum().backward()
        assert {p.grad.dtype for p in one.experts.parameters()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((TypeError, RuntimeError)):
        step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    step()
    other = copy.deepcopy(one)
    of_copy = torch.optim.SGD(other.experts.parameters(), lr=0.01)
    x = rows(dist.get_rank(), torch.bfloat16)
    other(x).square().sum().backward()
    with pytest.raises(ConfigError, match=r"prepare\(model\) after"):
        of_copy.step()
    prepare(other)
    of_copy.zero_grad()
    other(x).square().sum().backward()
    of_copy.step()
    sharded = layer(None, dtype=torch.bfloat16)
    fully_shard(sharded, mesh=data_mesh())
    with pytest.raises(NotImplementedError, match="MixedPrecisionPolicy"):
        prepare(sharded, accumulate_fp32=True)


def test_accumulation_in_float32_is_not_lost():
    gloo_pool(RANKS).run(wide_for_ever)


def evaluated_under_no_sync():
    """DDP's flag counts in forward calls with gradients only."""
    model = prepare(nn.Sequential(layer(mesh())))
    ddp = DistributedDataParallel(model) if any(p.requires_grad for p in model[0].router.parameters()) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    value = loss(ddp)
    with ddp.no_sync(), torch.no_grad():
        ddp(rows(0))
    value.backward()
    optimizer.step()
    for way in (True, False):  # zeros are nobody's gradient
        with ddp.no_sync():
            loss(ddp).backward()
        optimizer.zero_grad(set_to_none=way)
        optimizer.step()


def test_no_false_alarm_after_an_evaluation_or_zeros():
    gloo_pool(RANKS).run(evaluated_under_no_sync)


def marked_alone():
    one = prepare(layer(mesh()))
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    mark_parameter(scale, one.ownership)
    model = nn.Module()
    model.layer, model.scale = one, scale
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (one(rows(dist.get_rank())) * scale).square().sum().backward()
    optimizer.step()
    return scale.detach()


def test_a_parameter_that_is_marked_alone_is_reduced_too():
    results = gloo_pool(RANKS).run(marked_alone)
    assert results[0] == results[2] and results[1] == results[3]


def counted(way):
    """Exchanges of R in three micro-batches."""
    model = prepare(nn.Sequential(layer(mesh())))
    replicas = model[0].ownership.replicas
    call, quiet = model, (lambda: no_sync(model))
    if way == "ddp":
        call = DistributedDataParallel(model)
        quiet = call.no_sync
    before = replicas.transport.stats.exchanges
    for batch in range(3):
        with quiet() if way != "always" and batch < 2 else nullcontext():
            loss(call).backward()
    return replicas.transport.stats.exchanges - before


@pytest.mark.parametrize(("way", "times"), [("loop", 1), ("ddp", 1), ("always", 3)])
def test_no_sync_saves_the_exchanges(way, times):
    assert gloo_pool(RANKS).run(counted, way) == [2 * times] * RANKS


def clipping_too_early():
    one = prepare(layer(mesh()))
    with no_sync(one):
        loss(one).backward()
    for call in (lambda: clip_grad_norm_(one.parameters(), 1.0), lambda: gradients_are_finite(one.parameters())):
        with pytest.raises(ConfigError, match="one replica alone"):
            call()


def test_the_norm_of_gradients_of_one_replica_is_refused():
    gloo_pool(RANKS).run(clipping_too_early)


def dimensions_the_other_way_round():
    for names in (("experts", "replicas"), ("ep", "dp")):
        with pytest.raises(ConfigError, match="replicas first"):
            layer(init_device_mesh("cpu", (2, 2), mesh_dim_names=names))


def test_a_mesh_whose_names_say_the_other_order():
    gloo_pool(RANKS).run(dimensions_the_other_way_round)
