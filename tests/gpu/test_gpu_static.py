"""mode="static" on the GPU: never waited for by the host, captured in CUDA graphs, replayed on other inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import moe_overlap
from moe_overlap import CapacityExceeded, MoELayer
from moe_overlap.transport import LocalTransport, StagedTransport, Transport
from tests.tolerances import close, same_bits

pytestmark = pytest.mark.gpu

T, D, F, E, K = 96, 64, 96, 8, 2
SCHEDULES = ("serial", "chunked(4)")


def wire(name: str) -> Transport:
    """A small piece, so that an exchange is in several."""
    return StagedTransport(share=7 / 8, piece_bytes=1 << 14) if name == "staged" else LocalTransport()


def build(
    schedule: str, capacity: float | str = "no_drop", dtype: torch.dtype = torch.float32, transport: str = "local"
) -> MoELayer:
    torch.manual_seed(0)
    drawn = moe_overlap.MoELayer(D, F, E, K)
    layer = moe_overlap.MoELayer(D, F, E, K, schedule=schedule, mode="static", static_capacity=capacity, dtype=dtype,
                                 transport=wire(transport))  # fmt: skip
    layer.load_state_dict(drawn.state_dict())
    return layer.cuda()


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(T, D, generator=generator).to("cuda", dtype) for _ in range(2))
    return x, dy


def step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = [y.detach().clone(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    return found


@contextmanager
def waits_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_after_the_first_never_wait(schedule: str, dtype: torch.dtype) -> None:
    layer = build(schedule, dtype=dtype)
    x, dy = inputs(0, dtype)
    first = step(layer, x, dy)
    with waits_are_errors():
        second = step(layer, x, dy)
    for a, b in zip(first, second, strict=True):
        same_bits(a, b)
    layer.check_static()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_static_is_host_to_tolerance(schedule: str) -> None:
    x, dy = inputs(0)
    torch.manual_seed(0)
    host = moe_overlap.MoELayer(D, F, E, K).double()  # on the CPU
    want = step(host, x.cpu().double(), dy.cpu().double())
    for a, b in zip(step(build(schedule), x, dy), want, strict=True):
        close(a.cpu(), b)


@pytest.mark.parametrize("transport", ["local", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_graphs_of_forward_and_backward_replay_on_other_inputs(
    schedule: str, dtype: torch.dtype, transport: str
) -> None:
    """Steps without a graph run between the replays, over a wire of their own."""
    eager, captured = (build(schedule, dtype=dtype, transport=transport) for _ in range(2))
    x, dy = inputs(0, dtype)
    step(captured, x, dy)  # the first step makes what the graphs hold
    captured = torch.cuda.make_graphed_callables(captured, (x.clone().requires_grad_(),))
    for seed in (1, 2, 3):
        x, dy = inputs(seed, dtype)
        with waits_are_errors():
            got = step(captured, x, dy)
        for a, b in zip(got, step(eager, x, dy), strict=True):
            same_bits(a, b)
    captured.check_static()


def test_steps_and_replays_over_one_wire_take_turns() -> None:
    """Events outside a graph do not reach into it, and a step behind a replay waits for none of its events."""
    layer = build("chunked(4)", transport="staged")
    x, dy = inputs(0)
    step(layer, x, dy)
    want = step(layer, x, dy)
    for _ in range(2):
        graph, y = torch.cuda.CUDAGraph(), torch.empty(0)
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            y.zero_()
            graph.replay()
            same_bits(y, want[0])
            for have, should in zip(step(layer, x, dy), want, strict=True):
                same_bits(have, should)
    layer.check_static()


def test_an_overflow_of_a_replay_is_found() -> None:
    layer = build("chunked(4)", 3.0)  # all logits alike: the first two of eight experts take all, 4 times their share
    x, dy = inputs(0)
    step(layer, x, dy)
    layer.check_static()
    layer = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    layer(x.requires_grad_())
    layer.check_static()
    layer(torch.zeros_like(x).requires_grad_())
    with pytest.raises(CapacityExceeded, match="static_capacity = 4.0 would do"):
        layer.check_static()
    layer(x)
    layer.check_static()
    layer.transport.reopen()
    layer(torch.zeros_like(x).requires_grad_())
    with pytest.raises(CapacityExceeded, match="static_capacity = 4.0 would do"):
        layer.check_static()
