"""`PlannedSchedule` from outside: which steps share a plan, how many plans are kept, chunks by groups of experts."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.auto import planned as planning
from moe_overlap.auto.planned import PlannedSchedule
from tests.auto.planted import FREE, cost_model, exchange, line

ROW_BYTES = 128


def planned(model, **options):
    return PlannedSchedule(model=model, row_bytes=ROW_BYTES, **{"num_ops": 0, **options})


def step(pairs, **options):
    """An agreed step in which pairs[w][v] rows go from each block of rank w to the experts of rank v."""
    rows = np.array(pairs)
    counts = np.repeat(rows[:, None, :], BLOCKS, axis=1)  # one expert a rank
    return exchange(counts, **options)


# ---------------------------------------------------------------- what a step is known by


STAYING, LEAVING = step([[64, 0], [0, 64]]), step([[0, 64], [64, 0]])


@pytest.mark.parametrize("steps", [(STAYING, LEAVING), (LEAVING, STAYING)], ids=["staying_first", "leaving_first"])
def test_steps_with_the_same_rows_and_other_bytes_are_planned_apart(steps):
    """All rows stay where they are in the one, all leave in the other."""
    schedule = planned(cost_model())
    chunks = {id(one): schedule.pair_for(one).chunks for one in steps}
    assert chunks[id(STAYING)] == 1 < chunks[id(LEAVING)]
    found = schedule.planned(STAYING).windows["forward"], schedule.planned(LEAVING).windows["forward"]
    assert [window.chunking(1, "tokens").first_s[0] > 0 for window in found] == [False, True]


# 60 rows of each block for the experts of rank 0, 45 of them from other ranks; 15 on a rank at most, or 45.
SPREAD = step([[15, 0, 0, 0]] * 4)
CROWDED = step([[15, 0, 0, 0], [45, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("steps", [(SPREAD, CROWDED), (CROWDED, SPREAD)], ids=["spread_first", "crowded_first"])
def test_steps_with_the_same_rows_and_bytes_and_other_tokens_are_planned_apart(steps):
    """Of the busiest rank: what it permutes, and what its ops beside the exchanges take, grows with its tokens."""
    model = cost_model(2, permute=line(1e-8), measured_rows=float(15 * BLOCKS))
    schedule = planned(model, num_ops=2)
    windows = {id(one): schedule.planned(one).windows["forward"] for one in steps}
    spread, crowded = windows[id(SPREAD)], windows[id(CROWDED)]
    assert spread.chunking(1, "tokens") == crowded.chunking(1, "tokens")
    assert crowded.head_s == pytest.approx(3 * spread.head_s, rel=0.2)
    assert crowded.ops_s == pytest.approx([3 * seconds for seconds in spread.ops_s], rel=0.2)


def test_steps_whose_experts_share_the_rows_otherwise_are_planned_apart():
    """Each rank's first expert has most of its rows, or as many as the others."""
    schedule = planned(cost_model())
    even, crowded = (exchange(np.tile(np.array(of_expert), (2, BLOCKS, 2))) for of_expert in ([9] * 4, [24, 4, 4, 4]))
    parts = [schedule.planned(one).windows["forward"].chunking(2, "experts").experts_s for one in (even, crowded)]
    assert parts[0][0] == pytest.approx(parts[0][1]) and parts[1][0] > 2 * parts[1][1] > 0
    assert sum(parts[0]) == pytest.approx(sum(parts[1])), "the same rows"


def test_the_tally_has_steps_and_searches_and_not_who_only_asks():
    schedule = planned(cost_model())
    for one in (STAYING, LEAVING, STAYING, STAYING):
        schedule.pair_for(one)
    schedule.planned(LEAVING)
    assert (schedule.tally["steps"], schedule.tally["searched"]) == (4, 2)


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False)], ids=str)
def test_a_step_with_gradients_and_one_without_are_planned_apart(order):
    schedule = planned(cost_model())
    for grad in order:
        found = schedule.planned(exchange(grad=grad))
        assert set(found.windows) == set(found.candidates) == ({"forward", "backward"} if grad else {"forward"})


def test_the_digest_knows_the_budget():
    budgets = (None, 1 << 20, 1 << 21)
    assert len({planned(cost_model(), max_in_flight_bytes=budget).digest for budget in budgets}) == len(budgets)


# ---------------------------------------------------------------- how many plans are kept


def test_only_so_many_plans_are_kept(monkeypatch):
    """Of a router that never settles each step is of another kind. What was dropped is planned again, and alike."""
    monkeypatch.setattr(planning, "REMEMBERED", 3)
    schedule = planned(cost_model(alpha_s=2e-6))
    kinds = [exchange(rows=1 << power) for power in range(8)]
    kept = [weakref.ref(schedule.planned(one)) for one in kinds]
    pairs = [schedule.pair_for(one) for one in kinds[-3:]]
    gc.collect()
    assert sum(plan() is not None for plan in kept) == 3
    assert all(plan() is schedule.planned(one) for plan, one in zip(kept[-3:], kinds[-3:], strict=True)), (
        "the last ones"
    )
    assert [planned(schedule.model).pair_for(one) for one in kinds[-3:]] == pairs
    assert schedule.pair_for(kinds[0]) == planned(schedule.model).pair_for(kinds[0])


# ---------------------------------------------------------------- experts that each cost


EACH_EXPERT = cost_model(expert_s=2e-5, expert_dgrad_s=4e-5, experts=FREE, experts_dgrad=FREE, experts_wgrad=FREE)
"""Nothing but an expert's own cost: chunks of tokens pay it again for each chunk."""


def test_each_expert_counts_in_every_chunk_of_tokens_and_once_in_groups():
    """Four experts a rank."""
    found = planned(EACH_EXPERT).planned(exchange()).windows
    for phase, expert_s in (("forward", 2e-5), ("backward", 4e-5)):
        for chunks in (1, 2, 4, 8, 16):
            assert found[phase].chunking(chunks, "tokens").experts_s == pytest.approx((4 * expert_s,) * chunks)
        for groups in (2, 4):
            assert found[phase].chunking(groups, "experts").experts_s == pytest.approx(
                (4 / groups * expert_s,) * groups
            )


def test_chunks_by_groups_of_experts_are_chosen_where_each_expert_costs():
    """The exchanges take as long as the experts: worth hiding, and tokens in chunks would double what is to hide it."""
    agreed = exchange(rows=12)
    pair = planned(EACH_EXPERT).pair_for(agreed)
    assert (pair.by, pair.backward_by, pair.joined) == ("experts", "experts", False)
    assert pair.chunks > 1 and pair.backward_chunks > 1
    by_rows = replace(EACH_EXPERT, expert_s=0.0, expert_dgrad_s=0.0, experts=line(1e-7), experts_dgrad=line(2e-7))
    assert planned(by_rows).pair_for(agreed).by == "tokens", "where only rows cost, tokens can be cut finer"


def test_a_rank_with_one_expert_has_no_groups():
    found = planned(EACH_EXPERT).planned(exchange(slots=2)).windows["forward"]
    assert {chunking.by for chunking in found.chunkings} == {"tokens"}
