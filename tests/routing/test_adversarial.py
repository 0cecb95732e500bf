"""Every router and selector on logits and sizes that go wrong easily, against plain Python floats: ties, numbers near
the ends of a dtype, -inf, NaN and +inf; no token and one token, one expert, numbers of experts that are no power of 2,
k = E."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    LinearRouter,
    Locality,
    LocMoEPlusRouter,
    LocMoERouter,
    Nodes,
    QuantileRouter,
    RecurrentRouter,
    SinkhornRouter,
    SmileRouter,
    SwitchRouter,
    VariableK,
    drop_over_capacity,
    expert_capacity,
)
from tests.tolerances import close

NAN, INF = math.nan, math.inf
SIZES = [(0, 5, 2), (1, 1, 1), (1, 7, 7), (3, 6, 6), (17, 12, 3), (5, 97, 8)]  # T, E, k
DTYPES = [torch.float32, torch.float64]


def draw(kind, tokens, experts, dtype, seed=0):
    """[T, E] logits of the kind, none of which is refused."""
    generator = torch.Generator().manual_seed(seed)
    normal_TE = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    whole_TE = torch.randint(-2, 3, (tokens, experts), generator=generator).to(dtype)
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if kind == "signed zeros":
        return torch.where(whole_TE > 0, 0.0, -0.0).to(dtype)
    if kind == "partly -inf":
        made = torch.where(whole_TE > 0, -INF, normal_TE.to(dtype))
        made[:, :1] = 0.5
        return made
    return {
        "normal": normal_TE.to(dtype),
        "all equal": torch.zeros(tokens, experts, dtype=dtype),
        "ties": whole_TE,
        "huge": (whole_TE * (largest / 4)),
        "denormal": whole_TE * (least / 8),
        "far apart": whole_TE * 400 + normal_TE.to(dtype),
        "one ulp": torch.ones_like(whole_TE) + whole_TE * torch.finfo(dtype).eps,
    }[kind]


KINDS = ["normal", "all equal", "ties", "signed zeros", "huge", "denormal", "far apart", "one ulp", "partly -inf"]


def scores_by_hand(row, score):
    """Python floats of one row's scores, as exact as they go."""
    if score == "sigmoid":
        return [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in row]
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [part / sum(parts) for part in parts]


def chosen_by_hand(row, k):
    return sorted(range(len(row)), key=lambda expert: -row[expert])[:k]


def nodes_of(experts):
    return Nodes(of_expert=tuple(expert * 2 // experts for expert in range(experts)), num_nodes=2, own=0)


# Each takes (D, E, k) and is read with the scores that stand beside it.
TOP_K = {
    "softmax": (LinearRouter, "softmax"),
    "topk_softmax": (partial(LinearRouter, score="topk_softmax"), "topk_softmax"),
    "sigmoid": (partial(LinearRouter, score="sigmoid"), "sigmoid"),
    "switch": (partial(SwitchRouter, jitter=0.0, capacity_factor=None, aux_loss_coef=0.0), "softmax"),
    "locmoe": (partial(LocMoERouter, mu=0.0, aux_loss_coef=0.0), "softmax"),
    "quantile": (lambda *sizes, **options: QuantileRouter(*sizes, **options).eval(), None),
    "sinkhorn in eval": (lambda *sizes, **options: SinkhornRouter(*sizes, **options).eval(), "softmax"),
}


def reading(make, sizes, logits_TE, **options):
    """A router of the sizes whose logits are the given ones, differentiable: its x."""
    router = make(
        len(logits_TE[0]) if len(logits_TE) else sizes[1], sizes[1], sizes[2], dtype=logits_TE.dtype, **options
    )
    router._logits = lambda x_TD: x_TD
    return router


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, (_, score) in TOP_K.items() if score])
def test_top_k_routers_choose_as_plain_python_does(name, kind, dtype):
    make, score = TOP_K[name]
    for sizes in SIZES:
        tokens, experts, k = sizes
        logits_TE = draw(kind, tokens, experts, dtype).requires_grad_()
        decision = reading(make, sizes, logits_TE)(logits_TE, local_experts=nodes_of(experts))
        rows = logits_TE.tolist()
        ids = [chosen_by_hand(row, k) for row in rows]
        assert decision.topk_ids_TK.tolist() == ids and decision.topk_ids_TK.shape == (tokens, k)
        want = [
            [scores_by_hand([row[i] for i in chosen] if score == "topk_softmax" else row, score)[at]
             for at in (range(k) if score == "topk_softmax" else chosen)]
            for row, chosen in zip(rows, ids, strict=True)
        ]  # fmt: skip
        close(decision.topk_weights_TK.detach(), torch.tensor(want, dtype=dtype).reshape(tokens, k), dtype)
        flat = [expert for row in ids for expert in row]
        assert decision.tokens_per_expert_E.tolist() == [flat.count(expert) for expert in range(experts)]
        assert decision.status.tolist() == [0] and int(decision.dropped_tokens) == 0
        (grad,) = torch.autograd.grad(decision.topk_weights_TK.sum(), logits_TE)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_stay_finite_where_their_formulas_are(kind, dtype):
    """All of them but the z-loss, whose square of a huge logit is inf by its definition."""
    for level in ("micro", "sequence", "global"):
        for sizes in SIZES:
            logits_TE = draw(kind, sizes[0], sizes[1], dtype).requires_grad_()
            router = reading(partial(LocMoERouter, mu=0.5, aux_loss_coef=0.1, balance=level), sizes, logits_TE)
            decision = router(logits_TE, local_experts=nodes_of(sizes[1]))
            rest = decision.global_balance
            loss = decision.aux_loss + (0.0 if rest is None else rest.alone())
            (grad,) = torch.autograd.grad(loss, logits_TE)
            assert loss.isfinite() and grad.isfinite().all()


BAD_ROWS = {"nan": [NAN, 1.0], "inf": [INF, 1.0], "nan beside inf": [INF, NAN], "all -inf": [-INF, -INF]}
EVERY = {
    **{name: make for name, (make, _) in TOP_K.items()},
    "locmoe+": partial(LocMoEPlusRouter, mu=0.0, aux_loss_coef=0.0, gate="linear", capacity_factor=1e3),
    "sinkhorn": SinkhornRouter,
    "base": lambda d, e, k, **options: BaseRouter(d, e, 1, **options),
    "expert choice": partial(ExpertChoiceRouter, allow_noncausal=True),
    "variable k": partial(LinearRouter, variable_k=VariableK(threshold=0.5)),
    "biased groups": partial(LinearRouter, score="sigmoid", bias=True, n_group=3, topk_group=2),
    "capped": partial(LinearRouter, locality=Locality(off_node_share=0.5)),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_row_is_refused_and_changes_no_other(name, policy, bad):
    """Where tokens are chosen for together the others may take its place, but stay sound."""
    if (name, policy) == ("expert choice", "drop"):
        with pytest.raises(ConfigError, match="bad_logits"):
            EVERY[name](6, 6, 2, bad_logits=policy)
        return
    sizes = (9, 6, 2)
    logits_TE = draw("normal", 9, 6, torch.float32)
    spoilt_TE = logits_TE.clone()
    spoilt_TE[4] = torch.tensor(BAD_ROWS[bad] * 3)
    router = reading(EVERY[name], sizes, logits_TE, bad_logits=policy)
    told = {"local_experts": nodes_of(6)}
    decision, sound = (router(one.requires_grad_(), **told) for one in (spoilt_TE, logits_TE))
    others = torch.arange(9) != 4
    assert (decision.topk_ids_TK[4] == -1).all() and (decision.topk_weights_TK[4] == 0).all()
    assert decision.status.tolist() == [policy == "raise"] and sound.status.tolist() == [0]
    assert int(decision.tokens_per_expert_E.sum()) == int((decision.topk_ids_TK >= 0).sum())
    if not router.selects_together and name != "capped":
        assert torch.equal(decision.topk_ids_TK[others], sound.topk_ids_TK[others])
    if policy == "drop":
        assert int(decision.dropped_tokens) == router.top_k
        (grad,) = torch.autograd.grad(decision.topk_weights_TK.sum(), spoilt_TE)
        assert grad.isfinite().all() and not grad[4].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sinkhorn", "base", "expert choice"])
def test_who_selects_for_all_tokens_together_stays_within_bounds(name, kind, dtype):
    for sizes in SIZES:
        tokens, experts, k = sizes
        logits_TE = draw(kind, tokens, experts, dtype).requires_grad_()
        options = {"average": min(2.0, experts)} if name == "expert choice" else {}
        router = reading(EVERY[name], sizes, logits_TE, **options)
        decision = router(logits_TE)
        ids = [[one for one in row if one >= 0] for row in decision.topk_ids_TK.tolist()]
        assert all(len({*row}) == len(row) and max(row, default=0) < experts for row in ids)
        loads = decision.tokens_per_expert_E
        assert int(loads.sum()) == sum(map(len, ids)) and decision.status.tolist() == [0]
        if name == "expert choice":
            seats = min(tokens, expert_capacity(options["average"], tokens, 1, experts))
            assert int(loads.sum()) + int(decision.dropped_tokens) == seats * experts
        else:
            assert all(len(row) == router.top_k for row in ids)
        if name == "base" and tokens:
            assert int(loads.max()) <= -(-tokens // experts)
        score = router.score
        for row, chosen, weights in zip(logits_TE.tolist(), ids, decision.topk_weights_TK.tolist(), strict=True):
            want = [scores_by_hand(row, score)[expert] for expert in chosen]
            assert weights[: len(chosen)] == pytest.approx(want, rel=1e-5, abs=1e-30)
        (grad,) = torch.autograd.grad(decision.topk_weights_TK.sum(), logits_TE)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_prices_by_quantile_stay_finite_and_the_next_batch_is_sound(kind, dtype):
    for sizes in SIZES:
        logits_TE = draw(kind, sizes[0], sizes[1], dtype).requires_grad_()
        router = reading(QuantileRouter, sizes, logits_TE)
        for _ in range(2):
            decision = router(logits_TE)
            assert all(len({*row}) == sizes[2] and min(row) >= 0 for row in decision.topk_ids_TK.tolist())
            assert decision.topk_weights_TK.isfinite().all() and decision.status.tolist() == [0]
            router.step()
            assert router.expert_bias_E.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "partly -inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smile_chooses_a_node_and_then_inside_as_plain_python_does(kind, dtype):
    """Its gates read their logits off x: those of 3 nodes, then those of the m places of a node."""
    for tokens, inside, k in ((0, 5, 2), (1, 1, 1), (4, 7, 7), (17, 5, 3)):
        router = SmileRouter(3 + inside, 3 * inside, k, num_nodes=3, alpha=0.0, beta=0.0, dtype=dtype)
        with torch.no_grad():
            router.node_weight.copy_(torch.eye(3, 3 + inside))
            router.weight.copy_(torch.eye(inside, 3 + inside).roll(3, dims=1))
        x_TD = draw(kind, tokens, 3 + inside, dtype)
        decision = router(x_TD)
        for row, ids, weights in zip(
            x_TD.tolist(), decision.topk_ids_TK.tolist(), decision.topk_weights_TK.tolist(), strict=True
        ):
            (node,), places = chosen_by_hand(row[:3], 1), chosen_by_hand(row[3:], k)
            assert ids == [node * inside + place for place in places]
            p, q = scores_by_hand(row[:3], "softmax")[node], scores_by_hand(row[3:], "softmax")
            assert weights == pytest.approx([p * q[place] for place in places], rel=1e-5, abs=1e-30)
        assert decision.topk_ids_TK.shape == (tokens, k) and decision.status.tolist() == [0]


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (7, 1), (7, 7), (97, 8)])
def test_hash_takes_any_sizes_and_refuses_ids_of_no_table(experts, k):
    router = HashRouter(11, experts, k)
    for ids_T in (torch.arange(0), torch.tensor([10]), torch.arange(11).repeat(3)):
        router.give(ids_T)
        decision = router(torch.full((len(ids_T), 4), NAN))  # which it does not read
        rows = decision.topk_ids_TK.tolist()
        assert all(len({*row}) == k and min(row) >= 0 and max(row) < experts for row in rows)
        assert rows == [router.table_VK[token].tolist() for token in ids_T.tolist()]
        close(decision.topk_weights_TK, torch.full((len(ids_T), k), 1 / k), torch.float32)
    for outside in (11, -1):
        with pytest.raises(ConfigError, match=f"token_ids.*{outside}"):
            router.give(torch.tensor([3, outside]))


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1.0, 1e30])
def test_a_state_from_layer_to_layer_is_finite_and_nan_is_refused(scale):
    torch.manual_seed(0)
    router = RecurrentRouter(8, 7, 7, router_size=4)
    x_TD = torch.randn(5, 8) * scale
    decision = router(x_TD)
    assert decision.state.isfinite().all() and decision.status.tolist() == [0]
    assert all(sorted(row) == [*range(7)] for row in decision.topk_ids_TK.tolist())
    x_TD[2, 3] = NAN
    spoilt = router(x_TD)
    assert spoilt.status.tolist() == [1] and (spoilt.topk_ids_TK[2] == -1).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "partly -inf"])
@pytest.mark.parametrize("threshold", [1e-30, 0.5, 0.999, 1.0])
def test_variable_k_takes_experts_until_they_are_worth_the_threshold(kind, threshold):
    """Counted in Python floats; a sum that meets the threshold within rounding may end on either side of it."""
    for sizes in SIZES:
        tokens, experts, k = sizes
        logits_TE = draw(kind, tokens, experts, torch.float64)
        router = reading(partial(LinearRouter, variable_k=VariableK(threshold=threshold)), sizes, logits_TE)
        for row, ids in zip(logits_TE.tolist(), router(logits_TE).topk_ids_TK.tolist(), strict=True):
            best, probs = chosen_by_hand(row, k), scores_by_hand(row, "softmax")
            taken = [one for one in ids if one >= 0]
            assert taken == best[: len(taken)] and len(taken) >= 1
            sums = [sum(probs[expert] for expert in best[:count]) for count in range(k + 1)]
            assert sums[len(taken) - 1] < threshold + 1e-9
            assert len(taken) == k or sums[len(taken)] > threshold - 1e-9


@pytest.mark.parametrize("kind", ["ties", "denormal", "huge", "all equal"])
def test_capacity_keeps_the_best_of_adversarial_weights(kind):
    for tokens, experts, k in SIZES:
        ids_TK = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int() if tokens else \
            torch.zeros(0, k, dtype=torch.int32)  # fmt: skip
        weights_TK = draw(kind, tokens, k, torch.float32).abs()
        for capacity in (0, 1, 2, tokens):
            kept_TK, left_TK, dropped = drop_over_capacity(ids_TK, weights_TK, num_experts=experts, capacity=capacity)
            assert int(dropped) == int((kept_TK < 0).sum()) and not left_TK[kept_TK < 0].any()
            for expert in range(experts):
                there = (ids_TK == expert).any(dim=1).nonzero()[:, 0].tolist()
                worth = {t: float(weights_TK[t][ids_TK[t] == expert]) for t in there}
                want = sorted(there, key=lambda t, worth=worth: -worth[t])[:capacity]
                assert (kept_TK == expert).any(dim=1).nonzero()[:, 0].tolist() == sorted(want)


def test_the_kinds_are_what_they_are_called():
    """Else nothing above would be adversarial."""
    for dtype in DTYPES:
        denormal = draw("denormal", 17, 12, dtype)
        assert (denormal != 0).any() and (denormal.abs() < torch.finfo(dtype).smallest_normal).all()
        assert draw("huge", 17, 12, dtype).abs().max() == torch.finfo(dtype).max / 2
        assert len(draw("ties", 17, 12, dtype).unique()) == 5
        ulp = draw("one ulp", 17, 12, dtype).unique().tolist()
        assert all(0 < b - a <= 2 * torch.finfo(dtype).eps for a, b in pairwise(ulp))
        assert draw("partly -inf", 17, 12, dtype).isinf().any()
