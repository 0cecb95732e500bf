"""Sinkhorn routing: in training, top-k of a plan that gives every expert the same share (S-BASE, arXiv 2202.01169)."""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.assigned import bad_rows, choice_of
from moe_overlap.routing.checks import check_count
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.nodes import Nodes


@torch.no_grad()
def sinkhorn_potential(logits_TE: torch.Tensor, iterations: int) -> torch.Tensor:
    """[E]: what is added to the logits of each expert so that softmax(logits + g_E) has columns of equal sums (Sinkhorn
    and Knopp: rows and columns scaled in turn; g up to a constant, which changes no softmax). In logarithms, so that
    nothing overflows; so many rounds, whatever they reach, so that no host waits."""
    tokens, experts = logits_TE.shape
    g_E = logits_TE.new_zeros(experts)
    for _ in range(iterations if tokens else 0):
        f_T1 = -(logits_TE + g_E).logsumexp(dim=1, keepdim=True)
        g_E = -(logits_TE + f_T1).logsumexp(dim=0)
    return g_E


class SinkhornRouter(LinearRouter):
    """A LinearRouter that in training mode selects by a Sinkhorn plan over this rank's tokens of the call, and in eval
    mode by the scores alone, since there a token may not depend on others.

    Weights are those of `score` for the experts selected, without a gradient through the plan. iterations: of the plan;
    In training a token's experts depend on those after it, as far as these say which experts are in demand. No bias and
    no groups.
    """

    selects_together = True

    def __init__(self, *sizes: int, iterations: int = 16, **options: Any) -> None:
        super().__init__(*sizes, **options)
        check_count("iterations", iterations)
        if self.n_group != 1:
            raise ConfigError("n_group", self.n_group, "1: a plan over all experts knows no groups")
        if self.expert_bias_E is not None:
            raise ConfigError("bias", True, "False: the plan is what balances")
        self.iterations = iterations

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        if not self.training:
            return super()._choose(logits_TE, nodes)
        known_TE = logits_TE.detach().masked_fill(bad_rows(logits_TE), 0.0)
        ids_TK = (known_TE + sinkhorn_potential(known_TE, self.iterations)).topk(self.top_k, dim=1).indices
        return choice_of(logits_TE, ids_TK, **self._weighing)
