"""A router with a state that goes from layer to layer (RMoE: "Layerwise Recurrent Router for Mixture-of-Experts", arXiv
2408.06793, section 3.2):

    r   = W1 x                      each layer its own W1 [R, D]
    h_l = GRU(r, h_{l-1})           one cell for all layers; before the first one h is 0
    logits = W2 h_l                 each layer its own W2 [E, R]

A layer whose router has a state returns (y, state); the next one is called with `state=state`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.ops.checks import check_transform
from moe_overlap.ops.devices import check_device
from moe_overlap.routing.checks import check_tokens
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.masks import check_token_mask, without_padding
from moe_overlap.routing.scores import routing_dtype


class RecurrentRouter(nn.Module):
    """The router of one layer of RMoE.

    cell: the nn.GRUCell(R, R) that all layers share: give the same module to each router (its parameters are then in
    the state dict of each layer, one tensor under several names). None: a cell of its own, for a model of one layer.
    router_size R: the width of the state, where no cell says it. options: as LinearRouter's, which is `head`, W2 and
    all that follows from logits.

    Computes in float32, float64 for float64 x, whatever autocast says; so is the state. Parameters: `project.weight`
    [R, D], those of `cell`, and `head`'s.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        cell: nn.GRUCell | None = None,
        router_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_device(device)
        if (cell is None) == (router_size is None):
            raise ConfigError("router_size", router_size, "an integer of at least 1, or None beside a cell")
        if cell is None:
            if isinstance(router_size, bool) or not isinstance(router_size, int) or router_size < 1:
                raise ConfigError("router_size", router_size, "an integer of at least 1, or None beside a cell")
            cell = nn.GRUCell(router_size, router_size, device=device, dtype=dtype)
        if not isinstance(cell, nn.GRUCell) or cell.input_size != cell.hidden_size:
            raise ConfigError("cell", repr(cell), "a torch.nn.GRUCell(R, R)")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.head = LinearRouter(cell.hidden_size, num_experts, top_k, device=device, dtype=dtype, **options)
        self.project = nn.Linear(hidden_size, cell.hidden_size, bias=False, device=device, dtype=dtype)
        self.cell = cell

    @property
    def balance(self) -> str:
        """As a LinearRouter's, by which a layer knows what to do about its loss."""
        return self.head.balance

    @property
    def needs_nodes(self) -> bool:
        """As a LinearRouter's."""
        return self.head.needs_nodes

    @property
    def replays(self) -> bool:
        """As a LinearRouter's."""
        return self.head.replays

    def reset_parameters(self) -> None:
        """Every part as it starts, the shared cell too."""
        for part in (self.head, self.project, self.cell):
            part.reset_parameters()

    def forward(
        self,
        x_TD: torch.Tensor,
        *,
        state: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **told: Any,
    ) -> RoutingDecision:
        """x_TD: [T, D], floating. state: [T, R] of the layer before, float32 (float64 for float64 x); None: 0, as for
        the first layer. token_mask and the rest: as LinearRouter's. The decision's `state` is h_l, differentiable.

        Raises ConfigError for a wrong shape, dtype or device.
        """
        check_transform(inline=True)
        check_tokens(x_TD, self.hidden_size, self.project.weight.device)
        token_mask = check_token_mask(token_mask, x_TD)
        dtype = routing_dtype(x_TD)
        self._check_state(state, x_TD, dtype)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            r_TR = nn.functional.linear(without_padding(x_TD, token_mask).to(dtype), self.project.weight.to(dtype))
            if state is None:
                state = r_TR.new_zeros(r_TR.shape)
            weights = [w.to(dtype) for w in (self.cell.weight_ih, self.cell.weight_hh)]
            biases = [None if b is None else b.to(dtype) for b in (self.cell.bias_ih, self.cell.bias_hh)]
            h_TR = torch.gru_cell(r_TR, without_padding(state, token_mask), *weights, *biases)
        return replace(self.head(h_TR, token_mask=token_mask, **told), state=h_TR)

    def _check_state(self, state: object, x_TD: torch.Tensor, dtype: torch.dtype) -> None:
        if state is None:
            return
        width = self.cell.hidden_size
        if not isinstance(state, torch.Tensor):
            raise ConfigError("state", type(state).__name__, f"a tensor [T, {width}]")
        if state.dim() != 2 or state.shape[1] != width or state.shape[0] != x_TD.shape[0]:
            raise ConfigError("state", tuple(state.shape), f"[{x_TD.shape[0]}, {width}]")
        if state.dtype != dtype or state.device != x_TD.device:
            raise ConfigError("state", f"{state.dtype} on {state.device}", f"{dtype} on {x_TD.device}")
