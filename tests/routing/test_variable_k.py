import pytest
import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing import LinearRouter, VariableK

D, E, K, T = 8, 10, 4, 60
SCORES = ["softmax", "topk_softmax", "sigmoid"]


def make(k=K, **options):
    torch.manual_seed(0)
    router = LinearRouter(D, E, k, dtype=torch.float64, **options)
    nn.init.normal_(router.weight)
    return router, torch.randn(T, D, dtype=torch.float64)


def probabilities(logits_TE, score):
    if score == "sigmoid":
        return logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, keepdim=True)
    return logits_TE.softmax(-1)


@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_experts_are_added_until_their_probabilities_reach_the_threshold(score, renormalize, threshold):
    options = {"score": score, "renormalize": renormalize, "scale": 2.0}
    router, x_TD = make(variable_k=VariableK(threshold=threshold), **options)
    x_TD.requires_grad_()
    got = router(x_TD)
    full = make(**options)[0](x_TD)
    probs_TE = probabilities(x_TD @ router.weight.t(), score)
    weights = []
    for t in range(T):
        kept, total = [], 0.0
        for expert in full.topk_ids_TK[t].tolist():
            if total >= threshold:
                break
            kept.append(expert)
            total += probs_TE[t, expert].item()
        assert got.topk_ids_TK[t].tolist() == kept + [-1] * (K - len(kept))
        logits = (x_TD[t] @ router.weight.t())[kept]
        scores = {"softmax": probs_TE[t, kept], "sigmoid": logits.sigmoid(), "topk_softmax": logits.softmax(-1)}[score]
        if renormalize:
            scores = scores / scores.sum()
        weights.append(torch.cat([2.0 * scores, torch.zeros(K - len(kept), dtype=torch.float64)]))
    want_TK = torch.stack(weights)
    torch.testing.assert_close(got.topk_weights_TK, want_TK, rtol=1e-10, atol=1e-14)
    mix_TK = torch.randn(T, K, dtype=torch.float64)
    both = [torch.autograd.grad((w * mix_TK).sum(), (x_TD, router.weight)) for w in (got.topk_weights_TK, want_TK)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    used = got.topk_ids_TK[got.topk_ids_TK >= 0].long()
    assert torch.equal(got.tokens_per_expert_E, torch.bincount(used, minlength=E))
    assert got.dropped_tokens == 0 and got.status.tolist() == [0]
    if threshold == 1e-6:
        assert (got.topk_ids_TK[:, 1:] == -1).all() and (got.topk_ids_TK[:, 0] >= 0).all()
    if threshold == 0.3:
        assert len({int(n) for n in (got.topk_ids_TK >= 0).sum(1)}) > 1, "tokens differ"


class Allocator(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(D, K + 1, dtype=torch.float64)

    def forward(self, x_TD):
        return self.heads(x_TD).argmax(-1)


def test_an_allocator_says_how_many_experts_each_token_takes():
    router, x_TD = make(variable_k=VariableK(allocator=Allocator()), score="sigmoid", renormalize=True, scale=3.0)
    assert "variable_k.allocator.heads.weight" in router.state_dict()
    k_T = router.variable_k.allocator(x_TD)
    assert set(k_T.tolist()) == set(range(K + 1))
    got, full = router(x_TD), make(score="sigmoid")[0](x_TD)
    for t, k in enumerate(k_T.tolist()):
        assert got.topk_ids_TK[t].tolist() == full.topk_ids_TK[t, :k].tolist() + [-1] * (K - k)
        want = full.topk_weights_TK[t, :k]
        torch.testing.assert_close(got.topk_weights_TK[t, :k], 3.0 * want / want.sum().clamp_min(1e-30))
    assert not router.weight.isnan().any() and got.topk_weights_TK.isfinite().all()
    (gradient,) = torch.autograd.grad(got.topk_weights_TK.square().sum(), router.weight)
    assert gradient.isfinite().all() and gradient.any()


def test_losses_and_capacity_see_what_is_kept():
    router, x_TD = make(variable_k=VariableK(threshold=0.5), aux_loss_coef=1.0, capacity_factor=0.5)
    got = router(x_TD)
    probs_TE = probabilities(x_TD @ router.weight.t(), "softmax")
    f_E = got.tokens_per_expert_E.double() / got.tokens_per_expert_E.sum()
    torch.testing.assert_close(got.aux_loss, E * (f_E * probs_TE.mean(0)).sum())
    capacity = -(-T * K // (2 * E))
    kept_E = torch.bincount(got.topk_ids_TK[got.topk_ids_TK >= 0].long(), minlength=E)
    assert torch.equal(kept_E, got.tokens_per_expert_E.clamp_max(capacity))
    assert got.dropped_tokens == (got.tokens_per_expert_E - kept_E).sum() > 0


def test_padding_and_bad_tokens_take_none():
    router, x_TD = make(variable_k=VariableK(threshold=2.0), bad_logits="drop")
    x_TD[0] = float("nan")
    mask_T = torch.ones(T, dtype=torch.bool)
    mask_T[1] = False
    got = router(x_TD, token_mask=mask_T)
    assert (got.topk_ids_TK[:2] == -1).all() and (got.topk_ids_TK[2:] >= 0).all() and got.dropped_tokens == K


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "0.5"])
def test_a_threshold_that_is_none(bad):
    with pytest.raises(ConfigError) as caught:
        VariableK(threshold=bad)
    assert caught.value.field == "threshold"


def test_neither_both_nor_something_else():
    for options in ({}, {"threshold": 0.5, "allocator": lambda x: x}):
        with pytest.raises(ConfigError) as caught:
            VariableK(**options)
        assert caught.value.field == "threshold"
    with pytest.raises(ConfigError) as caught:
        VariableK(allocator=3)
    assert caught.value.field == "allocator"
    with pytest.raises(ConfigError) as caught:
        make(variable_k=0.5)
    assert caught.value.field == "variable_k"


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: torch.full((len(x),), K + 1),
        lambda x: torch.full((len(x),), -1),
        lambda x: torch.ones(len(x)),
        lambda x: torch.ones(len(x), 1, dtype=torch.int64),
        lambda x: [1] * len(x),
    ],
)
def test_what_an_allocator_must_not_say(bad):
    router, x_TD = make(variable_k=VariableK(allocator=bad))
    with pytest.raises(ConfigError) as caught:
        router(x_TD)
    assert caught.value.field == "allocator" and str(K) in str(caught.value)
