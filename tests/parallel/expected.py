"""What the gradients must be: those of a run with no checkpoint, no overlap and no wrapper; and of a single process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.parallel.model import EXPERTS, Model, joined, loss_of
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits

WORLD = 2
Gradients = dict[str, Tensor]


@lru_cache(maxsize=32)
def run_once(function: Callable[..., Any], *args: Any) -> list[Any]:
    """`gloo_pool(WORLD).run(function, *args)`, remembered: what other runs are compared with.

    Copied, as every tensor that came from a rank holds a file descriptor.
    """
    results = gloo_pool(WORLD).run(function, *args)
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, results)


def unwrapped(times: int = 1, batches: int = 1, plan: str = "by_hand") -> list[Gradients]:
    """Each rank's own gradients, with every exchange joined and no checkpoint."""
    return run_once(joined, times, batches, plan)


@lru_cache(maxsize=8)
def single_process(times: int = 1, batches: int = 1) -> Gradients:
    """One process with all experts: the gradient of the mean over the ranks of the ranks' losses."""
    model = Model(None, times=times)
    for batch in range(batches):
        (sum(loss_of(model, rank, batch) for rank in range(WORLD)) / WORLD).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_averaged(
    results: list[Gradients], times: int = 1, batches: int = 1, own: list[Gradients] | None = None
) -> None:
    """Assert that each rank has the averaged dense gradients and its own experts', bit for bit.

    With two ranks the sum does not depend on an order, and halving is exact; so bucketing may change no bit. `own`:
    each rank's own gradients, joined (None: those of the schedules written by hand).
    """
    own = unwrapped(times, batches) if own is None else own
    whole = single_process(times, batches)
    for name in whole:
        if name.endswith(EXPERTS):
            for got, want in zip(results, own, strict=True):
                same_bits(got[name], want[name])
            close(torch.cat([got[name] for got in results]), whole[name])
        else:
            for got in results:
                same_bits(got[name], (own[0][name] + own[1][name]) / WORLD)
                close(got[name], whole[name])
