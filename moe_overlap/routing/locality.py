"""Locality: what keeps tokens on their node. A loss, a parameter and a cap, each for itself or together.

Where locality comes from: a router that is equal on all ranks and reads tokens alone does not know its node. On texts
that are alike everywhere the sum over the nodes of the locality loss is least where every node's tokens are spread
evenly, and then no token stays for it. Two things break that: `LocalityBias`, whose rows differ by node, and text that
differs by node.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.ops.devices import check_device
from moe_overlap.routing.balance import mean_over_tokens
from moe_overlap.routing.checks import check_coefficients, is_finite
from moe_overlap.routing.choice import Choice, count_choices
from moe_overlap.routing.nodes import Nodes
from moe_overlap.routing.select import FACTOR_DENOMINATOR


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What a router does to keep tokens on their node.

    mu: factor of `locality_loss`. smoothing: its eps. nodes: that many rows of a `LocalityBias`; 0: none.
    off_node_share: at most this share of a rank's tokens has its first choice on another node (`limit_off_node`); None:
    no limit.
    """

    mu: float = 0.0
    smoothing: float = 0.1
    nodes: int = 0
    off_node_share: float | None = None

    def __post_init__(self) -> None:
        check_coefficients(mu=self.mu)
        if not (is_finite(self.smoothing) and 0 < self.smoothing < 1):
            raise ConfigError("smoothing", self.smoothing, "a number between 0 and 1: without it the loss is infinite")
        if isinstance(self.nodes, bool) or not isinstance(self.nodes, int) or self.nodes < 0:
            raise ConfigError("nodes", self.nodes, "an integer of at least 0")
        share = self.off_node_share
        if share is not None and not (is_finite(share) and 0 <= share <= 1):
            raise ConfigError("off_node_share", share, "None or a number from 0 to 1")


def check_locality(locality: object, *, bias: bool, n_group: int, zero_experts: int = 0) -> None:
    """Raises ConfigError for what is no Locality, and for a cap beside what could have a masked expert win: a bias on
    the selection, or groups none of whose experts is on the node."""
    if not isinstance(locality, Locality):
        raise ConfigError("locality", type(locality).__name__, "None or a routing.Locality")
    if zero_experts:
        raise ConfigError("zero_experts", zero_experts, "0 beside a locality: those experts are on every node")
    if locality.off_node_share is not None and (bias or n_group > 1):
        field, value = ("bias", bias) if bias else ("n_group", n_group)
        raise ConfigError(field, value, f"{False if bias else 1} beside off_node_share")


def locality_loss(
    probs_TE: torch.Tensor,
    nodes: Nodes,
    *,
    smoothing: float,
    valid_T1: torch.Tensor | None = None,
    masked_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(D_c || D_l) without its factor mu (LocMoE, arXiv 2401.13920, eq. 6): a scalar of probs_TE's dtype.

        D_c[i] = mean over the tokens of p_i                      where the tokens go; differentiable
        D_l[i] = (1 - eps) / |S| in S, eps / (E - |S|) elsewhere  S: the experts on the tokens' node, by the placement

    Masked experts (masked_E: bool [E]) are in neither, and none of the E.

    The paper leaves D_l and its smoothing open. This one is even inside the node and outside, so that the loss is
    least where a share eps of the tokens leaves the node and both parts are balanced. Where all experts are on the node
    D_l is even. A node without experts (fewer experts than nodes) has nothing to favour: its loss is 0, and so is what
    locality can gain there (the paper's case of 256 ranks).

    probs_TE: [T, E], rows sum to 1. Where tokens are on several nodes (`nodes.own` a tensor), the mean over all nodes
    of each one's loss: with one rank to a node, what the ranks' mean is.
    """
    if isinstance(nodes.own, torch.Tensor):
        each = [_mean_of(probs_TE, valid_T1, (nodes.own == node)[:, None]) for node in range(nodes.num_nodes)]
        current_NE, near_NE = torch.stack(each), nodes.is_near(probs_TE.device)
    else:
        current_NE, near_NE = mean_over_tokens(probs_TE, valid_T1)[None], nodes.near(probs_TE.device)
    there_NE = torch.ones_like(near_NE) if masked_E is None else (~masked_E).expand_as(near_NE)
    near_NE = near_NE & there_NE
    num_near = near_NE.sum(dim=-1, keepdim=True).to(probs_TE.dtype)
    num_far = there_NE.sum(dim=-1, keepdim=True) - num_near
    favoured_NE = torch.where(near_NE, (1 - smoothing) / num_near, smoothing / num_far.clamp_min(1))
    favoured_NE = torch.where(num_far == 0, 1 / num_near, favoured_NE)
    tiny = torch.finfo(probs_TE.dtype).tiny
    terms_NE = current_NE * (current_NE.clamp_min(tiny) / favoured_NE.clamp_min(tiny)).log()
    return terms_NE.masked_fill(num_near == 0, 0.0).sum() / len(current_NE)


def _mean_of(probs_TE: torch.Tensor, valid_T1: torch.Tensor | None, there_T1: torch.Tensor) -> torch.Tensor:
    return mean_over_tokens(probs_TE, there_T1 if valid_T1 is None else there_T1 & valid_T1)


class LocalityBias(nn.Module):
    """A number for each (node, expert) that is added to the logits: `weight` [nodes, E], zeros at first.

    Every rank has all rows and uses that of its own node, so that the parameter is the same on all ranks, and its
    gradient, after the mean over ranks that DDP makes, too. It learns from the router's losses and weights. A state
    with another number of nodes gives every row the mean of its rows, with a warning.
    """

    def __init__(
        self, num_nodes: int, num_experts: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_device(device)
        self.weight = nn.Parameter(torch.zeros(num_nodes, num_experts, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Zeros: no node favours an expert."""
        nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return f"nodes={self.weight.shape[0]}, experts={self.weight.shape[1]}"

    def forward(self, logits_TE: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """logits_TE with the row of each token's node added. Raises ConfigError for another number of nodes."""
        if nodes.num_nodes != self.weight.shape[0]:
            raise ConfigError("locality.nodes", self.weight.shape[0], f"{nodes.num_nodes}, as many as there are")
        own = nodes.own if isinstance(nodes.own, torch.Tensor) else torch.full((1,), nodes.own, device=logits_TE.device)
        return logits_TE + self.weight.to(logits_TE.dtype)[own]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved, own = state_dict.get(f"{prefix}weight"), self.weight.shape
        if isinstance(saved, torch.Tensor) and saved.dim() == 2 and saved.shape[1] == own[1] and saved.shape != own:
            text = f"{prefix}weight was saved for {saved.shape[0]} nodes and is loaded for {own[0]}"
            warnings.warn(f"{text}: every node gets the mean of its rows", stacklevel=2)
            mean_NE = saved.mean(dim=0, keepdim=True).expand(own)
            state_dict = state_dict | {f"{prefix}weight": mean_NE.clone()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def limit_off_node(choice: Choice, near_choice: Choice, nodes: Nodes, share: float) -> Choice:
    """FasterMoE's topology gate (PPoPP'22; fmoe/gates/faster_gate.py): a hard cap on the off-node share.

    Of a rank's T tokens at most floor(share * T) keep a first choice on another node: those of highest weight, equal
    weights: the earlier token. All others take their row of `near_choice`, which is made among the experts of the node
    alone, with weights that are scores among these. A second choice of a token that stays as it is may be anywhere.
    """
    tokens = choice.ids_TK.shape[0]
    if tokens == 0:
        return choice
    first_T1 = choice.ids_TK[:, :1]
    near_TE = nodes.near(first_T1.device).expand(tokens, -1)
    off_T = (~near_TE.gather(1, first_T1.clamp_min(0).long()) & (first_T1 >= 0))[:, 0]
    best_T = choice.weights_TK[:, 0].detach().masked_fill(~off_T, -torch.inf)
    place_T = best_T.argsort(descending=True, stable=True).argsort()
    part = Fraction(share).limit_denominator(FACTOR_DENOMINATOR)
    moved_T = off_T & (place_T >= part.numerator * tokens // part.denominator) & (near_choice.ids_TK[:, 0] >= 0)
    ids_TK = torch.where(moved_T[:, None], near_choice.ids_TK, choice.ids_TK)
    return replace(choice, ids_TK=ids_TK, counts_E=count_choices(ids_TK, choice.counts_E.shape[0]),
                   weights_TK=torch.where(moved_T[:, None], near_choice.weights_TK, choice.weights_TK))  # fmt: skip
