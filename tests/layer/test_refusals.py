"""What a layer refuses: on one rank, on all ranks alike, and how it goes on afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_overlap import ConfigError, MoELayer, PlanMismatch
from moe_overlap.routing.linear import LinearRouter
from moe_overlap.schedule.builders import window
from tests.layers import D, E, F, K, make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 9}),
        ("hidden_size", {"hidden_size": 0}),
        ("ffn_hidden_size", {"ffn_hidden_size": -1}),
        ("activation", {"activation": "tanh"}),
        ("chunks", {"schedule": "chunked(17)"}),
        ("chunks", {"schedule": "chunked(0)"}),
        ("schedule", {"schedule": "fast"}),
        ("schedule", {"schedule": "shared_expert"}),
        ("bad_logits", {"bad_logits": "ignore"}),
        ("capacity_factor", {"capacity_factor": -1.0}),
        ("router", {"router": "argmax"}),
        ("schedule", {"schedule": 3}),
        ("schedule", {"schedule": window(2, 1)}),
        ("num_experts", {"num_experts": 8.0}),
        ("num_experts", {"num_experts": 0}),
        ("top_k", {"top_k": 1.5}),
        ("top_k", {"top_k": True}),
        ("top_k", {"top_k": 9, "router": LinearRouter(D, E, K)}),
        ("top_k", {"top_k": 1, "router": LinearRouter(D, E, K)}),
        ("num_experts", {"router": LinearRouter(D, 2 * E, K)}),
        ("shared_expert_size", {"shared_expert_size": 0}),
        ("capacity_factor", {"capacity_factor": "1"}),
        ("aux_loss_coef", {"aux_loss_coef": "x"}),
        ("dtype", {"dtype": torch.int32}),
    ],
)
def test_bad_construction_names_the_field(field, options):
    arguments = {"hidden_size": D, "ffn_hidden_size": F, "num_experts": E, "top_k": K} | options
    with pytest.raises(ConfigError) as caught:
        MoELayer(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("topk_ids", lambda r: replace(r, topk_ids_TK=r.topk_ids_TK.long())),
        ("topk_ids", lambda r: replace(r, topk_ids_TK=r.topk_ids_TK[1:])),
        ("topk_ids", lambda r: replace(r, topk_ids_TK=r.topk_ids_TK + E)),
        ("topk_weights", lambda r: replace(r, topk_weights_TK=r.topk_weights_TK[:, 1:])),
        ("topk_weights", lambda r: replace(r, topk_weights_TK=r.topk_weights_TK.bfloat16())),
        ("topk_weights", lambda r: replace(r, topk_weights_TK=r.topk_weights_TK.to("meta"))),
    ],
)
def test_a_router_whose_choice_does_not_fit_is_refused_before_anything_is_sent(field, change):
    class Odd(LinearRouter):
        def forward(self, x_TD, **kwargs):
            decision = super().forward(x_TD, **kwargs)
            return change(decision) if x_TD.shape[0] == 5 else decision

    def rank(me):
        layer = make(me.transport(), router=Odd(D, E, K, dtype=torch.float64))
        with pytest.raises(ConfigError) as caught:
            layer(tokens(5 if me.rank == 1 else 4))
        assert caught.value.field == field
        assert layer.transport.stats.exchanges == 0
        layer(tokens(4))

    virtual_world(2).run(rank)


def test_on_one_rank_auto_is_serial():
    layer = make(schedule="auto")
    assert replace(layer.schedule, name="serial") == make(schedule="serial").schedule
    assert "one rank exchanges nothing" in layer.explain()


def test_a_mode_that_does_not_exist():
    with pytest.raises(ConfigError, match="mode"):
        make(mode="both")


def bad_calls():
    good = tokens(5)
    nan = good.clone()
    nan[2, 0] = float("nan")
    return {
        "hidden": ("x.shape[-1]", torch.randn(5, D + 1, dtype=torch.float64)),
        "dtype": ("x.dtype", good.float()),
        "device": ("x.device", good.to("meta")),
        "list": ("x", good.tolist()),
        "nan": ("logits", nan),
    }


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
@pytest.mark.parametrize("kind", ["hidden", "dtype", "device", "list", "nan"])
def test_a_refusal_of_one_rank_is_raised_by_all_and_the_layer_stays_usable(kind, schedule):
    field, bad = bad_calls()[kind]

    def rank(me):
        layer = make(me.transport(), schedule=schedule)
        before = layer(tokens(5, me.rank)).detach()
        with pytest.raises(ConfigError) as caught:
            layer(bad if me.rank == 1 else tokens(5, me.rank))
        assert caught.value.field == field, caught.value
        assert me.rank == 1 or "rank 1" in str(caught.value)
        exchanges = layer.transport.stats.exchanges
        same_bits(layer(tokens(5, me.rank)).detach(), before)
        return exchanges, layer.transport.stats.exchanges

    for refused, after in virtual_world(3 if E % 3 == 0 else 2).run(rank):
        assert after == 2 * refused, "the refused step sent nothing"


@pytest.mark.parametrize("kind", ["hidden", "dtype", "device", "list", "nan"])
def test_a_refusal_on_one_rank_alone(kind):
    field, bad = bad_calls()[kind]
    for layer in (make(), make(schedule="chunked(2)")):
        with pytest.raises(ConfigError) as caught:
            layer(bad)
        assert caught.value.field == field


def test_minus_infinity_rows_are_dropped_on_request():
    layer = make(bad_logits="drop")
    x = tokens(5)
    x[1] = float("nan")
    x[1:2].nan_to_num_(nan=float("nan"))
    y = layer(x)
    assert torch.isfinite(y[[0, 2, 3, 4]]).all() and not y[1].any()
    assert layer.stats().dropped_tokens == K


def test_a_failing_router_is_a_refusal_too():
    class Broken(LinearRouter):
        def forward(self, x_TD, **kwargs):
            if x_TD.shape[0] == 3:
                raise KeyError("broken")
            return super().forward(x_TD, **kwargs)

    def rank(me):
        layer = make(me.transport(), router=Broken(D, E, K, dtype=torch.float64))
        with pytest.raises(KeyError if me.rank == 0 else ConfigError):
            layer(tokens(3 if me.rank == 0 else 4))
        layer(tokens(4))

    virtual_world(2).run(rank)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chunks", {"schedule": "chunked(2)"}),
        ("chunk_by", {"schedule": "chunked(4,experts)"}),
        ("header", {"activation": "relu"}),
        ("config_digest", {"bad_logits": "drop"}),
        ("schedule_digest", {"schedule": "shared_expert(0)", "shared_expert_size": F}),
        ("dtype", {"dtype": torch.float32}),
    ],
)
def test_ranks_that_differ_raise_plan_mismatch_before_any_payload(name, change):
    def rank(me):
        options = {"schedule": "chunked(4)"}
        if name == "schedule_digest":
            options = {"schedule": "shared_expert(1)", "shared_expert_size": F}
        layer = make(me.transport(), **options | (change if me.rank == 1 else {}))
        with pytest.raises(PlanMismatch, match="another configuration" if name in ("header", "dtype") else name):
            layer(tokens(5, dtype=layer.experts.down_proj.dtype))
        return layer.transport.stats.payload_bytes

    assert virtual_world(2).run(rank) == [0, 0]


def test_mixed_grad_enabled_is_a_mismatch():
    def rank(me):
        layer = make(me.transport())
        with torch.set_grad_enabled(me.rank == 0), pytest.raises(PlanMismatch, match="grad_enabled"):
            layer(tokens(5))

    virtual_world(2).run(rank)
