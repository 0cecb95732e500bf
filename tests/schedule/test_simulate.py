"""The event simulator: the compiled one gives the same doubles and the same error texts as the Python reference."""

from __future__ import annotations

import math
import random

import pytest

from moe_overlap.native import native
from moe_overlap.schedule.simulate import implementation, simulate, simulate_reference

Case = tuple[list[int], list[float], list[list[int]], dict[int, float]]
EXACT_CASES = 4000


def random_case(seed: int) -> Case:
    """A few lanes, dependencies mostly backward and sometimes forward (so that some cases deadlock)."""
    source = random.Random(seed)
    count = source.randrange(0, 40)
    lanes = [source.randrange(1 + seed % 4) for _ in range(count)]
    seconds = [source.choice([0.0, 1.0, source.random(), source.random() * 1e-6]) for _ in range(count)]
    forward = 0.05 if seed % 3 == 0 else 0.0
    deps = [
        [
            source.randrange(count if source.random() < forward else max(i, 1))
            for _ in range(source.randrange(4) if i else 0)
        ]
        for i in range(count)
    ]
    slowdown = {lane: source.choice([1.0, 1.25, 1.0 + source.random()]) for lane in range(3) if seed % 2}
    return lanes, seconds, deps, slowdown


def outcome(run: object, case: Case) -> object:
    try:
        return run(*case)  # type: ignore[operator]
    except ValueError as error:
        return str(error)


@pytest.fixture
def planner() -> object:
    module = native.planner()
    if module is None:
        pytest.skip(native.reason("planner"))
    return module


def test_compiled_equals_reference(planner):
    deadlocks = 0
    for seed in range(EXACT_CASES):
        case = random_case(seed)
        compiled, reference = outcome(planner.simulate, case), outcome(simulate_reference, case)
        assert compiled == reference, seed
        deadlocks += isinstance(reference, str)
    assert EXACT_CASES / 50 < deadlocks < EXACT_CASES / 2


def test_starts_are_as_early_as_allowed():
    for seed in range(500):
        lanes, seconds, deps, _ = random_case(seed)
        times = outcome(simulate, (lanes, seconds, deps, {}))
        if isinstance(times, str):
            assert times.startswith("deadlock: action ")
            continue
        for i, (start_s, end_s) in enumerate(times):
            before = [times[j][1] for j in range(i) if lanes[j] == lanes[i]]
            assert start_s == max([0.0, *before, *(times[d][1] for d in deps[i])])
            assert end_s == start_s + seconds[i]


def test_factors_of_one_change_no_double():
    for seed in range(500):
        lanes, seconds, deps, _ = random_case(seed)
        ones = dict.fromkeys(range(4), 1.0)
        for run in (simulate, simulate_reference):
            assert outcome(run, (lanes, seconds, deps, ones)) == outcome(run, (lanes, seconds, deps, {}))


@pytest.mark.parametrize(
    "slowdown, times",
    [
        # Lane 0 runs 1.5 s, lane 1 runs 2 s and then what needs both runs 1 s on lane 0.
        ({1: 2.0}, [(0.0, 2.75), (0.0, 1.5), (2.75, 3.75)]),  # 0.75 s of lane 1's work while lane 0 is busy
        ({0: 2.0}, [(0.0, 2.0), (0.0, 2.5), (2.5, 3.5)]),  # 1 s of lane 0's work in 2 s, the rest alone
        ({0: 2.0, 1: 4.0}, [(0.0, 4.25), (0.0, 3.0), (4.25, 5.25)]),
        ({0: 1.5, 1: 1.5, 7: 9.0}, [(0.0, 2.75), (0.0, 2.25), (2.75, 3.75)]),
    ],
)
def test_a_lane_is_slower_while_another_is_busy(slowdown, times):
    for run in (simulate, simulate_reference):
        assert run([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]], slowdown) == times


def test_slowed_work_is_conserved():
    """Each action takes between its duration and its duration times the factor; lanes stay in order."""
    for seed in range(1, 500, 2):
        lanes, seconds, deps, slowdown = case = random_case(seed)
        times = outcome(simulate, case)
        if isinstance(times, str):
            continue
        for i, (start_s, end_s) in enumerate(times):
            factor = slowdown.get(lanes[i], 1.0)
            assert seconds[i] - 1e-12 <= end_s - start_s <= factor * seconds[i] + 1e-12
            before = [times[j][1] for j in range(i) if lanes[j] == lanes[i]]
            assert start_s == max([0.0, *before, *(times[d][1] for d in deps[i])])


@pytest.mark.parametrize("exchange_s, expert_s", [(1.0, 0.25), (1.0, 1.0), (1.0, 3.0), (0.5, 0.125)])
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_equal_chunks_follow_the_closed_form(chunks, exchange_s, expert_s):
    """T(r) = max{2ra, 2a + re, (r+1)a + e}; the numbers are dyadic, so equality is exact."""
    compute, wire = 0, 1
    lanes = [wire] * chunks + [compute] * chunks + [wire] * chunks
    seconds = [exchange_s] * chunks + [expert_s] * chunks + [exchange_s] * chunks
    deps = [[] for _ in range(chunks)] + [[c] for c in range(2 * chunks)]
    end_s = max(end for _, end in simulate(lanes, seconds, deps))
    r, a, e = chunks, exchange_s, expert_s
    assert end_s == max(2 * r * a, 2 * a + r * e, (r + 1) * a + e)


@pytest.mark.parametrize(
    "case, text",
    [
        (([0, 0], [1.0, 1.0], [[1], []]), "deadlock: action 0 (lane 0) never starts, it waits for action 1"),
        (
            ([0, 5, 7], [1.0, 1.0, 1.0], [[], [2], [1]]),
            "deadlock: action 1 (lane 5) never starts, it waits for action 2",
        ),
        (([3], [1.0], [[0]]), "deadlock: action 0 (lane 3) never starts, it waits for action 0"),
        (([0, 0], [1.0], [[], []]), "one entry for each action, got 2, 1 and 2"),
        (([0], [math.nan], [[]]), "duration_s of action 0: expected a finite number of seconds >= 0"),
        (([0], [-0.5], [[]]), "duration_s of action 0: expected a finite number of seconds >= 0"),
        (([0, 1], [1.0, 1.0], [[], [2]]), "action 1 depends on action 2: expected 0 to 1"),
        (([0], [1.0], [[]], {3: 0.5}), "slowdown of lane 3: expected a finite factor >= 1"),
        (([0], [1.0], [[]], {0: math.inf}), "slowdown of lane 0: expected a finite factor >= 1"),
        (([0, 0], [1.0, 1.0], [[1], []], {0: 2.0}), "deadlock: action 0 (lane 0) never starts, it waits for action 1"),
    ],
)
def test_refusals_name_the_action(case, text):
    for run in (simulate, simulate_reference):
        with pytest.raises(ValueError) as caught:
            run(*case)
        assert text in str(caught.value)


def test_says_which_one_runs(monkeypatch):
    loaded = native.part("planner").loaded
    assert implementation()[0] == ("cpp" if loaded else "reference")

    absent = native.NativePart("planner", False, None, "left out for this test")
    monkeypatch.setattr(native, "_load_planner", lambda: (None, absent))
    assert implementation() == ("reference", "left out for this test")
    assert simulate([1, 0, 0], [2.0, 1.5, 1.0], [[], [], [0]]) == [(0.0, 2.0), (0.0, 1.5), (2.0, 3.0)]
