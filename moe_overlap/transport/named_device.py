"""The device that a user names for a transport."""

from __future__ import annotations

import torch

from moe_overlap.errors import ConfigError


def as_device(device: torch.device | str) -> torch.device:
    """What torch takes this name for. Raises ConfigError("device") for a name that it does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError("device", device, "None, or a device of torch such as cpu or cuda:0") from None
