"""Bounds of rows from measured terms, by hand: each phase by its own cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_overlap.commands.bench.rows import RowPlan, Terms, bound_s
from moe_overlap.commands.bench.wires import Exchanges
from moe_overlap.launch.launch import World
from moe_overlap.schedule.builders import chunked, shared_expert, shortcut

INFER = Terms(whole=20.0, experts=8.0, dgrad=0.0, wgrad=0.0, window=6.0, window_backward=0.0)
TRAIN = Terms(whole=70.0, experts=8.0, dgrad=9.0, wgrad=7.0, window=6.0, window_backward=12.0)


def exchanges(dispatch, combine):
    return Exchanges(dispatch_s=dispatch, combine_s=combine, agree_s=0.0, total_s=0.0, cpu_s=0.0, payload_bytes=0,
                     meta_bytes=0)  # fmt: skip


def row(pair, case="scmoe_pos2", schedule="auto"):
    return RowPlan(model=SimpleNamespace(case=case), schedule=schedule, pair=pair)


def two_and_four():
    return shortcut(2, 1, chunks=2).with_backward(shortcut(2, 1, chunks=4))


@pytest.mark.parametrize(
    ("pair", "dispatch", "combine", "expected"),
    [
        (shortcut(2, 1), 5.0, 4.0, 6.0 + 8.0 + 9.0),  # one chunk: T_exp + max(6, 5 + 4)
        (shortcut(2, 1), 2.0, 1.0, 6.0 + 8.0 + 6.0),
        (shortcut(2, 1, chunks=2), 5.0, 4.0, 6.0 + 18.0),  # the wire: 2 (5 + 4) of max(14, 18, 17)
        (shortcut(2, 1, chunks=2), 3.0, 4.0, 6.0 + 15.0),  # the chain: 3 + 8 + 4 of max(14, 14, 15)
        (shortcut(2, 1, chunks=2), 1.0, 1.0, 6.0 + 14.0),  # compute: 8 + 6
    ],
)
def test_windows_with_ops(pair, dispatch, combine, expected):
    for schedule in ("auto", "mirrored", "shortcut"):
        found = bound_s(World(), row(pair, schedule=schedule), "infer", INFER, exchanges(dispatch, combine), None)
        assert found == expected


def test_each_phase_by_its_own_cut():
    forward, backward = exchanges(5.0, 4.0), exchanges(3.0, 2.0)
    outside = 70.0 - (8.0 + 9.0 + 7.0 + 6.0 + 12.0)
    pair = two_and_four()
    # Forward: the wire, 2 * 9. Backward: compute, dgrad, ops and what is deferred, 9 + 12 + 7, over the wire's 20.
    assert bound_s(World(), row(pair), "train", TRAIN, forward, backward) == outside + 18.0 + 28.0
    joined_up = shortcut(2, 1, chunks=2).with_backward(shortcut(2, 1))
    assert bound_s(World(), row(joined_up), "train", TRAIN, forward, backward) == outside + 18.0 + 9.0 + 19.0


def test_which_rows_take_the_compute_of_their_own_chunks():
    assert row(two_and_four()).cut_apart and row(shortcut(2, 1).with_backward(two_and_four())).cut_apart
    assert not row(shortcut(2, 1)).cut_apart and not row(shared_expert(0), "shared1").cut_apart
    assert row(chunked(1), "top2").cut_apart and not row(chunked(1), "top2", "serial").cut_apart
    assert row(chunked(2), "top2").cut != row(chunked(2, "experts"), "top2").cut


def test_serial_rows_have_no_bound():
    assert bound_s(World(), row(shortcut(2, 1), schedule="serial"), "infer", INFER, exchanges(1.0, 1.0), None) is None
