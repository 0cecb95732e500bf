"""The rows of an expert shared out over its seats: who sends what to whom."""

from __future__ import annotations

import numpy as np
import pytest

from moe_overlap.native import native
from moe_overlap.planning.replication import split_rows, split_seats, split_seats_reference


def test_rows_stay_on_their_rank_then_on_their_node():
    found = split_rows([4, 3, 2, 5], [(0, 6), (3, 8)], 2)
    assert found == [(0, 0, 4), (3, 3, 5), (1, 0, 2), (2, 3, 2), (1, 3, 1)]
    assert split_rows([0, 7], [(0, 3), (1, 4)], 1) == [(1, 1, 4), (1, 0, 3)]


def test_what_crosses_is_spread_over_the_ports():
    """Two of a node's ranks compute all rows; the other node's leave it evenly, and enter both evenly."""
    enter = dict.fromkeys(range(4), 0)
    for source, rank, rows in split_rows([0, 0, 10, 10, 20, 20, 20, 20], [(0, 50), (1, 50)], 4):
        enter[rank] += rows if source > 3 else 0
    assert enter == {0: 40, 1: 40, 2: 0, 3: 0}
    leave = dict.fromkeys(range(8), 0)
    for source, rank, rows in split_rows([20, 20, 20, 20, 0, 0, 0, 0], [(0, 30), (4, 50)], 4):
        leave[source] += rows if rank == 4 else 0
    assert [leave[source] for source in range(4)] == [0, 17, 17, 16]


@pytest.mark.parametrize("seed", range(10))
def test_a_split_has_the_rows_of_every_source_and_of_every_place(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, 8)
    ranks = rng.permutation(8)[: rng.integers(1, 6)]
    rooms = rng.multinomial(counts.sum(), np.full(len(ranks), 1 / len(ranks)))
    found = split_rows(
        counts.tolist(), list(zip(ranks.tolist(), rooms.tolist(), strict=True)), int(rng.choice([1, 2, 4]))
    )
    assert all(rows > 0 for _, _, rows in found)
    assert [sum(n for s, _, n in found if s == source) for source in range(8)] == counts.tolist()
    assert [sum(n for _, r, n in found if r == rank) for rank in ranks] == rooms.tolist()


@pytest.mark.parametrize("bits", [5, 20, 40])
def test_the_compiled_split_is_the_reference(bits):
    rng = np.random.default_rng(bits)
    for _ in range(60):
        ranks, experts = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 7))
        counts = rng.integers(0, 1 << bits, (ranks, experts)) * rng.integers(0, 2, (ranks, experts))
        seats = []
        for expert, rows in enumerate(counts.sum(axis=0).tolist()):
            places = rng.permutation(ranks)[: rng.integers(1, ranks + 1)].tolist()
            ends = sorted(rng.integers(0, rows + 1, len(places) - 1).tolist())
            parts = np.diff([0, *ends, rows]).tolist()
            seats += [(expert, rank, part) for rank, part in zip(places, parts, strict=True)]
        seats = [seats[i] for i in rng.permutation(len(seats))]
        size = int(rng.choice([size for size in (1, 2, 4, 8) if ranks % size == 0]))
        found = split_seats(counts, seats, size)
        assert found.dtype == np.int64 and found.tolist() == split_seats_reference(counts, seats, size).tolist()


def test_a_split_of_rows_that_are_not_there_is_refused():
    planner = native.planner()
    if planner is None:
        pytest.skip("compiled parts are not built")
    for counts, seats, size in (
        ([[4], [4]], ((0, 0, 4), (0, 1, 5)), 1),
        ([[4], [4]], ((0, 0, 4), (0, 2, 4)), 1),
        ([[4], [4]], ((0, 0, 9), (0, 1, -1)), 1),
        ([[4], [4]], ((0, 0, 4), (0, 1, 4)), 3),
        ([[4], [4]], ((0, 0), (0, 1, 4)), 1),
    ):
        with pytest.raises(ValueError, match="split_rows|seats of three"):
            planner.split_rows(np.array(counts), seats, size)
