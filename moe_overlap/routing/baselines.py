"""The routers that LocMoE compares itself with: Switch and Hash."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.ops.devices import check_device
from moe_overlap.routing.checks import check_count, check_sizes, check_tokens, is_finite
from moe_overlap.routing.choice import Choice, count_choices, decide
from moe_overlap.routing.decision import STATUS_OK, RoutingDecision
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.masks import check_token_mask
from moe_overlap.routing.scores import routing_dtype


class SwitchRouter(LinearRouter):
    """Switch Transformer (arXiv 2101.03961, section 2.2): top-1 softmax, auxiliary loss, capacity, noisy tokens.

    jitter: in training the router (and only it) reads each element of x times a number drawn evenly from 1 - jitter to
    1 + jitter. A recompute draws the same ones where the checkpoint keeps the state of the random numbers, as torch's
    does unless told otherwise; where it does not, a layer refuses a recompute that has routed otherwise.
    Other options: those of LinearRouter, with the paper's defaults.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        aux_loss_coef: float = 0.01,
        capacity_factor: float | None = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, aux_loss_coef=aux_loss_coef, capacity_factor=capacity_factor,
                         **options)  # fmt: skip
        if not (is_finite(jitter) and 0 <= jitter < 1):
            raise ConfigError("jitter", jitter, "a number from 0 to below 1")
        self.jitter = jitter

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.training and self.jitter > 0:
            x_TD = x_TD.to(routing_dtype(x_TD))
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return super()._logits(x_TD)


class HashRouter(nn.Module):
    """Hash layers (arXiv 2106.04426): the experts of a token are those of its id in a table. No parameters, no loss.

    The table is drawn from `seed`, equal on all ranks, and gives every expert as many of the vocabulary's ids as any
    other, +-1; how often these ids come is another matter. A token's top_k experts are different ones, their weights
    1 / top_k each.

    The ids of the coming tokens are told with `give`, before the layer's call, and hold until others are given: so one
    call of `give` serves all layers that share a router, and a recompute of the latest forward. A recompute that met
    the ids of another forward would route otherwise, which a layer refuses.
    """

    table_VK: torch.Tensor

    def __init__(self, vocab_size: int, num_experts: int, top_k: int = 1, *, seed: int = 0, device: Any = None) -> None:
        super().__init__()
        check_count("vocab_size", vocab_size)
        check_sizes(1, num_experts, top_k)
        check_device(device)
        self.num_experts = num_experts
        self.top_k = top_k
        generator = torch.Generator().manual_seed(seed)
        first_V = torch.randperm(vocab_size, generator=generator) % num_experts
        # The other choices lie behind the first one, each token's in the same steps, drawn once.
        steps_K = torch.randperm(num_experts - 1, generator=generator)[: top_k - 1] + 1
        table_VK = torch.cat([first_V[:, None], (first_V[:, None] + steps_K) % num_experts], dim=1)
        self.register_buffer("table_VK", table_VK.to(torch.int32).to(device))
        self._token_ids: torch.Tensor | None = None

    def give(self, token_ids: torch.Tensor) -> None:
        """The ids of the coming forward's tokens: integers of any shape, in the order of the rows of x. Raises
        ConfigError for other dtypes, and on the CPU for an id outside the vocabulary; on a GPU, where the host would
        have to wait for it, an assertion of the device."""
        if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
            raise ConfigError("token_ids", token_ids.dtype, "an integer dtype")
        vocab = self.table_VK.shape[0]
        outside = (token_ids < 0) | (token_ids >= vocab)
        if token_ids.device.type != "cpu":
            torch._assert_async(~outside.any(), "token_ids: an id outside the vocabulary")
        elif outside.any():
            raise ConfigError("token_ids", int(token_ids[outside][0]), f"ids from 0 to {vocab - 1}")
        self._token_ids = token_ids.detach().reshape(-1)

    def extra_repr(self) -> str:
        return f"vocab={self.table_VK.shape[0]}, experts={self.num_experts}, top_k={self.top_k}"

    def forward(self, x_TD: torch.Tensor, *, token_mask: torch.Tensor | None = None) -> RoutingDecision:
        """x_TD: [T, D], floating; only its size, dtype and device count. token_mask: as LinearRouter's. Raises
        ConfigError unless the ids of T tokens have been given.
        """
        check_tokens(x_TD, x_TD.shape[-1], self.table_VK.device)
        ids_T = self._token_ids
        if ids_T is None or ids_T.shape[0] != x_TD.shape[0]:
            given = None if ids_T is None else ids_T.shape[0]
            raise ConfigError("token_ids", given, f"ids of {x_TD.shape[0]} tokens, by `give` before the call")
        ids_TK = self.table_VK[ids_T.to(x_TD.device).long()]
        weights_TK = x_TD.new_full(ids_TK.shape, 1 / self.top_k, dtype=routing_dtype(x_TD))
        token_mask = check_token_mask(token_mask, x_TD)
        if token_mask is not None:
            ids_TK = ids_TK.masked_fill(~token_mask[:, None], -1)
            weights_TK = weights_TK.masked_fill(~token_mask[:, None], 0.0)
        counts_E = count_choices(ids_TK, self.num_experts)
        status = torch.full((1,), STATUS_OK, dtype=torch.int32, device=x_TD.device)
        return decide(Choice(weights_TK=weights_TK, ids_TK=ids_TK, counts_E=counts_E, status=status,
                             dropped=counts_E.new_zeros((), dtype=torch.int64)))  # fmt: skip
