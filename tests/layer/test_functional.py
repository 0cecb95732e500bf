"""The functional form: right against the oracle, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from moe_overlap import ConfigError
from moe_overlap.layer.functional import moe_forward
from tests import oracle
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.strategies import make_routing
from tests.tolerances import close


@pytest.mark.parametrize("kind", ["uniform", "with_unused", "one_expert", "nobody"])
@pytest.mark.parametrize("world", [1, 2])
def test_moe_forward_is_the_oracle(world, kind):
    layer = make()

    def rank(me):
        ids, weights = make_routing(kind, 11, E, K, seed=me.rank, dtype=torch.float64)
        x, weights = tokens(11, me.rank).requires_grad_(), weights.requires_grad_()
        local = E // world
        own = [
            w.detach()[me.rank * local : (me.rank + 1) * local].clone().requires_grad_() for w in layer.expert_weights
        ]
        y = moe_forward(x, ids, weights, *own, transport=me.transport(), schedule="chunked(2)")
        want = oracle.moe(x, ids, weights, *layer.expert_weights)
        close(y, want)
        for g, w in zip(
            torch.autograd.grad(y.sum(), [x, weights]), torch.autograd.grad(want.sum(), [x, weights]), strict=True
        ):
            close(g, w)

    virtual_world(world).run(rank)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("topk_ids", {"ids": torch.full((4, K), E)}),
        ("topk_ids", {"ids": torch.full((4, K), -2)}),
        ("topk_ids", {"ids": torch.full((4, K), 2**32)}),
        ("topk_ids", {"ids": torch.zeros(4, K)}),
        ("topk_ids", {"ids": torch.zeros(4, dtype=torch.int64)}),
        ("topk_ids", {"ids": torch.zeros(4, K, dtype=torch.int64, device="meta")}),
        ("topk_weights", {"weights": torch.ones(4, K, device="meta")}),
        ("topk_weights", {"weights": None}),
        ("x", {"x": torch.zeros((), dtype=torch.float64)}),
        ("down_proj", {"w_out": torch.zeros(E // 2, D, F)}),
        ("topk_weights", {"weights": torch.ones(4, K + 1)}),
        ("x.shape[-1]", {"x": torch.zeros(4, D + 1, dtype=torch.float64)}),
        ("x.dtype", {"x": torch.zeros(4, D)}),
        ("gate_up_proj", {"w_in": torch.zeros(E, F, D, dtype=torch.float64)}),
    ],
)
def test_moe_forward_refuses_on_all_ranks(field, change):
    def rank(me):
        local = E // 2
        arguments = {
            "x": tokens(4),
            "ids": torch.zeros(4, K, dtype=torch.int64),
            "weights": torch.ones(4, K),
            "w_in": torch.zeros(local, 2 * F, D, dtype=torch.float64),
            "w_out": torch.zeros(local, D, F, dtype=torch.float64),
        }
        good, transport = dict(arguments), me.transport()
        if me.rank == 1:
            bad = {k: v[:local] if k == "w_in" else v for k, v in change.items()}
            arguments |= bad
        with pytest.raises(ConfigError) as caught:
            moe_forward(*arguments.values(), transport=transport)
        assert caught.value.field == field
        assert transport.stats.exchanges == 0
        moe_forward(*good.values(), transport=transport)

    virtual_world(2).run(rank)


@pytest.mark.parametrize("tokens_in_batch", [1, 11])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_the_bits_are_the_same(tokens_in_batch, autocast):
    """Then operators skip autograd's Python (`one_rank`), of which nothing may be seen: also not by autocast."""
    weights = [weight.detach().float().requires_grad_() for weight in make().expert_weights]
    ids, routing = make_routing("with_unused", tokens_in_batch, E, K, seed=0, dtype=torch.float32)
    x = tokens(tokens_in_batch, 0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        want = moe_forward(x, ids, routing, *weights)
        with torch.no_grad():
            got = moe_forward(x, ids, routing, *weights)
        with torch.inference_mode():
            inferred = moe_forward(x, ids, routing, *weights)
    assert want.requires_grad and not got.requires_grad and inferred.is_inference()
    assert want.dtype == got.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(got, want) and torch.equal(inferred, want)


def test_a_functional_gradient_beside_no_grad():
    """What no_grad skips is there for torch.func."""
    weights = [weight.detach() for weight in make().expert_weights]
    ids, routing = make_routing("uniform", 5, E, K, seed=0, dtype=torch.float64)
    x = tokens(5, 0)

    def loss(x):
        return moe_forward(x, ids, routing, *weights).square().sum()

    want = torch.func.grad(loss)(x)
    with torch.no_grad():
        assert not moe_forward(x, ids, routing, *weights).requires_grad
    leaf = x.clone().requires_grad_()
    close(want, torch.autograd.grad(loss(leaf), leaf)[0])
