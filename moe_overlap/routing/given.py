"""A router that is told its choice: ids and weights that some other code has made for these tokens."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing.checks import check_sizes
from moe_overlap.routing.choice import count_choices
from moe_overlap.routing.decision import RoutingDecision

IDS = (torch.int64, torch.int32, torch.int16, torch.int8)


class GivenRouter(nn.Module):
    """The routing of a layer from its caller: `layer(x, topk_ids=ids, topk_weights=weights)`.

    For models that have a router of their own, routed by token ids (DeepSeek-V4's hash layers), or choose elsewhere.
    forward(x [T, D], topk_ids integer [T, K], topk_weights floating [T, K]); -1 = unused, whose weight is ignored.
    Weights become float32 (float64 for float64 x) and stay differentiable. There is no auxiliary loss. No parameters.

    Raises ConfigError for shapes and dtypes; for an id out of range the layer does, on all ranks.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        check_sizes(1, num_experts, top_k)
        self.num_experts, self.top_k = num_experts, top_k

    def forward(
        self, x_TD: torch.Tensor, *, topk_ids: torch.Tensor | None = None, topk_weights: torch.Tensor | None = None
    ) -> RoutingDecision:
        shape = (x_TD.shape[0], self.top_k)
        if topk_ids is None or topk_ids.dtype not in IDS or topk_ids.shape != shape:
            raise ConfigError("topk_ids", _said(topk_ids), f"integers {shape}, [T, K]")
        if topk_weights is None or not topk_weights.is_floating_point() or topk_weights.shape != shape:
            raise ConfigError("topk_weights", _said(topk_weights), f"floating-point numbers {shape}, [T, K]")
        ids_TK = topk_ids.to(torch.int32)
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        in_range_TK = (ids_TK >= 0) & (ids_TK < self.num_experts)  # others are counted nowhere
        counts_E = count_choices(ids_TK.masked_fill(~in_range_TK, -1), self.num_experts)
        return RoutingDecision(
            topk_ids_TK=ids_TK,
            topk_weights_TK=topk_weights.to(dtype).masked_fill(ids_TK < 0, 0.0),
            tokens_per_expert_E=counts_E.to(torch.int64),
            dropped_tokens=torch.zeros((), dtype=torch.int64, device=ids_TK.device),
            status=torch.zeros(1, dtype=torch.int32, device=ids_TK.device),
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}"


def _said(value: torch.Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} {tuple(value.shape)}"
