"""Devices that a user names, checked before torch is asked for memory on them."""

from __future__ import annotations

import torch

from moe_overlap.errors import ConfigError

Device = torch.device | str | None


def as_device(device: torch.device | str) -> torch.device:
    """What torch takes this name for. Raises ConfigError("device") for a name that it does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError("device", device, "None, or a device of torch such as cpu or cuda:0") from None


def check_device(device: Device) -> None:
    """Raises ConfigError("device") where tensors cannot be made there; None is where torch makes them by default. It
    makes one, so that whatever stands for a device here (the device `meta`, fake tensors) passes."""
    if device is None:
        return
    at = as_device(device)
    try:
        torch.empty(0, device=at)
    except (AssertionError, RuntimeError) as error:  # torch built without it; no driver, or no device of this number
        why = str(error).partition("\n")[0][:200]
        raise ConfigError("device", str(at), f"a device that torch finds on this machine ({why})") from None
