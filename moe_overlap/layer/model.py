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


def ignore_experts_for_ddp(model: nn.Module) -> list[str]:
    """Tell DistributedDataParallel to leave the expert weights of `model` alone; call it before wrapping.

    Their gradients are already sums over all ranks; they are divided by the number of ranks, as DDP does with all
    other gradients. Returns the names of the parameters.
    """
    names: list[str] = []
    for prefix, module in model.named_modules():
        if isinstance(module, MoELayer):
            module.expert_grad_scale = 1.0 / module.transport.world_size
            own = f"{prefix}.experts." if prefix else "experts."
            names += [f"{own}{name}" for name, _ in module.experts.named_parameters()]
    already = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*already, *names])
    return names
