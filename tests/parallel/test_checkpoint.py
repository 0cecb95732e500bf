"""The checkpoint modes without a wrapper: same bits, one recompute, nothing sent twice, the planned order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_overlap import ConfigError
from tests.parallel.expected import WORLD, single_process, unwrapped
from tests.parallel.model import EXPERTS, MODES, PLANS, Model, bare, loss_of
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits


@pytest.mark.parametrize(("times", "batches"), [(1, 1), (2, 2)], ids=["once", "twice_and_accumulated"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_bits_of_none(mode, plan, times, batches):
    """Also where the blocks are used twice in one forward, and two micro-batches accumulate."""
    results = gloo_pool(WORLD).run(bare, mode, plan, times, batches, True)
    for got, want in zip(results, unwrapped(times, batches, plan), strict=True):
        assert got.keys() == want.keys()
        for name in want:
            same_bits(got[name], want[name])


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_the_run_they_are_compared_with_is_right(plan, times):
    results, whole = unwrapped(times, plan=plan), single_process(times)
    assert results[0].keys() == whole.keys()
    for name in whole:
        parts = [one[name] for one in results]
        close(torch.cat(parts) if name.endswith(EXPERTS) else sum(parts) / WORLD, whole[name])


def reentrant():
    model = Model(dist.group.WORLD, "reentrant")
    loss = loss_of(model, dist.get_rank())
    with pytest.raises(ConfigError, match="use_reentrant=False") as caught:
        loss.backward()
    return caught.value.field


def test_a_reentrant_checkpoint_is_refused_on_every_rank():
    assert gloo_pool(WORLD).run(reentrant) == ["checkpoint"] * WORLD
