"""Which transport a group gets."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moe_overlap.errors import ConfigError
from moe_overlap.transport import LocalTransport, ProcessGroupTransport
from moe_overlap.transport.opening import open_transport
from tests.ranks import gloo_pool


def test_no_group_is_one_rank() -> None:
    assert isinstance(open_transport(None), LocalTransport)


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        open_transport("no group")


def groups() -> None:
    for device in (None, "cpu"):
        transport = open_transport(dist.group.WORLD, timeout_s=7.0, device=device)
        assert isinstance(transport, ProcessGroupTransport) and transport.timeout_s == 7.0
        assert transport.device.type == "cpu"
    with pytest.raises(ConfigError, match="cuda"):
        open_transport(dist.group.WORLD, device="cuda")


def test_a_group_is_its_ranks() -> None:
    gloo_pool(2).run(groups)
