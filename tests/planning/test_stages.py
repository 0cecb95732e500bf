"""EPS-MoE's rule for the number of stages: its closed form, and what it loses against the search."""

from __future__ import annotations

import math
import random

import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.planning.search import search
from moe_overlap.planning.stages import eps_stages
from moe_overlap.planning.window import Chunking, Window

LOCAL = 12


def test_it_is_the_best_divisor_by_the_papers_formula():
    chance = random.Random(1)
    many = set()
    for _ in range(2000):
        comm, comp, k = chance.random(), chance.random(), 10 ** chance.uniform(-4, 0)
        local = chance.choice((1, 4, 7, 12, 16))
        best = math.sqrt(min(comm, comp) / k)
        found = eps_stages(comm, comp, k, local_experts=local)
        many.add(found)
        assert local % found == 0
        divisors = [n for n in range(1, local + 1) if local % n == 0]
        near = [
            max((n for n in divisors if n <= best), default=1),
            min((n for n in divisors if n >= best), default=local),
        ]
        assert found == 1 or found in near
    assert many >= {1, 2, 4, 7, 16}


def test_one_stage_where_nothing_is_gained():
    assert eps_stages(0.0, 1.0, 0.0, local_experts=8) == 1
    assert eps_stages(1.0, 1.0, 1.0, local_experts=8) == 1
    assert eps_stages(1.0, 1.0, 0.01, 0.9, local_experts=8) == 1
    assert eps_stages(1.0, 1.0, 1.0 / 16, local_experts=8) == 4


@pytest.mark.parametrize(
    "given", [{"comm_s": -1.0}, {"comp_s": math.inf}, {"stage_s": "1"}, {"fixed_s": math.nan}, {"local_experts": 0}]
)
def test_bad_input(given):
    usual = {"comm_s": 1.0, "comp_s": 1.0, "stage_s": 0.1, "fixed_s": 0.0, "local_experts": 4}
    with pytest.raises(ConfigError, match=next(iter(given))):
        eps_stages(**(usual | given))


def cut(comm_s: float, comp_s: float, stage_s: float, stages: int) -> Chunking:
    """Each exchange and each group of experts costs half of stage_s by itself: a stage more on either lane costs k."""
    one_way_s = (comm_s / 2 / stages + stage_s / 2,) * stages
    return Chunking(chunks=stages, by="experts", first_s=one_way_s, second_s=one_way_s,
                    experts_s=(comp_s / stages + stage_s,) * stages)  # fmt: skip


def test_its_regret_against_the_search():
    """The figures of docs/schedules.md: the mean and the largest share that the rule's choice is slower."""
    chance = random.Random(2)
    regrets = []
    for _ in range(2000):
        comm, comp, k = chance.random(), chance.random(), 10 ** chance.uniform(-4, -1)
        cuts = tuple(cut(comm, comp, k, n) for n in range(1, LOCAL + 1) if LOCAL % n == 0)
        window = Window(phase="forward", head_s=0.0, tail_s=0.0, chunkings=cuts)
        found = {c.chunks: c.predicted_s for c in reversed(search(window)) if not c.joined or c.chunks == 1}
        chosen = found[eps_stages(comm, comp, k, local_experts=LOCAL)]
        regrets.append(chosen / min(found.values()) - 1)
    assert min(regrets) >= 0.0
    assert sum(regrets) / len(regrets) == pytest.approx(0.013, abs=5e-4)
    assert max(regrets) == pytest.approx(0.30, abs=5e-3)
    assert sum(regret < 1e-9 for regret in regrets) / len(regrets) == pytest.approx(0.61, abs=5e-3)
