"""State dicts that were copied, cast, staged or gathered on their way: they are still of one rank, or of all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from moe_overlap import ConfigError, MoELayer
from moe_overlap.parallel.state import WRITE
from tests.parallel.saved import EXPERTS, D, E, F, Job, model_of, whole
from tests.ranks import gloo_pool
from tests.tolerances import same_bits

WORLD = 2
OTHERS = "another rank's file"
COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": torch.Tensor.clone,
    "cpu": torch.Tensor.cpu,
    "cast": lambda value: value.float().double(),
    "deepcopy": copy.deepcopy,
    "times": lambda value: value * 1.0,
    "new": lambda value: torch.empty_like(value).copy_(value),
}


def one_file(path: str, how: str, before: bool) -> None:
    """What rank 0 has saved is refused on rank 1, whether it was copied before it was saved or after it was loaded."""
    model, other, own = (model_of(dist.group.WORLD, seed) for seed in (3, 8, 9))
    copied = {name: COPIES[how](value) for name, value in model.state_dict().items()}
    own.load_state_dict(copied)
    for name in EXPERTS:
        same_bits(own.get_parameter(name).detach().float(), model.get_parameter(name).detach().float())
    if dist.get_rank() == 0:
        torch.save(copied if before else model.state_dict(), path)
    dist.barrier()
    read = torch.load(path, weights_only=True)
    if not before:
        read = {name: COPIES[how](value) for name, value in read.items()}
    if dist.get_rank() == 0:
        other.load_state_dict(read)
    else:
        with pytest.raises(ConfigError, match=OTHERS):
            other.load_state_dict(read)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_still_of_one_rank(how, before, tmp_path):
    gloo_pool(WORLD).run(one_file, str(tmp_path / "file"), how, before)


def optimizer_file(path: str, how: str) -> None:
    job = Job("plain", "adamw")
    job.step(0)
    state = job.optimizer.state_dict()
    for one in state["state"].values():
        one.update({key: COPIES[how](value) for key, value in one.items()})
    if job.rank == 0:
        torch.save(state, path)
    dist.barrier()
    for fresh in (True, False):
        other = Job("plain", "adamw", seed=8)
        if not fresh:
            other.step(1)
        read = torch.load(path, weights_only=True)
        if job.rank == 0:
            other.optimizer.load_state_dict(read)
            continue
        with pytest.raises(ConfigError, match=OTHERS):
            other.optimizer.load_state_dict(read)
            for parameter in other.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            other.optimizer.step()
    other = Job("plain", "adamw", seed=8)
    other.optimizer.load_state_dict(state)
    job.step(1)
    other.model.load_state_dict(job.model.state_dict())
    for one in (job, other):
        one.step(2)
    assert type(other.optimizer.state[other.model[1].experts.down_proj]["exp_avg"]) is torch.Tensor


@pytest.mark.parametrize("how", ["clone", "deepcopy", "times"])
def test_a_copy_of_an_optimizers_state(how, tmp_path):
    gloo_pool(WORLD).run(optimizer_file, str(tmp_path / "file"), how)


def on_all_ranks() -> None:
    model, other = model_of(dist.group.WORLD), model_of(dist.group.WORLD, 8)
    state = model.state_dict()
    everywhere = {
        name: value.redistribute(placements=[Replicate()]) if isinstance(value, DTensor) else value
        for name, value in state.items()
    }
    other.load_state_dict(everywhere)
    same_bits(other[1].experts.down_proj, model[1].experts.down_proj)
    mesh = init_device_mesh("cpu", (WORLD,))
    elsewhere = {  # as another model of all experts has it under FSDP2
        name: torch.distributed.tensor.distribute_tensor(value, mesh) if name in EXPERTS else value
        for name, value in whole(state).items()
    }
    other = model_of(dist.group.WORLD, 8)
    other.load_state_dict(elsewhere)
    same_bits(other[1].experts.down_proj, model[1].experts.down_proj)


def test_dtensors_of_other_kinds():
    gloo_pool(WORLD).run(on_all_ranks)


def another_model(path: str) -> None:
    """With more experts, of which a rank's file has those that are wanted."""
    larger, layer = (MoELayer(D, F, experts, 2, group=dist.group.WORLD) for experts in (16, 12))
    state = {name: value for name, value in larger.state_dict().items() if "experts." in name}
    torch.save(state, f"{path}-{dist.get_rank()}")
    dist.barrier()
    for read in (state, torch.load(f"{path}-0", weights_only=True)):
        with pytest.raises((ConfigError, RuntimeError), match=f"size mismatch|{OTHERS}"):
            layer.load_state_dict(read, strict=False)


def test_experts_of_another_model_are_refused(tmp_path):
    gloo_pool(WORLD).run(another_model, str(tmp_path / "file"))


class App(Stateful):
    """As torch's tutorial of distributed checkpoints has it."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.job.call, self.job.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(self.job.call, self.job.optimizer, model_state_dict=state_dict["model"],
                       optim_state_dict=state_dict["optimizer"])  # fmt: skip


def save_app(folder: str, wrap: str, how: str) -> dict[str, Any]:
    job = Job(wrap, "adamw")
    job.step(0)
    if how == "async":
        dcp.async_save({"app": App(job)}, checkpoint_id=folder).result()
    else:
        dcp.save({"app": App(job)}, checkpoint_id=folder)
    return job.whole()


def load_app(folder: str, wrap: str) -> dict[str, Any]:
    job = Job(wrap, "adamw", seed=8)
    dcp.load({"app": App(job)}, checkpoint_id=folder)
    return job.whole()


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(("wrap", "how"), [("ddp", "sync"), ("fsdp", "async")])
def test_stateful_objects_as_torch_recommends_them(wrap, how, m, tmp_path):
    want = gloo_pool(WORLD).run(save_app, str(tmp_path), wrap, how)[0]
    for got in gloo_pool(m).run(load_app, str(tmp_path), wrap):
        for part in ("model", "optimizer"):
            assert got[part].keys() == want[part].keys()
            for name, value in want[part].items():
                if isinstance(value, torch.Tensor):
                    same_bits(got[part][name], value)


def save_model(folder: str) -> None:
    dcp.save(model_of(dist.group.WORLD).state_dict(), checkpoint_id=folder)


def test_torchs_own_conversion_to_a_file_is_whole(tmp_path):
    gloo_pool(WORLD).run(save_model, str(tmp_path / "folder"))
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "file")
    model = model_of(None, 8)
    model.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    for name, value in model_of(None).state_dict().items():
        same_bits(model.state_dict()[name], value)


def offloaded() -> None:
    """Rank 0 alone gets whole tensors, which are then broadcast: as trainers save."""
    job = Job("plain", "adamw")
    job.step(0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(job.model, job.optimizer, options=options)
    assert bool(model) == bool(optimizer["state"] if optimizer else {}) == (job.rank == 0)
    other = Job("plain", "adamw", seed=8)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # Not by set_state_dict, which takes an empty dict for nothing to load (torch 2.13.0), and other ranks wait.
    set_model_state_dict(other.model, model, options=options)
    set_optimizer_state_dict(other.model, other.optimizer, optimizer, options=options)
    want, got = job.whole(), other.whole()
    for part in ("model", "optimizer"):
        for name, value in want[part].items():
            if isinstance(value, torch.Tensor):
                same_bits(got[part][name], value)


def test_whole_states_on_rank_0_only():
    gloo_pool(WORLD).run(offloaded)


def without_memory() -> None:
    want = model_of(None).state_dict()
    with torch.device("meta"):
        model = model_of(dist.group.WORLD)
    model.load_state_dict(want, assign=True)
    weight = model[1].experts.down_proj
    first = dist.get_rank() * E // WORLD
    same_bits(weight.detach(), want["1.experts.down_proj"][first : first + E // WORLD])
    assert weight.untyped_storage().nbytes() == weight.nbytes, "the whole is not kept"
    assert weight.requires_grad and not hasattr(weight, "expert_ids")
    with pytest.raises(ConfigError, match="that does not stand for the whole"):  # as those of a new model
        getattr(weight, WRITE)("down_proj", weight)


def test_a_model_that_gets_its_weights_by_assignment():
    gloo_pool(WORLD).run(without_memory)


def untold() -> None:
    """Replicas that the layer knows, on a mesh that it does not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    layer = MoELayer(D, F, E, 2, group=mesh["experts"], replicate_group=mesh["replicas"])
    model = nn.Sequential(layer)
    fully_shard(layer.router, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(layer, mesh=mesh["replicas"])
    with pytest.raises(ConfigError, match=r"group=mesh with dimensions \(replicas, experts\)"):
        model.state_dict()


def test_experts_sharded_over_replicas_on_a_mesh_that_is_not_known():
    gloo_pool(4).run(untold)


def replica_file(path: str) -> None:
    """A file of a rank whose experts are the same, and whose shards of them are not."""
    job = Job("fsdp_replicas", "sgd", grid=(2, 2))
    state = {name: value for name, value in job.model.state_dict().items() if name in EXPERTS}
    if job.rank == 0:
        torch.save(state, path)
    dist.barrier()
    read = torch.load(path, weights_only=True)
    if job.rank == 0:
        job.model.load_state_dict(read, strict=False)
    else:
        with pytest.raises(ConfigError, match=OTHERS if job.rank % 2 else "replica_0"):
            job.model.load_state_dict(read, strict=False)


def test_the_file_of_another_replica_is_refused(tmp_path):
    gloo_pool(4).run(replica_file, str(tmp_path / "file"))
