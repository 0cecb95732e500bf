import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import STATUS_BAD_LOGITS, STATUS_OK, LinearRouter, Locality, Nodes

SCORES = ["softmax", "topk_softmax", "sigmoid"]
NAN, INF = float("nan"), float("inf")


def make(experts=6, k=2, hidden=8, *, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    router = LinearRouter(hidden, experts, k, dtype=dtype, **options)
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(11, hidden, dtype=dtype)


def plain(router, x_TD, *, score, renormalize=False, scale=1.0, bias_E=None):
    """Weights and ids by torch.topk, to compare numbers and gradients with."""
    logits_TE = x_TD @ router.weight.t()
    scores_TE = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "topk_softmax": lambda z: z}[score](
        logits_TE
    )
    chosen_by_TE = scores_TE if bias_E is None else scores_TE + bias_E
    ids_TK = chosen_by_TE.detach().topk(router.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if score == "topk_softmax":
        weights_TK = weights_TK.softmax(-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK * scale, ids_TK


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_values_and_gradients_equal_plain_torch(score, renormalize, k):
    router, x_TD = make(k=k, score=score, renormalize=renormalize, scale=2.5)
    x_TD.requires_grad_()
    decision = router(x_TD)
    weights_TK, ids_TK = plain(router, x_TD, score=score, renormalize=renormalize, scale=2.5)
    assert decision.topk_ids_TK.dtype == torch.int32
    assert torch.equal(decision.topk_ids_TK.long(), ids_TK)
    torch.testing.assert_close(decision.topk_weights_TK, weights_TK, rtol=1e-12, atol=1e-14)
    mix_TK = torch.randn_like(weights_TK)
    ours = torch.autograd.grad((decision.topk_weights_TK * mix_TK).sum(), (x_TD, router.weight))
    theirs = torch.autograd.grad((weights_TK * mix_TK).sum(), (x_TD, router.weight))
    for our_grad, their_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-10, atol=1e-13)


def test_counts_status_and_drops_of_a_good_batch():
    router, x_TD = make()
    decision = router(x_TD)
    expected_E = torch.bincount(decision.topk_ids_TK.flatten().long(), minlength=6)
    assert torch.equal(decision.tokens_per_expert_E, expected_E) and expected_E.dtype == torch.int64
    assert decision.dropped_tokens.item() == 0 and decision.dropped_tokens.dtype == torch.int64
    assert decision.status.tolist() == [STATUS_OK] and decision.aux_loss is None


def test_bias_changes_the_choice_but_not_the_weights():
    router, x_TD = make(score="sigmoid", bias=True)
    router.expert_bias_E[4] = 100.0
    decision = router(x_TD)
    assert (decision.topk_ids_TK == 4).any(-1).all()
    weights_TK, ids_TK = plain(router, x_TD, score="sigmoid", bias_E=router.expert_bias_E.double())
    assert torch.equal(decision.topk_ids_TK.long(), ids_TK)
    torch.testing.assert_close(decision.topk_weights_TK, weights_TK)
    assert "expert_bias_E" in router.state_dict() and not router.expert_bias_E.requires_grad


def test_groups_limit_the_choice():
    router, x_TD = make(k=2, n_group=3, topk_group=1)
    groups_TK = router(x_TD).topk_ids_TK // 2
    assert (groups_TK[:, 0] == groups_TK[:, 1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_routed_in_float32(dtype):
    router, x_TD = make(dtype=torch.float32)
    x_TD = x_TD.to(dtype)
    decision = router(x_TD)
    assert decision.topk_weights_TK.dtype == torch.float32
    assert torch.equal(decision.topk_weights_TK, router(x_TD.float()).topk_weights_TK)


def test_autocast_does_not_lower_the_precision():
    router, x_TD = make(dtype=torch.float32, aux_loss_coef=0.1, z_loss_coef=0.1)
    outside = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x_TD)
    assert torch.equal(inside.topk_weights_TK, outside.topk_weights_TK)
    assert inside.topk_weights_TK.dtype == inside.aux_loss.dtype == torch.float32
    assert torch.equal(inside.aux_loss, outside.aux_loss)


def test_float64_input_is_routed_in_float64_even_with_float32_weights():
    router, x_TD = make(dtype=torch.float32)
    weights_TK = router(x_TD.double()).topk_weights_TK
    assert weights_TK.dtype == torch.float64
    expected_TK = (x_TD.double() @ router.weight.double().t()).softmax(-1).topk(2).values
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("score", SCORES)
def test_losses_are_scaled_and_differentiable(score):
    router, x_TD = make(score=score, aux_loss_coef=0.01, z_loss_coef=0.001)
    decision = router(x_TD)
    logits_TE = x_TD @ router.weight.t()
    scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    f_E = decision.tokens_per_expert_E.double() / decision.tokens_per_expert_E.sum()
    expected = 0.01 * 6 * (f_E * probs_TE.mean(0)).sum() + 0.001 * logits_TE.logsumexp(-1).square().mean()
    torch.testing.assert_close(decision.aux_loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss, router.weight)[0] for loss in (decision.aux_loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


def test_the_level_says_which_balance_loss_there_is():
    options = {"aux_loss_coef": 0.5, "z_loss_coef": 0.1}
    micro, x_TD = make(**options)
    z_only, _ = make(z_loss_coef=0.1)
    x_TD = x_TD[:10]
    for balance in ("sequence", "global"):
        router, _ = make(balance=balance, **options)
        decision = router(x_TD)
        if balance == "sequence":  # one sequence is the micro-batch; two are not
            torch.testing.assert_close(decision.aux_loss, micro(x_TD).aux_loss, rtol=1e-12, atol=0)
            halves = [micro(half).aux_loss for half in x_TD.chunk(2)]
            got = router(x_TD, sequence_length=5)
            torch.testing.assert_close(got.aux_loss, sum(halves) / 2, rtol=1e-12, atol=0)
            assert got.global_balance is None
        else:
            torch.testing.assert_close(decision.aux_loss, z_only(x_TD).aux_loss, rtol=1e-12, atol=0)
            whole = decision.aux_loss + decision.global_balance.alone()
            torch.testing.assert_close(whole, micro(x_TD).aux_loss, rtol=1e-12, atol=0)
            assert decision.global_balance.agreed
            dropping, _ = make(balance=balance, capacity_factor=1.0, **options)
            assert not dropping(x_TD).global_balance.agreed, "what is counted is not all dispatched"


def test_capacity_drops_the_lowest_scores_and_counts_before_drops():
    router, x_TD = make(k=1, capacity_factor=1.0)  # ceil(1.0 * 11 * 1 / 6) = 2 slots per expert
    full, _ = make(k=1)
    full.load_state_dict(router.state_dict())
    everything, limited = full(x_TD), router(x_TD)
    assert torch.equal(limited.tokens_per_expert_E, everything.tokens_per_expert_E)
    kept_E = torch.bincount(limited.topk_ids_TK[limited.topk_ids_TK >= 0].long(), minlength=6)
    assert torch.equal(kept_E, everything.tokens_per_expert_E.clamp_max(2))
    assert limited.dropped_tokens.item() == 11 - kept_E.sum().item() > 0
    for expert in range(6):
        was_T = everything.topk_ids_TK[:, 0] == expert
        kept_T = limited.topk_ids_TK[:, 0] == expert
        weights_T = everything.topk_weights_TK[:, 0]
        if (was_T & ~kept_T).any():
            assert weights_T[kept_T].min() >= weights_T[was_T & ~kept_T].max()
    assert (limited.topk_weights_TK[limited.topk_ids_TK < 0] == 0).all()


def bad_rows(kind):
    """A router whose logits are the input, and an input with one bad row."""
    router = LinearRouter(4, 4, 2, dtype=torch.float64, bad_logits="raise")
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x_TD = torch.tensor([[4.0, 3, 2, 1], [0, 0, 0, 0], [1, 2, 3, 4]], dtype=torch.float64)
    x_TD[1] = torch.tensor({"nan": [NAN, 1, 1, 1], "inf": [INF, 1, 1, 1], "minus_inf": [-INF] * 4}[kind])
    return router, x_TD


@pytest.mark.parametrize("kind", ["nan", "inf", "minus_inf"])
def test_policy_raise_reports_by_status_and_does_not_raise(kind):
    router, x_TD = bad_rows(kind)
    decision = router(x_TD)
    assert decision.status.tolist() == [STATUS_BAD_LOGITS]


@pytest.mark.parametrize("kind", ["nan", "inf", "minus_inf"])
def test_policy_drop_skips_the_token_in_values_losses_and_gradients(kind):
    router, x_TD = bad_rows(kind)
    router.bad_logits, router.aux_loss_coef, router.z_loss_coef = "drop", 0.1, 0.1
    x_TD.requires_grad_()
    decision = router(x_TD)
    assert decision.status.tolist() == [STATUS_OK]
    assert decision.dropped_tokens.item() == 2
    assert decision.topk_ids_TK.tolist() == [[0, 1], [-1, -1], [3, 2]]
    assert decision.topk_weights_TK[1].tolist() == [0.0, 0.0]
    assert decision.tokens_per_expert_E.tolist() == [1, 1, 1, 1]
    good = router(x_TD[[0, 2]].detach())
    torch.testing.assert_close(decision.aux_loss, good.aux_loss, rtol=1e-12, atol=0)
    assert torch.equal(decision.topk_weights_TK[[0, 2]], good.topk_weights_TK)
    mix_TK = torch.tensor([[1.0, 2.0], [5.0, 7.0], [3.0, -1.0]], dtype=torch.float64)
    grad_ED, grad_TD = torch.autograd.grad(
        (decision.topk_weights_TK * mix_TK).sum() + decision.aux_loss, (router.weight, x_TD)
    )
    good_ED = torch.autograd.grad((good.topk_weights_TK * mix_TK[[0, 2]]).sum() + good.aux_loss, router.weight)[0]
    torch.testing.assert_close(grad_ED, good_ED, rtol=1e-12, atol=1e-15)
    assert grad_TD[1].tolist() == [0.0] * 4


def test_policy_drop_covers_logits_that_overflow():
    router, x_TD = bad_rows("nan")
    router.bad_logits = "drop"
    x_TD = x_TD.nan_to_num(0.0)
    with torch.no_grad():
        router.weight.mul_(1e200)
    x_TD[1] = 1e200
    decision = router(x_TD)
    assert decision.topk_ids_TK[1].tolist() == [-1, -1] and decision.status.tolist() == [STATUS_OK]
    grad_ED = torch.autograd.grad(decision.topk_weights_TK.sum(), router.weight)[0]
    assert grad_ED.isfinite().all()


def test_no_tokens():
    router, _ = make(aux_loss_coef=0.1, z_loss_coef=0.1, capacity_factor=1.0)
    decision = router(torch.zeros(0, 8, dtype=torch.float64))
    assert decision.topk_ids_TK.shape == (0, 2) and decision.aux_loss.item() == 0.0
    assert decision.tokens_per_expert_E.tolist() == [0] * 6
    decision.aux_loss.backward()
    assert router.weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": 9}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"num_experts": 0}, "num_experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"score": "noisy"}, "score"),
        ({"bad_logits": "ignore"}, "bad_logits"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": NAN}, "capacity_factor"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef"),
        ({"z_loss_coef": INF}, "z_loss_coef"),
        ({"scale": NAN}, "scale"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"top_k": 3, "n_group": 4, "topk_group": 1}, "topk_group"),
    ],
)
def test_bad_options_name_field_value_and_expectation(options, field):
    arguments = {"hidden_size": 8, "num_experts": 8, "top_k": 2, **options}
    with pytest.raises(ConfigError) as caught:
        LinearRouter(**arguments)
    assert caught.value.field == field and caught.value.expected


@pytest.mark.parametrize(
    ("x", "field"),
    [
        (torch.zeros(3, 7), "x.shape"),
        (torch.zeros(2, 3, 8), "x.shape"),
        (torch.zeros(3, 8, dtype=torch.int64), "x.dtype"),
        (torch.zeros(3, 8, device="meta"), "x.device"),
    ],
)
def test_bad_input_names_what_is_wrong(x, field):
    router, _ = make(dtype=torch.float32)
    with pytest.raises(ConfigError) as caught:
        router(x)
    assert caught.value.field == field


def test_it_ignores_nodes_without_a_locality_and_needs_them_with_one():
    router, x_TD = make()
    nodes = Nodes(of_expert=(0, 0, 0, 1, 1, 1), num_nodes=2, own=1)
    assert not router.needs_nodes
    assert torch.equal(router(x_TD, local_experts=nodes).topk_weights_TK, router(x_TD).topk_weights_TK)
    router, _ = make(locality=Locality(mu=1.0))
    assert router.needs_nodes
    with pytest.raises(ConfigError) as caught:
        router(x_TD)
    assert caught.value.field == "local_experts"


def test_it_compiles_without_a_graph_break():
    router, x_TD = make(dtype=torch.float32, aux_loss_coef=0.1, z_loss_coef=0.1, capacity_factor=1.0)

    def weights_and_loss(x_TD):
        decision = router(x_TD)
        return decision.topk_weights_TK, decision.aux_loss

    compiled = torch.compile(weights_and_loss, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(x_TD), weights_and_loss(x_TD), strict=True):
        assert torch.equal(ours, theirs)
