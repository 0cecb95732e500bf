"""Routers that balance by looking at many tokens at once: Sinkhorn, BASE, quantile balancing, expert choice."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap.errors import ConfigError
from moe_overlap.ops.gate import gate_topk
from moe_overlap.routing import (
    BaseRouter,
    ExpertChoiceRouter,
    LinearRouter,
    QuantileRouter,
    SinkhornRouter,
    max_violation,
)
from moe_overlap.routing.assigned import bad_rows, choice_of, selection_scores
from moe_overlap.routing.base_assignment import PRECISION, assign
from moe_overlap.routing.quantile import quantile_prices
from moe_overlap.routing.sinkhorn import sinkhorn_potential
from tests.layers import D, E, make, tokens
from tests.ranks import virtual_world
from tests.strategies import make_logits
from tests.tolerances import close, same_bits

NAN, INF = float("nan"), float("inf")


def skewed(router):
    """Its weights so that some experts are wanted far more than others, by tokens that `ones` makes."""
    with torch.no_grad():
        router.weight.mul_(10)
        router.weight[:, 0] = torch.linspace(-2, 2, router.num_experts, dtype=router.weight.dtype)
    return router


def ones(count, seed=0):
    x_TD = tokens(count, seed)
    x_TD[:, 0] = 1.0
    return x_TD


def new(kind, **options):
    torch.manual_seed(1)
    return skewed(kind(D, E, options.pop("top_k", 2), dtype=torch.float64, **options))


# ---------------------------------------------------------------- ids that were made otherwise


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_ids_of_top_k_have_the_weights_and_gradients_of_top_k(score, renormalize):
    logits_TE = make_logits("normal", 9, 6, dtype=torch.float64).requires_grad_()
    how = {"score": score, "renormalize": renormalize, "scale": 2.5}
    weights_TK, ids_TK, counts_E, status = gate_topk(logits_TE, k=3, **how)
    choice = choice_of(logits_TE, ids_TK, **how)
    close(choice.weights_TK, weights_TK)
    assert torch.equal(choice.counts_E, counts_E.long()) and torch.equal(choice.status, status)
    seed = torch.randn_like(weights_TK)
    ours, theirs = (torch.autograd.grad(one, logits_TE, seed)[0] for one in (choice.weights_TK, weights_TK))
    close(ours, theirs)


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_bad_and_unused_rows_have_no_weight_and_finite_gradients(score):
    logits_TE = torch.randn(5, 4, dtype=torch.float64)
    logits_TE[0, 1], logits_TE[1, 2], logits_TE[2] = NAN, INF, -INF
    assert bad_rows(logits_TE)[:, 0].tolist() == [True, True, True, False, False]
    logits_TE.requires_grad_()
    ids_TK = torch.tensor([[0, 1], [2, 1], [3, 0], [1, -1], [-1, -1]])
    choice = choice_of(logits_TE, ids_TK, score=score, renormalize=True, scale=1.0)
    assert choice.ids_TK.tolist() == [[-1, -1]] * 3 + [[1, -1], [-1, -1]]
    assert choice.status.tolist() == [1] and choice.counts_E.tolist() == [0, 1, 0, 0]
    close(choice.weights_TK.detach()[3], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert not choice.weights_TK[[0, 1, 2, 4]].any()
    (grad,) = torch.autograd.grad(choice.weights_TK.sum(), logits_TE)
    assert grad.isfinite().all()


# ---------------------------------------------------------------- Sinkhorn


def test_the_plan_has_even_columns():
    logits_TE = 2 * make_logits("skewed", 64, 6, dtype=torch.float64)
    plan_TE = (logits_TE + sinkhorn_potential(logits_TE, 300)).softmax(dim=1)
    close(plan_TE.sum(dim=0), torch.full((6,), 64 / 6, dtype=torch.float64))


def test_sinkhorn_balances_in_training_and_takes_the_best_in_eval():
    router, plain = new(SinkhornRouter), new(LinearRouter)
    x_TD = ones(256)
    before, after = plain(x_TD), router(x_TD)
    assert max_violation(after.tokens_per_expert_E) < 0.5 < 1.5 < max_violation(before.tokens_per_expert_E)
    same_bits(router.eval()(x_TD).topk_ids_TK, before.topk_ids_TK)
    chosen_TK = (x_TD @ plain.weight.T).softmax(-1).gather(1, after.topk_ids_TK.long())
    close(after.topk_weights_TK, chosen_TK)


# ---------------------------------------------------------------- BASE


@pytest.mark.parametrize(("count", "experts"), [(6, 3), (6, 2), (7, 3), (4, 4), (5, 1), (3, 4)])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties"])
def test_the_assignment_is_even_and_nearly_the_best(kind, count, experts):
    scores_TE = make_logits(kind, count, experts, dtype=torch.float64)
    seats = -(-count // experts)

    def value(ids):
        return sum(float(scores_TE[t, e]) for t, e in enumerate(ids))

    all_even = (ids for ids in product(range(experts), repeat=count) if max(map(ids.count, ids)) <= seats)
    best = max(map(value, all_even))
    found = assign(scores_TE).tolist()
    assert max(map(found.count, found)) <= seats
    spread = float(scores_TE.max() - scores_TE.min())
    assert best - count * PRECISION * spread - 1e-9 <= value(found) <= best + 1e-9


def test_base_gives_every_expert_as_many_tokens_in_training_and_the_best_in_eval():
    router = new(BaseRouter, top_k=1)
    x_TD = ones(203)
    decision = router(x_TD)
    assert decision.tokens_per_expert_E.max() == 26 and decision.tokens_per_expert_E.sum() == 203
    logits_TE = x_TD @ router.weight.T
    close(decision.topk_weights_TK, logits_TE.sigmoid().gather(1, decision.topk_ids_TK.long()))
    assert torch.equal(router.eval()(x_TD).topk_ids_TK[:, 0].long(), logits_TE.argmax(dim=1))


# ---------------------------------------------------------------- quantile balancing


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_quantile_prices_balance_the_batch_that_they_are_of(score):
    router = new(QuantileRouter, score=score, top_k=3)
    x_TD = ones(512)
    before = router(x_TD).tokens_per_expert_E
    router.step()
    assert router.expert_bias_E.dtype == torch.float32 and abs(float(router.expert_bias_E.mean())) < 1e-6
    after = router(x_TD).tokens_per_expert_E
    assert max_violation(before) > 1.0 and max_violation(after) < 0.1


def test_quantile_prices_are_the_quantiles():
    """K = 1, T = 4, E = 2: each takes the two tokens that prefer it most, by 0.8 and 0.5 or by 0.1 and 0.4 less."""
    scores_TE = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6], [0.6, 0.2]])
    prices_E = quantile_prices(scores_TE, 1, torch.zeros(2))
    taken = (scores_TE - prices_E).argmax(dim=1)
    assert taken.tolist() == [0, 0, 1, 1] and prices_E.sum().abs() < 1e-6


def test_quantile_steps_take_the_mean_of_micro_batches_ranks_and_the_steps_before():
    router = new(QuantileRouter, momentum=0.5)
    with torch.no_grad():
        router(ones(64))
    router.eval()(ones(64))
    router.step()
    assert not router.expert_bias_E.any(), "neither call was one of training"
    router.train()
    first, second = ones(64), ones(48, seed=1)
    scores = [selection_scores(x_TD @ router.weight.detach().T, router.score) for x_TD in (first, second)]
    prices_E = sum(quantile_prices(one_TE, router.top_k, torch.zeros(E)) for one_TE in scores) / 2
    checkpoint(lambda x_TD: router(x_TD).topk_weights_TK, first, use_reentrant=False).sum().backward()
    router(second)
    router.step(mean=lambda mine_E: (mine_E + 1.0) / 2)
    close(router.expert_bias_E, (0.5 * (1.0 - prices_E) / 2).float())


# ---------------------------------------------------------------- expert choice


def test_experts_choose_the_same_number_of_tokens_each():
    router = new(ExpertChoiceRouter, top_k=E, average=2.0, allow_noncausal=True)
    x_TD = ones(21)
    decision = router(x_TD)
    assert decision.tokens_per_expert_E.tolist() == [6] * E  # ceil(2 * 21 / 8)
    scores_TE = (x_TD @ router.weight.T).softmax(-1)
    for expert in range(E):
        want = set(scores_TE[:, expert].topk(6).indices.tolist())
        assert {t for t in range(21) if expert in decision.topk_ids_TK[t].tolist()} == want
    used_TK = decision.topk_ids_TK >= 0
    close(decision.topk_weights_TK[used_TK], scores_TE.gather(1, decision.topk_ids_TK.clamp_min(0).long())[used_TK])
    assert decision.dropped_tokens == 0
    narrow = new(ExpertChoiceRouter, top_k=1, average=2.0, allow_noncausal=True)(x_TD)
    assert torch.equal(narrow.topk_ids_TK[:, 0], decision.topk_ids_TK[:, 0])
    assert narrow.dropped_tokens == 6 * E - (narrow.topk_ids_TK >= 0).sum() > 0


def test_expert_choice_is_refused_unless_one_insists():
    for given in ({}, {"allow_noncausal": False}, {"allow_noncausal": 1}):
        with pytest.raises(ConfigError, match="future") as caught:
            new(ExpertChoiceRouter, **given)
        assert caught.value.field == "allow_noncausal"


# ---------------------------------------------------------------- all of them


ALL = [(SinkhornRouter, {}), (BaseRouter, {"top_k": 1}), (QuantileRouter, {}),
       (ExpertChoiceRouter, {"top_k": 4, "allow_noncausal": True})]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        (SinkhornRouter, {"n_group": 2}, "n_group"),
        (SinkhornRouter, {"bias": True}, "bias"),
        (SinkhornRouter, {"iterations": 0}, "iterations"),
        (BaseRouter, {"top_k": 2}, "top_k"),
        (BaseRouter, {"top_k": 1, "n_group": 2}, "n_group"),
        (BaseRouter, {"top_k": 1, "bias": True}, "n_group"),
        (QuantileRouter, {"n_group": 2, "topk_group": 2}, "n_group"),
        (QuantileRouter, {"momentum": 1.0}, "momentum"),
        (ExpertChoiceRouter, {"allow_noncausal": True, "average": 0}, "average"),
        (ExpertChoiceRouter, {"allow_noncausal": True, "average": E + 1}, "average"),
        (ExpertChoiceRouter, {"allow_noncausal": True, "aux_loss_coef": 0.1}, "aux_loss_coef"),
        (ExpertChoiceRouter, {"allow_noncausal": True, "bias": True}, "bias"),
        (ExpertChoiceRouter, {"allow_noncausal": True, "capacity_factor": 1.0}, "capacity_factor"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, options, field):
    with pytest.raises(ConfigError) as caught:
        new(kind, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(("kind", "options"), ALL)
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_bad_logits_raise_or_are_dropped(kind, options, policy):
    if (kind, policy) == (ExpertChoiceRouter, "drop"):
        with pytest.raises(ConfigError, match="bad_logits"):
            new(kind, bad_logits=policy, **options)
        return
    router = new(kind, bad_logits=policy, **options)
    x_TD = ones(24)
    x_TD[[3, 5], 1] = NAN
    decision = router(x_TD)
    assert (decision.topk_ids_TK[[3, 5]] == -1).all()
    assert decision.status.tolist() == [policy == "raise"]
    if policy == "drop":
        decision.topk_weights_TK.sum().backward()
        assert router.weight.grad.isfinite().all() and decision.dropped_tokens >= 2 * router.top_k


@pytest.mark.parametrize(("kind", "options"), ALL)
@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_a_layer_on_ranks_with_uneven_tokens(kind, options, schedule):
    """Outputs and the router's gradients are those of the same decisions on one rank."""
    sizes = (9, 0)

    def rank(me):
        layer = make(me.transport(), router=new(kind, **options), top_k=options.get("top_k", 2), schedule=schedule)
        x = ones(sizes[me.rank], seed=me.rank)
        y = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), [layer.router.weight])
        return y.detach(), grad

    results = virtual_world(2).run(rank)
    assert results[1][0].shape == (0, D) and not results[1][1].any()
    alone = make(router=new(kind, **options), top_k=options.get("top_k", 2))
    y = alone(ones(9))
    (grad,) = torch.autograd.grad(y.square().sum(), [alone.router.weight])
    close(results[0][0], y.detach())
    close(results[0][1], grad)
    assert grad.abs().max() > 1e-6
