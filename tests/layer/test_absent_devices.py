"""A device that this machine has not, or that is none: a ConfigError that names the field, wherever one is given."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_overlap as mo
from moe_overlap import routing
from moe_overlap.errors import ConfigError
from moe_overlap.layer.tensor_parallel import TensorParallelMoE
from moe_overlap.ops import registry
from moe_overlap.ops.devices import check_device
from moe_overlap.routing.locality import LocalityBias
from moe_overlap.transport.host_link import CudaHostLink

ABSENT = ["cuda:99", "xpu:99", "no device", 2.5, *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda")])]
GIVEN = {
    "MoELayer": lambda at: mo.MoELayer(16, 32, 4, 2, device=at),
    "experts in host memory": lambda at: mo.MoELayer(16, 32, 4, 2, device=at, expert_offload="host"),
    "experts given": lambda at: mo.MoELayer(16, 32, 4, 2, device=at, experts=mo.Experts(16, 32, 4)),
    "TensorParallelMoE": lambda at: TensorParallelMoE(16, 32, 4, 2, tensor_ranks=1, device=at),
    "Experts": lambda at: mo.Experts(16, 32, 4, device=at),
    "SharedExpert": lambda at: mo.SharedExpert(16, 32, device=at),
    "LinearRouter": lambda at: mo.LinearRouter(16, 4, 2, device=at),
    "SmileRouter": lambda at: routing.SmileRouter(16, 4, num_nodes=2, device=at),
    "RecurrentRouter": lambda at: routing.RecurrentRouter(16, 4, 2, router_size=8, device=at),
    "HashRouter": lambda at: routing.HashRouter(100, 4, device=at),
    "LocalityBias": lambda at: LocalityBias(2, 4, device=at),
    "CudaHostLink": CudaHostLink,
    "ops.explain": registry.explain,
    "ops.grouped": registry.grouped,
}


@pytest.mark.parametrize("device", ABSENT, ids=str)
@pytest.mark.parametrize("name", GIVEN)
def test_a_device_that_is_not_there(name, device):
    with pytest.raises(ConfigError, match="device") as caught:
        GIVEN[name](device)
    assert caught.value.field == "device" and ("device" in caught.value.expected)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "meta"])
def test_devices_that_are_there(device):
    layer = mo.MoELayer(16, 32, 4, 2, device=device)
    assert {one.device.type for one in layer.parameters()} == {"cpu" if device is None else torch.device(device).type}


def test_a_device_that_fake_tensors_stand_for():
    with FakeTensorMode():
        check_device("cuda")
