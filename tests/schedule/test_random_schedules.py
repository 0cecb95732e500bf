"""Random schedules: followed row by row, refused when they are spoilt, and executed on virtual ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from moe_overlap import MoELayer, ShortcutBlock
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.builders import SchedulePair, serial, window
from moe_overlap.schedule.check import check
from moe_overlap.schedule.recorder import record
from tests.layers import Op
from tests.random_schedules import Wrong, follow, mutated, random_pair, random_shape
from tests.ranks import virtual_world
from tests.tolerances import close

D, F, E, K = 8, 12, 6, 3
TOKENS = (9, 6)
AT_ONCE = 1000


def valid(seed: int, count: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        pair = random_pair(chance, random_shape(chance, copies=True))
        check(pair)
        follow(pair)


def spoilt(seed: int, count: int) -> int:
    """How many of so many mutations are wrong: `check` refuses these, each of them, and no other."""
    chance = random.Random(seed)
    refused = 0
    for _ in range(count):
        pair = random_pair(chance, random_shape(chance, copies=True))
        half = chance.choice(("forward", "backward"))
        pair = replace(pair, **{half: mutated(chance, getattr(pair, half))})
        try:
            follow(pair)
            wrong = ""
        except Wrong as error:
            wrong = str(error)
        if wrong:
            refused += 1
            with pytest.raises(ConfigError):
                check(pair)
                pytest.fail(f"{pair.forward} / {pair.backward} ({pair.by}, {pair.backward_by}) passes, though {wrong}")
        else:
            check(pair)
    return refused


@pytest.mark.parametrize("seed", range(10))
def test_random_schedules_bring_every_row_through_its_expert_and_back(seed):
    valid(seed, AT_ONCE)


def test_spoilt_ones_are_refused_and_no_others():
    assert spoilt(100, 2 * AT_ONCE) > AT_ONCE


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
def test_100_000_random_schedules(seed):
    valid(seed, AT_ONCE)


@pytest.mark.soak
def test_10_000_spoilt_ones_are_refused():
    refused = sum(spoilt(seed, AT_ONCE) for seed in range(200, 215))
    assert refused >= 10_000


# ---------------------------------------------------------------- executed


def run(me, pair: SchedulePair, *, dedup: bool, shared: bool):
    """(executed compute actions of both phases, results) of one rank."""
    torch.manual_seed(3)
    plain = pair.num_ops > 0
    moe = MoELayer(D, F, E, K, transport=me.transport(), dtype=torch.float64, dedup="on" if dedup else "off",
                   shared_expert_size=F if shared else None, schedule="serial" if plain else pair)  # fmt: skip
    model = ShortcutBlock([Op(D) for _ in range(pair.num_ops)], moe, tap=0, schedule=pair) if plain else moe
    x = torch.randn(TOKENS[me.rank], D, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank))
    x.requires_grad_()
    with record() as events:
        y = model(x)
        y.square().sum().backward()
    order = [event.action for event in events if event.lane == "comp"]
    return order, {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@lru_cache(maxsize=16)
def usual(ops: int, dedup: bool, shared: bool):
    """The same model under the simplest schedule."""
    pair = window(ops, 0) if ops else serial(shared=shared)
    return [results for _, results in virtual_world(2).run(lambda me: run(me, pair, dedup=dedup, shared=shared))]


def execute(seed: int, count: int) -> None:
    chance = random.Random(seed)
    for number in range(count):
        shape = random_shape(chance, copies=False, most_chunks=4)
        pair = random_pair(chance, shape)
        want = usual(shape.ops, shape.dedup, shape.shared)
        options = {"dedup": shape.dedup, "shared": shape.shared}
        ranks = virtual_world(2, seed=number).run(lambda me, p=pair, o=options: run(me, p, **o))
        planned = [a.text for half in (pair.forward, pair.backward) for a in half if a.lane == "comp"]
        for (order, got), right in zip(ranks, want, strict=True):
            assert order == planned, (seed, number, pair.forward.text, pair.backward.text)
            assert got.keys() == right.keys()
            for name in got:
                close(got[name], right[name])


@pytest.mark.parametrize("seed", range(5))
def test_random_schedules_run_as_they_stand_and_give_the_usual_results(seed):
    execute(seed, 40)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1050))
def test_2_000_of_them(seed):
    execute(seed, 40)
