"""Weights before the experts: against transformers' Llama4, on one rank and on two, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_overlap import ConfigError, PlanMismatch, moe_forward
from moe_overlap.transport.local import LocalTransport
from tests.ranks import virtual_world

D, F, E, T = 12, 8, 4, 18


def _inputs(k, rank=0, ranks=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, D, generator=generator)
    ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :k]
    weights = torch.rand(T, k, generator=generator)
    w_in, w_out = (0.2 * torch.randn(shape, generator=generator) for shape in ((E, 2 * F, D), (E, D, F)))
    held = slice(rank * E // ranks, (rank + 1) * E // ranks)
    mine = [value.tensor_split(ranks)[rank].clone() for value in (x, ids, weights)]
    return *mine, w_in[held].clone(), w_out[held].clone()


def _step(k, transport, schedule="serial"):
    x, ids, weights, w_in, w_out = _inputs(k, transport.rank, transport.world_size)
    leaves = [value.requires_grad_() for value in (x, weights, w_in, w_out)]
    y = moe_forward(x, ids, weights, w_in, w_out, weights_at="input", schedule=schedule, transport=transport)
    y.sin().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("k", [1, 2])
def test_llama4(k):
    modeling = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    experts = modeling.Llama4TextExperts(
        SimpleNamespace(num_local_experts=E, intermediate_size=F, hidden_size=D, hidden_act="silu")
    )
    x, ids, weights, w_in, w_out = _inputs(k)
    with torch.no_grad():
        experts.gate_up_proj.copy_(w_in.transpose(1, 2))
        experts.down_proj.copy_(w_out.transpose(1, 2))
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    scores = torch.zeros(T, E).scatter(1, ids, weights)  # as Llama4's block has them: 0 where an expert is not chosen
    rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
    y = experts(rows).reshape(E, T, D).sum(dim=0)
    y.sin().sum().backward()
    want = [y.detach(), *(leaf.grad for leaf in leaves), experts.gate_up_proj.grad.transpose(1, 2),
            experts.down_proj.grad.transpose(1, 2)]  # fmt: skip
    for one, other in zip(_step(k, LocalTransport()), want, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_two_ranks(schedule):
    ranks = zip(*virtual_world(2).run(lambda me: _step(2, me.transport(), schedule)), strict=True)
    for got, want in zip(ranks, _step(2, LocalTransport()), strict=True):
        torch.testing.assert_close(torch.cat(list(got)), want, rtol=1e-5, atol=1e-5)


def test_ranks_that_weigh_in_other_places_are_told_so():
    def step(me):
        transport = me.transport()
        x, ids, weights, w_in, w_out = _inputs(1, me.rank, 2)
        given = {"transport": transport, "weights_at": ("output", "input")[me.rank]}
        with pytest.raises(PlanMismatch, match="weights_at: output and input"):
            moe_forward(x, ids, weights, w_in, w_out, **given)
        transport.reopen()
        moe_forward(x, ids, weights, w_in, w_out, transport=transport)

    virtual_world(2).run(step)


def test_a_transport_is_for_one_of_the_two():
    def step(me):
        x, ids, weights, w_in, w_out = _inputs(1, me.rank, 2)
        given = {"transport": me.transport()}
        moe_forward(x, ids, weights, w_in, w_out, **given)
        with pytest.raises(ConfigError, match="header"):
            moe_forward(x, ids, weights, w_in, w_out, weights_at="input", **given)

    virtual_world(2).run(step)


def test_a_mask_and_unused_ids():
    x, ids, weights, w_in, w_out = _inputs(2)
    whole = moe_forward(x, ids, weights, w_in, w_out, weights_at="input")
    mask = torch.arange(T) != 5
    masked = moe_forward(x, ids, weights, w_in, w_out, weights_at="input", token_mask=mask)
    assert not masked[5].any() and torch.allclose(masked[mask], whole[mask], atol=1e-6)
    some = moe_forward(x, ids.masked_fill(~mask[:, None], E), weights, w_in, w_out, weights_at="input", unused_id=E)
    assert torch.equal(some, masked)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("weights_at", {"weights_at": "middle"}),
        ("zero_experts", {"weights_at": "input", "zero_experts": 1}),
        ("topk_weights", {"weights_at": "input", "topk_weights_TK": torch.ones(T, 3)}),
        ("topk_ids", {"weights_at": "input", "topk_ids_TK": torch.zeros(T, dtype=torch.int64)}),
        ("x", {"weights_at": "input", "hidden_TD": None}),
    ],
)
def test_what_does_not_fit_is_refused(field, options):
    names = ("hidden_TD", "topk_ids_TK", "topk_weights_TK", "gate_up_proj", "down_proj")
    with pytest.raises(ConfigError) as error:
        moe_forward(**(dict(zip(names, _inputs(2), strict=True)) | options))
    assert error.value.field == field
