"""What is looked at when a layer is called."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.parallel import ddp
from moe_overlap.parallel.optimizers import accumulate_again
from moe_overlap.parallel.ownership import Ownership, ownership_of
from moe_overlap.parallel.state import mark


def entered(experts: nn.Module, ownership: Ownership) -> Ownership:
    """The mark of the experts of a layer that is called now. Raises ConfigError where DDP has taken them."""
    if torch.compiler.is_compiling():
        return ownership
    ownership = adopt(experts, ownership)  # they may have come by add_module
    accumulate_again()  # of a step that failed
    ddp.check(ownership, experts)
    return ownership


def adopt(module: nn.Module, ownership: Ownership) -> Ownership:
    """Mark the experts of a layer with what they are to it, or, where another layer with the same experts on the same
    ranks has marked them (tied weights), take that: what is said of one is said of both."""
    known = ownership_of(module)
    if known is not None and (known is ownership or known.holds_like(ownership)):
        return known
    mark(module, ownership)
    return ownership
