import copy
import itertools

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    LinearRouter,
    LocMoEPlusRouter,
    LocMoERouter,
    Nodes,
    QuantileRouter,
    RecurrentRouter,
    SinkhornRouter,
    SmileRouter,
    SwitchRouter,
)
from moe_overlap.routing.masks import experts_left

D, E, K = 8, 12, 2
NODES = Nodes(of_expert=(0, 1) * (E // 2), num_nodes=2, own=0)
SCORES = ["softmax", "topk_softmax", "sigmoid"]


def make(kind=LinearRouter, k=K, **options):
    torch.manual_seed(0)
    router = kind(D, E, k, dtype=torch.float64, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def x_of(tokens=40, seed=1):
    return torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bias", [None, -5.0, 5.0])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (3, 3)])
def test_a_masked_expert_is_never_chosen_and_the_others_as_if_it_did_not_exist(score, bias, groups):
    n_group, topk_group = groups
    router = make(score=score, n_group=n_group, topk_group=topk_group, bias=bias is not None)
    if bias is not None:
        router.expert_bias_E.normal_().add_(bias)
        router.expert_bias_E[1] = 100.0  # of a masked one: nothing lifts it
    masked = [1, 5, 9] if n_group == 4 else [0, 1, 2, 7]
    router.mask_experts(masked)
    x_TD = x_of(200).requires_grad_()
    decision = router(x_TD)
    assert not torch.isin(decision.topk_ids_TK, torch.tensor(masked, dtype=torch.int32)).any()
    assert (decision.topk_ids_TK >= 0).all() and decision.status.item() == 0
    assert not decision.tokens_per_expert_E[masked].any() and decision.tokens_per_expert_E.sum() == 200 * K
    dx, dw = torch.autograd.grad((decision.topk_weights_TK * torch.randn(200, K).double()).sum(), (x_TD, router.weight))
    assert dx.isfinite().all() and not dw[masked].any() and dw.any()
    if n_group == 1:
        left = [expert for expert in range(E) if expert not in masked]
        small = LinearRouter(D, len(left), K, score=score, bias=bias is not None, dtype=torch.float64)
        with torch.no_grad():
            small.weight.copy_(router.weight[left])
            if bias is not None:
                small.expert_bias_E.copy_(router.expert_bias_E[left])
        want = small(x_TD)
        assert torch.equal(torch.tensor(left)[want.topk_ids_TK.long()], decision.topk_ids_TK.long())
        torch.testing.assert_close(decision.topk_weights_TK, want.topk_weights_TK, rtol=1e-12, atol=0)


def test_the_auxiliary_loss_is_that_of_a_router_without_the_masked_experts():
    options = {"aux_loss_coef": 0.5, "z_loss_coef": 0.1}
    for balance in ("micro", "sequence"):
        router = make(balance=balance, **options)
        router.mask_experts(range(6, E))
        small = LinearRouter(D, 6, K, balance=balance, dtype=torch.float64, **options)
        with torch.no_grad():
            small.weight.copy_(router.weight[:6])
        torch.testing.assert_close(router(x_of()).aux_loss, small(x_of()).aux_loss, rtol=1e-12, atol=0)


def test_a_token_whose_other_logits_are_minus_infinity_takes_no_masked_expert_instead():
    router = make(k=2)
    router.mask_experts([0, 1])
    logits_TE = torch.full((1, E), -torch.inf, dtype=torch.float64)
    logits_TE[0, 5] = 1.0
    choice = router.refuse_masked(router._choose(router.hide_masked(logits_TE), None))
    assert choice.ids_TK.tolist() == [[5, -1]] and choice.weights_TK[0, 1] == 0
    assert choice.counts_E.tolist() == [0] * 5 + [1] + [0] * 6


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2), (6, 3)])
def test_experts_left_is_what_random_tokens_meet_in_the_worst_case(groups, best):
    n_group, topk_group = groups
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        flags = (torch.rand(E, generator=generator) < 0.4).tolist()
        left = experts_left(flags, n_group, topk_group, best)
        router = make(k=1, score="sigmoid", bias=best == 2, n_group=n_group, topk_group=topk_group)
        router.top_k = min(E // n_group * topk_group, E)
        router.masked_experts_E = torch.tensor(flags)
        router._look_at_mask = lambda masked_E: None  # which would refuse it
        logits_TE = 4 * torch.randn(1000, E, dtype=torch.float64, generator=generator)
        choice = router._choose(router.hide_masked(logits_TE), None)
        seen_TK = (~router.masked_experts_E)[choice.ids_TK.clamp_min(0).long()] & (choice.ids_TK >= 0)
        assert seen_TK.sum(dim=1).min() == left or sum(flags) == E


def test_more_experts_than_are_left_are_refused_by_whoever_masks_them():
    router = make(k=4)
    router.mask_experts(range(8))
    for bad in (range(9), range(E)):
        with pytest.raises(ConfigError) as caught:
            router.mask_experts(bad)
        assert caught.value.field == "top_k" and caught.value.value == 4 and f"at most {E - len(bad)}" in str(caught)
    assert int(router.masked_experts_E.sum()) == 8, "nothing has changed"
    router.masked_experts_E[8] = True
    with pytest.raises(ConfigError, match="at most 3"):
        router(x_of())
    other = make(k=4)
    with pytest.raises(ConfigError, match="at most 3"):
        other.load_state_dict(router.state_dict())
    for bad, value in (([E], E), ([-1], -1), ([0.5], 0.5), ([True], True)):
        with pytest.raises(ConfigError) as caught:
            router.mask_experts(bad)
        assert caught.value.field == "masked_experts" and caught.value.value == value
    router.masked_experts_E = torch.zeros(E)
    with pytest.raises(ConfigError) as caught:
        router(x_of())
    assert caught.value.field == "masked_experts_E"


def test_a_mask_is_saved_loaded_copied_and_lifted():
    router, plain = make(), make()
    assert "masked_experts_E" not in router.state_dict()
    before = router(x_of())
    router.mask_experts([2, 3])
    for twin in (copy.deepcopy(router), make()):
        twin.load_state_dict(router.state_dict())
        assert torch.equal(twin(x_of()).topk_ids_TK, router(x_of()).topk_ids_TK)
    router.to(torch.bfloat16).to(torch.float64)
    assert router.masked_experts_E.dtype == torch.bool
    with pytest.raises(RuntimeError, match="masked_experts_E"):
        router.load_state_dict(plain.state_dict())  # a checkpoint that says nothing of the mask
    router = make()
    router.mask_experts([2, 3])
    router.mask_experts([])
    assert torch.equal(router(x_of()).topk_ids_TK, before.topk_ids_TK) and "masked_experts_E" not in router.state_dict()


# ---------------------------------------------------------------- tokens

ROUTERS = {
    **{score: (LinearRouter, {"score": score, "capacity_factor": 1.0}) for score in SCORES},
    "bias and groups": (LinearRouter, {"score": "sigmoid", "bias": True, "n_group": 4, "topk_group": 2}),
    "variable sequences": (LinearRouter, {"balance": "sequence"}),
    "zero experts": (LinearRouter, {"zero_experts": 3}),
    "switch": (SwitchRouter, {"jitter": 0.0, "capacity_factor": None}),
    "locmoe": (LocMoERouter, {"mu": 0.3, "locality_bias": 2, "balance": "micro"}),
    "locmoe+": (LocMoEPlusRouter, {"mu": 0.3, "gate": "linear", "balance": "micro", "capacity_factor": 20.0}),
    "smile": (SmileRouter, {"num_nodes": 3}),
    "recurrent": (RecurrentRouter, {"router_size": 5}),
}


def routed(name, x_TD, mask_T=None, **options):
    kind, own = ROUTERS[name]
    if kind in (LinearRouter, RecurrentRouter):
        options = {"aux_loss_coef": 0.3, "z_loss_coef": 0.1, **options}
    router = make(kind, **{**own, **options})
    told = {"local_experts": NODES} if getattr(router, "needs_nodes", False) else {}
    return router, router(x_TD, **told, **({} if mask_T is None else {"token_mask": mask_T}))


def padded(real_TD, junk=float("nan")):
    """Each token between others that are none."""
    mask_T = torch.tensor([True, False, False] * len(real_TD) + [False])
    x_TD = torch.full((len(mask_T), D), junk, dtype=real_TD.dtype).masked_scatter(mask_T[:, None], real_TD)
    return x_TD, mask_T


@pytest.mark.parametrize("bad_logits", ["raise", "drop"])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_is_routed_nowhere_and_counted_in_nothing(name, bad_logits):
    options = {"bad_logits": bad_logits}
    if "capacity_factor" in ROUTERS[name][1]:
        # Capacity follows from the shape, padding included: so the two sides get the same one.
        options["capacity_factor"] = ROUTERS[name][1]["capacity_factor"]
    real_TD = x_of(12).requires_grad_()
    x_TD, mask_T = padded(real_TD)
    if options.get("capacity_factor"):
        router, want = routed(name, real_TD, **options | {"capacity_factor": options["capacity_factor"] * 37 / 12})
    else:
        router, want = routed(name, real_TD, **options)
    masked, got = routed(name, x_TD, mask_T, **options)
    assert torch.equal(got.topk_ids_TK[mask_T], want.topk_ids_TK)
    torch.testing.assert_close(got.topk_weights_TK[mask_T], want.topk_weights_TK)
    assert (got.topk_ids_TK[~mask_T] == -1).all() and not got.topk_weights_TK[~mask_T].any()
    assert torch.equal(got.tokens_per_expert_E, want.tokens_per_expert_E)
    assert got.dropped_tokens == want.dropped_tokens and got.status.tolist() == [0]
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    mix_TK = torch.randn(12, want.topk_weights_TK.shape[1]).double()
    loss = (want.topk_weights_TK * mix_TK).sum() + want.aux_loss
    ours = (got.topk_weights_TK[mask_T] * mix_TK).sum() + got.aux_loss
    theirs = torch.autograd.grad(loss, (real_TD, *router.parameters()), allow_unused=True)
    for g, w in zip(torch.autograd.grad(ours, (real_TD, *masked.parameters()), allow_unused=True), theirs, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("bad_logits", ["raise", "drop"])
def test_a_bad_token_beside_padding_is_still_seen(bad_logits):
    x_TD, mask_T = padded(x_of(4))
    x_TD[3] = float("nan")  # the second token
    router = make(bad_logits=bad_logits, aux_loss_coef=0.1)
    decision = router(x_TD, token_mask=mask_T)
    if bad_logits == "raise":
        assert decision.status.tolist() == [1]
        return
    assert decision.status.tolist() == [0] and decision.dropped_tokens == K and (decision.topk_ids_TK[3] == -1).all()
    want = router(x_TD[[0, 6, 9]])
    torch.testing.assert_close(decision.aux_loss, want.aux_loss)
    assert torch.equal(decision.tokens_per_expert_E, want.tokens_per_expert_E)


def test_tokens_of_a_hash_router_may_be_padding_too():
    router = HashRouter(50, E, K)
    router.give(torch.arange(6))
    mask_T = torch.tensor([True, False] * 3)
    got = router(x_of(6), token_mask=mask_T)
    assert (got.topk_ids_TK[~mask_T] == -1).all() and got.tokens_per_expert_E.sum() == 3 * K
    assert torch.equal(got.topk_ids_TK[mask_T], router(x_of(6)).topk_ids_TK[mask_T])


def test_all_tokens_or_none_are_padding():
    router = make(aux_loss_coef=0.1, z_loss_coef=0.1)
    plain, none = router(x_of()), router(x_of(), token_mask=torch.ones(40, dtype=torch.bool))
    torch.testing.assert_close(none.aux_loss, plain.aux_loss)
    assert torch.equal(none.topk_weights_TK, plain.topk_weights_TK)
    every = router(x_of(), token_mask=torch.zeros(40, dtype=torch.bool))
    assert (every.topk_ids_TK == -1).all() and every.aux_loss == 0 and every.status.tolist() == [0]
    empty = router(x_of(0), token_mask=torch.zeros(0, dtype=torch.bool))
    assert empty.topk_ids_TK.shape == (0, K) and empty.aux_loss == 0


@pytest.mark.parametrize("kind", [LinearRouter, SmileRouter, RecurrentRouter])
def test_what_is_no_token_mask_is_refused(kind):
    options = {SmileRouter: {"num_nodes": 3}, RecurrentRouter: {"router_size": 4}}.get(kind, {})
    router = make(kind, **options)
    bad = [torch.ones(40), torch.ones(39, dtype=torch.bool), torch.ones(40, 1, dtype=torch.bool), [True] * 40,
           torch.tensor(True)]  # fmt: skip
    for one in bad:
        with pytest.raises(ConfigError) as caught:
            router(x_of(), token_mask=one)
        assert caught.value.field == "token_mask" and "[40]" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        router(x_of(), token_mask=torch.ones(40, dtype=torch.bool, device="meta"))
    assert caught.value.field == "token_mask.device"


@pytest.mark.parametrize("kind", [BaseRouter, SinkhornRouter, QuantileRouter, ExpertChoiceRouter])
def test_a_router_that_selects_all_tokens_together_refuses_masks(kind):
    router = make(kind, k=1, **({"allow_noncausal": True} if kind is ExpertChoiceRouter else {}))
    with pytest.raises(ConfigError, match=kind.__name__) as caught:
        router.mask_experts([1])
    assert caught.value.field == "masked_experts" and router.masked_experts_E is None
    with pytest.raises(ConfigError, match=kind.__name__) as caught:
        router(x_of(), token_mask=torch.ones(40, dtype=torch.bool))
    assert caught.value.field == "token_mask"


# ---------------------------------------------------------------- capacity in eval


@pytest.mark.parametrize(
    ("training", "evaluation", "kept"), [(0.5, "same", 0.5), (0.5, None, None), (0.5, 2.0, 2.0), (None, 0.5, 0.5)]
)
def test_capacity_of_a_router_in_eval_mode(training, evaluation, kept):
    def ids(factor):
        return make(k=1, capacity_factor=factor)(x_of()).topk_ids_TK

    router = make(k=1, capacity_factor=training, eval_capacity_factor=evaluation)
    assert torch.equal(router(x_of()).topk_ids_TK, ids(training))
    assert torch.equal(router.eval()(x_of()).topk_ids_TK, ids(kept))
    assert not torch.equal(ids(0.5), ids(None))


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "off", "1"])
def test_what_is_no_capacity_in_eval_is_refused(bad):
    with pytest.raises(ConfigError) as caught:
        make(eval_capacity_factor=bad)
    assert caught.value.field == "eval_capacity_factor"


def test_masks_of_both_kinds_together_with_every_score():
    for score, (first, second) in itertools.product(SCORES, [(0, 11), (3, 4)]):
        router = make(score=score)
        router.mask_experts([first, second])
        x_TD, mask_T = padded(x_of(9))
        got = router(x_TD, token_mask=mask_T)
        assert torch.equal(got.topk_ids_TK[mask_T], router(x_of(9)).topk_ids_TK)
        assert (got.topk_ids_TK[~mask_T] == -1).all()
