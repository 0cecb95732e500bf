"""Expert parallel inside data parallel: two replicas of a model whose experts lie spread over two ranks, four in all.

The ranks of the mesh [[0, 1], [2, 3]]: rows share the experts out, columns hold the same ones.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import ConfigError, MoELayer, MoeTransportError, PlanMismatch, no_sync, prepare, reopen
from tests.parallel.model import EXPERTS, D, F, Model, gradients, loss_of, meshes
from tests.parallel.test_fsdp import make_unit_of_its_own
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

RANKS, REPLICAS, SPREAD = 4, 2, 2


def mesh(replicas=REPLICAS):
    return mesh_of(replicas)


@lru_cache(maxsize=4)
def mesh_of(replicas):
    return init_device_mesh("cpu", (replicas, RANKS // replicas), mesh_dim_names=("replicas", "experts"))


@lru_cache(maxsize=4)
def single_process(batches=1):
    model = Model(None)
    for batch in range(batches):
        (sum(loss_of(model, rank, batch) for rank in range(RANKS)) / RANKS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------- the equality matrix


def average_dense(model):
    """What a loop without wrappers does."""
    for name, parameter in model.named_parameters():
        if not name.endswith(EXPERTS):
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS


def wrap(model, way):
    """(what to call, the context of micro-batches but the last)."""
    if way == "ddp":
        ddp = DistributedDataParallel(model)
        return ddp, ddp.no_sync
    if way == "loop":
        return model, lambda: no_sync(model)
    if way == "every_batch":
        return model, nullcontext
    data = mesh()._flatten("data") if "data" not in (mesh()._flatten_mapping or {}) else mesh()["data"]
    experts = set() if way == "fsdp_sharded" else model.expert_parameters()
    if way == "fsdp_sharded":
        for layer in model.layers:
            for child in layer.children():
                if child is not layer.experts:
                    fully_shard(child, mesh=data)
            fully_shard(layer, mesh=mesh()["replicas"])
    for unit in (*(shell.block for shell in model.shells), model):
        fully_shard(unit, mesh=data, ignored_params=experts)

    @contextmanager
    def unsynchronised():
        model.set_requires_gradient_sync(False)
        with no_sync(model):
            yield
        model.set_requires_gradient_sync(True)

    return model, unsynchronised


def run(way, mode, batches, plan="by_hand"):
    model = prepare(Model(mesh(), mode, plan=plan))
    call, unsynchronised = wrap(model, way)
    for batch in range(batches):
        with unsynchronised() if batch < batches - 1 else nullcontext():
            loss_of(call, dist.get_rank(), batch).backward()
    if way in ("loop", "every_batch"):
        average_dense(model)
    return gradients(model)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize("way", ["loop", "every_batch", "ddp", "fsdp", "fsdp_sharded"])
def test_gradients_are_those_of_one_process(way, mode, batches):
    check_all(gloo_pool(RANKS).run(run, way, mode, batches), batches)


@pytest.mark.parametrize(("way", "mode", "batches"), [("loop", "none", 2), ("ddp", "selective", 1),
                                                      ("fsdp_sharded", "block", 2)])  # fmt: skip
def test_gradients_where_rows_are_deduplicated(way, mode, batches):
    check_all(gloo_pool(RANKS).run(run, way, mode, batches, "deduplicated"), batches)


def check_all(results, batches):
    for name, want in single_process(batches).items():
        if not name.endswith(EXPERTS):
            for got in results:
                close(got[name], want)
                same_bits(got[name], results[0][name])
            continue
        close(torch.cat([results[0][name], results[1][name]]), want)
        for rank in range(SPREAD):
            same_bits(results[rank + SPREAD][name], results[rank][name])


# ---------------------------------------------------------------- fewer experts than replicas, other shapes of meshes


def layer_of(shape, experts, dtype=torch.float64, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, experts, min(2, experts), group=mesh(shape), dtype=dtype, **options)


def rows(rank, dtype=torch.float64):
    return torch.randn(5 + rank, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).to(dtype)


def of_experts(layer):
    return [(w.grad.full_tensor() if hasattr(w.grad, "full_tensor") else w.grad) for w in layer.experts.parameters()]


def small(shape, experts, sharded, kind):
    layer = prepare(layer_of(shape, experts), gradients=kind)
    if sharded:
        for child in layer.children():
            if child is not layer.experts:
                fully_shard(child, mesh=mesh(1)["experts"])
        fully_shard(layer, mesh=mesh(shape)["replicas"])
    layer(rows(dist.get_rank())).square().sum().backward()
    return of_experts(layer)


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("replicas", "experts"), [(2, 2), (2, 6), (4, 1), (4, 3), (1, 4)])
def test_any_number_of_experts_and_replicas(replicas, experts, sharded, kind):
    """One expert for two ranks, or three for four: FSDP2 pads, R cuts the gradients wherever they are."""
    torch.manual_seed(3)
    whole = MoELayer(D, F, experts, min(2, experts), dtype=torch.float64)
    sum(whole(rows(rank)).square().sum() for rank in range(RANKS)).backward()
    results = gloo_pool(RANKS).run(small, replicas, experts, sharded, kind)
    spread = RANKS // replicas
    for at, parameter in enumerate(whole.experts.parameters()):
        want = parameter.grad / (RANKS if kind == "mean" else 1)
        close(torch.cat([results[rank][at] for rank in range(spread)]), want)
        for rank in range(RANKS):
            same_bits(results[rank][at], results[rank % spread][at])


# ---------------------------------------------------------------- the sum: in float32, in the order of the replicas


def half_precision(reduced):
    if reduced:
        layer = prepare(layer_of(2, 4, torch.bfloat16))
    else:
        torch.manual_seed(3)
        layer = prepare(MoELayer(D, F, 4, 2, group=mesh().get_group("experts"), dtype=torch.bfloat16))
    layer(rows(dist.get_rank(), torch.bfloat16)).square().sum().backward()
    return of_experts(layer)


def test_the_sum_is_rounded_once():
    own, got = (gloo_pool(RANKS).run(half_precision, reduced) for reduced in (False, True))
    for rank in range(RANKS):
        for at in range(2):
            first, second = own[rank % SPREAD][at], own[rank % SPREAD + SPREAD][at]
            want = ((first.float() + second.float()) / 2).to(torch.bfloat16)
            assert want.any()
            same_bits(got[rank][at], want)


def accumulated(fp32):
    layer = prepare(layer_of(2, 4, torch.bfloat16), accumulate_fp32=fp32)
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2, foreach=True)
    seen = []
    for step in range(2):
        for batch in range(8):
            with no_sync(layer) if batch < 7 else nullcontext():
                x = rows(dist.get_rank() + 10 * batch, torch.bfloat16) / 4
                layer(x).square().sum().backward()
        seen += [w.grad.double() for w in layer.experts.parameters()] if step == 0 else []
        optimizer.step()
        optimizer.zero_grad()
    return seen, [w.dtype for w in layer.experts.parameters()]


def test_accumulation_in_float32_is_nearer_to_the_sum():
    """Eight micro-batches in bfloat16: compared with float64 sums of the same bfloat16 gradients."""

    def error(results):
        return max((a - b).abs().max() / b.abs().max() for a, b in zip(results[0][0], exact, strict=True))

    exact = gloo_pool(RANKS).run(exact_sums)[0]
    plain, wide = (gloo_pool(RANKS).run(accumulated, fp32) for fp32 in (False, True))
    assert error(wide) < 1e-6 < 1e-3 < error(plain)
    assert wide[0][1] == [torch.bfloat16] * 2


def exact_sums():
    layer = prepare(layer_of(2, 4, torch.bfloat16))
    total = None
    for batch in range(8):
        with no_sync(layer):
            layer(rows(dist.get_rank() + 10 * batch, torch.bfloat16).div(4)).square().sum().backward()
        grads = [w.grad.double() for w in layer.experts.parameters()]
        layer.zero_grad()
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    for one in total:
        dist.all_reduce(one, group=mesh().get_group("replicas"))
    return [one / REPLICAS for one in total]


# ---------------------------------------------------------------- what would go wrong


def differing_weights():
    torch.manual_seed(0)
    layer = MoELayer(D, F, 4, 2, group=mesh(), dtype=torch.float64)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight += dist.get_rank()
    with pytest.raises(MoeTransportError, match="hold the same experts and differ in the values"):
        layer(rows(0)).sum().backward()


def test_replicas_with_other_weights_are_told_before_they_train_two_models():
    gloo_pool(RANKS).run(differing_weights)


def other_layers():
    first, second = layer_of(2, 4), layer_of(2, 4)
    for layer in (first, second):
        layer(rows(0)).sum().backward()
    chosen = first if dist.get_rank() < SPREAD else second
    with pytest.raises(PlanMismatch, match="have to run the same layers"):
        chosen(rows(0)).sum().backward()
    reopen(nn.ModuleList([first, second]))
    for layer in (first, second):
        layer(rows(0)).sum().backward()


def test_replicas_that_reduce_other_layers_are_told():
    """Equal shapes: without the number that travels with the rows, gradients of two layers would be mixed."""
    gloo_pool(RANKS).run(other_layers)


def late_parameters(way):
    layer = prepare(layer_of(2, 4))
    if way == "parametrized":
        nn.utils.parametrize.register_parametrization(layer.experts, "down_proj", Halved())
    elif way == "replaced":
        layer.experts.down_proj = nn.Parameter(layer.experts.down_proj.detach().clone())
    elif way == "adapted":
        layer.experts.adapter = nn.Parameter(torch.ones(2, 1, 1, dtype=torch.float64))
        nn.utils.parametrize.register_parametrization(layer.experts, "down_proj", Scaled(layer.experts.adapter))
    else:
        from copy import deepcopy

        layer = deepcopy(layer)
    x = rows(dist.get_rank())
    optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    if way == "parametrized":  # the parameter is the same one: it was watched all the time
        optimizer.step()
    else:
        before = [p.detach().clone() for p in layer.parameters()]
        with pytest.raises(ConfigError, match=r"moe_overlap.prepare\(model\) after"):
            optimizer.step()
        for got, want in zip(layer.parameters(), before, strict=True):
            same_bits(got.detach(), want)
    prepare(layer)
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()
    return [p.detach() for p in layer.experts.parameters()]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Scaled(nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, weight):
        return weight * self.adapter


@pytest.mark.parametrize("way", ["parametrized", "replaced", "adapted", "copied"])
def test_parameters_that_came_later_do_not_step_alone(way):
    results = gloo_pool(RANKS).run(late_parameters, way)
    for rank in range(SPREAD):
        for got, want in zip(results[rank + SPREAD], results[rank], strict=True):
            same_bits(got, want)


def on_a_mesh_of_their_own():
    model = prepare(Model(mesh()))
    make_unit_of_its_own(model.moe, meshes())
    experts = set(model.shortcut.moe.experts.parameters())
    fully_shard(model, mesh=meshes()["data"], ignored_params=experts)
    loss_of(model, dist.get_rank()).backward()
    with pytest.raises(ConfigError, match=r"ranks \[\d\], and ranks \[(0, 2|1, 3)\] hold"):
        torch.optim.SGD(model.moe.experts.parameters(), lr=0.1, foreach=False).step()


def test_replicas_that_nobody_reduces_do_not_step_alone():
    """A DTensor is left to what sharded it, and that knows one rank here."""
    gloo_pool(RANKS).run(on_a_mesh_of_their_own)


def stepping_without_a_sync():
    layer = prepare(layer_of(2, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with no_sync(layer):
        layer(rows(dist.get_rank())).square().sum().backward()
    with pytest.raises(ConfigError, match="one replica alone"):
        optimizer.step()
    optimizer.zero_grad()
    layer(rows(dist.get_rank())).square().sum().backward()
    optimizer.step()


def test_gradients_of_one_replica_are_not_stepped():
    gloo_pool(RANKS).run(stepping_without_a_sync)


def step_in_backward(inside):
    layer = prepare(layer_of(2, 4))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in layer.experts.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    if inside:
        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step)
    layer(rows(dist.get_rank())).square().sum().backward()
    if not inside:
        for parameter in optimizers:
            step(parameter)
    return [p.detach() for p in layer.experts.parameters()]


def test_an_optimizer_that_steps_inside_backward_waits_for_the_replicas():
    inside, after = (gloo_pool(RANKS).run(step_in_backward, which) for which in (True, False))
    for got, want in zip(inside, after, strict=True):
        for a, b in zip(got, want, strict=True):
            same_bits(a, b)


def groups_that_do_not_fit():
    world, own = dist.group.WORLD, mesh().get_group("experts")
    with pytest.raises(ConfigError, match="holds other ones"):
        MoELayer(D, F, 4, 2, group=own, replicate_group=world)
    with pytest.raises(ConfigError, match="two-dimensional"):
        MoELayer(D, F, 4, 2, group=mesh(), replicate_group=own)
    three = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c"))
    with pytest.raises(ConfigError, match="one dimension"):
        MoELayer(D, F, 4, 2, group=three)
    by_groups = MoELayer(D, F, 4, 2, group=own, replicate_group=mesh()["replicas"])
    assert by_groups.ownership.replicas is layer_of(2, 4).ownership.replicas  # one for all layers of a group


def test_groups_that_do_not_fit():
    gloo_pool(RANKS).run(groups_that_do_not_fit)


# ---------------------------------------------------------------- failures: nobody waits for ever


class Fails(torch.autograd.Function):
    """An identity whose backward fails on one rank."""

    @staticmethod
    def forward(ctx, x, rank):
        ctx.rank = rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if dist.get_rank() == ctx.rank:
            raise RuntimeError("planted")
        return grad, None


def failing_in_backward(where):
    torch.manual_seed(3)
    first, second = (MoELayer(D, F, 4, 2, group=mesh(), dtype=torch.float64, timeout_s=2.0) for _ in range(2))
    replicas_of_own = first.ownership.replicas
    both = (replicas_of_own.transport, replicas_of_own.returning)
    usual_s = both[0].timeout_s
    for transport in both:
        transport.timeout_s = 2.0
    x = rows(0)
    h = first(Fails.apply(x.requires_grad_(), 0) if where == "last" else x)
    h = second(Fails.apply(h, 0) if where == "middle" else h)
    error = "none"
    try:
        h.square().sum().backward()
    except (RuntimeError, MoeTransportError) as caught:
        error = type(caught).__name__
    dist.barrier()
    for layer in (first, second):
        layer.transport.reopen()
    replicas_of_own.reopen()
    for transport in both:
        transport.timeout_s = usual_s
    second(first(rows(0))).square().sum().backward()
    return error, [w.grad for w in (*first.experts.parameters(), *second.experts.parameters())]


@pytest.mark.parametrize("where", ["middle", "last"])
def test_a_rank_that_fails_in_backward_leaves_nobody_waiting(where):
    """And everything can be opened again. In the middle R of the second layer is under way when the first one is never
    reached; at the end all exchanges of rows are over, and only what R still misses can fail elsewhere."""
    results = gloo_pool(RANKS).run(failing_in_backward, where)
    assert results[0][0] == "RuntimeError"
    assert where == "last" or "none" not in [error for error, _ in results]
    for rank in range(SPREAD):
        for got, want in zip(results[rank + SPREAD][1], results[rank][1], strict=True):
            same_bits(got, want)
