"""What the kernels ask of a GPU: its architecture by name and by age."""

from __future__ import annotations

import torch


def architecture(device: torch.device) -> str:
    """Such as sm_90 or, on AMD, gfx942."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def older_than(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether an NVIDIA GPU is of an older compute capability; those of AMD have none."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < capability
