"""EPLB's and SYMI's algorithms: published examples, and compiled as in Python."""

from itertools import permutations

import numpy as np
import pytest

from moe_overlap.native import native
from moe_overlap.placement import packing

# github.com/deepseek-ai/EPLB, README: 2 layers, 12 experts in 4 groups, 16 slots on 8 ranks of 2 nodes.
README = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
README_MAP = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


@pytest.mark.parametrize("layer", [0, 1])
def test_eplb_s_example(layer):
    load = [float(one) for one in README[layer]]
    one = packing.eplb_reference(load, [2] * 8, [], nodes=2, groups=4, distinct=False)
    assert one == README_MAP[layer]
    assert packing.eplb([load], [2] * 8, [], nodes=2, groups=4, distinct=False) == [one]


def test_tensorrt_llm_s_example():
    load = [100.0, 80, 20, 20, 10, 10, 10, 10]
    found = packing.eplb([load], [3] * 4, [], nodes=1, groups=1, distinct=False)[0]
    count = np.bincount(found)
    assert count.tolist() == [3, 3, 1, 1, 1, 1, 1, 1]
    of_rank = (np.array(load)[found] / count[found]).reshape(4, 3).sum(axis=1)
    assert of_rank.max() == pytest.approx(70.0) and of_rank.max() / of_rank.mean() - 1 == pytest.approx(0.077, abs=1e-3)


@pytest.mark.skipif(native.planner() is None, reason="no compiled part")
@pytest.mark.parametrize("seed", range(40))
def test_compiled_is_the_reference(seed):
    rng = np.random.default_rng(seed)
    experts, ranks = int(rng.integers(1, 20)), int(rng.integers(1, 7))
    load = rng.integers(0, [3, 1000][seed % 2], experts).astype(float).tolist()  # ties, too
    slots = rng.integers(0, 5, ranks)
    slots[rng.integers(ranks)] += max(0, experts - int(slots.sum()))
    room, homes = slots.tolist(), []
    if seed % 3 == 0:  # homes that have room
        homes = rng.permutation(np.repeat(np.arange(ranks), slots))[:experts].tolist()
    distinct = bool(seed % 2)
    assert packing.eplb([load], room, homes, nodes=1, groups=1, distinct=distinct) == [
        packing.eplb_reference(load, room, homes, nodes=1, groups=1, distinct=distinct)
    ]
    for contiguous in (False, True):
        assert packing.proportional([load], room, homes, contiguous=contiguous) == [
            packing.proportional_reference(load, room, homes, contiguous=contiguous)
        ]
    cost = rng.integers(-9, 9, (min(experts, 5), min(experts, 5) + seed % 3))
    found = packing.assign(cost)
    assert len(set(found)) == len(found) == len(cost) and packing.assign_reference(cost) == found
    rows, columns = range(len(cost)), range(cost.shape[1])
    sums = (sum(int(cost[r, c]) for r, c in enumerate(order)) for order in permutations(columns, len(cost)))
    assert sum(int(cost[r, found[r]]) for r in rows) == min(sums)


def drops(every, walk, cap):
    """Tokens beyond the capacity of an expert's slots, when slots follow the popularity of the step before."""
    dropped, count = 0, np.full(walk.shape[1], 4)
    for step, load in enumerate(walk):
        if every and step and step % every == 0:
            flat = packing.proportional([walk[step - 1].tolist()], [4] * 16, [], contiguous=True)[0]
            count = np.bincount(flat, minlength=len(load))
        dropped += np.maximum(load - count * cap, 0).sum()
    return dropped


@pytest.mark.parametrize("seed", [0, 1])
def test_symi_drops_the_less_the_more_often_it_places(seed):
    """16 experts in 64 slots of one 64th of the tokens each, popularity a random walk that is drawn to its mean."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((600, 16))
    for step in range(1, 600):
        logits[step] = 0.99 * logits[step - 1] + rng.normal(0, 0.1, 16)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    walk = np.floor(share * 65536)
    found = [drops(every, walk, 1024) for every in (0, 100, 50, 10, 1)]
    assert found == sorted(found, reverse=True) and len(set(found)) == 5
    assert found[-1] <= 0.7 * found[3] and found[-1] <= 0.4 * found[0]
