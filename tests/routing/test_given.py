"""Routing that the caller gives, options that a layer hands to its router, and the gated shared expert."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ConfigError, LinearRouter, MoELayer, SharedExpert
from moe_overlap.routing import GivenRouter, load_balancing_loss, pooled_balancing_loss
from moe_overlap.transport.local import LocalTransport
from tests.ranks import virtual_world

D, F, E, K, T = 12, 8, 4, 2, 18


def _layer(router, transport, **options):
    torch.manual_seed(1)
    return MoELayer(D, F, E, K, router=router, transport=transport, **options)


def _given(rank=0, ranks=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, D, generator=generator)
    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    ids[4, 1] = -1
    weights = torch.rand(T, K, generator=generator)
    return [value.tensor_split(ranks)[rank].clone() for value in (x, ids, weights)]


def _step(transport, schedule):
    layer = _layer(GivenRouter(E, K), transport, schedule=schedule)
    x, ids, weights = _given(transport.rank, transport.world_size)
    x.requires_grad_()
    weights.requires_grad_()
    y = layer(x[None], topk_ids=ids, topk_weights=weights)[0]
    y.square().sum().backward()
    return y.detach(), x.grad, weights.grad, layer.experts.gate_up_proj.grad


def _by_hand():
    layer = _layer(GivenRouter(E, K), LocalTransport())
    x, ids, weights = _given()
    y = torch.zeros(T, D)
    for t in range(T):
        for k in range(K):
            if ids[t, k] >= 0:
                gate, up = (layer.experts.gate_up_proj[ids[t, k]] @ x[t]).chunk(2)
                y[t] += weights[t, k] * (layer.experts.down_proj[ids[t, k]] @ (torch.nn.functional.silu(gate) * up))
    return y.detach()


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_a_given_choice_runs_on_any_number_of_ranks(schedule):
    alone = _step(LocalTransport(), schedule)
    torch.testing.assert_close(alone[0], _by_hand(), rtol=1e-5, atol=1e-6)
    assert alone[2][4, 1] == 0
    parts = list(zip(*virtual_world(2).run(lambda me: _step(me.transport(), schedule)), strict=True))
    for got, want in zip(parts, alone, strict=True):
        torch.testing.assert_close(torch.cat(list(got)), want, rtol=1e-5, atol=1e-6)


def test_counts_leave_out_what_is_unused():
    x, ids, weights = _given()
    decision = GivenRouter(E, K)(x, topk_ids=ids, topk_weights=weights)
    assert torch.equal(decision.tokens_per_expert_E, torch.bincount(ids[ids >= 0], minlength=E))
    assert decision.topk_weights_TK[4, 1] == 0


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("topk_ids", {"topk_ids": None}),
        ("topk_ids", {"topk_ids": torch.zeros(T, K)}),
        ("topk_ids", {"topk_ids": torch.zeros(T, K + 1, dtype=torch.int64)}),
        ("topk_weights", {"topk_weights": None}),
        ("topk_weights", {"topk_weights": torch.ones(T, K, dtype=torch.int64)}),
        ("topk_ids", {"topk_ids": torch.full((T, K), E)}),
        ("topk_ids", {"topk_ids": torch.full((T, K), -2)}),
        ("topk", {"topk": torch.zeros(T, K)}),
    ],
)
def test_what_does_not_fit_is_refused(field, change):
    x, ids, weights = _given()
    with pytest.raises(ConfigError) as error:
        _layer(GivenRouter(E, K), LocalTransport())(x, **({"topk_ids": ids, "topk_weights": weights} | change))
    assert error.value.field == field


def test_a_layer_hands_on_what_its_router_takes():
    layer = _layer("sigmoid", LocalTransport(), renormalize=True, scale=2.5, n_group=2, topk_group=1, bias=True)
    torch.manual_seed(1)
    router = LinearRouter(D, E, K, score="sigmoid", renormalize=True, scale=2.5, n_group=2, topk_group=1, bias=True)
    x = _given()[0]
    got, want = layer.router(x), router(x)
    assert torch.equal(got.topk_weights_TK, want.topk_weights_TK) and torch.equal(got.topk_ids_TK, want.topk_ids_TK)
    torch.testing.assert_close(got.topk_weights_TK.sum(dim=1), torch.full((T,), 2.5))


def test_options_beside_a_router_module_are_refused():
    with pytest.raises(ConfigError) as error:
        _layer(GivenRouter(E, K), LocalTransport(), renormalize=True)
    assert error.value.field == "renormalize"
    with pytest.raises(TypeError, match="renormalise"):
        _layer("softmax", LocalTransport(), renormalise=True)


def test_a_gated_shared_expert():
    torch.manual_seed(0)
    shared = SharedExpert(D, F, gated=True)
    x = _given()[0]
    gate, up = shared.up(x).chunk(2, dim=1)
    want = torch.sigmoid(x @ shared.gate.weight.T) * shared.down(torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(shared(x), want)
    layer = MoELayer(D, F, E, K, shared_expert=shared)
    without = MoELayer(D, F, E, K, router=layer.router, experts=layer.experts)
    torch.testing.assert_close(layer(x), without(x) + want)


def test_decisions_carry_the_logits():
    router = LinearRouter(D, E, K)
    x = _given()[0]
    logits = router(x).logits_TE
    torch.testing.assert_close(logits, x @ router.weight.T)
    logits.sum().backward()
    assert router.weight.grad is not None


def test_the_pooled_loss_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    routers = [LinearRouter(D, E, K, dtype=torch.float64) for _ in range(3)]
    xs = [torch.randn(T, D, dtype=torch.float64) for _ in routers]
    mask = torch.arange(T) % 5 > 0
    for token_mask in (None, mask):
        decisions = [router(x, token_mask=token_mask) for router, x in zip(routers, xs, strict=True)]
        loss = pooled_balancing_loss(
            [one.logits_TE for one in decisions], [one.tokens_per_expert_E for one in decisions], token_mask=token_mask
        )
        attention = None if token_mask is None else token_mask[None].long()
        plain = tuple(x @ router.weight.T for router, x in zip(routers, xs, strict=True))
        want = theirs(plain, E, K, attention)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0, check_dtype=False)  # theirs is float32
        parameters = [router.weight for router in routers]
        got, wanted = torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_the_pooled_loss_of_one_layer_is_k_times_the_micro_loss():
    decision = LinearRouter(D, E, K)(_given()[0])
    pooled = pooled_balancing_loss([decision.logits_TE], [decision.tokens_per_expert_E])
    micro = load_balancing_loss(decision.logits_TE.softmax(dim=1), decision.tokens_per_expert_E)
    torch.testing.assert_close(pooled, K * micro)


@pytest.mark.parametrize("logits", [[], [torch.ones(3, E), torch.ones(4, E)], [torch.ones(3, E)]])
def test_layers_that_do_not_go_together_are_refused(logits):
    with pytest.raises(ConfigError):
        pooled_balancing_loss(logits, [torch.ones(E)] * 2)
