"""The checkpoint modes without a wrapper: same bits, one recompute, nothing sent twice, the planned order."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import set_checkpoint_early_stop

from moe_overlap import ConfigError
from tests.parallel.expected import WORLD, single_process, unwrapped
from tests.parallel.model import EXPERTS, MODES, PLANS, Model, bare, loss_of
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits


def check_same(results, wanted):
    for got, want in zip(results, wanted, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            same_bits(got[name], want[name])


@pytest.mark.parametrize(("times", "batches"), [(1, 1), (2, 2)], ids=["once", "twice_and_accumulated"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_bits_of_none(mode, plan, times, batches):
    """Also where the blocks are used twice in one forward, and two micro-batches accumulate."""
    results = gloo_pool(WORLD).run(bare, mode, times, batches, {"plan": plan})
    check_same(results, unwrapped(times, batches, plan))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_the_run_they_are_compared_with_is_right(plan, times):
    results, whole = unwrapped(times, plan=plan), single_process(times)
    assert results[0].keys() == whole.keys()
    for name in whole:
        parts = [one[name] for one in results]
        close(torch.cat(parts) if name.endswith(EXPERTS) else sum(parts) / WORLD, whole[name])


@pytest.mark.parametrize("mode", MODES)
def test_blocks_used_twice_side_by_side(mode):
    """The second use goes backward first, as a whole: on every rank, whatever is ready earlier."""
    joined = gloo_pool(WORLD).run(bare, "none", 1, 1, {"branches": True, "overlap": False})
    check_same(gloo_pool(WORLD).run(bare, mode, 1, 1, {"branches": True}), joined)


def test_checkpointed_ops_inside_a_checkpointed_block():
    check_same(gloo_pool(WORLD).run(bare, "nested", 1, 1, {}), unwrapped())


def to_the_end(mode):
    with set_checkpoint_early_stop(False):
        return bare(mode, 1, 1, {})


def offloaded(mode, plan):
    with torch.autograd.graph.save_on_cpu():
        return bare(mode, 1, 1, {"plan": plan})


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputes_that_run_to_the_end(mode):
    check_same(gloo_pool(WORLD).run(to_the_end, mode), unwrapped())


@pytest.mark.parametrize("plan", ["by_hand", "deduplicated"])
@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_that_are_kept_elsewhere(mode, plan):
    check_same(gloo_pool(WORLD).run(offloaded, mode, plan), unwrapped(plan=plan))


def reentrant(offload):
    model = Model(dist.group.WORLD, "reentrant")
    loss = loss_of(model, dist.get_rank())
    with torch.autograd.graph.save_on_cpu() if offload else nullcontext():
        with pytest.raises(ConfigError, match="use_reentrant=False") as caught:
            loss.backward()
    return caught.value.field


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "with_saved_tensor_hooks"])
def test_a_reentrant_checkpoint_is_refused_on_every_rank(offload):
    assert gloo_pool(WORLD).run(reentrant, offload) == ["checkpoint"] * WORLD
