"""LocMoE (arXiv 2401.13920) and LocMoE+ (arXiv 2406.00023): routers that keep tokens near.

What the papers leave open, and what is chosen here:

- **Gate.** The paper's gate (GrAP) has no parameters, so that its losses reach the hidden states only. The default is a
  learnable one, GrAP the option. The paper's ReLU on the scores is left out: it changes no order among positive ones,
  and where all scores of a token are negative it would tie them, send the token to expert 0 and leave it no gradient.
- **Locality.** mu, D_l and its smoothing: see `locality.py`, also for what the loss needs in order to act.
- **Balance.** The auxiliary loss balances the tokens of all ranks ("global"): balanced over one rank's tokens alone, it
  asks for what the locality loss forbids.
- **Weights of LocMoE+** are those of LocMoE (a softmax over the gate's scores); cosines decide what is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing.balance import router_probabilities
from moe_overlap.routing.capacity_floor import (
    MEASURED_FORMS,
    capacity_bound,
    check_delta,
    clamp_capacity,
    measured_floor,
)
from moe_overlap.routing.checks import is_finite
from moe_overlap.routing.choice import Choice, count_choices
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.routing.locality import Locality
from moe_overlap.routing.nodes import Nodes
from moe_overlap.routing.scores import routing_dtype

GATES = ("linear", "grap")


def grap_rows(num_experts: int, hidden_size: int, *, device: Any = None, dtype: Any = None) -> torch.Tensor:
    """The gate of grouped average pooling, [E, D] (LocMoE, eq. 4): row i is E / D on the i-th of E equal groups of
    neighbouring features and 0 elsewhere, so that the score of expert i is the mean of a token's i-th group.

    Rows are orthogonal, their norm is sqrt(E / D). Raises ConfigError unless E divides D.
    """
    if hidden_size % num_experts:
        raise ConfigError("num_experts", num_experts, f"a divisor of hidden_size ({hidden_size}), for the GrAP gate")
    width = hidden_size // num_experts
    return torch.eye(num_experts, device=device, dtype=dtype).repeat_interleave(width, dim=1) / width


class LocMoERouter(LinearRouter):
    """LocMoE's router: softmax scores, auxiliary loss and mu * locality loss.

    mu, smoothing: see `locality_loss`. locality_bias: None, or the number of nodes, for a `LocalityBias`.
    off_node_share: see `Locality`. gate: "linear" (a learnable `weight` [E, D]) or "grap" (`grap_rows`; no parameter).
    delta: None, or the least cosine of a token that an expert can tell apart (the paper measured .03): the capacity of
    capacity_factor is then raised to LocMoE's floor, see `capacity_floor.py`, of this form ("exact", "erfc", "exp").
    Other options: those of LinearRouter, with LocMoE's defaults (top-1, aux_loss_coef 0.01). It needs `local_experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        mu: float = 0.1,
        smoothing: float = 0.1,
        locality_bias: int | None = None,
        off_node_share: float | None = None,
        gate: str = "linear",
        delta: float | None = None,
        floor_form: str = "exact",
        aux_loss_coef: float = 0.01,
        balance: str = "global",
        **options: Any,
    ) -> None:
        locality = Locality(mu=mu, smoothing=smoothing, nodes=locality_bias or 0, off_node_share=off_node_share)
        super().__init__(hidden_size, num_experts, top_k, aux_loss_coef=aux_loss_coef, balance=balance,
                         locality=locality, **options)  # fmt: skip
        if gate not in GATES:
            raise ConfigError("gate", gate, f"one of {', '.join(GATES)}")
        self.gate = gate
        if gate == "grap":
            grap_rows(num_experts, hidden_size)
            self.register_parameter("weight", None)
        self.bound: float | None = None
        if delta is not None:
            check_delta(delta)
            if self.capacity_factor is None:
                raise ConfigError("delta", delta, "None without a capacity_factor: it is a floor of that capacity")
            self.bound = capacity_bound(num_experts, hidden_size, delta, form=floor_form)

    def _gate(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.gate == "linear":
            return super()._gate(x_TD)
        return grap_rows(self.num_experts, self.hidden_size, device=x_TD.device, dtype=routing_dtype(x_TD))

    def _capacity(self, choice: Choice, rank_by_TK: torch.Tensor | None) -> int | torch.Tensor | None:
        capacity = super()._capacity(choice, rank_by_TK)
        if capacity is None or self.bound is None:
            return capacity
        return max(capacity, clamp_capacity(self.bound, choice.ids_TK.shape[0]))


class LocMoEPlusRouter(LocMoERouter):
    """LocMoE+: each token chooses experts, then each expert keeps the tokens of highest affinity among those.

    Affinity is cos(x_t, w_i) (eq. 2-4). A token chooses its top_k experts by score (eq. 5; with GrAP, whose rows are
    equally long, that is by affinity), fewer where `share` is set: the fewest whose probabilities sum to it. Then an
    expert keeps, of this rank's tokens, the C of highest affinity (eq. 6; it prints "Bottom-C", and the text says that
    the highest stay). C is the capacity of `capacity_factor`, 1.1 as in the paper's comparison.

    delta: a number, as in LocMoERouter, or "max": the floor of C is then that of the greatest affinity between one of
    the call's tokens (of this rank) and an expert that it chose, measured in every call (Remark 7). It reaches T soon:
    d 768, n 8, T 4096 at a cosine of .16. floor_form: None is "exact", and with "max" the "exp" of the paper ("erfc" is
    the other one there).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        share: float | None = None,
        capacity_factor: float = 1.1,
        gate: str = "grap",
        delta: float | str | None = None,
        floor_form: str | None = None,
        **options: Any,
    ) -> None:
        measured_form = None
        if delta == "max":
            delta, measured_form = None, floor_form or "exp"
            if measured_form not in MEASURED_FORMS:
                raise ConfigError("floor_form", measured_form, f"{' or '.join(MEASURED_FORMS)} beside a measured delta")
            floor_form = None
        elif isinstance(delta, str):
            raise ConfigError("delta", delta, 'None, "max" or a cosine between 0 and 1')
        super().__init__(hidden_size, num_experts, top_k, capacity_factor=capacity_factor, gate=gate, delta=delta,
                         floor_form=floor_form or "exact", **options)  # fmt: skip
        self.measured_form = measured_form
        if share is not None and not (is_finite(share) and 0 < share <= 1):
            raise ConfigError("share", share, "None or a number above 0, at most 1")
        if capacity_factor is None:
            raise ConfigError("capacity_factor", None, "a number: what an expert keeps is what LocMoE+ is about")
        self.share = share

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        choice = super()._choose(logits_TE, nodes)
        if self.share is None:
            return choice
        ids_TK = choice.ids_TK
        probs_TE = router_probabilities(logits_TE.detach(), self.score)
        probs_TK = probs_TE.gather(1, ids_TK.clamp_min(0).long())
        enough_TK = probs_TK.cumsum(dim=-1) - probs_TK >= self.share  # before this choice
        ids_TK = ids_TK.masked_fill(enough_TK, -1)
        return replace(choice, ids_TK=ids_TK, weights_TK=choice.weights_TK.masked_fill(enough_TK, 0.0),
                       counts_E=count_choices(ids_TK, self.num_experts))  # fmt: skip

    @property
    def _drops(self) -> bool:
        return super()._drops or self.share is not None

    def _rank_by(self, x_TD: torch.Tensor, choice: Choice) -> torch.Tensor | None:
        with torch.no_grad():
            x_TD = x_TD.to(routing_dtype(x_TD))
            gate_ED = self._gate(x_TD).to(x_TD.dtype)
            cosines_TE = nn.functional.linear(nn.functional.normalize(x_TD), nn.functional.normalize(gate_ED))
            return cosines_TE.gather(1, choice.ids_TK.clamp_min(0).long())

    def _capacity(self, choice: Choice, rank_by_TK: torch.Tensor | None) -> int | torch.Tensor | None:
        capacity = super()._capacity(choice, rank_by_TK)
        if capacity is None or rank_by_TK is None or self.measured_form is None:
            return capacity
        chosen_TK = rank_by_TK.masked_fill(choice.ids_TK < 0, 0.0)
        floor = measured_floor(
            chosen_TK, self.num_experts, self.hidden_size, chosen_TK.shape[0], form=self.measured_form
        )
        return floor.clamp_min(capacity)
