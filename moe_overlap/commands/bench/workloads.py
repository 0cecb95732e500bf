"""The public workloads of `bench balance`: who wants which expert, as pure functions of name, seed and step.

Popularity is permuted over the experts by the seed: with contiguous Zipf all hot experts would share a rank, which any
reshuffling cures. All ranks' tokens follow the same popularity. A token's k experts are distinct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_overlap.commands.bench.routing import read_file
from moe_overlap.errors import ConfigError

HOT_SHARE = 0.5  # of all tokens: those that want the hot expert, or one of the hot node's
DRIFT_STEPS = 100  # steps until the popularity of `drifting` is another permutation's


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """tokens: of one rank, in one step."""

    ranks: int
    ranks_per_node: int
    tokens: int
    experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`claim`: what a figure on it may be said to show. popularity: (sizes, seed, step) -> float64 [E], sums to 1; None
    where tokens are not drawn."""

    name: str
    claim: str
    popularity: Callable[[Sizes, int, int], np.ndarray] | None


def _zipf(exponent: float) -> Callable[[Sizes, int, int], np.ndarray]:
    def popularity(sizes: Sizes, seed: int, step: int) -> np.ndarray:
        weights = np.arange(1, sizes.experts + 1, dtype=np.float64) ** -exponent
        return _permuted(weights / weights.sum(), seed)

    return popularity


def _permuted(popularity_E: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).permutation(popularity_E)


def _hot_expert(sizes: Sizes, seed: int, step: int) -> np.ndarray:
    """A share HOT_SHARE of the tokens wants one expert, the other choices are even: of top_k choices HOT_SHARE is its
    part of the first."""
    hot = HOT_SHARE / sizes.top_k
    rest = (1.0 - hot) / max(1, sizes.experts - 1)
    return _permuted(np.array([hot, *[rest] * (sizes.experts - 1)]), seed)


def _hot_node(sizes: Sizes, seed: int, step: int) -> np.ndarray:
    """The experts whose homes are on one node have HOT_SHARE more than their part."""
    nodes = sizes.ranks // sizes.ranks_per_node
    node_E = np.arange(sizes.experts) * nodes // sizes.experts
    hot = int(np.random.default_rng([seed, 2]).integers(nodes))
    even = np.full(sizes.experts, (1.0 - HOT_SHARE) / sizes.experts)
    even[node_E == hot] += HOT_SHARE / (node_E == hot).sum()
    return even


def _drifting(sizes: Sizes, seed: int, step: int) -> np.ndarray:
    """Zipf 1.0 that goes over from one permutation to the next in DRIFT_STEPS steps."""
    epoch, within = divmod(step, DRIFT_STEPS)
    zipf = _zipf(1.0)
    part = within / DRIFT_STEPS
    return (1.0 - part) * zipf(sizes, seed + epoch, 0) + part * zipf(sizes, seed + epoch + 1, 0)


def _flipping(sizes: Sizes, seed: int, step: int) -> np.ndarray:
    """Zipf 1.0 of one permutation in even steps and of another in odd ones."""
    return _zipf(1.0)(sizes, seed + step % 2, 0)


WORKLOADS = {
    one.name: one
    for one in (
        Workload(name="balanced", claim="what balancing costs where there is nothing to win", popularity=None),
        Workload(name="zipf0.6", claim="mild skew, as a trained router with a balance loss has", popularity=_zipf(0.6)),
        Workload(name="zipf1.0", claim="the skew of FlexMoE's and FasterMoE's figures", popularity=_zipf(1.0)),
        Workload(name="zipf1.5", claim="heavy skew: a few experts have most tokens", popularity=_zipf(1.5)),
        Workload(name="one_hot_expert", claim="one expert alone is the limit: copies of it help, moves do not",
                 popularity=_hot_expert),
        Workload(name="one_hot_node", claim="one node's ports are the limit, not one rank's compute",
                 popularity=_hot_node),
        Workload(name="drifting", claim="a placement grows old: how well a controller or a rule follows",
                 popularity=_drifting),
        Workload(name="flipping", claim="a forecast from the last step is wrong in every step", popularity=_flipping),
        Workload(name="recorded", claim="a router's own choices on text, nothing drawn", popularity=None),
    )
}  # fmt: skip


def choices(
    name: str, sizes: Sizes, *, seed: int, step: int, rank: int, recorded: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 [T, k], weights float32 [T, k]) of one rank's tokens. ConfigError for a name that is none, or for
    "recorded" without a file (`moe-overlap train --save-routing`)."""
    if name not in WORKLOADS:
        raise ConfigError("workload", name, f"one of {', '.join(WORKLOADS)}")
    if not 1 <= sizes.top_k <= sizes.experts:
        raise ConfigError("top_k", sizes.top_k, f"an integer from 1 to the number of experts ({sizes.experts})")
    even = torch.full((sizes.tokens, sizes.top_k), 1.0 / sizes.top_k)
    if name == "recorded":
        if recorded is None:
            raise ConfigError("--recorded", None, "a routing file (moe-overlap train --save-routing FILE writes one)")
        file = read_file(recorded, experts=sizes.experts, top_k=sizes.top_k)
        return file.of_rank(rank, sizes.ranks, tokens=sizes.tokens, top_k=sizes.top_k)
    popularity = WORKLOADS[name].popularity
    if popularity is None:
        first_T = rank + torch.arange(sizes.tokens) * sizes.top_k
        return ((first_T[:, None] + torch.arange(sizes.top_k)) % sizes.experts).to(torch.int32), even
    rng = np.random.default_rng([seed, 3, step, rank])
    ids = _distinct(popularity(sizes, seed, step), sizes, rng)
    return torch.from_numpy(ids.astype(np.int32)), even


def _distinct(popularity_E: np.ndarray, sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """int64 [T, k]: drawn one after the other without repetition (Gumbel top-k)."""
    with np.errstate(divide="ignore"):
        log_E = np.log(popularity_E)
    keys_TE = log_E + rng.gumbel(size=(sizes.tokens, sizes.experts))
    return np.argsort(-keys_TE, axis=1, kind="stable")[:, : sizes.top_k]


def counts_of(name: str, sizes: Sizes, *, seed: int, step: int, recorded: Path | None = None) -> np.ndarray:
    """int64 [W, E]: rows of each rank's tokens for each expert."""
    found = np.zeros((sizes.ranks, sizes.experts), dtype=np.int64)
    for rank in range(sizes.ranks):
        ids_TK, _ = choices(name, sizes, seed=seed, step=step, rank=rank, recorded=recorded)
        used = ids_TK[ids_TK >= 0].numpy()
        found[rank] = np.bincount(used, minlength=sizes.experts)
    return found


def imbalance(counts_WE: np.ndarray, homes: np.ndarray) -> float:
    """Rows of the fullest rank over the mean, where expert e is computed on rank homes[e] alone."""
    loads = np.bincount(homes, weights=counts_WE.sum(axis=0), minlength=len(counts_WE))
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0
