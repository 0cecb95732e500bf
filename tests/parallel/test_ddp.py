"""DistributedDataParallel around both kinds of layers, in every checkpoint mode.

The user's part: `prepare(model)` before wrapping. DDP then reduces the dense gradients only, and the
experts' gradients are scaled like the mean that DDP makes.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import ConfigError, prepare
from tests.parallel.expected import WORLD, check_averaged, unwrapped
from tests.parallel.model import MODES, Model, loss_of, train
from tests.ranks import gloo_pool

# A bucket of 0.001 MiB holds no weight of the model: every parameter is reduced alone, in the middle of backward.
OPTIONS = {
    "default": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "tiny_buckets": {"bucket_cap_mb": 0.001},
}


def run(mode, times, batches, options, plan="by_hand"):
    """Averaged gradients of one optimizer step over `batches` micro-batches."""
    model = Model(dist.group.WORLD, mode, times=times, plan=plan)
    if "find_unused_parameters" in options:
        model.unused = nn.Linear(3, 3, dtype=torch.float64)
    prepare(model)
    ddp = DistributedDataParallel(model, **options)
    if "static_graph" in options and batches > 1:
        # Torch itself fails where the first backward of a static graph is under no_sync, with dense models too.
        loss_of(ddp, dist.get_rank()).backward()
        ddp.zero_grad()
    return train(model, dist.get_rank(), call=ddp, batches=batches, unsynchronised=ddp.no_sync)


@pytest.mark.parametrize(("times", "batches"), [(1, 1), (2, 1), (1, 2)], ids=["once", "twice", "accumulated"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_averaged_gradients(mode, options, times, batches):
    """Also where the blocks are used twice in one forward, and where a micro-batch under no_sync comes first."""
    check_averaged(gloo_pool(WORLD).run(run, mode, times, batches, options), times, batches)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_averaged_gradients_where_rows_are_deduplicated(mode, batches):
    results = gloo_pool(WORLD).run(run, mode, 1, batches, OPTIONS["tiny_buckets"], "deduplicated")
    check_averaged(results, 1, batches, unwrapped(1, batches, "deduplicated"))


def reentrant():
    model = Model(dist.group.WORLD, "reentrant")
    prepare(model)
    loss = loss_of(DistributedDataParallel(model), dist.get_rank())
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        loss.backward()


def test_a_reentrant_checkpoint_is_refused():
    gloo_pool(WORLD).run(reentrant)
