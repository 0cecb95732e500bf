"""Experts that sleep: for as long as their rows take, whatever the schedule."""

from __future__ import annotations

import pytest

from moe_overlap import ShortcutBlock
from moe_overlap.commands.bench.slept import ExpertSeconds, slept_experts
from moe_overlap.placement import LocalFirst, Placement
from moe_overlap.schedule.builders import window
from tests.layers import K, Op, make, tokens
from tests.ranks import virtual_world

SECONDS = ExpertSeconds(expert_row_s=1.0, dgrad_row_s=1e3, wgrad_row_s=1e6)
ROWS = 2 * 40 * K
COPIED = Placement.of_ranks([[0, 1, 2, 3], [4, 5, 6, 7, 0, 1]], selector=LocalFirst())


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "serial"},
        {"schedule": "chunked(2)"},
        {"schedule": "chunked(2,experts)"},
        {"schedule": "chunked(4)", "dedup": "on"},
        {"schedule": "chunked(2)", "placement": COPIED},
        {"schedule": "chunked(2)", "placement": COPIED, "dedup": "on"},
    ],
    ids=str,
)
def test_every_row_is_slept_for_once_in_each_piece(options):
    slept: list[float] = []

    def rank(me):
        make(me.transport(), **options)(tokens(40, me.rank).requires_grad_()).sum().backward()

    with slept_experts(SECONDS, slept.append):
        virtual_world(2).run(rank)
    assert sum(slept) == ROWS * (1 + 1e3 + 1e6)


def test_so_is_it_in_a_window_and_nothing_sleeps_afterwards():
    slept: list[float] = []

    def rank(me):
        block = ShortcutBlock([Op()], make(me.transport()), tap=0, schedule=window(1, 0, chunks=2))
        block(tokens(40, me.rank).requires_grad_()).sum().backward()

    with slept_experts(SECONDS, slept.append):
        virtual_world(2).run(rank)
    assert sum(slept) == ROWS * (1 + 1e3 + 1e6)
    virtual_world(2).run(rank)
    assert sum(slept) == ROWS * (1 + 1e3 + 1e6)
