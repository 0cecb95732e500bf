"""Every answer to experts that are wanted more than others, beside every option of a layer and of a job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_overlap as mo
from moe_overlap.errors import ConfigError
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.routing import LinearRouter, LocMoERouter
from tests.layers import D, E, F, K
from tests.tolerances import close

COSTS = mo.nominal_costs(hidden=D, ffn=F, flop_per_s=1e9, inter_bytes_per_s=1e12, intra_bytes_per_s=1e12)
OPTIONS = {
    'schedule="auto"': {"schedule": "auto"},
    'dedup="on"': {"dedup": "on"},
    "hierarchical=True": {"dedup": "on", "hierarchical": True},
    'mode="static"': {"mode": "static", "static_capacity": "no_drop"},
    'expert_offload="host"': {"expert_offload": "host", "schedule": "chunked(2,experts)"},
}
# The last two: replicas of experts, over ranks with other tokens, reduced by the layer or sharded by FSDP2.
JOBS = ("torch.compile", "DDP", "FSDP2", "replicas", "FSDP2 over replicas")
ANSWERS = ("LocMoE", "LossFreeBalancer", "kept copies", "migrate", "ReplicationRule", "ParallelismSwitch")


def router_of(answer):
    torch.manual_seed(7)
    if answer == "LocMoE":
        return LocMoERouter(D, num_experts=E, top_k=K, mu=0.1, locality_bias=2, aux_loss_coef=0.1)
    router = LinearRouter(D, E, K, score="sigmoid", bias=True)
    with torch.no_grad():
        router.weight[0] += 0.5  # expert 0 is wanted more
    return router


def make(answer, world, **options):
    """A layer of this rank; two nodes."""
    router = router_of(answer)
    torch.manual_seed(3)
    return mo.MoELayer(D, F, E, K, router=router, ranks_per_node=max(1, world // 2), **options)


def placements(world):
    """Homes in order with one copy, and homes that moved."""
    each = E // world
    homes = [list(range(each * rank, each * rank + each)) for rank in range(world)]
    copied = Placement.of_ranks([*homes[:-1], [*homes[-1], 0]], homes=Placement.of_ranks(homes).home_ranks,
                                selector=LocalFirst())  # fmt: skip
    moved = [[homes[1][0], *homes[0][1:]], [homes[0][0], *homes[1][1:]], *homes[2:]]
    return copied, Placement.of_ranks(moved)


def placement_of(answer, world):
    """The layer's option for copies that are kept."""
    return {"placement": placements(world)[0]} if answer == "kept copies" else {}


def tokens(rank):
    return torch.randn(24, D, generator=torch.Generator().manual_seed(rank)) + 0.5


def acted(answer, layer, model, world, optimizer):
    """Put the answer into the layer; what it takes to be seen to act afterwards."""
    per_node = max(1, world // 2)
    _, moved = placements(world)
    if answer == "kept copies":
        return lambda: layer.last_exchange.seats.has_copies
    if answer == "migrate":
        mo.migrate(model, moved, optimizer)
        return lambda: layer.dispatcher.placement.home_ranks == moved.home_ranks
    if answer == "LossFreeBalancer":
        balancer, before = mo.LossFreeBalancer(layer, update_rate=0.1), layer.router.expert_bias_E.clone()
        return lambda: bool(balancer.step() is None and (layer.router.expert_bias_E != before).any())
    if answer == "LocMoE":
        return lambda: bool(layer.router.locality_bias.weight.grad.abs().sum() > 0)
    if answer == "ReplicationRule":
        rule = mo.ReplicationRule(phases=COSTS, spare=2, ranks_per_node=per_node)
    else:
        rule = mo.ParallelismSwitch(phases=COSTS, degrees=[world], ranks_per_node=per_node)
    layer.dispatcher.rule = rule
    return lambda: layer.last_exchange.seats.has_copies


def step_of(model, layer, rank):
    """(y, the gradient of x, those of this rank's experts) of a step."""
    x = tokens(rank).requires_grad_()
    y = model(x)
    (y.square().sum() + mo.aux_loss(model)).backward()
    grads = [weight.grad for weight in layer.experts.parameters()]
    return y.detach(), x.grad, [one.full_tensor() if hasattr(one, "device_mesh") else one for one in grads]


def compare(answer, found, want):
    """Experts that moved have their gradients elsewhere."""
    close(found[0], want[0])
    close(found[1], want[1])
    for one, other in zip(found[2], want[2], strict=True) if answer != "migrate" else ():
        close(one, other)


def beside_option(me, answer, option):
    """Whether the answer acts in a layer with an option, the numbers being those of a layer with neither."""
    world = me.world_size
    plain = make(answer, world, transport=me.transport())
    want = step_of(plain, plain, me.rank)
    layer = make(answer, world, transport=me.transport(), **placement_of(answer, world), **OPTIONS[option])
    seen = acted(answer, layer, layer, world, torch.optim.Adam(layer.parameters()))
    compare(answer, step_of(layer, layer, me.rank), want)
    return seen()


def beside_job(answer, job):
    """The same in processes of their own, wrapped as a training job does; see `JOBS`."""
    ranks, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    if "replicas" in job:
        group = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "experts"))
    world = ranks // 2 if "replicas" in job else ranks
    plain = make(answer, world, group=group)
    want = step_of(mo.prepare(nn.Sequential(plain)), plain, rank)
    layer = make(answer, world, group=group, **placement_of(answer, world))
    model = run = mo.prepare(nn.Sequential(layer))
    optimizer = torch.optim.Adam(mo.param_groups(model))
    if job == "DDP":
        run = DistributedDataParallel(model)
    elif job == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=set(layer.experts.parameters()))
        optimizer = torch.optim.Adam(mo.param_groups(model))
    elif job == "FSDP2 over replicas":
        data = init_device_mesh("cpu", (ranks,))
        fully_shard(layer.router, mesh=data)
        fully_shard(layer, mesh=group["replicas"])
        fully_shard(model, mesh=data)
        optimizer = torch.optim.Adam(mo.param_groups(model))
    elif job == "torch.compile":
        run = torch.compile(model, backend="eager")
    seen = acted(answer, layer, model, world, optimizer)
    compare(answer, step_of(run, layer, rank), want)
    optimizer.step()
    return seen()


def said(answer, beside, act, *args):
    """What the table says: "yes" where the answer acts beside something, "no" where that is refused."""
    try:
        assert act(*args, answer, beside), f"{answer} did nothing beside {beside}"
    except (ConfigError, NotImplementedError):
        return "no"
    return "yes"


def row_of_option(me, option):
    return [said(answer, option, beside_option, me) for answer in ANSWERS]


def row_of_job(job):
    return [said(answer, job, beside_job) for answer in ANSWERS]
