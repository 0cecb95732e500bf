"""Lower precision in every checkpoint mode: autocast, and FSDP2 with mixed precision and experts on an own mesh."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from moe_overlap import ConfigError, prepare
from tests.parallel.expected import WORLD, run_once
from tests.parallel.model import MODES, Model, gradients, tokens, watch
from tests.parallel.test_fsdp import has_own_meshes, shard
from tests.ranks import gloo_pool
from tests.tolerances import same_bits

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make(mode):
    model = Model(dist.group.WORLD, mode).float()
    prepare(model)
    return model


def train(model, *, autocast):
    """Gradients of one step on float32 tokens."""
    with watch(model) as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(tokens(dist.get_rank()).float())
        y.float().square().mean().backward()
    seen.check()
    assert y.dtype == torch.bfloat16
    return gradients(model)


def with_autocast(mode):
    return train(make(mode), autocast=True)


def with_mixed_precision(mode, unit):
    model = make(mode)
    shard(model, unit, "own_mesh", mp_policy=POLICY)
    return train(model, autocast=False)


def check_same(function, mode, *arguments):
    wanted = run_once(function, "none", *arguments)
    for got, want in zip(gloo_pool(WORLD).run(function, mode, *arguments), wanted, strict=True):
        for name in want:
            assert got[name].dtype == torch.float32
            same_bits(got[name], want[name])


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    check_same(with_autocast, mode)


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("mode", MODES)
def test_mixed_precision_of_fsdp(mode, unit):
    if not has_own_meshes():
        pytest.skip("this torch has one mesh per unit")
    check_same(with_mixed_precision, mode, unit)


def experts_that_fsdp_does_not_cast():
    model = make("none")
    shard(model, "block", "ignored", mp_policy=POLICY)
    with pytest.raises(ConfigError) as caught:
        model(tokens(dist.get_rank()).float())
    return caught.value.field


def test_ignored_experts_under_mixed_precision_are_refused_by_name():
    """FSDP casts the activations and not the ignored weights: the user has to choose one of the two dtypes."""
    assert gloo_pool(WORLD).run(experts_that_fsdp_does_not_cast) == ["x.dtype"] * WORLD
