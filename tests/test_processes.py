"""The layer over real processes: DistributedDataParallel, groups, a rank that dies, ranks that disagree."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import (
    ConfigError,
    MoELayer,
    PeerFailed,
    PlanMismatch,
    ShortcutBlock,
    TransportClosed,
    TransportTimeout,
    prepare,
)
from tests.layers import Op
from tests.ranks import Ranks, gloo_pool
from tests.tolerances import close, same_bits

D, F, E, K = 16, 24, 8, 2


class Model(nn.Module):
    """Two dense ops, a layer, a shortcut block."""

    def __init__(self, group, schedule="chunked(2)"):
        super().__init__()
        torch.manual_seed(5)
        factory = {"dtype": torch.float64, "group": group}
        self.first = Op()
        self.moe = MoELayer(D, F, E, K, schedule=schedule, **factory)
        shared = nn.Linear(D, D, bias=False, dtype=torch.float64)
        self.block = ShortcutBlock(
            [Op(), Op()], MoELayer(D, F, E, 1, **factory), tap=1, slot=1, shared_expert=shared, combine="gated"
        )

    def forward(self, x):
        h = self.first(x)
        return self.block(h + self.moe(h))


def tokens(rank, count=7):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def ddp_gradients(options, steps):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Model(dist.group.WORLD)
    prepare(model)
    wrapped = DistributedDataParallel(model, **options)
    for step in range(steps):
        wrapped(tokens(rank + world * step)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"bucket_cap_mb": 0.0001}])
def test_all_gradients_under_ddp_are_those_of_a_single_process(options):
    world, steps = 2, 2
    reference = Model(None)
    for step in range(steps):
        losses = [reference(tokens(rank + world * step)).square().mean() for rank in range(world)]
        (sum(losses) / world).backward()
    want = {name: p.grad for name, p in reference.named_parameters()}
    results = gloo_pool(world).run(ddp_gradients, options, steps)
    for name, grad in want.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            close(torch.cat([r[name] for r in results]), grad)
        else:
            for result in results:
                close(result[name], grad)
            same_bits(results[0][name], results[1][name])


def bad_groups():
    rank = dist.get_rank()
    only_zero = dist.new_group([0])
    with pytest.raises(ConfigError, match="group") if rank else nullcontext():
        MoELayer(D, F, E, K, group=only_zero)
    mesh = init_device_mesh("cpu", (1, 1, 2))
    with pytest.raises(ConfigError, match="group"):
        MoELayer(D, F, E, K, group=mesh)
    with pytest.raises(ConfigError):
        MoELayer(D, F, E, K, group="world")
    model = Model(init_device_mesh("cpu", (2,)))
    return model(tokens(rank)).detach(), Model(dist.group.WORLD)(tokens(rank)).detach()


def test_groups_meshes_and_what_is_refused():
    for by_mesh, by_group in gloo_pool(2).run(bad_groups):
        same_bits(by_mesh, by_group)


def compiled():
    torch.manual_seed(1)
    layer = MoELayer(D, F, E, K, group=dist.group.WORLD, schedule="chunked(2)")
    before, after = nn.Linear(D, D), nn.Linear(D, D)

    def model(x):
        return after(layer(before(x).relu()).relu())

    x = tokens(dist.get_rank()).float()
    graphs = []
    y = torch.compile(model, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])(x)
    y.sum().backward()
    assert layer.experts.down_proj.grad is not None
    return len(graphs), float((y - model(x)).detach().abs().max())


def test_with_a_group_compile_breaks_the_graph_once():
    """One graph before the layer, one after it."""
    for graphs, difference in gloo_pool(2).run(compiled):
        assert graphs == 2 and difference < 1e-5


def disagreeing():
    rank = dist.get_rank()
    layer = MoELayer(D, F, E, K, group=dist.group.WORLD, schedule=f"chunked({2 + rank})", dtype=torch.float64)
    with pytest.raises(PlanMismatch, match="chunks"):
        layer(tokens(rank))
    with pytest.raises(PlanMismatch):
        MoELayer(D, F, E, K + rank, group=dist.group.WORLD)(tokens(rank).float())
    fine = MoELayer(D, F, E, K, group=dist.group.WORLD, dtype=torch.float64)
    with pytest.raises(ConfigError) as caught:
        fine(tokens(rank).float() if rank else tokens(rank))
    assert caught.value.field == "x.dtype"
    return fine(tokens(rank)).shape


def test_ranks_that_disagree_raise_alike_and_go_on():
    assert gloo_pool(2).run(disagreeing) == [torch.Size([7, D])] * 2


def fails_and_reopens():
    """Rank 1 fails in the middle of a step that rank 0 finishes; after reopen both go on, from the same step."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    block = ShortcutBlock(
        [Op(), Op()], MoELayer(D, F, E, 1, group=dist.group.WORLD, dtype=torch.float64), tap=0, slot=1
    )
    before = block(tokens(rank)).detach()
    body = block.backbone[1].forward
    if rank == 1:
        block.backbone[1].forward = lambda h: h @ torch.zeros(1)
    with pytest.raises(RuntimeError):
        for _ in range(3):
            block(tokens(rank))
    with pytest.raises(TransportClosed):
        block(tokens(rank))
    block.backbone[1].forward = body
    block.moe.transport.reopen()
    same_bits(block(tokens(rank)).detach(), before)
    return block.moe.dispatcher.steps


def test_a_failed_layer_goes_on_after_reopen():
    assert gloo_pool(2).run(fails_and_reopens) == [1, 1]


LAST_ACTIONS = {"forward": "C1", "backward": "Dt1", "metadata": "M", "metadata of backward": "Mt"}


def dies_in_the_middle(victim, phase):
    """The victim is killed by its own hand in the middle of an exchange; the others say what they saw, and when."""
    rank = dist.get_rank()
    layer = MoELayer(256, 64, E, K, group=dist.group.WORLD, schedule="chunked(4)", timeout_s=4.0,
                     dedup="on" if phase.startswith("metadata") else "off")  # fmt: skip
    x = torch.randn(4096, 256).requires_grad_()
    layer(x).sum().backward()
    start, started = layer.transport.start, []

    def start_and_die(*args, action, **kwargs):
        work = start(*args, action=action, **kwargs)
        started.append(action)
        if rank == victim and action == LAST_ACTIONS[phase]:
            os.kill(os.getpid(), signal.SIGKILL)
        return work

    layer.transport.start = start_and_die
    begun_s = time.monotonic()
    try:
        for _ in range(3):
            layer(x).sum().backward()
    except (PeerFailed, TransportTimeout) as error:
        return type(error).__name__, error.peer, time.monotonic() - begun_s
    return "nothing", None, 0.0


@pytest.mark.parametrize(("victim", "phase"), [(1, "forward"), (0, "backward"), (2, "backward"), (1, "metadata"),
                                               (3, "metadata of backward")])  # fmt: skip
def test_a_rank_killed_in_the_middle_of_an_exchange_is_named_by_all_others(victim, phase):
    with Ranks(4) as ranks:
        ranks.start(dies_in_the_middle, victim, phase)
        others = [rank for rank in range(4) if rank != victim]
        for one in ranks.wait(limit_s=40.0, ranks=others):
            assert not one.error, one.text
            name, peer, seconds = one.value
            assert name in ("PeerFailed", "TransportTimeout") and peer == victim, one.value
            assert seconds < 4.0 + 2.0 + 10.0  # the limit, and slack for a loaded machine
