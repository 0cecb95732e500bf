import math
import warnings

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import LinearRouter, Locality, LocalityBias, LocMoERouter, Nodes, locality_loss

OF_EXPERT = (1, 0, 2, 0, 1, 2, 2)  # as a placement might say: no node has neighbours only


def nodes(own):
    return Nodes(of_expert=OF_EXPERT, num_nodes=3, own=own)


def probabilities(tokens=20, seed=0):
    return torch.randn(tokens, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def by_hand(probs_TE, own, smoothing):
    """The KL sum in plain Python."""
    current = probs_TE.mean(0).tolist()
    near = [expert for expert, node in enumerate(OF_EXPERT) if node == own]
    far = 7 - len(near)
    favoured = [(1 - smoothing) / len(near) if expert in near else smoothing / far for expert in range(7)]
    return sum(c * math.log(c / f) for c, f in zip(current, favoured, strict=True))


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_the_loss_is_the_divergence_from_the_placement_s_node(own, smoothing):
    probs_TE = probabilities()
    loss = locality_loss(probs_TE, nodes(own), smoothing=smoothing)
    assert loss.item() == pytest.approx(by_hand(probs_TE, own, smoothing), rel=1e-12)


def test_it_is_zero_at_the_favoured_distribution_and_positive_beside_it():
    favoured = torch.tensor([0.1 / 5, 0.45, 0.1 / 5, 0.45, 0.1 / 5, 0.1 / 5, 0.1 / 5], dtype=torch.float64)
    assert abs(locality_loss(favoured.expand(4, 7), nodes(0), smoothing=0.1).item()) < 1e-14
    assert locality_loss(probabilities(), nodes(0), smoothing=0.1) > 0.1


def test_a_node_for_each_token_is_the_mean_over_nodes():
    probs_TE = probabilities(21)
    own_T = torch.arange(21) % 3
    each = [by_hand(probs_TE[own_T == node], node, 0.1) for node in range(3)]
    loss = locality_loss(probs_TE, nodes(own_T), smoothing=0.1)
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-12)


def test_tokens_that_do_not_count_are_left_out():
    probs_TE = probabilities()
    valid_T1 = (torch.arange(20) % 2 == 0)[:, None]
    loss = locality_loss(probs_TE, nodes(1), smoothing=0.1, valid_T1=valid_T1)
    assert loss.item() == pytest.approx(by_hand(probs_TE[::2], 1, 0.1), rel=1e-12)


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_favour_costs_nothing(tokens):
    """Fewer experts than nodes: node 2 has none; and no tokens at all."""
    where = Nodes(of_expert=(0, 1), num_nodes=3, own=2 if tokens else 0)
    probs_TE = torch.full((tokens, 2), 0.5, dtype=torch.float64, requires_grad=True)
    loss = locality_loss(probs_TE, where, smoothing=0.1)
    loss.backward()
    assert loss.item() == 0.0 and (probs_TE.grad == 0).all()


@pytest.mark.parametrize("masked", [(3,), (2, 4), (1, 3)])
def test_a_masked_expert_is_on_no_node(masked):
    """As if it were not there; (1, 3): node 0 has none left, and nothing to favour."""
    masked_E = torch.tensor([expert in masked for expert in range(7)])
    probs_TE = probabilities().masked_fill(masked_E, 0.0)
    probs_TE = (probs_TE / probs_TE.sum(dim=1, keepdim=True)).requires_grad_()
    loss = locality_loss(probs_TE, nodes(0), smoothing=0.1, masked_E=masked_E)
    left = [expert for expert in range(7) if expert not in masked]
    there = Nodes(of_expert=tuple(OF_EXPERT[expert] for expert in left), num_nodes=3, own=0)
    assert loss.item() == pytest.approx(locality_loss(probs_TE[:, left], there, smoothing=0.1).item(), rel=1e-12)
    assert (loss.item() == 0.0) == (masked == (1, 3))
    loss.backward()
    assert probs_TE.grad.isfinite().all()


def test_a_router_tells_its_loss_what_is_masked():
    router = LocMoERouter(8, 7, mu=1.0, aux_loss_coef=0.0, dtype=torch.float64)
    router.mask_experts((1, 3))
    assert router(torch.randn(5, 8, dtype=torch.float64), local_experts=nodes(0)).aux_loss.item() == 0.0
    assert router(torch.randn(5, 8, dtype=torch.float64), local_experts=nodes(1)).aux_loss.item() > 0.1


def test_equal_nodes_and_equal_texts_have_their_least_sum_at_even_probabilities():
    """Why the loss alone does nothing: the sum over the nodes of one even distribution is below that of any other."""
    where = [Nodes(of_expert=(0, 0, 1, 1), num_nodes=2, own=own) for own in range(2)]

    def total(probs_E):
        return sum(locality_loss(probs_E[None], one, smoothing=0.1) for one in where)

    even = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(total(even), even)
    assert (slope - slope.mean()).abs().max() < 1e-12  # none along distributions
    for seed in range(20):
        assert total(torch.rand(4, generator=torch.Generator().manual_seed(seed)).double().softmax(0)) > total(even)


def trained(locality, *, texts_differ, mu, steps=300):
    """Share of tokens on their own node after training a router alone on two nodes; and max over mean of the load."""
    generator = torch.Generator().manual_seed(1)
    router = LinearRouter(16, 4, 1, aux_loss_coef=0.01, locality=locality(mu), dtype=torch.float64)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    where = [Nodes(of_expert=(0, 1, 0, 1), num_nodes=2, own=own) for own in range(2)]
    texts = torch.randn(2, 16, generator=generator, dtype=torch.float64) * texts_differ
    for _ in range(steps):
        xs = torch.randn(2, 256, 16, generator=generator, dtype=torch.float64) + texts[:, None]
        decisions = [router(x_TD, local_experts=one) for x_TD, one in zip(xs, where, strict=True)]
        optimizer.zero_grad()
        sum(decision.aux_loss for decision in decisions).backward()
        optimizer.step()
    shares = [decision.tokens_per_expert_E[node::2].sum().item() / 256 for node, decision in enumerate(decisions)]
    return sum(shares) / 2


def test_locality_comes_from_the_bias_or_from_the_text_and_from_nothing_else():
    torch.manual_seed(0)
    biased, plain = (lambda mu: Locality(mu=mu, nodes=2)), (lambda mu: Locality(mu=mu))
    alike = [trained(plain, texts_differ=0.0, mu=mu) for mu in (0.0, 0.1)]
    assert all(abs(share - 0.5) < 0.1 for share in alike)
    assert trained(biased, texts_differ=0.0, mu=0.1) > 0.8
    assert trained(plain, texts_differ=1.0, mu=0.1) > 0.8


def test_the_bias_uses_the_row_of_the_node():
    router = LocMoERouter(8, 7, 2, mu=0.0, locality_bias=3, aux_loss_coef=0.0, dtype=torch.float64)
    with torch.no_grad():
        router.locality_bias.weight.copy_(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)))
    x_TD = torch.randn(6, 8, dtype=torch.float64)
    own_T = torch.tensor([0, 1, 2, 2, 1, 0])
    together = router(x_TD, local_experts=nodes(own_T))
    logits_TE = x_TD @ router.weight.T + router.locality_bias.weight[own_T]
    torch.testing.assert_close(together.topk_weights_TK, logits_TE.softmax(-1).topk(2).values)
    for node in range(3):
        alone = router(x_TD[own_T == node], local_experts=nodes(node))
        assert torch.equal(alone.topk_ids_TK, together.topk_ids_TK[own_T == node])


def test_a_state_of_another_number_of_nodes_gives_every_row_the_mean_with_a_warning():
    saved = LocalityBias(2, 3)
    with torch.no_grad():
        saved.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, -1.0]]))
    loaded = LocalityBias(4, 3)
    with pytest.warns(UserWarning, match="saved for 2 nodes and is loaded for 4"):
        loaded.load_state_dict(saved.state_dict())
    assert loaded.weight.tolist() == [[2.0, 2.0, 1.0]] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocalityBias(2, 3).load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):  # other experts are another router
        LocalityBias(2, 5).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("share", [0.0, 0.14, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_cap_leaves_the_best_off_node_tokens_where_they_are(share, top_k):
    torch.manual_seed(2)
    x_TD = torch.randn(50, 8, dtype=torch.float64)
    router = LinearRouter(8, 7, top_k, locality=Locality(off_node_share=share), dtype=torch.float64)
    torch.nn.init.normal_(router.weight)
    free = LinearRouter(8, 7, top_k, dtype=torch.float64)
    free.load_state_dict(router.state_dict())
    capped, before = router(x_TD, local_experts=nodes(0)), free(x_TD)
    near = torch.tensor([node == 0 for node in OF_EXPERT])
    off_T = ~near[before.topk_ids_TK[:, 0].long()]
    ranked = sorted(off_T.nonzero().flatten().tolist(), key=lambda t: -before.topk_weights_TK[t, 0].item())
    stay = set(ranked[: math.floor(share * 50)]) | set((~off_T).nonzero().flatten().tolist())
    for token in range(50):
        if token in stay:
            assert torch.equal(capped.topk_ids_TK[token], before.topk_ids_TK[token])
            assert torch.equal(capped.topk_weights_TK[token], before.topk_weights_TK[token])
        else:
            assert near[capped.topk_ids_TK[token].long()].all()
    counted = torch.bincount(capped.topk_ids_TK.flatten().long(), minlength=7)
    assert torch.equal(capped.tokens_per_expert_E, counted)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Locality(mu=-1.0), "mu"),
        (lambda: Locality(mu=math.nan), "mu"),
        (lambda: Locality(smoothing=0.0), "smoothing"),
        (lambda: Locality(smoothing=1.0), "smoothing"),
        (lambda: Locality(nodes=-1), "nodes"),
        (lambda: Locality(off_node_share=1.5), "off_node_share"),
        (lambda: LinearRouter(8, 4, 1, locality=0.1), "locality"),
        (lambda: LinearRouter(8, 4, 1, bias=True, locality=Locality(off_node_share=0.1)), "bias"),
        (lambda: LinearRouter(8, 4, 1, n_group=2, locality=Locality(off_node_share=0.1)), "n_group"),
        (lambda: Nodes(of_expert=(0, 2), num_nodes=2, own=0), "nodes.of_expert"),
        (lambda: Nodes(of_expert=(0, 1), num_nodes=2, own=2), "nodes.own"),
    ],
)
def test_bad_options_name_the_field(make, field):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field and caught.value.expected


@pytest.mark.parametrize(
    ("where", "options", "field"),
    [
        (Nodes(of_expert=(0, 1), num_nodes=2, own=0), {}, "nodes.of_expert"),
        (torch.ones(4, dtype=torch.bool), {}, "local_experts"),
        (Nodes(of_expert=(0, 0, 1, 1), num_nodes=2, own=torch.zeros(3, dtype=torch.int64)), {}, "nodes.own"),
        (Nodes(of_expert=(0, 0, 1, 1), num_nodes=2, own=0), {"nodes": 3}, "locality.nodes"),
        (Nodes(of_expert=(0, 1, 1, 1), num_nodes=2, own=0), {"off_node_share": 0.1}, "top_k"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(where, options, field):
    router = LinearRouter(8, 4, 2, locality=Locality(**options))
    with pytest.raises(ConfigError) as caught:
        router(torch.randn(5, 8), local_experts=where)
    assert caught.value.field == field
