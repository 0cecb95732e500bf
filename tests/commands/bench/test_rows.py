"""Bounds of rows from measured terms, by hand: each phase by its own cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_overlap.commands.bench.rows import RowPlan, Terms, bound_s
from moe_overlap.commands.bench.wires import Exchanges
from moe_overlap.launch.launch import World
from moe_overlap.schedule.builders import chunked, deduplicate, shared_expert, shortcut

INFER = Terms(whole=20.0, experts=8.0, dgrad=0.0, wgrad=0.0, window=6.0, window_backward=0.0)
TRAIN = Terms(whole=70.0, experts=8.0, dgrad=9.0, wgrad=7.0, window=6.0, window_backward=12.0)


def exchanges(dispatch, combine, total=0.0):
    return Exchanges(dispatch_s=dispatch, combine_s=combine, agree_s=0.0, total_s=total, cpu_s=0.0, payload_bytes=0,
                     meta_bytes=0)  # fmt: skip


def row(pair, case="scmoe_pos2", schedule="auto"):
    return RowPlan(model=SimpleNamespace(case=case), schedule=schedule, pair=pair)


def bound(plan, phase, terms, found, *, nocomm=20.0, even=True):
    return bound_s(World(), plan, phase, terms, found, nocomm=nocomm, even=even)


@pytest.mark.parametrize(("dispatch", "combine", "expected"), [(5.0, 4.0, 6 + 8 + 9.0), (2.0, 1.0, 6 + 8 + 6.0)])
def test_one_chunk_in_a_window_of_ops(dispatch, combine, expected):
    """T_exp + max(ops, T_disp + T_comb) and what lies outside."""
    for schedule in ("auto", "mirrored", "shortcut"):
        assert bound(row(shortcut(2, 1), schedule=schedule), "infer", INFER, exchanges(dispatch, combine)) == expected


def test_one_chunk_in_training():
    outside = 70.0 - (8.0 + 9.0 + 7.0 + 6.0 + 12.0)
    found = bound(row(shortcut(2, 1)), "train", TRAIN, exchanges(5.0, 4.0))
    assert found == outside + (8.0 + 9.0) + (9.0 + 12.0 + 7.0)


def test_one_chunk_in_a_backward_alone():
    terms = Terms(whole=40.0, experts=0.0, dgrad=9.0, wgrad=7.0, window=0.0, window_backward=12.0)
    assert bound(row(shortcut(2, 1)), "backward", terms, exchanges(5.0, 4.0)) == (40.0 - 28.0) + 9.0 + (12.0 + 7.0)
    assert bound(row(shortcut(2, 1)), "backward", terms, exchanges(15.0, 14.0)) == (40.0 - 28.0) + 9.0 + (15.0 + 14.0)


@pytest.mark.parametrize(
    ("pair", "case", "phase", "total", "even", "expected"),
    [
        (shortcut(2, 1, chunks=2), "scmoe_pos2", "infer", 12.0, True, 20.0),  # compute
        (shortcut(2, 1, chunks=2), "scmoe_pos2", "infer", 25.0, True, 25.0),  # the wire
        (chunked(4), "top2", "infer", 12.0, True, 20.0 + 3.0),  # and the first and the last of four chunks
        (chunked(4), "top2", "train", 16.0, True, 20.0 + 2.0 + 1.0),  # each phase has half; backward waits once
        (chunked(2).with_backward(chunked(4)), "top2", "train", 16.0, True, 20.0 + 4.0 + 1.0),
        (chunked(4), "top2", "infer", 30.0, True, 30.0),
        (chunked(4), "top2", "forward", 12.0, True, 20.0 + 3.0),
        (chunked(2).with_backward(chunked(4)), "top2", "backward", 16.0, True, 20.0 + 2.0),  # waits for its first alone
        (chunked(4), "top2", "infer", 12.0, False, 20.0),  # some rank may wait for less
        (chunked(4), "top2", "infer", 30.0, False, 20.0),  # both directions of the link at once
        (chunked(4), "top2", "infer", 50.0, False, 25.0),
        (deduplicate(chunked(4)), "top2", "infer", 12.0, True, 20.0),  # rows that stay fill the waits
    ],
)
def test_a_step_that_is_cut(pair, case, phase, total, even, expected):
    terms = TRAIN if phase == "train" else INFER
    assert bound(row(pair, case, "chunked"), phase, terms, exchanges(1.0, 1.0, total), even=even) == expected


def test_which_rows_are_cut():
    two_and_four = shortcut(2, 1, chunks=2).with_backward(shortcut(2, 1, chunks=4))
    assert row(two_and_four).cut_apart and row(shortcut(2, 1).with_backward(two_and_four)).cut_apart
    assert not row(shortcut(2, 1)).cut_apart and not row(shared_expert(0), "shared1").cut_apart
    assert row(chunked(1), "top2").cut_apart and not row(chunked(1), "top2", "serial").cut_apart


def test_serial_rows_have_no_bound():
    assert bound(row(shortcut(2, 1), schedule="serial"), "infer", INFER, exchanges(1.0, 1.0)) is None
