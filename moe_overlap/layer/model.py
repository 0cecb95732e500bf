"""What concerns all MoE layers of a model together."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.layer.layer import MoELayer


def aux_loss(model: nn.Module) -> torch.Tensor:
    """The sum of the auxiliary losses of all MoE layers of `model` since the last call; reading clears them.

    A float32 scalar, zero where no layer has one.
    """
    total = torch.zeros((), dtype=torch.float32, device=next((p.device for p in model.parameters()), None))
    for module in model.modules():
        if isinstance(module, MoELayer):
            loss = module.take_aux_loss()
            if loss is not None:
                total = total + loss
    return total
