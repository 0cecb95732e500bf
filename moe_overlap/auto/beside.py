"""The user's ops that run beside the exchanges: as modules, what tells their cost, and which cannot be probed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moe_overlap.errors import ConfigError

Op = Callable[[torch.Tensor], torch.Tensor]


class PlainFunction(nn.Module):
    """A function h -> h as a module; what it costs, no parameter tells."""

    def __init__(self, function: Op) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.function(h)


def as_module(op: Op) -> nn.Module:
    """`op` itself where it is a module."""
    return op if isinstance(op, nn.Module) else PlainFunction(op)


def signature(op: Op) -> list[str]:
    """What tells the cost of an op: the classes of its modules, and its parameters."""
    if not isinstance(op, nn.Module):
        return []
    classes = [f"{type(module).__module__}.{type(module).__qualname__}" for module in op.modules()]
    return classes + [
        f"{name} {list(p.shape)} {p.dtype}{' grad' if p.requires_grad else ''}" for name, p in op.named_parameters()
    ]


def why_not_kept(ops: Sequence[Op]) -> str | None:
    """Which of the ops' costs cannot be told from a key, as a reason to keep no model; None where all can."""
    for op in ops:
        if not isinstance(op, nn.Module) or any(isinstance(module, PlainFunction) for module in op.modules()):
            return "what a function costs cannot be told without running it"
        if not any(True for _ in op.parameters()):
            return f"what {type(op).__name__}, which has no parameters, costs cannot be told without running it"
    return None


def refuse_units(ops: Sequence[Op]) -> None:
    """Raises ConfigError for an FSDP2 unit among `ops`: at the end of a probe's backward FSDP would shard the weights
    of every unit again, those of the step under way too."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for op in ops if isinstance(op, nn.Module) for module in op.modules()]
    if torch.is_grad_enabled() and any(isinstance(module, FSDPModule) for module in modules):
        expected = (
            "a fixed schedule, where ops beside the exchanges are FSDP2 units of their own (or fully_shard the block"
        )
        raise ConfigError("schedule", "auto", f"{expected} around them)")
