"""A small model whose ranks share one global batch, so that runs on any number of ranks are alike, and its states.

Linear -> MoELayer(E = 12, K = 2, shared expert) -> Linear
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import moe_overlap
from moe_overlap import MoELayer, prepare

D, F, E, TOKENS = 8, 12, 12, 12
EXPERTS = ("1.experts.gate_up_proj", "1.experts.down_proj")
WRAPS = ("plain", "ddp", "fsdp")
WRAPPERS = ("bare", "ddp", "compiled", "checkpointed", "fsdp", "fsdp_own", "averaged", "deepcopied")
OPTIMIZERS = ("adamw", "sgd")


def model_of(group: Any, seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    factory: dict[str, Any] = {"dtype": torch.float64}
    layer = MoELayer(D, F, E, 2, group=group, shared_expert_size=F, **factory)
    return nn.Sequential(nn.Linear(D, D, **factory), layer, nn.Linear(D, D, **factory))


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """With tensors for every parameter. Experts are a group of their own, as foreach wants where meshes differ."""
    groups = moe_overlap.param_groups(model, expert={"lr": 0.02})
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.01)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


class Job:
    """One rank of a training job: the model, wrapped, and its optimizer. `group`: of the layer; None on one rank.

    grid: (replicas, ranks of the experts), for expert parallel in data parallel; wrap "fsdp" has all but the experts
    sharded over all ranks, "fsdp_replicas" the experts over their replicas as well.
    """

    def __init__(self, wrap: str, kind: str, *, seed: int = 3, grid: tuple[int, int] | None = None) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if world > 1 else 0
        self.world, self.wrap = world, wrap
        group: Any = dist.group.WORLD if world > 1 else None
        if grid is not None:
            group = init_device_mesh("cpu", grid, mesh_dim_names=("replicas", "experts"))
        self.model = model_of(group, seed)
        prepare(self.model)
        self.call: nn.Module = self.model
        if wrap == "ddp" and world > 1:
            self.call = DistributedDataParallel(self.model)
        if wrap.startswith("fsdp") and world > 1:
            experts = set(self.model[1].experts.parameters())
            if wrap == "fsdp_replicas":
                mesh = init_device_mesh("cpu", (world,))
                for unit in (self.model[1].router, self.model[1].shared_expert):
                    fully_shard(unit, mesh=mesh)
                fully_shard(self.model[1], mesh=group["replicas"])
                experts = set(self.model[1].experts.parameters())
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world,)), ignored_params=experts)
        self.optimizer = optimizer_of(self.model, kind)

    def step(self, number: int) -> None:
        """On this rank's part of the global batch of that number."""
        x = torch.randn(TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.call(x.chunk(self.world)[self.rank]).square().mean().backward()
        if self.wrap == "plain" and self.world > 1:
            experts = set(self.model[1].experts.parameters())
            for parameter in self.model.parameters():
                if parameter not in experts:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": moe_overlap.optimizer_state_dict(self.model, self.optimizer),
        }

    def save(self, folder: str) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        moe_overlap.load_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def whole(self) -> dict[str, dict[str, Any]]:
        """The state with whole tensors, copied; numbers as they are."""
        return {part: whole(state) for part, state in self.state().items()}


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of a flat state dict whole, and a copy."""
    found = {}
    for name, value in state.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        found[name] = value.detach().clone() if isinstance(value, Tensor) else value
    return found


def wrapped(kind: str, seed: int = 3) -> nn.Module:
    """The model in one of the wrappers, with its experts spread over all ranks."""
    model = model_of(dist.group.WORLD, seed)
    prepare(model)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("own", "data"))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "checkpointed":
        model[1] = checkpoint_wrapper(model[1])
    if kind == "fsdp":
        return fully_shard(model, mesh=mesh["data"], ignored_params=set(model[1].experts.parameters()))
    if kind == "fsdp_own":
        for child in (model[1].router, model[1].shared_expert):
            fully_shard(child, mesh=mesh["data"])
        fully_shard(model[1], mesh=mesh["own"])
        return fully_shard(model, mesh=mesh["data"])
    if kind == "averaged":
        return AveragedModel(model)
    return copy.deepcopy(model) if kind == "deepcopied" else model


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """What torch.load makes of what torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
