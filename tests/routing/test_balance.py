import math

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import (
    GlobalBalance,
    load_balancing_loss,
    router_probabilities,
    sequence_balancing_loss,
    z_loss,
)
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


def test_the_global_loss_of_ranks_is_that_of_one_process():
    """Uneven tokens, one rank has none; the mean over the ranks, values and gradients."""
    logits_TE = make_logits("skewed", 20, 5, dtype=torch.float64).requires_grad_()
    ids_TK = logits_TE.detach().topk(2).indices
    probs_TE = logits_TE.softmax(-1)
    parts = [slice(0, 7), slice(7, 7), slice(7, 20)]
    counts = [torch.bincount(ids_TK[part].flatten(), minlength=5) for part in parts]
    rests = [GlobalBalance.of(probs_TE[part], n, coef=0.3) for part, n in zip(parts, counts, strict=True)]
    tokens = sum(rest.tokens for rest in rests)
    assert tokens == 20 and [int(rest.tokens) for rest in rests] == [7, 0, 13]
    ours = sum(rest.loss(sum(counts), tokens, 3) for rest in rests) / 3
    theirs = 0.3 * load_balancing_loss(probs_TE, sum(counts))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours_grad, theirs_grad = (torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-10, atol=1e-16)
    local = sum(0.3 * load_balancing_loss(probs_TE[part], n) for part, n in zip(parts, counts, strict=True)) / 3
    assert abs(local - theirs) > 1e-3, "it is another loss than that of each rank's own tokens"


def test_the_global_loss_of_one_rank_is_the_micro_batch_loss():
    logits_TE = make_logits("normal", 9, 4, dtype=torch.float64)
    valid_T1 = torch.arange(9)[:, None] % 3 > 0
    counts_E = torch.tensor([3, 4, 0, 5])
    for valid in (None, valid_T1):
        rest = GlobalBalance.of(logits_TE.softmax(-1), counts_E, coef=2.0, valid_T1=valid)
        want = 2.0 * load_balancing_loss(logits_TE.softmax(-1), counts_E, valid_T1=valid)
        torch.testing.assert_close(rest.alone(), want, rtol=1e-12, atol=0)
        assert rest.agreed == (valid is None)


@pytest.mark.parametrize("refused", [False, True])
def test_the_sequence_loss_is_the_mean_of_the_losses_of_the_sequences(refused):
    logits_TE = make_logits("skewed", 12, 5, dtype=torch.float64).requires_grad_()
    ids_TK = logits_TE.detach().topk(2).indices.int()
    valid_T1 = torch.ones(12, 1, dtype=torch.bool)
    if refused:  # two tokens of the first sequence, and all of the third
        valid_T1[[1, 2, 8, 9, 10, 11]] = False
        ids_TK = torch.where(valid_T1, ids_TK, -1)
    probs_TE = logits_TE.softmax(-1)
    ours = sequence_balancing_loss(probs_TE, ids_TK, 4, valid_T1=valid_T1 if refused else None)
    theirs = 0.0
    for begin in (0, 4, 8):
        some = slice(begin, begin + 4)
        chosen = ids_TK[some].flatten().long()
        counts_E = torch.bincount(chosen[chosen >= 0], minlength=5)
        theirs = theirs + load_balancing_loss(probs_TE[some], counts_E, valid_T1=valid_T1[some]) / 3
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours_grad, theirs_grad = (torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("length", [0, 5, 24])
def test_a_sequence_length_that_does_not_divide_is_refused(length):
    with pytest.raises(ConfigError) as caught:
        sequence_balancing_loss(torch.ones(12, 4), torch.zeros(12, 2, dtype=torch.int32), length)
    assert caught.value.field == "sequence_length"


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
    assert sequence_balancing_loss(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int32), 4).item() == 0
    nothing = GlobalBalance.of(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int32), coef=1.0)
    assert nothing.alone().item() == 0
