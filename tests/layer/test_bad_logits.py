"""What one rank's router cannot choose by, all ranks refuse, whichever the router, and nothing is sent; the next call
is sound."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moe_overlap import ConfigError, MoELayer
from moe_overlap.routing import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    LinearRouter,
    LocMoEPlusRouter,
    LocMoERouter,
    QuantileRouter,
    RecurrentRouter,
    SinkhornRouter,
    SmileRouter,
    SwitchRouter,
    VariableK,
)
from tests.ranks import virtual_world

D, F, E, NODES = 24, 8, 12, 2
RANKS, TOKENS, SPOILT = 4, (5, 0, 7, 1), 2
ROUTERS = {
    "linear": LinearRouter,
    "sigmoid, groups": partial(LinearRouter, score="sigmoid", bias=True, n_group=2, topk_group=1),
    "capacity": partial(LinearRouter, capacity_factor=1.0),
    "variable k": partial(LinearRouter, variable_k=VariableK(threshold=0.5)),
    "zero experts": partial(LinearRouter, zero_experts=2),
    "global balance": partial(LinearRouter, aux_loss_coef=0.1, balance="global"),
    "switch": SwitchRouter,
    "locmoe": partial(LocMoERouter, locality_bias=NODES),
    "locmoe, capped": partial(LocMoERouter, off_node_share=0.3),
    "locmoe+": partial(LocMoEPlusRouter, gate="linear"),
    "locmoe+ grap": LocMoEPlusRouter,
    "locmoe+ measured": partial(LocMoEPlusRouter, delta="max"),
    "smile": partial(SmileRouter, num_nodes=NODES),
    "smile, all ranks": partial(SmileRouter, num_nodes=NODES, balance="global"),
    "recurrent": partial(RecurrentRouter, router_size=6),
    "sinkhorn": SinkhornRouter,
    "base": BaseRouter,
    "quantile": QuantileRouter,
    "expert choice": partial(ExpertChoiceRouter, allow_noncausal=True),
}


def top_k_of(name):
    return 1 if name == "base" else 2


def made(name, me):
    torch.manual_seed(5)
    router = ROUTERS[name](D, E, top_k_of(name))
    return MoELayer(D, F, E, top_k_of(name), transport=me.transport(), router=router, ranks_per_node=RANKS // NODES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ROUTERS)
def test_bad_tokens_of_one_rank_are_refused_by_all(name, bad):
    def rank(me):
        layer = made(name, me)
        x_TD = torch.randn(TOKENS[me.rank], D, generator=torch.Generator().manual_seed(me.rank))
        spoilt_TD = x_TD.clone()
        if me.rank == SPOILT:
            spoilt_TD[3] = bad
        with pytest.raises(ConfigError) as caught:
            layer(spoilt_TD)
        assert caught.value.field == "logits" and f"refused on rank {SPOILT}" in str(caught.value)
        assert layer.transport.stats.payload_bytes == 0
        y = layer(x_TD)
        y = y[0] if isinstance(y, tuple) else y
        return y.isfinite().all() and y.shape == x_TD.shape

    assert all(virtual_world(RANKS).run(rank))


WRONG = {
    "another width": (torch.zeros(3, D + 1), "x.shape"),
    "integers": (torch.zeros(3, D, dtype=torch.int64), "x"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ROUTERS)
def test_and_so_is_what_is_no_token(name, case):
    def rank(me):
        layer = made(name, me)
        x_TD = WRONG[case][0] if me.rank == SPOILT else torch.randn(3, D)
        with pytest.raises(ConfigError) as caught:
            layer(x_TD)
        assert layer.transport.stats.payload_bytes == 0
        y = layer(torch.randn(2, D))
        return caught.value.field, (y[0] if isinstance(y, tuple) else y).shape == (2, D)

    fields = virtual_world(RANKS).run(rank)
    assert all(field.startswith(WRONG[case][1]) and sound for field, sound in fields)


def test_hash_ids_that_were_not_given_are_refused_by_all():
    """No logits there: the ids of another number of tokens."""

    def rank(me):
        layer = MoELayer(D, F, E, 2, transport=me.transport(), router=HashRouter(50, E, 2))
        layer.router.give(torch.arange(4 if me.rank == SPOILT else 3))
        with pytest.raises(ConfigError):
            layer(torch.randn(3, D))
        assert layer.transport.stats.payload_bytes == 0
        layer.router.give(torch.arange(3))
        return layer(torch.randn(3, D)).shape

    assert virtual_world(RANKS).run(rank) == [torch.Size([3, D])] * RANKS
