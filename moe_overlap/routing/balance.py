"""Losses that keep a router balanced and its logits small. Tensors of one rank.

The auxiliary loss exists at three levels, by the tokens that are to be spread evenly: those of a rank's call ("micro"),
of each sequence ("sequence"), or of the call on all ranks ("global"). The last one needs the counts of all ranks, which
a router does not know: it hands over a `GlobalBalance`, and the layer finishes the loss once the ranks have agreed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.scores import sqrt_softplus

LEVELS = ("micro", "sequence", "global")


def router_probabilities(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """Probabilities over all experts, rows sum to 1: softmax, or for scores of each expert by itself
    ("sigmoid", "sqrt_softplus") s_i / sum_j s_j (DeepSeek-V3)."""
    if score in ("sigmoid", "sqrt_softplus"):
        scores_TE = logits_TE.sigmoid() if score == "sigmoid" else sqrt_softplus(logits_TE)
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(logits_TE.dtype).tiny)
    return logits_TE.softmax(dim=-1)


def load_balancing_loss(
    probs_TE: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    *,
    valid_T1: torch.Tensor | None = None,
) -> torch.Tensor:
    """Switch/GShard auxiliary loss without its coefficient (Switch Transformer, arXiv 2101.03961, eq. 4-6).

        loss = E * sum_i f_i * P_i
        f_i  = fraction of the (token, k) slots that went to expert i, over all K choices; carries no gradient
        P_i  = mean over tokens of the router's probability of expert i

    It is 1 for a perfectly balanced router and E when every token is sent to one expert with probability 1.

    probs_TE: [T, E] float32 or float64. tokens_per_expert_E: [E] counts of this rank, before any drop.
    valid_T1: bool [T, 1]; tokens that are False count in neither mean. Returns a scalar of probs_TE's dtype.
    """
    counts_E = tokens_per_expert_E.to(probs_TE.dtype)
    f_E = (counts_E / counts_E.sum().clamp_min(1)).detach()
    p_E = mean_over_tokens(probs_TE, valid_T1)
    return probs_TE.shape[-1] * (f_E * p_E).sum()


def pooled_balancing_loss(
    logits: Sequence[torch.Tensor], tokens_per_expert: Sequence[torch.Tensor], *, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The auxiliary loss of transformers' models (`load_balancing_loss_func`), over the tokens of all layers together.

        loss = E * sum_i f_i * P_i, f_i = (token, k) slots of expert i over tokens, P_i = mean softmax probability

    With one layer it is K times `load_balancing_loss`; with several it is another loss than the sum of theirs.

    logits: [T, E] of each layer (`RoutingDecision.logits_TE`). tokens_per_expert: [E] of each. token_mask: bool [T],
    False = padding. Returns a scalar. Raises ConfigError for lists that do not go together.
    """
    if not logits or len(logits) != len(tokens_per_expert) or len({one.shape for one in logits}) > 1:
        shapes = [tuple(one.shape) for one in logits]
        raise ConfigError("logits", shapes, f"one shape for each of {len(tokens_per_expert)} layers, at least one")
    probs_TE = torch.cat([one if token_mask is None else one[token_mask] for one in logits]).softmax(dim=-1)
    f_E = torch.stack([one.to(probs_TE.dtype) for one in tokens_per_expert]).sum(dim=0) / max(1, probs_TE.shape[0])
    return probs_TE.shape[1] * (f_E.detach() * mean_over_tokens(probs_TE, None)).sum()


def sequence_balancing_loss(
    probs_TE: torch.Tensor, ids_TK: torch.Tensor, sequence_length: int, *, valid_T1: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean over sequences of `load_balancing_loss` of each (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    Token t belongs to sequence t // sequence_length. ids_TK: integer [T, K], -1 = unused. Sequences without a valid
    token count as 0 in a mean over all of them. Raises ConfigError where T is no multiple of the length.
    """
    tokens, experts = probs_TE.shape
    if sequence_length < 1 or tokens % sequence_length:
        raise ConfigError("sequence_length", sequence_length, f"a divisor of the {tokens} tokens of the call")
    sequences = tokens // sequence_length
    ids_BS = ids_TK.long().reshape(sequences, sequence_length * ids_TK.shape[1])
    counts_BE = torch.zeros(sequences, experts + 1, dtype=torch.int64, device=probs_TE.device)
    counts_BE = counts_BE.scatter_add(1, torch.where(ids_BS < 0, experts, ids_BS), torch.ones_like(ids_BS))
    counts_BE = counts_BE[:, :experts].to(probs_TE.dtype)
    f_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp_min(1)
    if valid_T1 is None:
        p_BE = probs_TE.reshape(sequences, sequence_length, experts).sum(dim=1) / sequence_length
    else:
        valid_BS1 = valid_T1.reshape(sequences, sequence_length, 1)
        p_BE = (probs_TE.reshape(sequences, sequence_length, experts) * valid_BS1).sum(dim=1)
        p_BE = p_BE / valid_BS1.sum(dim=1).clamp_min(1)
    return experts * (f_BE * p_BE).sum() / max(sequences, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalBalance:
    """An auxiliary loss over the tokens of all ranks, as far as one rank knows it before they have agreed.

    Source: "Demons in the Detail" (arXiv 2501.11873, eq. 4): the fractions f of the global batch, the probabilities P
    of a rank's own tokens, since a mean over ranks of sums f * P with one f is the sum with the mean P.

    probs_E: [E], differentiable: the sum over this rank's tokens of the router's probabilities. counts_E: int64 [E],
    its choices before any drop. tokens: how many tokens both are of, int64 scalar. coef: what the loss is multiplied
    by. agreed: whether each of the tokens has K choices and all of them are dispatched, so that the counts on which the
    ranks agree are the sums of `counts_E`, and K times those of `tokens`.
    """

    probs_E: torch.Tensor
    counts_E: torch.Tensor
    tokens: torch.Tensor
    coef: float
    agreed: bool

    @classmethod
    def of(
        cls,
        probs_TE: torch.Tensor,
        counts_E: torch.Tensor,
        *,
        coef: float,
        valid_T1: torch.Tensor | None = None,
        drops: bool = False,
    ) -> GlobalBalance:
        """From what `load_balancing_loss` takes. drops: choices that are counted may be dropped later on."""
        if valid_T1 is None:
            probs_E = probs_TE.sum(dim=0)
            tokens = torch.full((), probs_TE.shape[0], dtype=torch.int64, device=probs_TE.device)
        else:
            probs_E, tokens = (probs_TE * valid_T1).sum(dim=0), valid_T1.sum()
        agreed = valid_T1 is None and not drops
        return cls(probs_E=probs_E, counts_E=counts_E.to(torch.int64), tokens=tokens, coef=coef, agreed=agreed)

    def slope(self, counts_E: torch.Tensor, tokens: torch.Tensor, ranks: int) -> torch.Tensor:
        """float64 [E]: what the loss has for each of `probs_E`, given the sums of `counts_E` and `tokens` over ranks.

        P is `probs_E` over the mean number of tokens of a rank. So the mean over the ranks of their losses is the loss
        of one process that has all tokens, however unevenly these are spread; with as many on each rank P is the mean
        over a rank's own.
        """
        f_E = counts_E.double() / counts_E.sum().clamp_min(1)
        return f_E * (self.coef * ranks * counts_E.shape[0] / tokens.clamp_min(1).double())

    def loss(self, counts_E: torch.Tensor, tokens: torch.Tensor, ranks: int) -> torch.Tensor:
        """The loss of this rank, a scalar of the dtype of `probs_E`; arguments as in `slope`, on its device."""
        return (self.slope(counts_E, tokens, ranks).to(self.probs_E.dtype) * self.probs_E).sum()

    def alone(self) -> torch.Tensor:
        """The loss where there is no other rank."""
        return self.loss(self.counts_E, self.tokens, 1)


def z_loss(logits_TE: torch.Tensor, *, valid_T1: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2, without its coefficient (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return mean_over_tokens(logits_TE.logsumexp(dim=-1, keepdim=True).square(), valid_T1).sum()


def mean_over_tokens(values_TX: torch.Tensor, valid_T1: torch.Tensor | None) -> torch.Tensor:
    """Mean over dim 0; 0 for no tokens (a rank may hold none)."""
    if valid_T1 is None:
        return values_TX.sum(dim=0) / max(values_TX.shape[0], 1)
    return (values_TX * valid_T1).sum(dim=0) / valid_T1.sum().clamp_min(1)
