"""The shared expert: the dense feed-forward network that every token passes, beside its routed experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.layer.experts import w_in_rows
from moe_overlap.ops.devices import check_device
from moe_overlap.schedule.user_ops import check_result


class SharedExpert(nn.Module):
    """down(act(up(x))), and with `gated` sigmoid(gate(x)) times that (Qwen2-MoE, Qwen3-Next).

    Parameters: up.weight [2F or F, D], down.weight [D, F], gate.weight [1, D]. forward(x_TD) -> the same shape.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, activation: str = "swiglu", *, gated: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.activation = activation
        check_device(factory.get("device"))
        self.up = nn.Linear(hidden_size, w_in_rows(activation, ffn_hidden_size), bias=False, **factory)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False, **factory)
        self.gate = nn.Linear(hidden_size, 1, bias=False, **factory) if gated else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.down(ops.activation(self.up(x_TD), kind=self.activation))
        return y_TD if self.gate is None else torch.sigmoid(self.gate(x_TD)) * y_TD


def shared_of(shared_expert: nn.Module | None, x_TD: torch.Tensor) -> torch.Tensor:
    """shared_expert(x): [T, D] -> [T, D]. Raises ConfigError for a result that does not fit."""
    assert shared_expert is not None
    shared: torch.Tensor = shared_expert(x_TD)
    check_result("shared_expert", shared, x_TD)
    return shared
