"""FSDP2 (`fully_shard`) around both kinds of layers, in every checkpoint mode.

Expert weights are spread over the ranks already. Sharding them again over the ranks of the layer's group would take
slices of different experts for slices of one tensor. What is right, always after `prepare(model)`, which
scales their gradients like the mean that FSDP makes of all others:

- "ignored": `fully_shard(unit, ignored_params=expert weights)`. They stay plain tensors, whatever the unit.
- "own_unit": the layer as a unit on a mesh of this rank alone, after its router and its shared expert went to the
  data-parallel mesh. All parameters are DTensors then, which optimizers and checkpoints like better.
- "own_mesh": the same by `shard_placement_fn`, which can give the parameters of one unit different meshes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_overlap import ConfigError, MoELayer, clip_grad_norm_, param_groups, prepare
from tests.parallel.expected import WORLD, check_averaged, unwrapped
from tests.parallel.model import EXPERTS, MODES, D, F, Model, loss_of, meshes, train, whole
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

UNITS = ("layer", "block", "checkpointed_block", "root")
WAYS = [(unit, experts) for unit in UNITS for experts in ("ignored", "own_mesh")] + [("layer", "own_unit")]


def units_of(model: Model, unit: str) -> list[nn.Module]:
    """The modules that become units, from the inside out. A checkpoint lies inside a shell and outside its block."""
    inner = {
        "layer": [model.moe],
        "block": [shell.block for shell in model.shells],
        "checkpointed_block": list(model.shells),
        "root": [],
    }
    return [*inner[unit], model]


def make_unit_of_its_own(layer: MoELayer, mesh: DeviceMesh) -> None:
    """The layer's experts on a mesh of this rank alone, the rest of it on the data-parallel mesh."""
    for child in layer.children():
        if child is not layer.experts:
            fully_shard(child, mesh=mesh["data"])
    fully_shard(layer, mesh=mesh["own"])


def shard(model: Model, unit: str, experts: str, **options: Any) -> None:
    """`options` go to every call of fully_shard."""
    mesh = meshes()
    weights = model.expert_parameters()
    if experts == "own_unit":
        make_unit_of_its_own(model.moe, mesh)
        fully_shard(model, mesh=mesh["data"], ignored_params=set(model.shortcut.moe.experts.parameters()))
        return
    if experts == "ignored":
        options["ignored_params"] = weights
    else:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

        own = ShardPlacementResult(Shard(0), FSDPMeshInfo(mesh["own"], shard_mesh_dim=0))
        options["shard_placement_fn"] = lambda parameter: own if parameter in weights else None
    for module in units_of(model, unit):
        fully_shard(module, mesh=mesh["data"], **options)


def run(mode, times, batches, unit, experts, plan="by_hand"):
    model = Model(dist.group.WORLD, mode, times=times, plan=plan)
    prepare(model)
    shard(model, unit, experts)

    @contextmanager
    def unsynchronised() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return train(model, dist.get_rank(), batches=batches, unsynchronised=unsynchronised)


def has_own_meshes() -> bool:
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(("unit", "experts"), WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_averaged_gradients(mode, unit, experts):
    if experts == "own_mesh" and not has_own_meshes():
        pytest.skip("this torch has one mesh per unit")
    check_averaged(gloo_pool(WORLD).run(run, mode, 1, 1, unit, experts))


@pytest.mark.parametrize(("times", "batches"), [(2, 1), (1, 2)], ids=["twice", "accumulated"])
@pytest.mark.parametrize(("unit", "experts"), [way for way in WAYS if way[1] != "own_mesh"])
@pytest.mark.parametrize("mode", MODES)
def test_blocks_used_twice_and_accumulation(mode, unit, experts, times, batches):
    """The first micro-batch is not synchronised. Not both at once: FSDP then reduces the first micro-batch in the
    middle of the second, which is another order of sums."""
    check_averaged(gloo_pool(WORLD).run(run, mode, times, batches, unit, experts), times, batches)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("unit", "experts"), [("block", "ignored"), ("layer", "own_unit")])
@pytest.mark.parametrize("mode", MODES)
def test_averaged_gradients_where_rows_are_deduplicated(mode, unit, experts, batches):
    results = gloo_pool(WORLD).run(run, mode, 1, batches, unit, experts, "deduplicated")
    check_averaged(results, 1, batches, unwrapped(1, batches, "deduplicated"))


def clip_and_step(experts):
    """(norm of all gradients, weights after one clipped step), as docs/parallel.md says."""
    model = Model(dist.group.WORLD)
    prepare(model)
    shard(model, "block", experts)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9, foreach=True)
    loss_of(model, dist.get_rank()).backward()
    norm = clip_grad_norm_(model.parameters(), 0.5, foreach=True)
    optimizer.step()
    return norm, {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("experts", ["ignored", "own_mesh"])
def test_a_clipped_step_is_that_of_a_single_process(experts):
    if experts == "own_mesh" and not has_own_meshes():
        pytest.skip("this torch has one mesh per unit")
    model = Model(None)
    (sum(loss_of(model, rank) for rank in range(WORLD)) / WORLD).backward()
    want = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    results = gloo_pool(WORLD).run(clip_and_step, experts)
    for norm, weights in results:
        close(norm, want)
        assert norm > 1, "clipped"
        for name, parameter in model.named_parameters():
            if not name.endswith(EXPERTS):
                close(weights[name], parameter.detach())
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERTS):
            close(torch.cat([weights[name] for _, weights in results]), parameter.detach())


def reentrant():
    model = Model(dist.group.WORLD, "reentrant")
    shard(model, "block", "ignored")
    loss = loss_of(model, dist.get_rank())
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        loss.backward()


def test_a_reentrant_checkpoint_is_refused():
    gloo_pool(WORLD).run(reentrant)


def layer_of_a_shortcut_block(mode):
    """The layer inside a ShortcutBlock as a unit of its own."""
    model = Model(dist.group.WORLD, mode)
    prepare(model)
    mesh = meshes()
    make_unit_of_its_own(model.shortcut.moe, mesh)
    fully_shard(model, mesh=mesh["data"], ignored_params=set(model.moe.experts.parameters()))
    return train(model, dist.get_rank())


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_of_a_shortcut_block_as_its_own_unit(mode):
    check_averaged(gloo_pool(WORLD).run(layer_of_a_shortcut_block, mode))


def added_in_place(batched):
    model = Model(dist.group.WORLD)
    prepare(model)
    block = model.shells[0].block

    def forward(h):
        h = block.op(h)
        y = block.moe(h[None] if batched else h)
        y += h
        return y[0] if batched else y

    block.forward = forward
    shard(model, "layer", "ignored")
    return train(model, dist.get_rank())


@pytest.mark.parametrize("batched", [False, True])
def test_the_output_of_a_unit_may_be_changed_in_place(batched):
    """Were it a view, FSDP's hook on it would be lost, and backward would find the weights gone."""
    check_averaged(gloo_pool(WORLD).run(added_in_place, batched))


def experts_over_their_own_ranks():
    model = Model(dist.group.WORLD)
    with pytest.raises(ConfigError, match="ignored_params"):
        for module in units_of(model, "block"):
            fully_shard(module, mesh=meshes()["data"])
        loss_of(model, dist.get_rank())


def test_experts_sharded_over_the_ranks_they_are_spread_over_are_refused():
    """Each rank would compute with slices of both ranks' experts, and nothing would tell."""
    gloo_pool(WORLD).run(experts_over_their_own_ranks)


def experts_alone():
    model = Model(dist.group.WORLD)
    prepare(model)
    fully_shard(model.moe.experts, mesh=meshes()["own"])
    with pytest.raises(ConfigError, match="not its experts alone"):
        loss_of(model, dist.get_rank())


def test_experts_as_a_unit_without_their_layer_are_refused():
    """The layer does not call them, so nobody would gather their weights."""
    gloo_pool(WORLD).run(experts_alone)


class Foreign(nn.Module):
    """Experts of another class."""

    activation = "relu"

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.ones(4, F, D)), nn.Parameter(torch.ones(4, D, F))


def given_experts_over_the_ranks() -> None:
    experts = Foreign()
    fully_shard(experts, mesh=meshes()["data"])
    with pytest.raises(ConfigError, match="hold other experts"):
        MoELayer(D, F, 8, 2, group=dist.group.WORLD, experts=experts)


def test_given_experts_that_are_sharded_over_their_ranks_are_refused():
    gloo_pool(WORLD).run(given_experts_over_the_ranks)


def start_from_meta(own: bool) -> None:
    """Replicas of a layer of one rank, sharded over both ranks, or a layer of both with its experts on its own mesh."""
    group = dist.group.WORLD if own else None
    eager = MoELayer(D, F, 8, 2, group=group)
    with torch.device("meta"):
        layer = MoELayer(D, F, 8, 2, group=group)
    if own:
        make_unit_of_its_own(layer, meshes())
    else:
        fully_shard(layer, mesh=meshes()["data"])
    layer.to_empty(device="cpu")
    for one in (eager, layer):
        torch.manual_seed(5)
        one.experts.reset_parameters()
    for got, want in zip(layer.experts.parameters(), eager.experts.parameters(), strict=True):
        assert isinstance(got, DTensor)
        same_bits(got.full_tensor(), want.detach())


@pytest.mark.parametrize("own", [True, False])
def test_sharded_experts_start_as_whole_ones(own):
    gloo_pool(WORLD).run(start_from_meta, own)
