"""SMILE (arXiv 2212.05191): a token chooses a node first, and then an expert of that node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.ops.checks import check_transform
from moe_overlap.ops.devices import check_device
from moe_overlap.routing.balance import GlobalBalance, load_balancing_loss
from moe_overlap.routing.checks import check_coefficients, check_count, check_sizes, check_tokens, check_words
from moe_overlap.routing.choice import Choice, Losses, choose_top_k, count_choices, decide, drop_bad_tokens
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.linear import INIT_STD
from moe_overlap.routing.masks import check_token_mask, mark_padding, settle_padding, without_padding
from moe_overlap.routing.scores import linear_logits

BALANCE = ("micro", "global")


class SmileRouter(nn.Module):
    """Two gates with D * (n + m) parameters in the place of D * n * m: `node_weight` [n, D] for n nodes, and `weight`
    [m, D] for the m = E / n experts of a node, the same on every node (section 3).

        p = softmax(node_weight x), q = softmax(weight x);  y = p_i q_j E_ij(x),  i = argmax p, j = argmax q

    Expert (i, j) is the logical expert i * m + j. Nodes here are groups of experts, fixed with the model, as for
    group-limited top-k: the placement of a layer without a dispatcher of its own puts group i on node i, if `num_nodes`
    is the number of its nodes. The paper has one expert on each of a node's m ranks; here m may be any number of
    experts and top_k up to m experts of the one node are taken (the paper: one).

    alpha, beta: coefficients of the two-level loss alpha * n * sum_i f_i P_i + beta * m * sum_j g_j Q_j: f, g are the
    shares of the choices that went to node i and to place j of whichever node, P, Q the mean probabilities. It is
    alpha + beta where everything is even, its minimum over what routing follows p and q. balance: of which tokens the
    shares are: "micro" (this rank's call) or "global" (all ranks', which the layer finishes as LinearRouter's).
    bad_logits: as in LinearRouter.

    Exchanges in two steps, with (n - 1) + (m - 1) peers for one rank in the place of n * m - 1, are what a layer's
    `hierarchical=True` (beside `dedup`) does with any decision: one row to each node, to the rank of the own place
    there, which passes it on inside its node.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        num_nodes: int,
        alpha: float = 0.01,
        beta: float = 0.01,
        balance: str = "micro",
        bad_logits: str = "raise",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, num_experts, top_k)
        check_count("num_nodes", num_nodes)
        if num_experts % num_nodes:
            raise ConfigError("num_nodes", num_nodes, f"a divisor of num_experts ({num_experts})")
        if top_k > num_experts // num_nodes:
            raise ConfigError("top_k", top_k, f"at most {num_experts // num_nodes}, the experts of one node")
        check_words("softmax", bad_logits)
        check_coefficients(alpha=alpha, beta=beta)
        if balance not in BALANCE:
            raise ConfigError("balance", balance, f"one of {', '.join(BALANCE)}")
        check_device(device)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_nodes = num_nodes
        self.alpha = alpha
        self.beta = beta
        self.balance = balance
        self.bad_logits = bad_logits
        self.node_weight = nn.Parameter(torch.empty(num_nodes, hidden_size, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_experts // num_nodes, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights (std 0.02), as LinearRouter's."""
        nn.init.normal_(self.node_weight, std=INIT_STD)
        nn.init.normal_(self.weight, std=INIT_STD)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden_size}, experts={self.num_experts}, nodes={self.num_nodes}, top_k={self.top_k}"

    def forward(self, x_TD: torch.Tensor, *, token_mask: torch.Tensor | None = None) -> RoutingDecision:
        """x_TD: [T, D], floating. token_mask: as LinearRouter's. Raises ConfigError for a wrong shape or dtype."""
        check_transform(inline=True)
        check_tokens(x_TD, self.hidden_size, self.weight.device)
        token_mask = check_token_mask(token_mask, x_TD)
        x_TD = without_padding(x_TD, token_mask)
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            drop = self.bad_logits == "drop"
            node_logits_Tn = linear_logits(x_TD, self.node_weight, drop_bad=drop)
            logits_Tm = linear_logits(x_TD, self.weight, drop_bad=drop)
            choice = self._choose(mark_padding(node_logits_Tn, token_mask), mark_padding(logits_Tm, token_mask))
            if drop:
                choice = drop_bad_tokens(choice)
            choice = settle_padding(choice, token_mask, raises=not drop)
            return decide(choice, losses=self._losses(node_logits_Tn, logits_Tm, choice))

    def _choose(self, node_logits_Tn: torch.Tensor, logits_Tm: torch.Tensor) -> Choice:
        node = choose_top_k(node_logits_Tn, k=1)
        inside = choose_top_k(logits_Tm, k=self.top_k)
        bad_TK = (node.ids_TK < 0) | (inside.ids_TK < 0)
        ids_TK = (node.ids_TK * logits_Tm.shape[1] + inside.ids_TK).masked_fill(bad_TK, -1)
        weights_TK = (node.weights_TK * inside.weights_TK).masked_fill(bad_TK, 0.0)
        return replace(inside, ids_TK=ids_TK, weights_TK=weights_TK, status=node.status | inside.status,
                       counts_E=count_choices(ids_TK, self.num_experts))  # fmt: skip

    def _losses(self, node_logits_Tn: torch.Tensor, logits_Tm: torch.Tensor, choice: Choice) -> Losses:
        if self.alpha == 0.0 and self.beta == 0.0:
            return None, None
        valid_T1 = choice.valid_T1
        if valid_T1 is not None:
            node_logits_Tn = node_logits_Tn.masked_fill(~valid_T1, 0.0)
            logits_Tm = logits_Tm.masked_fill(~valid_T1, 0.0)
        # f_i is a sum over j of the share f_ij of expert (i, j), g_j one over i. So both levels are one auxiliary loss
        # E * sum_ij f_ij R_ij, of R = alpha / m * P_i + beta / n * Q_j in the place of probabilities.
        nodes_Tn1, inside_T1m = node_logits_Tn.softmax(dim=-1)[:, :, None], logits_Tm.softmax(dim=-1)[:, None]
        per_node = logits_Tm.shape[1]
        both_TE = (self.alpha / per_node * nodes_Tn1 + self.beta / self.num_nodes * inside_T1m).flatten(1)
        if self.balance == "global":
            return None, GlobalBalance.of(both_TE, choice.counts_E, coef=1.0, valid_T1=valid_T1)
        return load_balancing_loss(both_TE, choice.counts_E, valid_T1=valid_T1), None
