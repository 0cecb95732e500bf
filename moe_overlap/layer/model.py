"""What concerns all MoE layers of a model together."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.layer.layer import MoELayer


@torch.compiler.disable(reason="it reads what calls left behind: one graph break")
def aux_loss(model: nn.Module) -> torch.Tensor:
    """The auxiliary losses of all calls of all MoE layers of `model`, summed, since the last time. Reading clears them.

    A float32 scalar (float64 for float64 losses), zero where there is none. See `MoELayer.take_aux_loss`.
    """
    total = torch.zeros((), dtype=torch.float32, device=next((p.device for p in model.parameters()), None))
    for module in model.modules():
        if isinstance(module, MoELayer):
            loss = module.take_aux_loss()
            if loss is not None:
                total = total + loss
    return total
