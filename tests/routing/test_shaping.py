"""Options of LinearRouter for other families: logit bias, softcap, eps of the sum, a scale for each expert."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ConfigError, LinearRouter, MoELayer
from moe_overlap.routing import Recorded, VariableK

D, E, K, T = 12, 6, 3, 20


def _router(**options):
    torch.manual_seed(0)
    router = LinearRouter(D, E, K, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return router


def _x():
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _same(router, weights_of):
    """Weights and gradients are those of `weights_of(logits, pick)` at the ids that the router takes."""
    decision = router(_x())
    logits = _x() @ router.weight.T
    want = weights_of(logits, lambda scores: scores.gather(1, decision.topk_ids_TK.long()), decision.topk_ids_TK.long())
    torch.testing.assert_close(decision.topk_weights_TK, want, rtol=1e-12, atol=1e-14)
    pull = torch.randn(T, K, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((one * pull).sum(), list(router.parameters())) for one in (
        decision.topk_weights_TK, want))  # fmt: skip
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    return decision


def test_logit_bias_is_that_of_gpt_oss():
    router = _router(score="topk_softmax", logit_bias=True)
    decision = _same(router, lambda logits, pick, ids: pick(logits + router.logit_bias_E).softmax(dim=1))
    assert torch.equal(decision.topk_ids_TK.long(), (_x() @ router.weight.T + router.logit_bias_E).topk(K).indices)


def test_softcap_comes_after_the_bias():
    router = _router(softcap=1.5, logit_bias=True)
    _same(router, lambda logits, pick, ids: pick(
        (1.5 * torch.tanh((logits + router.logit_bias_E) / 1.5)).softmax(dim=1)))  # fmt: skip


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_eps_of_the_sum(score):
    def weights(logits, pick, ids):
        chosen = pick(logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=1))
        return 2.5 * chosen / (chosen.sum(dim=1, keepdim=True) + 0.1)

    _same(_router(score=score, renormalize=True, scale=2.5, renormalize_eps=0.1), weights)


def test_a_scale_for_each_expert():
    router = _router(score="softmax", renormalize=True, expert_scale=True)

    def weights(logits, pick, ids):
        chosen = pick(logits.softmax(dim=1))
        return chosen / chosen.sum(dim=1, keepdim=True) * router.expert_scale_E[ids]

    _same(router, weights)


def test_replay_weighs_as_the_router_does():
    router = _router(
        score="sigmoid", renormalize=True, renormalize_eps=0.1, expert_scale=True, logit_bias=True, softcap=2.0
    )
    decision = router(_x())
    again = router(_x(), replay=Recorded.of(decision, None))
    torch.testing.assert_close(again.topk_weights_TK, decision.topk_weights_TK)


def test_parameters_start_neutral_and_are_only_there_when_asked_for():
    router = LinearRouter(D, E, K, logit_bias=True, expert_scale=True)
    assert not router.logit_bias_E.any() and bool((router.expert_scale_E == 1).all())
    assert [name for name, _ in LinearRouter(D, E, K).named_parameters()] == ["weight"]


def test_bad_logits_are_seen_through_a_cap():
    router = _router(softcap=2.0)
    x = _x()
    x[3, 0] = float("inf")
    assert router(x).status.item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dropped_token_leaves_no_gradient_behind_a_cap(bad):
    """Values and gradients are those of the other tokens alone."""
    router = _router(softcap=2.0, logit_bias=True, bad_logits="drop", aux_loss_coef=0.1, z_loss_coef=0.1)
    x = _x()
    x[3, 0] = bad
    others = [token for token in range(T) if token != 3]
    results = []
    for decision in (router(x), router(x[others])):
        loss = decision.topk_weights_TK[:, 0].square().sum() + decision.aux_loss
        results.append([loss, *torch.autograd.grad(loss, list(router.parameters()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_layer_takes_them():
    layer = MoELayer(D, 8, E, K, router="topk_softmax", logit_bias=True, softcap=30.0)
    layer(torch.randn(T, D)).sum().backward()
    assert layer.router.logit_bias_E.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": float("inf")}),
        ("softcap", {"softcap": "2"}),
        ("renormalize_eps", {"renormalize_eps": -1e-6, "renormalize": True}),
        ("renormalize_eps", {"renormalize_eps": 1e-6}),
        ("renormalize_eps", {"renormalize_eps": 1e-6, "renormalize": True, "variable_k": VariableK(threshold=0.5)}),
        ("expert_scale", {"expert_scale": True, "variable_k": VariableK(threshold=0.5)}),
    ],
)
def test_what_does_not_fit_is_refused(field, options):
    with pytest.raises(ConfigError) as error:
        LinearRouter(D, E, K, **options)
    assert error.value.field == field
