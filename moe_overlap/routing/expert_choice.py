"""Expert choice: experts choose tokens (arXiv 2202.09368). Not for causal models, and refused unless one insists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.assigned import bad_rows, choice_of, selection_scores
from moe_overlap.routing.checks import is_finite
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.nodes import Nodes
from moe_overlap.routing.select import expert_capacity

WHY = "True, for a model that may see the future: whether an expert takes a token depends on the tokens after it"


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its best ceil(average * T / E) of this rank's tokens of the call, by score: even loads always.

    average: experts that a token has on average (the paper's capacity factor c, 2 there). top_k: at most so many of
    them; of more, those of lowest score are dropped, which breaks the evenness, so E keeps all. Ids are -1 where a
    token has fewer, and none of them is sent. allow_noncausal: has to be True. In a causal language model this choice
    leaks the future into a token's experts (arXiv 2408.15664, section 5.2: about 50 bits a token at nine layers of 16
    experts), in eval as well. No auxiliary loss, bias, groups or capacity: loads are even. Bad logits raise.
    """

    selects_together = True

    def __init__(
        self, *sizes: int, average: float = 2.0, allow_noncausal: bool = False, score: str = "softmax", **options: Any
    ) -> None:
        if allow_noncausal is not True:
            raise ConfigError("allow_noncausal", allow_noncausal, WHY)
        super().__init__(*sizes, score=score, **options)
        if not (is_finite(average) and 0 < average <= self.num_experts):
            raise ConfigError("average", average, f"a number above 0, up to num_experts ({self.num_experts})")
        if self.expert_bias_E is not None:
            raise ConfigError("bias", True, "False: where experts choose, loads are even")
        for name, only in (("aux_loss_coef", 0.0), ("n_group", 1), ("capacity_factor", None), ("bad_logits", "raise")):
            if getattr(self, name) != only:
                raise ConfigError(name, getattr(self, name), f"{only!r} where experts choose, whose loads are even")
        self.average = average

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        bad_T1 = bad_rows(logits_TE)
        scores_TE = selection_scores(logits_TE.detach().masked_fill(bad_T1, 0.0), self.score)
        scores_TE = scores_TE.masked_fill(bad_T1, float("-inf"))
        tokens, experts = scores_TE.shape
        seats = min(tokens, expert_capacity(self.average, tokens, 1, experts))
        taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        taken_TE.scatter_(0, scores_TE.topk(seats, dim=0).indices, True)
        taken_TE &= ~bad_T1
        best = scores_TE.masked_fill(~taken_TE, float("-inf")).topk(self.top_k, dim=1)
        ids_TK = torch.where(best.values == float("-inf"), -1, best.indices)
        choice = choice_of(logits_TE, ids_TK, **self._weighing)
        return replace(choice, dropped=taken_TE.sum() - (choice.ids_TK >= 0).sum())
