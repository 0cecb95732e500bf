"""What a layer leaves out, on every path of a call: padding, slots that a token does not take, masked experts, and
zero-computation experts, which are never sent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, MoELayer, aux_loss, moe_forward
from moe_overlap.routing import LinearRouter, VariableK
from tests import oracle
from tests.layer.contract import MODULES, PATHS, gradients, on
from tests.layers import D, E, F, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

K, Z = 4, 3


class Allocator(nn.Module):
    """From 0 to K experts, by the tokens."""

    def forward(self, x_TD):
        return (x_TD[:, 0] * 7).abs().long() % (K + 1)


def router(*, masked=(), **options):
    one = LinearRouter(D, E, K, dtype=torch.float64, **options)
    nn.init.normal_(one.weight, std=0.3)
    one.mask_experts(masked)
    return one


ROUTERS = {
    "threshold": lambda: router(variable_k=VariableK(threshold=0.4)),
    "allocator": lambda: router(variable_k=VariableK(allocator=Allocator()), score="sigmoid", renormalize=True),
    "masked": lambda: router(masked=(0, 3, 6)),
    "zero": lambda: router(zero_experts=Z),
    "all": lambda: router(masked=(2, E), zero_experts=Z, variable_k=VariableK(threshold=0.4), renormalize=True),
}


def expected(make_router, x_TD, w_in, w_out, given):
    """The layer by hand: the router, whose own tests say that it is right, and the dense oracle."""
    torch.manual_seed(5)
    by_hand = make_router()
    decision = by_hand(x_TD, **given)
    zero_TK = decision.topk_ids_TK >= E
    y_TD = oracle.moe(x_TD, decision.topk_ids_TK.masked_fill(zero_TK, -1), decision.topk_weights_TK, w_in, w_out)
    weights_T1 = torch.where(zero_TK, decision.topk_weights_TK, 0).sum(dim=1, keepdim=True)
    return by_hand, decision, y_TD + weights_T1 * x_TD


def rows_sent(ids_TK, rank, ranks, deduplicated):
    there_TK = torch.where((ids_TK < 0) | (ids_TK >= E), rank, ids_TK // (E // ranks))
    if not deduplicated:
        return int((there_TK != rank).sum())
    return sum(len({*row} - {rank}) for row in there_TK.tolist())


def x_of(rank):
    return tokens(24 + 5 * rank, seed=rank).requires_grad_()


def given_of(x, padded):
    return {"token_mask": torch.arange(len(x)) % 4 > 0} if padded else {}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROUTERS)
def test_values_gradients_and_bytes_on_every_path(name, path, padded):
    def rank(call):
        me = 0 if call.transport is None else call.transport.rank
        x = x_of(me)
        y = call(x, **given_of(x, padded))
        sent = 0 if call.transport is None else call.transport.stats.payload_bytes
        grads = torch.autograd.grad(call.routed(x, y).square().sum(), [x, call.layer.router.weight, *call.weights])
        return call.routed(x, y).detach(), sent, grads, [weight.detach() for weight in call.weights]

    if path == "early block" and name in ("zero", "all"):
        # Whose experts read another state than its router: which of the two to give back is not said.
        with pytest.raises(NotImplementedError, match="zero-computation experts"):
            on(path, rank, make_router=ROUTERS[name], top_k=K)
        return
    results = on(path, rank, make_router=ROUTERS[name], top_k=K)
    w_in, w_out = (torch.cat([result[3][i] for result in results]).requires_grad_() for i in range(2))
    total, wanted, rows = torch.zeros((), dtype=torch.float64), [], 0
    for me, (y, _, _, _) in enumerate(results):
        x = x_of(me)
        by_hand, decision, want = expected(ROUTERS[name], x, w_in, w_out, given_of(x, padded))
        close(y, want.detach())
        rows += rows_sent(decision.topk_ids_TK, me, len(results), path.startswith("deduplicated"))
        total = total + want.square().sum()
        wanted += [x, by_hand.weight]
        assert (decision.topk_ids_TK < 0).any() or not (padded or "threshold" in name or "allocator" in name)
    # Each rank sends what is its own to the others, and back what is theirs; float64.
    assert all(sent == rows * D * 8 for _, sent, _, _ in results) and (rows > 0) == (len(results) > 1)
    *both, dw_in, dw_out = torch.autograd.grad(total, [*wanted, w_in, w_out])
    for me, (_, _, grads, weights) in enumerate(results):
        local = slice(me * len(weights[0]), (me + 1) * len(weights[0]))
        for got, want in zip(grads, (both[2 * me], both[2 * me + 1], dw_in[local], dw_out[local]), strict=True):
            close(got, want)


@pytest.mark.parametrize("path", PATHS)
def test_padding_changes_nothing_whatever_it_holds(path):
    """The same layer on the tokens alone."""

    def rank(call):
        real = tokens(11).requires_grad_()
        mask = torch.tensor([True, False] * 11 + [False])
        x = torch.full((23, D), float("nan"), dtype=torch.float64).masked_scatter(mask[:, None], real)
        alone = call(real)
        before = 0 if call.transport is None else call.transport.stats.payload_bytes
        want = gradients(call, alone.square().sum() + (aux_loss(call.layer) if path in MODULES else 0), real)
        middle = 0 if call.transport is None else call.transport.stats.payload_bytes
        y = call(x, token_mask=mask)
        after = 0 if call.transport is None else call.transport.stats.payload_bytes
        close(y[mask].detach(), alone.detach())
        assert after - middle == before
        if not path.endswith("block"):
            assert not y[~mask].any()
        if path in MODULES:
            assert int(call.layer.stats().tokens_per_expert.sum()) == 11 * K * (1 if call.transport is None else 2)
        got = gradients(call, y[mask].square().sum() + (aux_loss(call.layer) if path in MODULES else 0), real)
        for ours, theirs in zip(got, want, strict=True):
            close(ours, theirs)

    options = {"aux_loss_coef": 0.3, "z_loss_coef": 0.1} if path in MODULES else {}
    on(path, rank, make_router=lambda: router(**options), top_k=K)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_a_mask_of_the_shape_of_x_or_of_its_tokens(shape):
    torch.manual_seed(0)
    layer = MoELayer(D, F, E, K, dtype=torch.float64)
    x, mask = tokens(12).reshape(*shape, D), torch.arange(12).reshape(shape) % 3 > 0
    want = layer(x.reshape(-1, D), token_mask=mask.reshape(-1))
    for one in (mask, mask.reshape(-1)):
        same_bits(layer(x, token_mask=one).reshape(-1, D).detach(), want.detach())
    same_bits(layer(x, token_mask=None).detach(), layer(x).detach())


def test_the_functional_form_has_a_mask_of_its_own():
    layer = MoELayer(D, F, E, K, dtype=torch.float64)
    x, mask = tokens(12), torch.arange(12) % 3 > 0
    decision = layer.router(x)
    ids, weights = decision.topk_ids_TK, decision.topk_weights_TK.detach().requires_grad_()
    y = moe_forward(x, ids, weights, *layer.expert_weights, token_mask=mask)
    same_bits(y.detach(), layer(x, token_mask=mask).detach())
    (dw,) = torch.autograd.grad(y.square().sum(), weights)
    assert not dw[~mask].any() and dw[mask].all()
    for field, options in (("token_mask", {"token_mask": mask[1:]}), ("zero_experts", {"zero_experts": -1}),
                           ("unused_id", {"zero_experts": 2, "unused_id": E + 1})):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            moe_forward(x, ids, weights, *layer.expert_weights, **options)
        assert caught.value.field == field
    with pytest.raises(ConfigError, match="topk_ids"):
        moe_forward(x, torch.full_like(ids, E + 2), weights, *layer.expert_weights, zero_experts=2)


# ---------------------------------------------------------------- every builder

SCHEDULES = ["serial", "chunked(3)", "chunked(2,experts)", "shared_expert", "shared_expert(1)"]


@pytest.mark.parametrize("nodes", ["one level", "hierarchical"])
@pytest.mark.parametrize("dedup", ["off", "on"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_builder_gives_the_same_bits_with_overlap_on_and_off(schedule, dedup, nodes):
    if nodes == "hierarchical" and dedup == "off":
        pytest.skip("refused by name")
    options = {"ranks_per_node": 2, "hierarchical": True} if nodes == "hierarchical" else {}
    shared = F if "shared" in schedule else None

    def rank(me):
        results = []
        for overlap in (True, False):
            torch.manual_seed(5)
            given = ROUTERS["all"]()
            torch.manual_seed(6)
            layer = MoELayer(D, F, E, K, transport=me.transport(), schedule=schedule, overlap=overlap, dedup=dedup,
                             router=given, shared_expert_size=shared, dtype=torch.float64, **options)  # fmt: skip
            x = x_of(me.rank) if me.rank < 3 else tokens(0).requires_grad_()
            y = layer(x, token_mask=torch.arange(len(x)) % 4 > 0)
            grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
            results.append([y.detach(), *grads])
        for on_, off in zip(*results, strict=True):
            same_bits(on_, off)
        extra = 0 if shared is None else layer.shared_expert(x).detach()
        return results[0][0] - extra, [weight.detach() for weight in layer.expert_weights]

    results = virtual_world(4).run(rank)
    w_in, w_out = (torch.cat([weights[i] for _, weights in results]) for i in range(2))
    for me, (y, _) in enumerate(results[:3]):
        x = x_of(me)
        close(y, expected(ROUTERS["all"], x, w_in, w_out, given_of(x, True))[2].detach())


def test_auto_probes_with_the_masks_of_the_call():
    def rank(me):
        torch.manual_seed(5)
        layer = MoELayer(D, F, E, K, transport=me.transport(), schedule="auto", router=ROUTERS["all"](),
                         dtype=torch.float64)  # fmt: skip
        x = x_of(me.rank).detach()
        x[::4] = float("nan")
        y = layer(x, token_mask=torch.arange(len(x)) % 4 > 0)
        return y.detach(), [weight.detach() for weight in layer.expert_weights]

    results = virtual_world(2).run(rank)
    w_in, w_out = (torch.cat([weights[i] for _, weights in results]) for i in range(2))
    for me, (y, _) in enumerate(results):
        x = x_of(me).detach()
        want = expected(ROUTERS["all"], x, w_in, w_out, given_of(x, True))[2]
        mask = given_of(x, True)["token_mask"]
        close(y[mask], want[mask].detach())
        assert not y[~mask].any()


@pytest.mark.parametrize("kind", ["shared", "latent", "autocast"])
def test_zero_experts_beside_other_parts(kind):
    """They return x itself, at its full width, beside a shared expert and latent experts; under autocast, its dtype."""
    options = {"shared": {"shared_expert_size": 8}, "latent": {"latent_size": 6}, "autocast": {}}[kind]
    dtype = torch.float32 if kind == "autocast" else torch.float64

    def layers(zero):
        torch.manual_seed(5)
        given = LinearRouter(D, E, K, zero_experts=zero, dtype=dtype)
        torch.manual_seed(6)
        return MoELayer(D, F, E, K, router=given, dtype=dtype, **options)

    layer = layers(Z)
    x = tokens(30).to(dtype)
    decision = layer.router(x)
    zero_TK = decision.topk_ids_TK >= E
    weights_T1 = torch.where(zero_TK, decision.topk_weights_TK, 0).sum(1, keepdim=True)
    assert zero_TK.any() and not zero_TK.all()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        y = layer(x)
        # Without them: a bias of the router takes them out of the sum, which is the routed part alone.
        routed = moe_forward(x, decision.topk_ids_TK, decision.topk_weights_TK, *layer.expert_weights, unused_id=None,
                             zero_experts=Z) if kind != "latent" else None  # fmt: skip
    if kind == "autocast":
        assert y.dtype == torch.bfloat16
        same_bits(y, routed)
        return
    if kind == "shared":
        close(y.detach(), (routed + layer.shared_expert(x)).detach())
        return
    inner = x @ layer.latent_in.weight.t()
    latent = moe_forward(inner, decision.topk_ids_TK.masked_fill(zero_TK, -1), decision.topk_weights_TK,
                         *layer.expert_weights)  # fmt: skip
    close(y.detach(), (latent @ layer.latent_out.weight.t() + weights_T1 * x).detach())


# ---------------------------------------------------------------- refused


class Plain(nn.Module):
    """A router that takes x and nothing else."""

    def __init__(self):
        super().__init__()
        self.inner = LinearRouter(D, E, K, dtype=torch.float64)

    def forward(self, x_TD):
        return self.inner(x_TD)


def spoilt(layer):
    layer.router.masked_experts_E = torch.arange(E) < E - K + 1


BAD = {
    "mask of another length": ("token_mask", {"token_mask": torch.ones(5, dtype=torch.bool)}, None),
    "mask of another dtype": ("token_mask", {"token_mask": torch.ones(6)}, None),
    "no mask": ("token_mask", {"token_mask": [True] * 6}, None),
    "an argument of no router": ("token_masks", {"token_masks": torch.ones(6, dtype=torch.bool)}, None),
    "too many masked": ("top_k", {}, spoilt),
}


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith("functional")])
@pytest.mark.parametrize("case", BAD)
def test_what_one_rank_is_given_wrong_all_refuse_and_nothing_is_sent(path, case):
    field, given, spoil = BAD[case]

    def rank(call):
        me = 0 if call.transport is None else call.transport.rank
        bad = call.transport is None or me == 1
        if bad and spoil is not None:
            spoil(call.layer)
        with pytest.raises(ConfigError) as caught:
            call(tokens(6), **(given if bad else {}))
        if bad:
            assert caught.value.field == field
        else:
            assert "refused on rank 1" in str(caught.value)
        assert call.transport is None or call.transport.stats.payload_bytes == 0
        call.layer.router.mask_experts([])
        assert call(tokens(6)).isfinite().all()

    on(path, rank, make_router=router, top_k=K)


def test_a_router_that_takes_no_mask_is_named():
    layer = MoELayer(D, F, E, K, router=Plain(), dtype=torch.float64)
    with pytest.raises(ConfigError, match="the forward of Plain does not take it") as caught:
        layer(tokens(6), token_mask=torch.ones(6, dtype=torch.bool))
    assert caught.value.field == "token_mask"
    assert layer(tokens(6), token_mask=None).isfinite().all()
