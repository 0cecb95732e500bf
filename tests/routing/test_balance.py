import math

import pytest
import torch

from moe_overlap.routing import load_balancing_loss, router_probabilities, z_loss
from tests.strategies import make_logits


def naive_balance(probs_TE, ids_TK, alpha):
    """alpha * E * sum_i f_i P_i with Python loops (Switch Transformer, eq. 4-6, over K choices)."""
    tokens, experts = probs_TE.shape
    total = 0.0
    for expert in range(experts):
        f = sum(int(i == expert) for row in ids_TK.tolist() for i in row) / ids_TK.numel()
        p = sum(probs_TE[t, expert] for t in range(tokens)) / tokens
        total = total + f * p
    return alpha * experts * total


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties"])
def test_balance_loss_equals_the_equation_and_its_gradient(kind, k):
    logits_TE = make_logits(kind, 13, 5, dtype=torch.float64).requires_grad_()
    ids_TK = logits_TE.detach().topk(k).indices
    counts_E = torch.bincount(ids_TK.flatten(), minlength=5)
    ours = 0.01 * load_balancing_loss(router_probabilities(logits_TE, "softmax"), counts_E)
    theirs = naive_balance(logits_TE.softmax(-1), ids_TK, 0.01)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours_grad, theirs_grad = (torch.autograd.grad(loss, logits_TE)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-10, atol=1e-15)
    assert ours_grad.abs().max() > 0


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    uniform_TE = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert load_balancing_loss(uniform_TE, torch.tensor([4, 4, 4, 4])).item() == 1.0
    collapsed_TE = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.long), 4).double()
    assert load_balancing_loss(collapsed_TE, torch.tensor([8, 0, 0, 0])).item() == 4.0


def test_reduce_balances_the_global_batch():
    # Each rank alone is collapsed, together they are balanced.
    probs_TE = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    counts_E = torch.tensor([4, 0])
    seen = []

    def mean_over_two_ranks(f_E):
        seen.append(f_E)
        return (f_E + f_E.flip(0)) / 2

    assert load_balancing_loss(probs_TE, counts_E).item() == 2.0
    assert load_balancing_loss(probs_TE, counts_E, reduce=mean_over_two_ranks).item() == 1.0
    assert seen[0].tolist() == [1.0, 0.0] and not seen[0].requires_grad


def test_sigmoid_probabilities_sum_to_one():
    logits_TE = make_logits("normal", 6, 4, dtype=torch.float64)
    probs_TE = router_probabilities(logits_TE, "sigmoid")
    torch.testing.assert_close(probs_TE.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(probs_TE * logits_TE.sigmoid().sum(-1, keepdim=True), logits_TE.sigmoid())
    assert router_probabilities(torch.full((1, 2), -1e4), "sigmoid").isfinite().all()


def test_z_loss_equals_mean_squared_logsumexp():
    logits_TE = make_logits("normal", 7, 5, dtype=torch.float64).requires_grad_()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.tolist()) / 7
    assert z_loss(logits_TE).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(z_loss, (logits_TE,))


def test_no_tokens_give_zero_not_nan():
    assert z_loss(torch.zeros(0, 3)).item() == 0
    assert load_balancing_loss(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int32)).item() == 0
    none_T1 = torch.zeros(4, 1, dtype=torch.bool)
    assert z_loss(torch.ones(4, 3), valid_T1=none_T1).item() == 0
