"""Four virtual ranks on one card: orders and offsets of a layer on a device, without any communication library."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moe_overlap import MoELayer
from moe_overlap.transport import VirtualRank
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

pytestmark = pytest.mark.gpu

RANKS, D, F, E, K = 4, 64, 96, 8, 3
TOKENS = (50, 0, 33, 7)


def drawn(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Values that every dtype has, so that all routers choose alike; float64."""
    return torch.randn(*shape, generator=generator).bfloat16().double()


def rank_results(
    me: VirtualRank, device: str, dtype: torch.dtype, schedule: str, dedup: str, overlap: bool
) -> list[torch.Tensor]:
    """y, the gradient of x and of this rank's experts."""
    layer = MoELayer(D, F, E, K, transport=me.transport(), schedule=schedule, dedup=dedup, overlap=overlap, dtype=dtype)
    local = E // RANKS
    held = slice(local * me.rank, local * (me.rank + 1))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            of_expert = name.startswith("experts.")
            shape = (E, *parameter.shape[1:]) if of_expert else parameter.shape
            value = drawn(*shape, generator=generator) * 0.125
            parameter.copy_(value[held] if of_expert else value)
    layer.to(device)
    generator.manual_seed(100 + me.rank)
    x, dy = (drawn(TOKENS[me.rank], D, generator=generator) for _ in range(2))
    x = x.to(device, dtype).requires_grad_()
    y = layer(x)
    y.backward(dy.to(device, dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for name, p in layer.named_parameters() if name.startswith("experts."))]


def results(device: str, dtype: torch.dtype, schedule: str, dedup: str, *, overlap: bool = True) -> list[torch.Tensor]:
    """Of all ranks, one after the other."""
    body = partial(rank_results, device=device, dtype=dtype, schedule=schedule, dedup=dedup, overlap=overlap)
    found = virtual_world(RANKS, seed=3).run(body, timeout_s=150.0)
    return [one.cpu() for rank in found for one in rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_virtual_ranks_on_a_card_are_those_of_the_host(schedule: str, dedup: str, dtype: torch.dtype) -> None:
    got = results("cuda", dtype, schedule, dedup)
    off = results("cuda", dtype, schedule, dedup, overlap=False)
    want = results("cpu", torch.float64, schedule, dedup)
    assert len(got) == len(want) == 4 * RANKS
    for have, joined, should in zip(got, off, want, strict=True):
        same_bits(have, joined)
        close(have, should)
