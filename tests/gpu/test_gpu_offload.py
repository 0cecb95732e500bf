"""Experts in host memory on a card: real copy engines, pinned weights. The logic is tested in tests/layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_overlap import MoELayer
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.transport import StagedTransport
from moe_overlap.transport.host_link import CudaHostLink
from tests.tolerances import same_bits

pytestmark = pytest.mark.gpu

HIDDEN, FFN, EXPERTS, TOP_K = 512, 1024, 16, 2


def step_of(layer: MoELayer) -> list[torch.Tensor]:
    """y, the gradients of x and of the parameters, on the host."""
    x = torch.randn(777, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().cuda().requires_grad_()
    for _ in range(2):
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [y.detach().cpu(), *(grad.cpu() for grad in grads if grad is not None)]


@pytest.mark.parametrize("schedule", ["serial", "chunked(2,experts)", "chunked(4,experts)"])
def test_the_bits_of_experts_on_the_card_and_two_groups_of_them(schedule: str) -> None:
    options = {"schedule": schedule, "device": "cuda", "dtype": torch.bfloat16}
    link = CudaHostLink()
    # One rank and one chunk over `local` are ops in a row, which experts in host memory are not; here nothing travels.
    resident = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, transport=StagedTransport(share=0.0), **options)
    away = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, expert_offload=link, **options)
    away.load_state_dict(resident.state_dict())
    for one, other in zip(step_of(resident), step_of(away), strict=True):
        same_bits(one, other)
    groups = 1 if schedule == "serial" else int(schedule[8])
    assert link.device_bytes == min(2, groups) * EXPERTS // groups * 3 * FFN * HIDDEN * 2
    assert all(weight.device.type == "cpu" and weight.is_pinned() for weight in away.expert_weights)


def test_auto_measures_the_link_and_has_the_bits_of_what_it_chose() -> None:
    options = {"device": "cuda", "dtype": torch.bfloat16, "expert_offload": "host"}
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, schedule="auto", **options)
    got = step_of(layer)
    assert isinstance(layer.schedule, AutoSchedule)
    (planned,) = layer.schedule.found.values()
    expert_bytes = 3 * FFN * HIDDEN * 2
    assert planned.model.host_up(expert_bytes) > 0 and planned.model.host_down(expert_bytes) > 0
    pair = replace(planned.planned(layer.last_exchange).pair, name="as chosen")
    fixed = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, schedule=pair, **options)
    fixed.load_state_dict(layer.state_dict())
    for one, other in zip(got, step_of(fixed), strict=True):
        same_bits(one, other)
    assert "copies of experts from and to the host take" in layer.explain()


@pytest.mark.parametrize("schedule", ["serial", "chunked(4,experts)"])
def test_in_a_graph_weights_come_up_as_they_are_at_each_replay(schedule: str) -> None:
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, schedule=schedule, mode="static", static_capacity="no_drop",
                     expert_offload=CudaHostLink(), device="cuda", dtype=torch.bfloat16)  # fmt: skip
    x = torch.randn(777, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    graph, y = torch.cuda.CUDAGraph(), torch.empty(0)
    with torch.no_grad():
        layer(x)  # the first step agrees, and pins the weights
        with torch.cuda.graph(graph):
            y = layer(x)
        for scale in (1.0, 2.0):
            torch.cuda.synchronize()  # who changes the weights waits for the replays
            for weight in layer.expert_weights:
                weight.mul_(scale)
            graph.replay()
            same_bits(y.clone(), layer(x))
    layer.check_static()


def test_gradients_of_experts_in_a_graph_are_refused() -> None:
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, mode="static", static_capacity="no_drop",
                     expert_offload=CudaHostLink(), device="cuda", dtype=torch.bfloat16)  # fmt: skip
    step_of(layer)
    x = torch.randn(777, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ConfigError, match="gradients of experts in a CUDA graph"):
        torch.cuda.make_graphed_callables(layer, (x,))
