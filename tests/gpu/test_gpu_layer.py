"""A layer on the GPU: its schedule forward and backward, overlap on and off, and times by the stream's clock."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import moe_overlap
from moe_overlap.measure.timeline import record
from moe_overlap.schedule.run import Step
from tests.tolerances import close, same_bits

pytestmark = pytest.mark.gpu


def results(device: str, *, overlap: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    drawn = moe_overlap.MoELayer(64, 96, 8, 2)  # in another dtype other numbers would be drawn
    layer = moe_overlap.MoELayer(64, 96, 8, 2, schedule="chunked(4)", overlap=overlap, dtype=dtype)
    layer.load_state_dict(drawn.state_dict())
    layer.to(device)
    x_TD = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    y_TD = layer(x_TD)
    y_TD.square().sum().backward()
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())]


def test_chunked_on_the_gpu_is_chunked_on_the_cpu() -> None:
    got, joined, want = (results("cuda"), results("cuda", overlap=False), results("cpu", dtype=torch.float64))
    assert len(got) == len(want) > 3
    for have, off, should in zip(got, joined, want, strict=True):
        same_bits(have, off)
        close(have.cpu(), should)


@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_after_the_agreement_the_host_never_waits(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whose kernels are there: a loop of matmuls would read where each expert's rows end."""
    walk, walked = Step.run, []

    @contextmanager
    def no_wait() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def run(step: Step, *args: Any, **more: Any) -> torch.Tensor:
        walked.append(step)
        with no_wait():
            return walk(step, *args, **more)

    layer = moe_overlap.MoELayer(256, 128, 8, 2, schedule=schedule, shared_expert_size=64, dtype=torch.bfloat16).cuda()
    x_TD = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x_TD).float().square().sum().backward()  # compiles
    monkeypatch.setattr(Step, "run", run)
    loss = layer(x_TD).float().square().sum()
    with no_wait():
        loss.backward()
    assert walked or schedule == "serial"  # which runs its ops in a row
    with pytest.raises(RuntimeError, match="called a synchronizing"), no_wait():
        x_TD.sum().item()


@pytest.mark.parametrize("schedule", ["serial", "chunked(4)", "chunked(2,experts)"])
def test_a_forward_waits_once(schedule: str) -> None:
    """For the counts, which the router's status goes with."""
    layer = moe_overlap.MoELayer(256, 128, 8, 2, schedule=schedule, dtype=torch.bfloat16).cuda()
    x_TD = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        layer(x_TD)  # compiles
        caught.clear()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            layer(x_TD)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(one.message) for one in caught]
    assert sum("called a synchronizing CUDA operation" in text for text in said) == 1, said


def test_recorded_times_are_the_streams() -> None:
    """Of large matmuls: the host would see their launches only."""
    layer = moe_overlap.MoELayer(2048, 4096, 4, 2, schedule="chunked(2)", dtype=torch.bfloat16).cuda()
    x_TD = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        with record() as events:
            layer(x_TD.requires_grad_()).sum().backward()
        torch.cuda.synchronize()
        whole_s = time.perf_counter() - begin_s
    experts_s = sum(event.end_s - event.start_s for event in events if event.action in ("E0", "E1"))
    assert all(event.start_s <= event.end_s for event in events)
    assert begin_s <= min(event.start_s for event in events) <= max(event.end_s for event in events)
    flops = 2 * 3 * 2 * x_TD.shape[0] * 2048 * 4096  # three matrices, two rows a token
    assert flops / 2e15 < experts_s < whole_s, "no GPU has two petaflops in bfloat16"
    layer(x_TD)
    assert layer.last_events == [], "not recorded, not timed"
