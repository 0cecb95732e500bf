"""The compiled search leaves out what bounds show to be slower; the reference in Python looks at everything."""

from __future__ import annotations

import random

import pytest

from moe_overlap.planning.search import search, search_reference
from moe_overlap.planning.window import Chunking, Slowdown, Window


def random_window(chance):
    """Cuts of a few kinds, plain or deduplicated: what is left out by a bound is most often wrong where figures tie."""
    draw = chance.choice([lambda: chance.choice([0.0, 0.25, 1.0]), chance.random, lambda: 0.05 + chance.random()])
    phase, distinct = chance.choice(["forward", "backward"]), chance.random() < 0.25
    ops_s = tuple(draw() for _ in range(chance.choice([0, 1, 2, 4]) + distinct))
    groups = tuple(draw() for _ in range(chance.randint(1, 2))) if phase == "backward" else ()
    cuts = []
    for chunks in chance.sample([1, 2, 3, 4, 5 + chance.randrange(3)], chance.choice([1, 1, 2, 3])):
        kind, rate = chance.randrange(3), draw()  # all alike, in proportion to their rows, or anything
        rows = [draw() if kind == 1 else 1.0 for _ in range(chunks)]
        first_s, experts_s, second_s = (
            tuple((draw() if kind == 2 else one) * size for size in rows) for one in (rate, draw(), rate)
        )
        cuts.append(Chunking(chunks=chunks, by=chance.choice(["tokens", "experts"]), first_s=first_s,
                             experts_s=experts_s, second_s=second_s, deferred_s=groups,
                             chunk_bytes=tuple(chance.randint(1, 9) for _ in rows)))  # fmt: skip
    slowdown = Slowdown(compute=chance.choice([1.0, 1 + chance.random()]), wire=chance.choice([1.0, 1.5]))
    return Window(phase=phase, head_s=draw(), tail_s=draw(), ops_s=ops_s, issue_s=chance.choice([0.0, 0.0, 0.01, 0.3]),
                  slowdown=slowdown, chunkings=tuple(cuts), metadata_s=draw() if distinct else None,
                  halves_s=(draw(), draw()) if distinct and phase == "forward" else None)  # fmt: skip


def test_what_the_compiled_search_leaves_out_is_never_among_the_best():
    """The reference looks at everything; of 2000 windows the best, the first few and all candidates are the same."""
    chance, orders = random.Random(8), 0
    for _ in range(2000):
        window = random_window(chance)
        every = search_reference(window)
        assert search(window) == every
        for limit in (1, chance.randint(2, 8), 16):
            assert search(window, limit=limit) == every[:limit]
        budget = chance.randint(9, 40)
        within = tuple(candidate for candidate in every if candidate.in_flight_bytes <= budget)
        if within:
            assert search(window, limit=4, max_in_flight_bytes=budget) == search_reference(
                window, limit=4, max_in_flight_bytes=budget
            )
            assert search(window, max_in_flight_bytes=budget)[0].predicted_s == pytest.approx(
                min(candidate.predicted_s for candidate in within), rel=1e-8
            )
        orders += sorted(every[0].chunk_order) != list(every[0].chunk_order)
    assert orders > 100, "chunks out of their own order"
