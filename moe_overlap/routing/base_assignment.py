"""BASE layers: in training every expert gets the same number of tokens, by a linear assignment (arXiv 2103.16716)."""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.assigned import bad_rows, choice_of
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.nodes import Nodes

PRECISION = 1 / 50  # of the range of the scores: the least that a bid raises a price by
MOST_ROUNDS = 10_000


@torch.no_grad()
def assign(scores_TE: torch.Tensor) -> torch.Tensor:
    """int64 [T]: an expert for each token, of which none has more than ceil(T / E), with nearly the greatest sum of
    scores: at most T * PRECISION * (max - min) below it.

    Bertsekas' auction, all unassigned tokens bidding at once: each for its best expert at today's prices, by as much as
    that one is better than the second best; an expert keeps the highest bids, and once it is full its price is the
    lowest of these. On the CPU, since the host looks at every round.
    """
    scores_TE = _from_the_best(scores_TE.cpu().double())
    tokens, experts = scores_TE.shape
    if experts == 1 or tokens == 0:
        return torch.zeros(tokens, dtype=torch.int64)
    seats = -(-tokens // experts)
    least = PRECISION * float(scores_TE.max() - scores_TE.min()) or 1.0
    held_T = torch.full((tokens,), -1)
    paid_T = torch.zeros(tokens, dtype=torch.float64)
    price_E = torch.zeros(experts, dtype=torch.float64)
    for _ in range(MOST_ROUNDS):
        free = (held_T < 0).nonzero()[:, 0]
        if not len(free):
            return held_T
        (best, second), (first, _) = (part.T for part in (scores_TE[free] - price_E).topk(2, dim=1))
        held_T[free] = first
        paid_T[free] = price_E[first] + best - second + least
        for expert in first.unique().tolist():
            holders = (held_T == expert).nonzero()[:, 0]
            if len(holders) >= seats:
                bids, order = paid_T[holders].sort(descending=True, stable=True)
                held_T[holders[order[seats:]]] = -1
                price_E[expert] = bids[seats - 1]
    raise RuntimeError(f"no assignment of {tokens} tokens to {experts} experts within {MOST_ROUNDS} rounds")


def _from_the_best(scores_TE: torch.Tensor) -> torch.Tensor:
    """Scores less the greatest, so that a bid is not lost in the rounding of scores that are nearly alike. -inf becomes
    what lies below all others by as much as these are apart: taken only where seats run out."""
    finite_TE = scores_TE.isfinite()
    if not finite_TE.any():
        return torch.zeros_like(scores_TE)
    scores_TE = scores_TE - scores_TE.max()
    return scores_TE.masked_fill(~finite_TE, 2 * float(scores_TE[finite_TE].min()) or -1.0)


class BaseRouter(LinearRouter):
    """A LinearRouter, top-1, that in training mode assigns this rank's tokens of the call evenly, and in eval mode
    takes the best expert of each token, as the paper does.

    score: "sigmoid" (the default here; the paper's gate sigmoid(x . w)), or another of LinearRouter's. The paper
    shuffles tokens over the ranks first, so that each rank assigns a fair sample; here a rank assigns its own. An even
    share of each rank's tokens is an even share of all. Bad logits take no expert in an assignment, whose seats the
    others do not get.
    """

    selects_together = True

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 1, *, score: str = "sigmoid", **options: Any):
        super().__init__(hidden_size, num_experts, top_k, score=score, **options)
        if top_k != 1:
            raise ConfigError("top_k", top_k, "1: an assignment gives each token one expert")
        if self.n_group != 1 or self.expert_bias_E is not None:
            given = f"n_group={self.n_group}, bias={self.expert_bias_E is not None}"
            raise ConfigError("n_group", given, "n_group=1 and bias=False: the assignment is what balances")

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        if not self.training:
            return super()._choose(logits_TE, nodes)
        known_TE = logits_TE.detach().masked_fill(bad_rows(logits_TE), 0.0)
        ids_TK = assign(known_TE)[:, None].to(logits_TE.device)
        return choice_of(logits_TE, ids_TK, **self._weighing)
