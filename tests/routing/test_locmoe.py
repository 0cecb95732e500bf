import math

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing import LocMoEPlusRouter, LocMoERouter, Nodes, cap_probability, capacity_bound, grap_rows
from moe_overlap.routing.capacity_floor import clamp_capacity, measured_floor
from moe_overlap.routing.select import expert_capacity

WHERE = Nodes(of_expert=(0, 0, 1, 1), num_nodes=2, own=0)


def tokens(count=40, hidden=12, seed=0):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("experts", "hidden"), [(4, 12), (6, 6), (1, 5), (16, 5120)])
def test_rows_of_the_pooling_gate_are_orthogonal_with_norm_sqrt_n_over_d(experts, hidden):
    rows_ED = grap_rows(experts, hidden, dtype=torch.float64)
    expected_EE = torch.eye(experts, dtype=torch.float64) * experts / hidden
    torch.testing.assert_close(rows_ED @ rows_ED.T, expected_EE, rtol=1e-12, atol=1e-15)


def test_the_pooling_gate_s_scores_are_means_of_feature_groups_and_it_has_no_parameter():
    router = LocMoERouter(12, 4, 2, gate="grap", mu=0.0, aux_loss_coef=0.0, dtype=torch.float64)
    x_TD = tokens().requires_grad_()
    decision = router(x_TD, local_experts=WHERE)
    expected = x_TD.unflatten(1, (4, 3)).mean(-1).softmax(-1).topk(2)
    assert torch.equal(decision.topk_ids_TK.long(), expected.indices)
    torch.testing.assert_close(decision.topk_weights_TK, expected.values)
    assert list(router.parameters()) == [] and router.state_dict() == {}
    assert torch.autograd.grad(decision.topk_weights_TK.sum(), x_TD)[0].abs().max() > 0


def test_even_directions_go_to_each_expert_of_the_pooling_gate_alike():
    router = LocMoERouter(64, 8, gate="grap", mu=0.0, dtype=torch.float64)
    where = Nodes(of_expert=(0,) * 8, num_nodes=1, own=0)
    counts_E = router(tokens(40_000, 64), local_experts=where).tokens_per_expert_E
    assert ((counts_E / 40_000 - 1 / 8).abs() < 0.02 / 8 + 0.004).all()


def test_the_floor_of_the_reference():
    assert capacity_bound(16, 5120, 0.03) == pytest.approx(1.965, abs=5e-4)
    assert capacity_bound(16, 5120, 0.03, form="erfc") == pytest.approx(1.966, abs=5e-4)
    assert cap_probability(5120**-0.5, 5120) == pytest.approx(0.3173, abs=1e-4)
    assert capacity_bound(16, 5120, 0.03, form="exp") == pytest.approx(0.627, abs=5e-4)
    assert capacity_bound(16, 5120, 0.05) == pytest.approx(181, abs=1)
    assert capacity_bound(16, 5120, 0.06) == pytest.approx(3602, abs=1)


@pytest.mark.parametrize("delta", [1e-6, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_the_cap_in_three_dimensions_is_one_minus_delta(delta):
    """Archimedes: the share of a sphere within |z| >= delta; and 1 - (2/pi) asin(delta) for a circle."""
    assert cap_probability(delta, 3) == pytest.approx(1 - delta, rel=1e-9)
    assert cap_probability(delta, 2) == pytest.approx(1 - 2 / math.pi * math.asin(delta), rel=1e-9)


@pytest.mark.parametrize(("hidden", "delta"), [(16, 0.3), (512, 0.06), (512, 0.1)])
def test_the_cap_counts_both_sides(hidden, delta):
    directions = torch.nn.functional.normalize(tokens(100_000, hidden, seed=1))
    both = (directions[:, 0].abs() >= delta).double().mean().item()
    one = (directions[:, 0] >= delta).double().mean().item()
    assert both == pytest.approx(cap_probability(delta, hidden), abs=0.005)
    assert one == pytest.approx(cap_probability(delta, hidden) / 2, abs=0.005)


@pytest.mark.parametrize(
    ("bound", "tokens", "expected"),
    [(0.2, 8, 1), (1.965, 8, 2), (7.5, 8, 8), (3602.0, 8, 8), (math.inf, 8, 8), (2.0, 0, 1)],
)
def test_the_floor_is_from_one_to_the_number_of_tokens(bound, tokens, expected):
    assert clamp_capacity(bound, tokens) == expected


def test_the_floor_raises_a_capacity_and_never_lowers_it():
    x_TD = tokens()
    for delta, factor in ((0.6, 0.1), (0.01, 1.0)):
        router = LocMoERouter(12, 4, 1, capacity_factor=factor, delta=delta, dtype=torch.float64)
        torch.nn.init.normal_(router.weight)
        capacity = max(expert_capacity(factor, 40, 1, 4), clamp_capacity(capacity_bound(4, 12, delta), 40))
        decision = router(x_TD, local_experts=WHERE)
        kept_E = torch.bincount(decision.topk_ids_TK[decision.topk_ids_TK >= 0].long(), minlength=4)
        assert torch.equal(kept_E, decision.tokens_per_expert_E.clamp_max(capacity))


@pytest.mark.parametrize("form", ["erfc", "exp"])
def test_the_measured_floor_is_that_of_the_greatest_cosine(form):
    for delta, hidden, count in ((0.03, 5120, 64), (0.05, 5120, 1000), (0.06, 5120, 64), (1.0, 4, 9)):
        cosines = torch.tensor([[-0.9, delta / 2], [delta, 0.0]])
        bound = capacity_bound(16, hidden, min(delta, 1 - 1e-9), form=form)
        assert measured_floor(cosines, 16, hidden, count, form=form).item() == clamp_capacity(bound, count)
    assert measured_floor(torch.zeros(0, 2), 16, 8, 0, form=form).item() == 1


@pytest.mark.parametrize("form", [None, "erfc"])
def test_plus_measures_its_floor_in_every_call(form):
    """Of the affinities of what was chosen; a call of other tokens has another one."""
    router = LocMoEPlusRouter(12, 4, 1, capacity_factor=0.2, delta="max", floor_form=form, mu=0.0, dtype=torch.float64)
    rows_ED = grap_rows(4, 12, dtype=torch.float64)
    kept = []
    for spread in (0.02, 0.1, 1.0):
        x_TD = torch.ones(40, 12, dtype=torch.float64) + spread * tokens()
        x_TD = x_TD - 0.97 * x_TD.mean(dim=1, keepdim=True) * (-1.0) ** torch.arange(12)  # nearly no mean of a group
        decision = router(x_TD, local_experts=WHERE)
        cosine_TE = torch.nn.functional.cosine_similarity(x_TD[:, None], rows_ED[None], dim=-1)
        delta = cosine_TE.gather(1, decision.chosen_ids_TK.long()).max().item()
        floor = clamp_capacity(capacity_bound(4, 12, delta, form=form or "exp"), 40)
        capacity = max(expert_capacity(0.2, 40, 1, 4), floor)
        kept_E = torch.bincount(decision.topk_ids_TK[decision.topk_ids_TK >= 0].long(), minlength=4)
        assert torch.equal(kept_E, decision.tokens_per_expert_E.clamp_max(capacity))
        assert decision.dropped_tokens.item() == 40 - kept_E.sum().item()
        kept.append(floor)
    assert len(set(kept)) > 1
    empty = router(x_TD[:0], local_experts=WHERE)
    assert empty.topk_ids_TK.shape == (0, 1)


@pytest.mark.parametrize("gate", ["linear", "grap"])
def test_plus_keeps_the_tokens_of_highest_cosine_not_those_of_highest_weight(gate):
    x_TD = tokens() * torch.linspace(0.1, 5, 40, dtype=torch.float64)[:, None]
    options = {"gate": gate, "capacity_factor": 0.5, "mu": 0.0, "dtype": torch.float64}
    plus = LocMoEPlusRouter(12, 4, 2, **options)
    if gate == "linear":
        torch.nn.init.normal_(plus.weight)
    decision = plus(x_TD, local_experts=WHERE)
    free = LocMoERouter(12, 4, 2, gate=gate, mu=0.0, dtype=torch.float64)
    free.load_state_dict(plus.state_dict())
    chosen_TK = free(x_TD, local_experts=WHERE).topk_ids_TK
    rows_ED = plus.weight if gate == "linear" else grap_rows(4, 12, dtype=torch.float64)
    cosine_TE = torch.nn.functional.cosine_similarity(x_TD[:, None], rows_ED[None], dim=-1)
    for expert in range(4):
        wanted = (chosen_TK == expert).any(-1).nonzero().flatten().tolist()
        best = sorted(wanted, key=lambda t: -cosine_TE[t, expert].item())[: math.ceil(0.5 * 40 * 2 / 4)]
        assert sorted(best) == (decision.topk_ids_TK == expert).any(-1).nonzero().flatten().tolist()


def test_plus_takes_the_fewest_experts_whose_probabilities_sum_to_the_share():
    x_TD = 4 * tokens()
    router = LocMoEPlusRouter(12, 4, 4, share=0.7, capacity_factor=100.0, dtype=torch.float64)
    decision = router(x_TD, local_experts=WHERE)
    probs_TE = x_TD.unflatten(1, (4, 3)).mean(-1).softmax(-1).sort(descending=True).values
    for token in range(40):
        total, expected = 0.0, 0
        while total < 0.7:
            total, expected = total + probs_TE[token, expected].item(), expected + 1
        assert (decision.topk_ids_TK[token] >= 0).sum() == expected
    assert decision.tokens_per_expert_E.sum() == (decision.topk_ids_TK >= 0).sum()
    assert decision.dropped_tokens.item() == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mu": -0.1}, "mu"),
        ({"gate": "cosine"}, "gate"),
        ({"gate": "grap", "num_experts": 5}, "num_experts"),
        ({"delta": 0.03}, "delta"),
        ({"delta": 1.0, "capacity_factor": 1.0}, "delta"),
        ({"delta": 0.03, "capacity_factor": 1.0, "floor_form": "gamma"}, "form"),
        ({"locality_bias": -2}, "nodes"),
        ({"top_k": 5}, "top_k"),
    ],
)
def test_bad_options_name_the_field(options, field):
    with pytest.raises(ConfigError) as caught:
        LocMoERouter(**{"hidden_size": 12, "num_experts": 4} | options)
    assert caught.value.field == field and caught.value.expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"share": 0.0}, "share"),
        ({"share": 2.0}, "share"),
        ({"capacity_factor": None}, "capacity_factor"),
        ({"delta": "most"}, "delta"),
        ({"delta": "max", "floor_form": "exact"}, "floor_form"),
    ],
)
def test_bad_options_of_plus_name_the_field(options, field):
    with pytest.raises(ConfigError) as caught:
        LocMoEPlusRouter(12, 4, **options)
    assert caught.value.field == field
