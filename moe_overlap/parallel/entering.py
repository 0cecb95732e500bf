"""What is looked at when a layer is called."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.parallel import ddp
from moe_overlap.parallel.optimizers import after_step
from moe_overlap.parallel.ownership import Ownership, adopt


def entered(experts: nn.Module, ownership: Ownership) -> Ownership:
    """The mark of the experts of a layer that is called now. Raises ConfigError where DDP has taken them."""
    if torch.compiler.is_compiling():
        return ownership
    ownership = adopt(experts, ownership)  # they may have come by add_module
    after_step()  # of a step that failed
    ddp.check(ownership, experts)
    return ownership
