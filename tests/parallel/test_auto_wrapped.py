"""schedule="auto" in every checkpoint mode, without a wrapper and under DDP, planned in the first step there.

What a calibration would measure is planted, so that chunks and overlap are chosen. As in every test of this room, what
ran is compared with what was planned, down to the order of the exchanges (`Seen.check`).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.auto.planted import FREE, cost_model, planted
from tests.parallel import test_ddp as ddp
from tests.parallel.expected import WORLD, check_averaged, run_once, single_process
from tests.parallel.model import AUTO, EXPERTS, MODES, Model, bare, train
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

OPS = {"backbone_s": (3e-7,) * 3, "backbone_backward_s": (6e-7,) * 3}
COSTS = {
    "rows": {"alpha_s": 5e-8},
    "experts": {"expert_s": 1e-6, "expert_dgrad_s": 2e-6, "experts": FREE, "experts_dgrad": FREE,
                "experts_wgrad": FREE},
}  # fmt: skip
ONCE = (1, 1)  # how often the blocks run in one forward, and micro-batches


@contextmanager
def planned_by(cost):
    """Every layer inside takes these costs, once for all its steps. No cache is shared with another test."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MOE_OVERLAP_CACHE_DIR=folder):
        with planted(cost_model(**OPS, **COSTS[cost])) as calibrations:
            yield
    assert len(calibrations) == 2, "once for each of the two layers"


def bare_auto(cost, mode, times, batches, overlap):
    with planned_by(cost):
        return bare(mode, times, batches, {"plan": AUTO, "overlap": overlap})


def ddp_auto(cost, mode, times, batches, options):
    with planned_by(cost):
        return ddp.run(mode, times, batches, options, plan=AUTO)


def joined(cost, times, batches):
    """Each rank's own gradients, with overlap off, no checkpoint and no wrapper."""
    return run_once(bare_auto, cost, "none", times, batches, False)


def chosen(cost):
    model = Model(dist.group.WORLD, plan=AUTO)
    with planned_by(cost):
        train(model, dist.get_rank())
    return [(pair.chunks, pair.by, pair.joined) for pair in (layer._last_step.pair for layer in model.layers)]


@pytest.mark.parametrize(("cost", "by"), [("rows", "tokens"), ("experts", "experts")])
def test_these_costs_make_both_layers_chunk_and_overlap(cost, by):
    for pairs in gloo_pool(WORLD).run(chosen, cost):
        assert all(chunks > 1 and not joined for chunks, _, joined in pairs), pairs
        assert by in {each for _, each, _ in pairs}, pairs


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_bits_of_none_joined(mode, cost):
    for got, want in zip(gloo_pool(WORLD).run(bare_auto, cost, mode, *ONCE, True), joined(cost, *ONCE), strict=True):
        assert got.keys() == want.keys()
        for name in want:
            same_bits(got[name], want[name])


@pytest.mark.parametrize("cost", COSTS)
def test_the_runs_they_are_compared_with_are_those_of_one_process(cost):
    results, whole = joined(cost, *ONCE), single_process()
    for name in whole:
        parts = [one[name] for one in results]
        close(sum(parts) / WORLD if not name.endswith(EXPERTS) else torch.cat(parts), whole[name])


@pytest.mark.parametrize(
    ("cost", "times", "batches"),
    [("rows", 1, 1), ("experts", 1, 1), ("rows", 2, 1), ("experts", 1, 2)],
    ids=["rows", "experts", "twice", "accumulated"],
)
@pytest.mark.parametrize("options", ddp.OPTIONS.values(), ids=ddp.OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_ddp(mode, options, cost, times, batches):
    """Also where the blocks are used twice in one forward, and where a micro-batch under no_sync comes first."""
    results = gloo_pool(WORLD).run(ddp_auto, cost, mode, times, batches, options)
    check_averaged(results, times, batches, joined(cost, times, batches))
