import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import SmileRouter

NODES, PER_NODE, HIDDEN = 3, 5, 8


def make(top_k=1, tokens=30, **options):
    torch.manual_seed(0)
    router = SmileRouter(HIDDEN, NODES * PER_NODE, top_k, num_nodes=NODES, dtype=torch.float64, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router, torch.randn(tokens, HIDDEN, dtype=torch.float64)


def by_hand(router, x_TD):
    p = (x_TD @ router.node_weight.T).softmax(-1)
    q = (x_TD @ router.weight.T).softmax(-1)
    node, inside = p.argmax(-1, keepdim=True), q.topk(router.top_k, dim=-1).indices
    return node * PER_NODE + inside, p.gather(1, node) * q.gather(1, inside), p, q, node, inside


@pytest.mark.parametrize("top_k", [1, 3, PER_NODE])
def test_a_node_first_and_then_experts_inside(top_k):
    router, x_TD = make(top_k)
    decision = router(x_TD)
    ids, weights, *_ = by_hand(router, x_TD)
    assert torch.equal(decision.topk_ids_TK.long(), ids)
    torch.testing.assert_close(decision.topk_weights_TK, weights)
    ours = torch.autograd.grad(decision.topk_weights_TK.square().sum(), list(router.parameters()))
    theirs = torch.autograd.grad(weights.square().sum(), list(router.parameters()))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(decision.tokens_per_expert_E, torch.bincount(ids.flatten(), minlength=NODES * PER_NODE))
    assert sum(p.numel() for p in router.parameters()) == HIDDEN * (NODES + PER_NODE)


@pytest.mark.parametrize("balance", ["micro", "global"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_two_level_loss(top_k, balance):
    router, x_TD = make(top_k, alpha=0.3, beta=0.7, balance=balance)
    _, _, p, q, node, inside = by_hand(router, x_TD)
    f = torch.bincount(node.flatten(), minlength=NODES) / len(x_TD)
    g = torch.bincount(inside.flatten(), minlength=PER_NODE) / inside.numel()
    expected = 0.3 * NODES * (f * p.mean(0)).sum() + 0.7 * PER_NODE * (g * q.mean(0)).sum()
    decision = router(x_TD)
    loss = decision.aux_loss if balance == "micro" else decision.global_balance.alone()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, list(router.parameters()), retain_graph=True)
    for got, want in zip(ours, torch.autograd.grad(expected, list(router.parameters())), strict=True):
        torch.testing.assert_close(got, want)
    assert balance == "micro" or decision.aux_loss is None


def test_the_loss_is_alpha_plus_beta_where_all_is_even_and_more_where_it_is_not():
    """One token for each (node, place), which prefers its own by a hair."""
    router = SmileRouter(NODES + PER_NODE, NODES * PER_NODE, num_nodes=NODES, alpha=0.3, beta=0.7, dtype=torch.float64)
    eye = torch.eye(NODES + PER_NODE, dtype=torch.float64)
    with torch.no_grad():
        router.node_weight.copy_(eye[:NODES])
        router.weight.copy_(eye[NODES:])
    pairs = [(node, NODES + place) for node in range(NODES) for place in range(PER_NODE)]
    x_TD = torch.stack([eye[node] + eye[place] for node, place in pairs])
    decision = router(x_TD)
    assert decision.tokens_per_expert_E.tolist() == [1] * len(pairs)
    assert decision.aux_loss.item() == pytest.approx(1.0, abs=1e-12)
    for count in (1, 4, PER_NODE + 1):  # the first nodes and places only
        assert router(x_TD[:count]).aux_loss.item() > 1.0 + 1e-3


def test_bad_logits_raise_or_drop():
    router, x_TD = make()
    x_TD[3] = float("nan")
    assert router(x_TD).status.tolist() == [1]
    router.bad_logits = "drop"
    dropped = router(x_TD)
    assert dropped.status.tolist() == [0] and dropped.topk_ids_TK[3].tolist() == [-1]
    assert dropped.dropped_tokens.item() == 1 and dropped.topk_weights_TK[3].item() == 0.0
    grads = torch.autograd.grad(dropped.topk_weights_TK.sum() + dropped.aux_loss, list(router.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_it_computes_in_float32_under_autocast():
    router, x_TD = make()
    router, x_TD = router.float(), x_TD.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x_TD)
    assert torch.equal(inside.topk_weights_TK, router(x_TD).topk_weights_TK)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_nodes": 4}, "num_nodes"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"top_k": 6}, "top_k"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": float("nan")}, "beta"),
        ({"bad_logits": "ignore"}, "bad_logits"),
        ({"balance": "sequence"}, "balance"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(ConfigError) as caught:
        SmileRouter(**{"hidden_size": 8, "num_experts": 15, "num_nodes": 3} | options)
    assert caught.value.field == field
