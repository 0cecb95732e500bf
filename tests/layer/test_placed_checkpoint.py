"""Checkpoints hold logical experts: saved in one placement, resumed in another one and on another number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_overlap import (
    ConfigError,
    experts_in_order,
    load_optimizer_state_dict,
    migrate,
    optimizer_state_dict,
    save_safetensors,
)
from moe_overlap.placement import Placement
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.layers import make, tokens
from tests.ranks import gloo_pool
from tests.tolerances import same_bits

FIRST = Placement.of_ranks([[7, 1, 2], [0, 3, 4, 5, 6, 7]], homes=[1, 0, 0, 1, 1, 1, 1, 0])
AGAIN = Placement.of_ranks([[6, 5, 4, 0], [3, 7, 2, 1]])
SECOND = Placement.of_ranks([[3, 0], [], [7, 6, 5, 4, 3], [1, 2]], homes=[0, 3, 3, 0, 2, 2, 2, 2])


def trained(placement, steps):
    """On the ranks of the placement, and where there are more of them, on their replicas."""
    spread = placement.world_size
    grid = init_device_mesh("cpu", (dist.get_world_size() // spread, spread), mesh_dim_names=("replicas", "experts"))
    transport = ProcessGroupTransport(grid["experts"], timeout_s=20.0)
    layer = make(transport, placement=placement, replicate_group=grid["replicas"])
    model = nn.Sequential(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(steps):
        x = tokens(9, seed=10 * step + dist.get_rank())
        model(x).square().sum().backward()
        dist.all_reduce(layer.router.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def by_expert(model, optimizer):
    """expert -> its weights and what Adam keeps of them."""
    layer = model[0]
    tensors = [t for w in layer.expert_weights for t in (w, *optimizer.state[w].values()) if t.dim()]
    return {expert: [one[place].detach().clone() for one in tensors]
            for place, expert in enumerate(layer.experts.expert_ids)}  # fmt: skip


def save(folder):
    """In the first placement, over 2 ranks or 2 x 2."""
    model, optimizer = trained(FIRST, 3)
    before = by_expert(model, optimizer)
    with experts_in_order(model, optimizer):
        dcp.save(
            {"model": model.state_dict(), "optimizer": optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
        )
    after = by_expert(model, optimizer)
    assert before.keys() == after.keys() and model[0].dispatcher.placement.digest == FIRST.digest
    for expert, tensors in before.items():
        for one, other in zip(tensors, after[expert], strict=True):
            same_bits(one, other)
    return before


def load(folder, placement):
    model, optimizer = trained(placement, 1)
    with experts_in_order(model, optimizer):
        state = {"model": model.state_dict(), "optimizer": optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        load_optimizer_state_dict(model, optimizer, state["optimizer"])
    found = by_expert(model, optimizer)
    migrate(model, Placement.identity(8, placement.world_size), optimizer)
    model(tokens(5)).sum().backward()
    return found


@pytest.mark.parametrize(("first", "then", "placement"), [(2, 4, SECOND), (4, 4, SECOND), (4, 4, AGAIN), (4, 2, AGAIN),
                                                          (2, 4, AGAIN)])  # fmt: skip
def test_others_resume_in_another_placement(tmp_path, first, then, placement):
    """On another number of ranks, too, or of replicas."""
    saved = {expert: tensors for one in gloo_pool(first).run(save, str(tmp_path)) for expert, tensors in one.items()}
    loaded = gloo_pool(then).run(load, str(tmp_path), placement)
    assert list(range(8)) == sorted(saved)
    assert sorted([*saved] * (then // placement.world_size)) == sorted(expert for one in loaded for expert in one)
    for one in loaded:
        for expert, tensors in one.items():
            assert len(tensors) == 6
            for mine, wanted in zip(tensors, saved[expert], strict=True):
                same_bits(mine, wanted)


def whole_files(folder):
    """What each rank is told when it writes a whole model whose experts have moved, evenly and not, and what is written
    where they are in order. Rank 0 holds the first experts in both: it has to refuse for the sake of the others."""
    model, optimizer = trained(Placement.identity(8, dist.get_world_size()), 1)
    told = []
    for homes in ([0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 2, 1, 2, 3, 3]):
        migrate(model, Placement.of_ranks([[e for e in range(8) if homes[e] == rank] for rank in range(4)]), optimizer)
        with pytest.raises(ConfigError, match="experts_in_order") as refused:
            save_safetensors(model, folder)
        with pytest.raises(dcp.CheckpointException, match="experts_in_order"):
            dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
        told.append(str(refused.value))
    with experts_in_order(model, optimizer):
        save_safetensors(model, folder + "/ordered")
    return told


def test_moved_experts_are_refused_by_all_ranks_alike_where_a_file_is_of_the_whole(tmp_path):
    told = gloo_pool(4).run(whole_files, str(tmp_path / "whole"))
    assert all(one == told[0] for one in told)
