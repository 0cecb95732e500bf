import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import HashRouter, LinearRouter, SwitchRouter


def test_switch_is_top_1_with_capacity_and_a_loss():
    torch.manual_seed(0)
    router = SwitchRouter(8, 6, dtype=torch.float64).eval()
    torch.nn.init.normal_(router.weight)
    plain = LinearRouter(8, 6, 1, aux_loss_coef=0.01, capacity_factor=1.25, dtype=torch.float64)
    plain.load_state_dict(router.state_dict())
    x_TD = torch.randn(30, 8, dtype=torch.float64)
    ours, theirs = router(x_TD), plain(x_TD)
    assert torch.equal(ours.topk_ids_TK, theirs.topk_ids_TK) and torch.equal(ours.aux_loss, theirs.aux_loss)
    assert ours.dropped_tokens.item() > 0


def test_switch_multiplies_what_the_router_reads_by_noise_in_training_alone():
    torch.manual_seed(0)
    router = SwitchRouter(8, 6, jitter=0.3, dtype=torch.float64)
    x_TD = torch.randn(400, 8, dtype=torch.float64)
    torch.manual_seed(1)
    weights_TK = router(x_TD).topk_weights_TK
    torch.manual_seed(1)
    factors = torch.empty_like(x_TD).uniform_(0.7, 1.3)
    expected_TK = ((x_TD * factors) @ router.weight.T).softmax(-1).max(-1, keepdim=True).values
    kept_TK = weights_TK > 0
    torch.testing.assert_close(weights_TK[kept_TK], expected_TK[kept_TK])
    router.eval()
    assert torch.equal(router(x_TD).topk_weights_TK, router(x_TD).topk_weights_TK)


@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize("vocab", [1, 20, 101])
def test_hash_spreads_the_vocabulary_evenly_over_different_experts(vocab, top_k):
    router = HashRouter(vocab, 7, top_k, seed=3)
    router.give(torch.arange(vocab))
    decision = router(torch.randn(vocab, 4))
    firsts = torch.bincount(decision.topk_ids_TK[:, 0].long(), minlength=7)
    assert firsts.max() - firsts.min() <= 1
    assert all(len(set(row)) == top_k for row in decision.topk_ids_TK.tolist())
    assert decision.topk_weights_TK.dtype == torch.float32
    torch.testing.assert_close(decision.topk_weights_TK.sum(-1), torch.ones(vocab))
    assert decision.aux_loss is None and list(router.parameters()) == []


def test_hash_is_a_function_of_the_ids_and_the_seed():
    x_TD, ids = torch.randn(12, 4), torch.randint(0, 50, (3, 4))
    same, other = HashRouter(50, 8, 2, seed=1), HashRouter(50, 8, 2, seed=2)
    results = []
    for router in (HashRouter(50, 8, 2, seed=1), same, other):
        router.give(ids)
        results.append(router(x_TD).topk_ids_TK)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(results[0], router_table(same)[ids.flatten()])
    loaded = HashRouter(50, 8, 2, seed=9)
    loaded.load_state_dict(same.state_dict())
    assert torch.equal(router_table(loaded), router_table(same))


def router_table(router):
    return router.state_dict()["table_VK"]


@pytest.mark.parametrize("ids", [None, torch.arange(4)])
def test_hash_refuses_tokens_without_ids(ids):
    router = HashRouter(50, 8)
    if ids is not None:
        router.give(ids)
    with pytest.raises(ConfigError) as caught:
        router(torch.randn(5, 4))
    assert caught.value.field == "token_ids"
    with pytest.raises(ConfigError):
        router.give(torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SwitchRouter(8, 4, jitter=1.0), "jitter"),
        (lambda: SwitchRouter(8, 4, jitter=-0.1), "jitter"),
        (lambda: HashRouter(0, 4), "vocab_size"),
        (lambda: HashRouter(9, 4, 5), "top_k"),
        (lambda: HashRouter(9, 0), "num_experts"),
    ],
)
def test_bad_options_name_the_field(make, field):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
