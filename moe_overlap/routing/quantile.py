"""Quantile balancing: the bias of the selection as the prices at which every expert is chosen equally often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.assigned import bad_rows, selection_scores
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.nodes import Nodes

ROUNDS = 4


@torch.no_grad()
def quantile_prices(scores_TE: torch.Tensor, top_k: int, prices_E: torch.Tensor) -> torch.Tensor:
    """[E]: prices beta after ROUNDS of dual coordinate descent from `prices_E`.

    A token t takes expert e where scores - beta_e is above its alpha_t, the (K+1)-th largest of its row; so an expert
    is taken by T * K / E tokens if beta_e is the one after that many of the column scores - alpha. (The dual update of
    Megatron-LM's quantile balancing.) Prices of mean zero, which select as others do.
    """
    tokens, experts = scores_TE.shape
    take = tokens * top_k // experts + 1
    if top_k == experts or take > tokens:
        return prices_E  # all are taken, or there is nothing to take a quantile of
    for _ in range(ROUNDS):
        alpha_T1 = (scores_TE - prices_E).topk(top_k + 1, dim=1).values[:, -1:]
        prices_E = (scores_TE - alpha_T1).topk(take, dim=0).values[-1]
    return prices_E - prices_E.mean()


class QuantileRouter(LinearRouter):
    """A LinearRouter whose bias is set to minus the prices of the batch before: `step()`, after the optimizer's.

    A training forward selects by the bias as it is and computes the prices of its own tokens; those of a batch are the
    mean over the forwards since the last step, its micro-batches, recomputes left out. momentum: how much of the old
    bias stays. Group limits are refused, since with them a price does not say who is taken.
    """

    selects_together = True

    def __init__(self, *sizes: int, momentum: float = 0.0, **options: Any) -> None:
        super().__init__(*sizes, bias=True, **options)
        if self.n_group != 1:
            raise ConfigError("n_group", self.n_group, "1: quantile balancing is incompatible with group limits")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError("momentum", momentum, "a number from 0, below 1")
        self.momentum = momentum
        self._sums_E1: torch.Tensor | None = None  # of prices since the last step, and of how many forwards

    @torch.no_grad()
    def step(self, mean: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Take over the prices of the training forwards since the last step, if there were some. mean: a vector [E] of
        this rank to its mean over the ranks that share the router, to be given where there are several: a collective of
        all."""
        bias_E, sums_E1 = self.expert_bias_E, self._sums_E1
        assert bias_E is not None
        wanted_E = bias_E.clone() if sums_E1 is None else -(sums_E1[:-1] / sums_E1[-1]).to(bias_E.dtype)
        wanted_E = wanted_E if mean is None else mean(wanted_E)
        bias_E.mul_(self.momentum).add_(wanted_E, alpha=1 - self.momentum)
        self._sums_E1 = None

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        recompute = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
        if self.training and torch.is_grad_enabled() and not recompute:
            assert self.expert_bias_E is not None
            known_TE = logits_TE.detach().masked_fill(bad_rows(logits_TE), 0.0)
            scores_TE = selection_scores(known_TE, self.score)
            prices_E = quantile_prices(scores_TE, self.top_k, -self.expert_bias_E.to(scores_TE.dtype))
            own_E1 = torch.cat([prices_E, prices_E.new_ones(1)])
            self._sums_E1 = own_E1 if self._sums_E1 is None else self._sums_E1 + own_E1
        return super()._choose(logits_TE, nodes)
