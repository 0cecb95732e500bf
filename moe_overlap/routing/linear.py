"""The linear router: logits = W x in float32, top-k through `ops.gate_topk`, losses and capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.ops.checks import check_transform
from moe_overlap.ops.devices import check_device
from moe_overlap.ops.gate import SCORES as GATE_SCORES
from moe_overlap.routing.assigned import choose_by_score
from moe_overlap.routing.balance import (
    GlobalBalance,
    load_balancing_loss,
    router_probabilities,
    sequence_balancing_loss,
    z_loss,
)
from moe_overlap.routing.checks import (
    check_capacity_factor,
    check_coefficients,
    check_eval_capacity_factor,
    check_scale,
    check_selection,
    check_shaping,
    check_sizes,
    check_tokens,
    check_words,
    check_zero_experts,
)
from moe_overlap.routing.choice import Choice, Losses, choose_top_k, decide, drop_bad_tokens
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.routing.locality import Locality, LocalityBias, check_locality, limit_off_node, locality_loss
from moe_overlap.routing.masks import (
    TOGETHER,
    ExpertMask,
    check_token_mask,
    mark_padding,
    settle_padding,
    without_padding,
)
from moe_overlap.routing.nodes import Nodes, check_nodes
from moe_overlap.routing.replayed import Recorded, replayed_choice, with_recorded_drops
from moe_overlap.routing.scores import linear_logits
from moe_overlap.routing.select import expert_capacity
from moe_overlap.routing.shaping import shaped_logits, weighed
from moe_overlap.routing.variable_k import VariableK, as_variable_k

INIT_STD = 0.02


class LinearRouter(ExpertMask):
    """Scores every expert with one matrix and picks `top_k` of them per token.

    score: "softmax" (softmax over all experts, then top-k: GShard, Switch), "topk_softmax" (top-k, then softmax over
    the winners: Mixtral, ScMoE eq. 2-5), "sigmoid" (each expert for itself: DeepSeek-V3) or "sqrt_softplus" (likewise:
    DeepSeek-V4). Ties go to the lower id.
    renormalize: divide the K weights by their sum. scale: multiply them. n_group, topk_group: choose the experts
    from the best `topk_group` of `n_group` groups. group_score: what a group is worth: "max", its best expert
    (DeepSeek-V2), "top2_sum", its two best (DeepSeek-V3, Mistral4); None: the sum with a bias, else the best.
    bias: a buffer `expert_bias_E` that is added for the selection
    only, never to the weights (arXiv 2408.15664). It is float32 whatever the module is cast to (float64 too) or loaded
    from: its steps are small. aux_loss_coef, z_loss_coef: see `balance.py`. balance: over what the auxiliary loss
    spreads the tokens evenly: "micro" (those of this rank's call), "sequence" (each sequence), "global" (all ranks').
    capacity_factor: None, or each expert keeps at most ceil(factor * T * K / E) of this rank's slots, those of
    highest weight (equal weights: earlier token first). eval_capacity_factor: the same for a router in eval mode; None:
    no limit there; "same": as in training. T counts padding, so that the capacity follows from the shape.
    zero_experts: Z more logits, of experts that return their input (see `zero.py`): ids from E on. They have no limit;
    the auxiliary loss, the bias and the counts treat all E + Z alike, so that balance means that K * E / (E + Z) of a
    token's experts compute, as LongCat-Flash's budget K_e = 8 of K = 12 is with its 512 + 256.
    logit_bias: a parameter `logit_bias_E`, added to the logits (GPT-OSS). softcap: c, logits become
    c * tanh(logits / c), after the bias. renormalize_eps, beside renormalize: weights are divided by their sum + eps.
    renormalize_p: by their p-norm instead of their sum (DBRX).
    logits_dtype: a dtype in which W x is computed and to which it is rounded, as models do whose router has the dtype
    of its weights; what follows is float32 still. None: float32 all through. Scores of equal logits tie.
    expert_scale: a parameter `expert_scale_E` that multiplies the weights of each expert (Gemma4).
    variable_k: None, or how many of its K experts each token takes (see `VariableK`). `mask_experts`: experts that are
    never chosen (see `ExpertMask`).
    locality: None, or what keeps tokens on their node (`Locality`); the router then needs `local_experts`.
    bad_logits: what happens to a token with a NaN or +inf logit, or with -inf everywhere. "raise": the decision's
    status says so, and all ranks raise together when they agree on the step. "drop": the token takes no expert, its
    K slots count as dropped, and no gradient comes from it.

    Computes in float32, float64 for float64 input, whatever autocast says. Parameters: `weight` [E + Z, D], and
    `locality_bias.weight` [nodes, E] where the locality has one.

    Its parts, for routers made of it: `_logits` (scores), `_choose` (selection), `_capacity`, `_rank_by` and `_losses`.
    """

    replays = True  # a layer may call it with `replay=`
    expert_bias_E: torch.Tensor | None
    logit_bias_E: nn.Parameter | None
    expert_scale_E: nn.Parameter | None
    locality_bias: LocalityBias | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = False,
        scale: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        bias: bool = False,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        balance: str = "micro",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | str | None = "same",
        zero_experts: int = 0,
        logit_bias: bool = False,
        softcap: float | None = None,
        renormalize_eps: float = 0.0,
        renormalize_p: float = 1.0,
        group_score: str | None = None,
        logits_dtype: torch.dtype | None = None,
        expert_scale: bool = False,
        variable_k: VariableK | None = None,
        locality: Locality | None = None,
        bad_logits: str = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, num_experts, top_k, n_group, topk_group)
        check_words(score, bad_logits, balance)
        check_scale(scale)
        check_coefficients(aux_loss_coef=aux_loss_coef, z_loss_coef=z_loss_coef)
        check_capacity_factor(capacity_factor)
        check_eval_capacity_factor(eval_capacity_factor)
        check_zero_experts(zero_experts, n_group)
        check_shaping(softcap, renormalize_eps, renormalize_p, renormalize=renormalize, expert_scale=expert_scale,
                      variable_k=variable_k is not None)  # fmt: skip
        check_selection(group_score, logits_dtype)
        check_device(device)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score = score
        self.renormalize = renormalize
        self.scale = scale
        self.n_group = n_group
        self.topk_group = topk_group
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.balance = balance
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.zero_experts = zero_experts
        self.softcap = softcap
        self.renormalize_eps, self.renormalize_p = renormalize_eps, renormalize_p
        self.group_score = group_score
        self.logits_dtype = logits_dtype
        self.variable_k = as_variable_k(variable_k)
        self.locality = locality
        self.bad_logits = bad_logits
        self.weight = nn.Parameter(torch.empty(self.num_logits, hidden_size, device=device, dtype=dtype))
        for name, wanted in (("logit_bias_E", logit_bias), ("expert_scale_E", expert_scale)):
            value_E = torch.empty(self.num_logits, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value_E) if wanted else None)
        self.locality_bias = None
        if locality is not None:
            check_locality(locality, bias=bias, n_group=n_group, zero_experts=zero_experts)
            if locality.nodes:
                self.locality_bias = LocalityBias(locality.nodes, num_experts, device=device, dtype=dtype)
        bias_E = torch.zeros(self.num_logits, device=device, dtype=torch.float32) if bias else None
        self.register_buffer("expert_bias_E", bias_E)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights (std 0.02): near-uniform probabilities, so that training starts balanced. Bias 0."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=INIT_STD)
        if self.expert_bias_E is not None:
            nn.init.zeros_(self.expert_bias_E)
        if self.logit_bias_E is not None:
            nn.init.zeros_(self.logit_bias_E)
        if self.expert_scale_E is not None:
            nn.init.ones_(self.expert_scale_E)
        if self.locality_bias is not None:
            self.locality_bias.reset_parameters()

    @property
    def needs_nodes(self) -> bool:
        """Whether it has to be told where experts are: a layer then calls it with `local_experts=`."""
        return self.locality is not None

    @property
    def num_logits(self) -> int:
        """E + Z."""
        return self.num_experts + self.zero_experts

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LinearRouter:
        """What `to`, `bfloat16`, `cuda`, `to_empty` and the like do: the bias takes the device, not the dtype."""
        before_E = self.expert_bias_E
        super()._apply(fn, recurse)
        self._restore_bias(before_E)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._restore_bias(self.expert_bias_E)  # assign=True takes over the dtype of what was saved

    def _restore_bias(self, exact_E: torch.Tensor | None) -> None:
        """The bias in float32 again, with the values of `exact_E`, where something has changed its dtype."""
        if exact_E is not None and self.expert_bias_E is not None and self.expert_bias_E.dtype != torch.float32:
            self.expert_bias_E = exact_E.to(self.expert_bias_E.device, torch.float32)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden_size}, experts={self.num_experts}, top_k={self.top_k}, score={self.score}"

    def forward(
        self,
        x_TD: torch.Tensor,
        *,
        sequence_length: int | None = None,
        local_experts: Nodes | None = None,
        token_mask: torch.Tensor | None = None,
        replay: Recorded | None = None,
    ) -> RoutingDecision:
        """x_TD: [T, D], floating. sequence_length: so many tokens in a row are a sequence, for balance="sequence"
        (None: all of them). With balance="global" that loss is left to who knows other ranks' counts: the layer.
        local_experts: where experts and tokens are, which a router with a `locality` needs and others ignore.
        token_mask: bool [T], True = a token, False = padding, which takes no expert and is counted nowhere, whatever
        its x holds: not in losses, not in `tokens_per_expert_E`, not in drops, and bad logits of it are none. With
        balance="global" all ranks give one, or none does (else PlanMismatch on all of them).
        replay: a decision of earlier for the same tokens: its ids, its drops, and the weights of these logits (see
        `replayed.py`); nothing is selected.

        Raises ConfigError for a wrong shape, dtype or device, for nodes that are missing or do not fit, and inside vmap
        and the like; never for bad logits (see `bad_logits`).
        """
        check_transform(inline=True)
        check_tokens(x_TD, self.hidden_size, x_TD.device if self.weight is None else self.weight.device)
        nodes = self._nodes(local_experts, x_TD.shape[0])
        if token_mask is not None and self.selects_together:
            raise ConfigError("token_mask", "given", f"None for a {type(self).__name__}, {TOGETHER}")
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            return self._route(x_TD, sequence_length, nodes, check_token_mask(token_mask, x_TD), replay)

    def _route(
        self,
        x_TD: torch.Tensor,
        sequence_length: int | None,
        nodes: Nodes | None,
        token_mask: torch.Tensor | None,
        replay: Recorded | None,
    ) -> RoutingDecision:
        """Scores -> selection -> capacity; the losses read scores and selection."""
        x_TD = without_padding(x_TD, token_mask)
        logits_TE = shaped_logits(self._logits(x_TD), self.logit_bias_E, self.softcap)
        if self.locality_bias is not None and nodes is not None:
            logits_TE = self.locality_bias(logits_TE, nodes)
        logits_TE = self.hide_masked(mark_padding(logits_TE, token_mask))
        if replay is not None:
            choice = replayed_choice(logits_TE, replay, token_mask, drop_bad=self.bad_logits == "drop",
                                     **self._weighing)  # fmt: skip
            choice = self._weighed(choice)
            losses = self._losses(logits_TE, choice, sequence_length, nodes)
            decision = decide(choice, losses=losses, zero_experts=self.zero_experts, logits_TE=logits_TE)
            return with_recorded_drops(decision, replay)
        choice = self._weighed(self.refuse_masked(self._choose(logits_TE, nodes)))
        if self.bad_logits == "drop":
            choice = drop_bad_tokens(choice)
        choice = settle_padding(choice, token_mask, raises=self.bad_logits == "raise")
        if self.variable_k is not None:
            sum_to = self.scale if self.renormalize or self.score == "topk_softmax" else None
            choice = self.variable_k(choice, x_TD, logits_TE, score=self.score, sum_to=sum_to)
        rank_by_TK = self._rank_by(x_TD, choice)
        return decide(
            choice,
            losses=self._losses(logits_TE, choice, sequence_length, nodes),
            capacity=self._capacity(choice, rank_by_TK),
            rank_by_TK=rank_by_TK,
            zero_experts=self.zero_experts,
            logits_TE=logits_TE,
        )

    def _nodes(self, given: Nodes | None, num_tokens: int) -> Nodes | None:
        if self.locality is None:
            return None
        nodes = check_nodes(given, self.num_experts, num_tokens)
        if self.locality.off_node_share is not None and nodes.fewest_experts() < self.top_k:
            expected = f"at most {nodes.fewest_experts()}, the experts of a node, beside off_node_share"
            raise ConfigError("top_k", self.top_k, expected)
        return nodes

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return linear_logits(x_TD, self._gate(x_TD), drop_bad=self.bad_logits == "drop", dtype=self.logits_dtype)

    def _gate(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[E, D], the row of each expert."""
        return self.weight

    def _choose(self, logits_TE: torch.Tensor, nodes: Nodes | None) -> Choice:
        bias_E = None if self.expert_bias_E is None else self.hide_masked(self.expert_bias_E.to(logits_TE.dtype))
        how = {"k": self.top_k, "n_group": self.n_group, "topk_group": self.topk_group, **self._weighing}

        def choose(among_TE: torch.Tensor) -> Choice:
            if self.score in GATE_SCORES and self.group_score is None:
                return choose_top_k(among_TE, bias_E, **how)
            return choose_by_score(among_TE, bias_E, group_score=self.group_score, **how)

        if nodes is None or self.locality is None or self.locality.off_node_share is None:
            return choose(logits_TE)
        near_TE = logits_TE.masked_fill(~nodes.near(logits_TE.device), -torch.inf)
        return limit_off_node(choose(logits_TE), choose(near_TE), nodes, self.locality.off_node_share)

    @property
    def _weighing(self) -> dict[str, Any]:
        """How the gate makes weights of scores; what it cannot divide by is divided by here (`_weighed`)."""
        if self._norm is not None:
            return {"score": self.score, "renormalize": False, "scale": 1.0}
        return {"score": self.score, "renormalize": self.renormalize, "scale": self.scale}

    @property
    def _norm(self) -> tuple[float, float] | None:
        """(p, eps) of the norm that weights are divided by, None where the gate does that or nobody."""
        plain = self.renormalize_p == 1 and self.renormalize_eps == 0
        return None if plain or not self.renormalize else (self.renormalize_p, self.renormalize_eps)

    def _weighed(self, choice: Choice) -> Choice:
        """The choice with the weights that the gate leaves to the router."""
        return weighed(choice, norm=self._norm, scale=self.scale, expert_scale_E=self.expert_scale_E)

    def _rank_by(self, x_TD: torch.Tensor, choice: Choice) -> torch.Tensor | None:
        """[T, K], by which an expert that is full picks its tokens; None: by weight."""
        return None

    @property
    def _capacity_factor(self) -> float | None:
        """The factor in force."""
        if self.training or isinstance(self.eval_capacity_factor, str):
            return self.capacity_factor
        return self.eval_capacity_factor

    def _capacity(self, choice: Choice, rank_by_TK: torch.Tensor | None) -> int | torch.Tensor | None:
        """Slots of one expert of this rank, an integer or an int64 scalar on the device; None: no limit."""
        factor = self._capacity_factor
        return None if factor is None else expert_capacity(factor, choice.ids_TK.shape[0], self.top_k, self.num_logits)

    @property
    def _drops(self) -> bool:
        """Whether a token may have fewer than K choices or not all are dispatched. Counts that are agreed on are K a
        token, or the sums of what is dispatched; else they are summed."""
        return self._capacity_factor is not None or self.variable_k is not None or self.zero_experts > 0

    def _losses(
        self, logits_TE: torch.Tensor, choice: Choice, sequence_length: int | None, nodes: Nodes | None
    ) -> Losses:
        mu = 0.0 if self.locality is None else self.locality.mu
        if self.aux_loss_coef == 0.0 and self.z_loss_coef == 0.0 and mu == 0.0:
            return None, None
        valid_T1, coef = choice.valid_T1, self.aux_loss_coef * self.unmasked_share
        if valid_T1 is not None:
            logits_TE = logits_TE.masked_fill(~valid_T1, 0.0)
        loss, rest = logits_TE.new_zeros(()), None
        probs_TE = router_probabilities(logits_TE, self.score) if coef or mu else logits_TE
        if coef != 0.0:
            if self.balance == "global":
                rest = GlobalBalance.of(probs_TE, choice.counts_E, coef=coef, valid_T1=valid_T1, drops=self._drops)
            elif self.balance == "sequence":
                length = max(logits_TE.shape[0], 1) if sequence_length is None else sequence_length
                loss = loss + coef * sequence_balancing_loss(probs_TE, choice.ids_TK, length, valid_T1=valid_T1)
            else:
                loss = loss + coef * load_balancing_loss(probs_TE, choice.counts_E, valid_T1=valid_T1)
        if self.z_loss_coef != 0.0:
            loss = loss + self.z_loss_coef * z_loss(logits_TE, valid_T1=valid_T1)
        if self.locality is not None and nodes is not None and mu != 0.0:
            there = locality_loss(probs_TE, nodes, smoothing=self.locality.smoothing, valid_T1=valid_T1,
                                  masked_E=self.masked_experts_E)  # fmt: skip
            loss = loss + mu * there
        return loss, rest
