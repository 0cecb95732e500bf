"""sqrt-softplus, p-norms, a dtype of the logits, and what a group is worth: against plain formulas, and the routers of
transformers where they have such an option."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe_overlap import ConfigError, LinearRouter, MoELayer
from moe_overlap.routing import Recorded, VariableK, router_probabilities

D, E, K, T = 12, 8, 3, 24


def _router(dtype=torch.float64, **options):
    torch.manual_seed(0)
    router = LinearRouter(D, E, K, dtype=dtype, **options)
    with torch.no_grad():
        router.weight.normal_()
        if router.expert_bias_E is not None:
            router.expert_bias_E.copy_(torch.randn(E))
    return router


def _x(dtype=torch.float64):
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def _weights_and_grads(weights, router):
    pull = torch.randn(weights.shape, dtype=weights.dtype, generator=torch.Generator().manual_seed(2))
    return weights, *torch.autograd.grad((weights * pull).sum(), [router.weight])


@pytest.mark.parametrize("bias", [False, True])
def test_sqrt_softplus(bias):
    router = _router(score="sqrt_softplus", bias=bias, renormalize=True, scale=1.5)
    decision = router(_x())
    scores = F.softplus(_x() @ router.weight.T).sqrt()
    ids = (scores + (router.expert_bias_E.double() if bias else 0)).topk(K).indices
    assert torch.equal(decision.topk_ids_TK.long(), ids)
    chosen = scores.gather(1, ids)
    want = 1.5 * chosen / chosen.sum(dim=1, keepdim=True)
    for got, wanted in zip(_weights_and_grads(decision.topk_weights_TK, router), _weights_and_grads(want, router),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_the_router_of_deepseek_v4():
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(num_experts_per_tok=K, num_local_experts=E, hidden_size=D, scoring_func="sqrtsoftplus",
                             routed_scaling_factor=2.5)  # fmt: skip
    theirs = modeling.DeepseekV4TopKRouter(config)
    router = _router(torch.float32, score="sqrt_softplus", bias=True, renormalize=True, scale=2.5)
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        theirs.e_score_correction_bias.copy_(router.expert_bias_E)
    _, weights, ids = theirs(_x(torch.float32))
    ids, order = ids.sort(dim=1)
    ours = router(_x(torch.float32))
    our_ids, our_order = ours.topk_ids_TK.long().sort(dim=1)
    assert torch.equal(our_ids, ids)
    got, want = ours.topk_weights_TK.gather(1, our_order), weights.gather(1, order)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sqrt_softplus_of_extreme_logits(dtype):
    """Scores that underflow: no NaN in any gradient."""
    router = LinearRouter(1, 4, 2, score="sqrt_softplus", renormalize=True, bias=True, aux_loss_coef=0.1, dtype=dtype)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-1e5], [-1e3], [3e4], [0.0]]))
    decision = router(torch.ones(5, 1, dtype=dtype))
    assert decision.topk_ids_TK.tolist() == [[2, 3]] * 5 and decision.status.item() == 0
    (decision.topk_weights_TK[:, 0].sum() + decision.aux_loss).backward()
    assert bool(router.weight.grad.isfinite().all())
    nothing = LinearRouter(1, 4, 2, score="sqrt_softplus", dtype=dtype)
    with torch.no_grad():
        nothing.weight.fill_(float("-inf"))
    assert nothing(torch.ones(5, 1, dtype=dtype)).status.item() == 1


def test_probabilities_of_sqrt_softplus_are_shares():
    logits = torch.randn(T, E, dtype=torch.float64)
    scores = F.softplus(logits).sqrt()
    want = scores / scores.sum(dim=1, keepdim=True)
    torch.testing.assert_close(router_probabilities(logits, "sqrt_softplus"), want)


@pytest.mark.parametrize(("p", "eps"), [(2.0, 0.0), (1.0, 0.1), (3.0, 0.05)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_p_norms(p, eps, score):
    """DBRX: weights over torch.norm(weights, p)."""
    router = _router(score=score, renormalize=True, renormalize_p=p, renormalize_eps=eps, scale=0.5)
    decision = router(_x())
    logits = _x() @ router.weight.T
    chosen = (logits.softmax(dim=1) if score == "softmax" else logits.sigmoid()).gather(1, decision.topk_ids_TK.long())
    want = 0.5 * chosen / (torch.norm(chosen, p=p, dim=-1, keepdim=True) + eps)
    for got, wanted in zip(_weights_and_grads(decision.topk_weights_TK, router), _weights_and_grads(want, router),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, 20.0, 40.0, 300.0])
def test_norms_whose_powers_float32_cannot_hold(p):
    """As of 128 experts, whose weights are about 1e-2."""
    torch.manual_seed(0)
    router = LinearRouter(D, 128, 4, renormalize=True, renormalize_p=p)
    decision = router(_x(torch.float32))
    chosen = (_x() @ router.weight.T.double()).softmax(dim=1).gather(1, decision.topk_ids_TK.long())
    norm = chosen.amax(dim=1, keepdim=True) * torch.norm(chosen / chosen.amax(dim=1, keepdim=True), p=p, dim=1)[:, None]
    for got, wanted in zip(_weights_and_grads(decision.topk_weights_TK, router),
                           _weights_and_grads((chosen / norm).float(), router), strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3 if p > 100 else 1e-5)


def test_a_token_without_experts_has_no_norm_to_divide_by():
    router = _router(renormalize=True, renormalize_p=2.0, bad_logits="drop")
    x = _x()
    x[3] = float("nan")
    decision = router(x)
    decision.topk_weights_TK.sum().backward()
    assert not decision.topk_weights_TK[3].any() and bool(router.weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_the_dtype_of_the_weights(dtype):
    """As routers that are nn.Linear in a model of 16 bits: the logits are those of F.linear, and so are the choices."""
    router = _router(dtype, logits_dtype=dtype)
    logits = F.linear(_x(dtype), router.weight)
    decision = router(_x(dtype))
    assert decision.logits_TE.dtype == torch.float32 and torch.equal(decision.logits_TE.to(dtype), logits)
    probs = logits.softmax(dim=1, dtype=torch.float32)
    torch.testing.assert_close(decision.topk_weights_TK, probs.gather(1, decision.topk_ids_TK.long()))
    assert not torch.equal(decision.logits_TE, _router(dtype)(_x(dtype)).logits_TE)  # which are not rounded
    decision.topk_weights_TK.sum().backward()
    assert router.weight.grad.dtype == dtype and router.weight.grad.any()


def _best_groups(values, n_group, topk_group, best):
    worth = values.view(T, n_group, -1).topk(best, dim=-1).values.sum(dim=-1)
    kept = torch.zeros(T, n_group, dtype=torch.bool).scatter(1, worth.topk(topk_group).indices, True)
    return values.masked_fill(~kept.repeat_interleave(E // n_group, dim=1), float("-inf"))


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_score", [None, "max", "top2_sum"])
def test_what_a_group_is_worth_is_apart_from_the_bias(score, bias, group_score):
    router = _router(score=score, bias=bias, n_group=4, topk_group=2, group_score=group_score)
    decision = router(_x())
    logits = _x() @ router.weight.T
    kinds = {"softmax": logits.softmax(dim=1), "sigmoid": logits.sigmoid(), "topk_softmax": logits}
    scores = kinds.get(score, F.softplus(logits).sqrt())
    best = {None: 1 + bias, "max": 1, "top2_sum": 2}[group_score]
    values = _best_groups(scores + (router.expert_bias_E.double() if bias else 0), 4, 2, best)
    assert torch.equal(decision.topk_ids_TK.long(), values.topk(K).indices)
    assert int(decision.tokens_per_expert_E.sum()) == T * K
    chosen = scores.gather(1, decision.topk_ids_TK.long())
    want = chosen.softmax(dim=1) if score == "topk_softmax" else chosen
    torch.testing.assert_close(decision.topk_weights_TK, want)


def test_masks_and_replay_hold_for_them():
    router = _router(score="sqrt_softplus", bias=True, renormalize=True, renormalize_p=2.0, group_score="max",
                     n_group=2, topk_group=2)  # fmt: skip
    router.mask_experts([0, 5])
    mask = torch.arange(T) != 4
    decision = router(_x(), token_mask=mask)
    assert not set(decision.topk_ids_TK.unique().tolist()) & {0, 5} and (decision.topk_ids_TK[4] == -1).all()
    again = router(_x(), token_mask=mask, replay=Recorded.of(decision))
    torch.testing.assert_close(again.topk_weights_TK, decision.topk_weights_TK)


def test_a_layer_takes_them():
    layer = MoELayer(D, 8, E, K, router="sqrt_softplus", renormalize=True, renormalize_p=2.0, group_score="top2_sum",
                     n_group=2, topk_group=1, logits_dtype=torch.bfloat16)  # fmt: skip
    layer(torch.randn(T, D)).sum().backward()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("score", {"score": "softplus"}),
        ("group_score", {"group_score": "mean"}),
        ("logits_dtype", {"logits_dtype": torch.int32}),
        ("logits_dtype", {"logits_dtype": "bfloat16"}),
        ("renormalize_p", {"renormalize_p": 2.0}),
        ("renormalize_p", {"renormalize_p": 0.5, "renormalize": True}),
        ("renormalize_p", {"renormalize_p": float("inf"), "renormalize": True}),
        ("renormalize_p", {"renormalize_p": 2.0, "renormalize": True, "variable_k": VariableK(threshold=0.5)}),
    ],
)
def test_what_does_not_fit_is_refused(field, options):
    with pytest.raises(ConfigError) as error:
        LinearRouter(D, E, K, **options)
    assert error.value.field == field
