"""torchtitan's MoE layer on this library, against the layer as it is.

`make test` installs torchtitan, without its dependencies for data and logging: pip install --no-deps torchtitan==0.3.0,
pip install spmd_types==0.2.3 tyro.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError
from moe_overlap.integrations import torchtitan as ours
from tests.ranks import virtual_world
from tests.test_docs import blocks, promised, run

REASON = "pip install --no-deps torchtitan==0.3.0 && pip install spmd_types==0.2.3 tyro"
theirs = pytest.importorskip("torchtitan.models.common.moe", reason=REASON)
Linear = pytest.importorskip("torchtitan.models.common.linear").Linear
Dispatcher = pytest.importorskip("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "torchtitan.md").read_text()
D, F, E, K, B, L = 16, 32, 4, 2, 2, 12


def _block(dtype=torch.bfloat16):
    config = theirs.MoE.Config(
        num_experts=E,
        routed_experts=theirs.RoutedExperts.Config(
            inner_experts=theirs.GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=Dispatcher.Config(num_experts=E, top_k=K),
        ),
        router=theirs.TokenChoiceTopKRouter.Config(
            num_experts=E, top_k=K, gate=Linear.Config(in_features=D, out_features=E), route_norm=True
        ),
    )
    block = theirs.MoE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return block.to(dtype)


def _x(dtype=torch.bfloat16):
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def _step(block, x):
    x = x.requires_grad_()
    y = block(x)
    y.float().sin().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: one.grad for name, one in block.named_parameters()}}


def _distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_one_rank_is_no_further_from_float32_than_torchtitan():
    """Its experts take bfloat16 whatever they are given, so the exact figures come from this library in float32."""
    exact = _step(ours.use(_block(torch.float32)), _x(torch.float32))
    want, got = _step(_block(), _x()), _step(ours.use(_block()), _x())
    assert got.keys() == want.keys() == exact.keys() and len(want) == 6
    for name, value in got.items():
        assert _distance(value, exact[name]) <= 1.2 * _distance(want[name], exact[name]) + 1e-3, name


def test_float32_is_the_formula():
    block = _block(torch.float32)
    inner, x = block.routed_experts.inner_experts, _x(torch.float32)
    scores, ids, _ = block.router(x, block.expert_bias_E)
    want = torch.zeros(B, L, D)
    for expert in range(E):
        h = nn.functional.silu(x @ inner.w1_EFD[expert].T) * (x @ inner.w3_EFD[expert].T)
        want += ((ids == expert) * scores).sum(dim=-1, keepdim=True) * (h @ inner.w2_EDF[expert].T)
    torch.testing.assert_close(ours.use(block)(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["serial", "chunked(2)"])
def test_two_ranks_are_one(schedule):
    want = _step(ours.use(_block(torch.float32)), _x(torch.float32))

    def step(me):
        block = _block(torch.float32)
        inner = block.routed_experts.inner_experts
        for name in ours.WEIGHTS:
            mine = getattr(inner, name).detach().chunk(2)[me.rank].clone()
            setattr(inner, name, nn.Parameter(mine))
        ours.use(block, transport=me.transport(), schedule=schedule)
        return _step(block, _x(torch.float32)[me.rank : me.rank + 1].clone())

    first, second = virtual_world(2).run(step)
    for name, value in want.items():
        both = (first[name], second[name])
        joined = sum(both) if "router" in name else torch.cat(both)
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-5)


def test_names_of_parameters_stay():
    block = _block()
    names = list(block.state_dict())
    assert list(ours.use(copy.deepcopy(block)).state_dict()) == names
    assert "routed_experts.inner_experts.w1_EFD" in names


def test_what_it_cannot_run_is_refused_and_left_alone():
    class Rounded(theirs.GroupedExperts):
        """Another matmul, as torchtitan's converters make it."""

    block = _block()
    whole = nn.Sequential(_block(), block)
    inner = Rounded(theirs.GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E))
    block.routed_experts.inner_experts = inner
    with pytest.raises(ConfigError, match="inner_experts"):
        ours.use(whole)
    assert all(isinstance(one.routed_experts, theirs.RoutedExperts) for one in whole)
    with pytest.raises(ConfigError, match="model"):
        ours.use(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="schedule"):
        ours.use(_block(), schedule="fast")


def test_the_program_of_the_page(tmp_path, capsys):
    (program,) = blocks(PAGE, "python")
    run(program, tmp_path)
    assert capsys.readouterr().out.splitlines() == promised(program) != []
