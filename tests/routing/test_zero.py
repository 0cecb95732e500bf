import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import LinearRouter, part_zero_experts, update_bias_

D, E, Z, K, T = 8, 6, 3, 3, 50


def make(**options):
    torch.manual_seed(0)
    router = LinearRouter(D, E, K, dtype=torch.float64, zero_experts=Z, **options)
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(T, D, dtype=torch.float64)


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_a_router_with_zero_experts_is_one_with_as_many_more_experts(score):
    options = {"score": score, "bias": True, "aux_loss_coef": 0.1}
    router, x_TD = make(**options)
    plain = LinearRouter(D, E + Z, K, dtype=torch.float64, **options)
    plain.load_state_dict(router.state_dict())
    got, want = router(x_TD), plain(x_TD)
    for name in ("topk_ids_TK", "topk_weights_TK", "tokens_per_expert_E", "aux_loss"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.zero_experts == Z and want.zero_experts == 0 and (got.topk_ids_TK >= E).any()


def test_what_is_parted():
    ids_TK = torch.tensor([[0, 6, 8], [7, -1, 5], [1, 2, 3], [9, 6, 6]], dtype=torch.int32)
    weights_TK = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3).requires_grad_()
    x_TD = torch.randn(4, D, dtype=torch.float64)
    x_TD[2] = float("nan")  # a token that no zero expert takes
    ids, weights, identity = part_zero_experts(ids_TK, weights_TK, x_TD, E, Z)
    # 9 is no expert of either kind: it stays, for whoever checks the ids.
    assert ids.tolist() == [[0, -1, -1], [-1, -1, 5], [1, 2, 3], [9, -1, -1]]
    assert weights.tolist() == [[1, 0, 0], [0, 5, 6], [7, 8, 9], [10, 0, 0]]
    assert identity.weights_T1[:, 0].tolist() == [5.0, 4.0, 0.0, 23.0]
    y_TD = identity.added_to(torch.ones(4, D, dtype=torch.float64))
    torch.testing.assert_close(y_TD[[0, 1, 3]], 1 + torch.tensor([5.0, 4, 23])[:, None].double() * x_TD[[0, 1, 3]])
    assert (y_TD[2] == 1).all()
    (d_TK,) = torch.autograd.grad(y_TD.sum() + 2 * weights.sum(), weights_TK)
    s = x_TD.sum(1)
    want = [[2, s[0], s[0]], [s[1], 2, 2], [2, 2, 2], [2, s[3], s[3]]]
    torch.testing.assert_close(d_TK, torch.tensor(want, dtype=torch.float64))


def test_zero_experts_have_no_capacity_limit():
    router, x_TD = make(capacity_factor=0.25)
    got, free = router(x_TD), make()[0](x_TD)
    zero_TK = free.topk_ids_TK >= E
    assert torch.equal(got.topk_ids_TK[zero_TK], free.topk_ids_TK[zero_TK])
    assert torch.equal(got.topk_weights_TK[zero_TK], free.topk_weights_TK[zero_TK])
    capacity = -(-T * K // (4 * (E + Z)))
    ids = got.topk_ids_TK[~zero_TK]
    assert torch.bincount(ids[ids >= 0].long(), minlength=E).max() == capacity
    assert got.dropped_tokens == (ids < 0).sum() > 0


def test_loss_free_balance_moves_the_share_of_real_experts_to_that_of_the_logits():
    """Balance over all E + Z: K * E / (E + Z) = 2 of a token's experts compute, whatever it was before."""
    router, _ = make(score="sigmoid", bias=True)
    with torch.no_grad():
        router.weight[E:] = router.weight[E:].abs() + 0.3
    x_TD = torch.randn(2000, D, dtype=torch.float64).abs()  # so that zero experts win at first
    before = router(x_TD)
    for _ in range(1500):
        update_bias_(router.expert_bias_E, router(x_TD).tokens_per_expert_E, 1e-3)
    after = router(x_TD)
    shares = [float((one.topk_ids_TK < E).sum()) / 2000 for one in (before, after)]
    assert shares[0] < 1.0 and abs(shares[1] - K * E / (E + Z)) < 0.05


def test_masked_and_zero_experts_together():
    router, x_TD = make()
    router.mask_experts([0, E])  # one of each kind
    ids = router(x_TD).topk_ids_TK
    assert not torch.isin(ids, torch.tensor([0, E], dtype=torch.int32)).any() and (ids > E).any()


@pytest.mark.parametrize("bad", [-1, 1.0, True, "2"])
def test_a_number_of_zero_experts_that_is_none(bad):
    with pytest.raises(ConfigError) as caught:
        LinearRouter(D, E, K, zero_experts=bad)
    assert caught.value.field == "zero_experts"


def test_zero_experts_belong_to_no_group():
    with pytest.raises(ConfigError) as caught:
        LinearRouter(D, E, K, zero_experts=Z, n_group=3, topk_group=2)
    assert caught.value.field == "n_group"
