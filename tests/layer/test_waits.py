"""What the host waits for in a layer's step on a GPU: the counts, once in a forward, and nothing in backward.

On a device that is played (`tests/played_device.py`); `tests/gpu/test_gpu_layer.py` asks a real one.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.agreement import common
from tests.layers import D, E, F, K, tokens
from tests.played_device import Played, Wait, Watch, play, play_module, playing
from tests.ranks import virtual_world
from tests.tolerances import close

COUNTS = (37, 0, 24, 16)
ALONE = SimpleNamespace(rank=0)

SCHEDULES = ("serial", "chunked(4)", "chunked(3,experts)", "shared_expert(0)", "shared_expert(ahead)")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dedup": {"dedup": "on"},
    "hierarchical": {"dedup": "on", "hierarchical": True, "ranks_per_node": 2},
}


def look(grad: torch.Tensor) -> None:
    play(grad).sum().tolist()


class Reading(nn.Module):
    """A shared expert that has the host look at its numbers, in forward or in backward."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.when == "forward":
            x_TD.sum().item()
        elif self.when == "backward":
            x_TD = x_TD * 1.0
            x_TD.register_hook(look)
        else:
            x_TD = x_TD + torch.zeros(x_TD.shape, dtype=x_TD.dtype).to("cuda", non_blocking=True)
        return x_TD


def layer_of(me: Any, world: int, options: dict[str, Any]) -> nn.Module:
    transport = me.transport() if world > 1 else None
    torch.manual_seed(7)
    block = options.pop("block", None)
    layer: nn.Module = MoELayer(D, F, E, K, transport=transport, dtype=torch.float32, **options)
    if block is not None:
        layer = ShortcutBlock([nn.Linear(D, D) for _ in range(3)], layer, tap=1, **block)
    return layer


def step(world: int, options: dict[str, Any], watch: Watch | None) -> list[list[torch.Tensor]]:
    """(y, dx, gradients of the weights) of each rank, on the played device where `watch` is there."""

    def run(me: Any) -> list[torch.Tensor]:
        layer = layer_of(me, world, dict(options))
        x, dy = (tokens(COUNTS[me.rank], seed + me.rank, torch.float32) for seed in (0, 10))
        if watch is None:
            layer(x.requires_grad_()).backward(dy)
        else:
            play_module(layer)
            play(x).requires_grad_()
            with watch:
                watch.backward(layer(x), play(dy))
        grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        return [torch.Tensor._make_subclass(torch.Tensor, grad) for grad in grads if grad is not None]

    return [run(ALONE)] if world == 1 else virtual_world(world, seed=1).run(run)


def watched(world: int, options: dict[str, Any]) -> Watch:
    with playing(Watch()) as watch:
        have = step(world, options, watch)
    for mine, should in zip(have, step(world, options, None), strict=True):
        assert len(mine) == len(should) > 3
        for one, other in zip(mine, should, strict=True):
            close(one, other)
    return watch


def options_of(schedule: str, kind: str) -> dict[str, Any]:
    shared = {"shared_expert_size": F} if "shared" in schedule else {}
    return {"schedule": schedule, **KINDS[kind], **shared}


CASES = [
    (schedule, kind) for schedule in SCHEDULES for kind in KINDS if "experts" not in schedule or kind != "hierarchical"
]


@pytest.mark.parametrize("schedule, kind", CASES)
def test_ranks_read_the_counts_and_nothing_else(schedule: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CLASSES", (*common.CLASSES, Played))  # weights are compared in a first call
    watch = watched(4, options_of(schedule, kind))
    assert watch.waits == [Wait("cpu", "counts.py", backward=False)] * 4
    assert watch.uploads == 4  # the integers of all chunks of both halves


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_reads_once(schedule: str) -> None:
    (wait,) = watched(1, options_of(schedule, "plain")).waits
    assert not wait.backward and wait.file in ("counts.py", "arguments.py")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "block", [{"slot": 1}, {"slot": 1, "chunks": 2, "backward_chunks": 3}, {"slot": 1, "ahead": 1}]
)
def test_a_block_reads_once(world: int, block: dict[str, int]) -> None:
    assert [wait.file for wait in watched(world, {"block": block}).waits] == ["counts.py"] * world


@pytest.mark.parametrize("when", ["forward", "backward", "copy"])
def test_a_planted_wait_is_found(when: str) -> None:
    shared = {"schedule": "shared_expert(0)", "shared_expert": Reading(when)}
    with playing(Watch()) as watch:
        step(2, shared, watch)
    found = Counter((wait.what, wait.backward) for wait in watch.waits if wait.file != "counts.py")
    what = {"forward": "item", "backward": "tolist", "copy": "a copy from pageable memory"}[when]
    assert found == {(what, when == "backward"): 2}


def test_a_host_tensor_among_operands_is_refused() -> None:
    with playing(Watch()) as watch, watch, pytest.raises(AssertionError, match="a host tensor among operands"):
        play(torch.ones(3)) + torch.ones(3)
