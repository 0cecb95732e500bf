"""Experts in host memory that have replicas: gradients come down, and are reduced on the host."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_overlap import ConfigError, no_sync, prepare
from moe_overlap.parallel import replicas as reducing
from tests.layers import check_same, make, tokens
from tests.ranks import gloo_pool


def groups(ranks: int) -> dict:
    """Of two ranks both hold all experts; four are two replicas of two ranks."""
    if ranks == 2:
        return {"replicate_group": dist.group.WORLD}
    return {"group": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))}


def trained(ranks: int, offload: str | None, *, means: bool) -> list[torch.Tensor]:
    """The weights after three steps of two micro-batches, and the last gradients of the experts."""
    layer = make(schedule="chunked(2,experts)", expert_offload=offload, **groups(ranks))
    if means:
        prepare(layer)
    optimizer = torch.optim.AdamW(layer.experts.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        for batch in range(2):
            x = tokens(7 + dist.get_rank(), seed=10 * step + 2 * dist.get_rank() + batch)
            if batch:
                layer(x).square().mean().backward()
            else:
                with no_sync(layer):
                    layer(x).square().mean().backward()
        optimizer.step()
    assert layer.ownership.replicas is not None
    return [*layer.parameters(), *(weight.grad for weight in layer.expert_weights)]


def same_training(ranks: int, means: bool) -> torch.Tensor:
    with torch.no_grad():
        plain, away = (trained_weights(ranks, offload, means) for offload in (None, "host"))
        check_same(plain, away)
        return away[-1]


def trained_weights(ranks: int, offload: str | None, means: bool) -> list[torch.Tensor]:
    with torch.enable_grad():
        return [one.detach().clone() for one in trained(ranks, offload, means=means)]


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_training_has_the_bits_of_experts_on_the_device(ranks: int, means: bool) -> None:
    found = gloo_pool(ranks).run(same_training, ranks, means)
    assert torch.equal(found[0], found[ranks // 2]), "replicas have the same gradients"


def refused() -> str:
    """By a group whose replicas reduce on a GPU."""
    group = dist.new_group([0, 1])
    known = reducing.replicas_of(group, timeout_s=30.0, device=None)
    assert known is not None
    known.transport.device = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="reduces on the host"):
        make(expert_offload="host", replicate_group=group)
    return "refused"


def test_replicas_that_reduce_on_a_gpu_are_refused() -> None:
    assert gloo_pool(2).run(refused) == ["refused"] * 2
