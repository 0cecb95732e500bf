"""Variable k: a token takes as many experts as it needs, up to K. Slots that it does not take have the id -1: they are
no row, no byte and no work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing.balance import router_probabilities
from moe_overlap.routing.checks import is_finite
from moe_overlap.routing.choice import Choice
from moe_overlap.routing.masks import keep_only

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class VariableK(nn.Module):
    """How many of its K experts each token takes, best first. One of the two:

    threshold: p above 0: experts are added until the sum of their probabilities is at least p, so that one of them is
        always taken ("Harder Tasks Need More Experts", arXiv 2403.07652, where K is E; LocMoE+, arXiv 2406.00023,
        sets its l so). Probabilities are those of the auxiliary loss: the softmax over all experts, or
        sigmoid scores over their sum. From 1 on all K are taken.
    allocator: a module or function, x [T, D] -> integers [T] from 0 to K (Ada-K, arXiv 2410.10456: a small
        network for each layer that is trained by PPO on a frozen model). It is called in every forward, recomputes
        too, samples or not, and keeps itself what its training needs. No gradient goes through it.

    Weights: those of the kept experts, and where the router renormalises (or its score is "topk_softmax") the kept ones
    have the sum that K would have. Counts, losses and capacity see what is kept; what is not is no drop.
    """

    def __init__(
        self, *, threshold: float | None = None, allocator: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        if (threshold is None) == (allocator is None):
            raise ConfigError("threshold", threshold, "a number above 0, or None beside an allocator")
        if threshold is not None and not (is_finite(threshold) and threshold > 0):
            raise ConfigError("threshold", threshold, "a finite number above 0")
        if allocator is not None and not callable(allocator):
            raise ConfigError("allocator", type(allocator).__name__, "a module or function, x [T, D] -> integers [T]")
        self.threshold = threshold
        self.allocator = allocator

    def extra_repr(self) -> str:
        return "" if self.threshold is None else f"threshold={self.threshold}"

    def forward(
        self, choice: Choice, x_TD: torch.Tensor, logits_TE: torch.Tensor, *, score: str, sum_to: float | None
    ) -> Choice:
        """The choice with what each token keeps. logits_TE: those that were chosen by. sum_to: what the weights of a
        token sum up to, None: whatever they do. Raises ConfigError for what an allocator must not say."""
        with torch.no_grad():
            if self.allocator is not None:
                places_K = torch.arange(choice.ids_TK.shape[1], device=x_TD.device)
                keep_TK = places_K < self._allocated(self.allocator, x_TD, choice.ids_TK.shape[1])[:, None]
            else:
                assert self.threshold is not None
                index_TK = choice.ids_TK.clamp_min(0).long()
                probs_TK = router_probabilities(logits_TE, score).gather(1, index_TK)
                keep_TK = probs_TK.cumsum(dim=1) - probs_TK < self.threshold
        choice = keep_only(choice, keep_TK & (choice.ids_TK >= 0))
        if sum_to is None:
            return choice
        total_T1 = choice.weights_TK.sum(dim=1, keepdim=True)
        weights_TK = choice.weights_TK * (sum_to / torch.where(total_T1 == 0, 1, total_T1))
        return replace(choice, weights_TK=weights_TK)

    @staticmethod
    def _allocated(allocator: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
        k_T = allocator(x_TD)
        if not isinstance(k_T, torch.Tensor) or k_T.dtype not in INTEGERS or k_T.shape != x_TD.shape[:1]:
            given = f"{k_T.dtype} {tuple(k_T.shape)}" if isinstance(k_T, torch.Tensor) else type(k_T).__name__
            raise ConfigError("allocator", given, f"integers [{x_TD.shape[0]}] from 0 to top_k = {top_k}")
        wrong_T = (k_T < 0) | (k_T > top_k)
        if torch.compiler.is_compiling():
            torch._assert_async(~wrong_T.any(), "allocator: integers from 0 to top_k")
        elif wrong_T.any():
            raise ConfigError("allocator", int(k_T[wrong_T][0]), f"integers from 0 to top_k = {top_k}")
        return k_T


def as_variable_k(given: object) -> VariableK | None:
    """Raises ConfigError for what is neither None nor a VariableK."""
    if given is not None and not isinstance(given, VariableK):
        raise ConfigError("variable_k", type(given).__name__, "None or a routing.VariableK")
    return given
