"""The formulas: their limits, and the closed forms against the exact event simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moe_overlap.measure import overlap as formulas
from moe_overlap.planning.explain import bound_s
from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.builders import chunked, window
from moe_overlap.schedule.check import makespan_s

TIMES = (0.3, 1.0, 2.7)


def test_overlap_eff_is_zero_for_serial_one_for_free_and_negative_when_it_hurts():
    assert formulas.overlap_eff(10.0, 10.0, 4.0) == 0.0
    assert formulas.overlap_eff(4.0, 10.0, 4.0) == 1.0
    assert formulas.overlap_eff(7.0, 10.0, 4.0) == pytest.approx(0.5)
    assert formulas.overlap_eff(13.0, 10.0, 4.0) == pytest.approx(-0.5)
    assert formulas.overlap_eff(4.0, 4.0, 4.0) is None, "nothing to hide"


def test_inflated_baselines_are_found_on_both_sides():
    assert not formulas.is_inflated(100.0, 40.0, 60.0)
    assert not formulas.is_inflated(100.0, 40.0, 55.5)
    assert formulas.is_inflated(100.0, 40.0, 54.0), "serial took longer than its parts"
    assert formulas.is_inflated(100.0, 40.0, 66.0)
    assert formulas.is_inflated(float("nan"), 40.0, 60.0)


def test_share_and_headroom():
    assert formulas.comm_share(10.0, 4.0) == pytest.approx(0.6)
    assert formulas.headroom(6.0, 4.0) == pytest.approx(10 / 6)
    assert formulas.headroom(0.0, 0.0) is None


@pytest.mark.parametrize("chunks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("a", "e"), list(itertools.product(TIMES, TIMES)))
def test_chunked_forward_is_the_simulated_time(chunks, a, e):
    simulated = makespan_s(chunked(chunks).forward, {"D": a, "C": a, "E": e})
    assert formulas.chunked_forward(chunks, a, e) == pytest.approx(simulated)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize(("a", "d", "w"), list(itertools.product(TIMES, TIMES, TIMES)))
def test_chunked_backward_is_a_lower_bound_of_the_simulated_time(chunks, a, d, w):
    simulated = makespan_s(chunked(chunks).backward, {"Ct": a, "Dt": a, "Ed": d, "Ew": chunks * w})
    assert formulas.chunked_backward(chunks, a, d, w) <= simulated + 1e-12


@pytest.mark.parametrize(("a", "c", "e"), list(itertools.product(TIMES, TIMES, TIMES)))
def test_no_slot_beats_the_shortcut_bound_and_one_slot_reaches_it_with_fine_ops(a, c, e):
    ops, n = 0.01, 300
    times = {"D0": a, "C0": c, "E0": e, "B": ops}
    bound = formulas.shortcut_bound(e, n * ops, a, c)
    best = min(makespan_s(window(n, slot).forward, times) for slot in range(0, n + 1, 5))
    assert bound - 1e-9 <= best <= bound + 6 * ops


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize(("a", "e"), list(itertools.product(TIMES, TIMES)))
@pytest.mark.parametrize("ops", [(0.5,), (1.0, 2.0, 0.2)])
def test_a_cut_window_reaches_no_less_than_its_bound_and_may_beat_that_of_one_chunk(chunks, a, e, ops):
    bound = formulas.cut_bound(e + sum(ops), 2 * a, chunks, None, alone=False)
    assert bound <= formulas.shortcut_bound(e, sum(ops), a, a) + 1e-12
    cut = Chunking(chunks=chunks, by="tokens", first_s=(a / chunks,) * chunks, second_s=(a / chunks,) * chunks,
                   experts_s=(e / chunks,) * chunks)  # fmt: skip
    problem = Window(phase="forward", head_s=0.0, tail_s=0.0, ops_s=ops, chunkings=(cut,))
    assert bound <= bound_s(problem, cut) + 1e-12, "layer.explain() knows more of the chunks"
    best_s = search(problem)[0].predicted_s
    assert best_s >= bound - 1e-12
    if (a, e, ops) == (2.7, 2.7, (0.5,)):
        assert best_s < formulas.shortcut_bound(e, sum(ops), a, a), "no bound for this one"


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize(("a", "e"), list(itertools.product(TIMES, TIMES)))
def test_no_pipeline_beats_the_bound_of_a_cut(chunks, a, e):
    """Forward alone, then with a backward of other chunks: also where chunks cost more than their share."""
    for dearer in (1.0, 1.3):
        each = {"D": dearer * a / chunks, "C": dearer * a / chunks, "E": dearer * e / chunks}
        forward = makespan_s(chunked(chunks).forward, each)
        assert formulas.cut_bound(e, 2 * a, chunks, None, alone=True) <= forward + 1e-12
        for back in (1, 4):
            each = {"Ct": dearer * a / back, "Dt": dearer * a / back, "Ed": dearer * e / back, "Ew": e}
            step = forward + makespan_s(chunked(back).backward, each)
            assert formulas.cut_bound(3 * e, 4 * a, chunks, back, alone=True) <= step + 1e-12


def test_percentiles_are_numpys():
    values = list(np.random.default_rng(0).normal(size=23))
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert formulas.percentile(values, q) == pytest.approx(np.quantile(values, q))
    assert formulas.median([3.0]) == 3.0


def test_noisy_means_p90_over_p10_above_1_3():
    assert not formulas.is_noisy([1.0] * 19 + [5.0])
    assert formulas.is_noisy([1.0] * 5 + [1.4] * 5)
