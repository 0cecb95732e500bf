"""Which transport a layer opens for a process group."""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.transport.base import Transport
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.named_device import as_device


def open_transport(
    group: Any, *, timeout_s: float | None = None, device: torch.device | str | None = None, lane: str = ""
) -> Transport:
    """The transport for `group`: None (one rank), a ProcessGroup or a one-dimensional DeviceMesh. `device`: where a
    layer was asked to be; a group for the CPU and CUDA both has a backend for each. `lane`: see
    ProcessGroupTransport."""
    if group is None:
        return LocalTransport()
    from moe_overlap.transport.process_group import ProcessGroupTransport

    device = torch.get_default_device() if device is None else as_device(device)
    return ProcessGroupTransport(
        group, timeout_s=timeout_s, device=device if device.type == "cuda" else None, lane=lane
    )
