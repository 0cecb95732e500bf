"""What a candidate takes in a window, with copies of experts and without: compiled and reference, to the last bit."""

from __future__ import annotations

import random

import pytest

from moe_overlap.native import native
from moe_overlap.planning.copied import priced_s, priced_s_reference
from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Slowdown, Window


def seconds(chance):
    """Zero, one, or anything between: ties and gaps of length zero are where simulations go wrong."""
    kind = chance.randrange(8)
    return float(kind) if kind < 2 else chance.random()


def window(chance, phase, deduplicated):
    def some(count):
        return tuple(seconds(chance) for _ in range(count))

    def cut(chunks):
        groups = 0 if phase == "forward" else 1 if deduplicated else chance.choice((1, 3))
        return Chunking(chunks=chunks, by="tokens", first_s=some(chunks), experts_s=some(chunks),
                        second_s=some(chunks), deferred_s=some(groups))  # fmt: skip

    halves = deduplicated and phase == "forward" and chance.random() < 0.5
    return Window(
        phase=phase,
        head_s=seconds(chance),
        tail_s=seconds(chance),
        ops_s=some(chance.randrange(5) + deduplicated),
        metadata_s=seconds(chance) if deduplicated else None,
        halves_s=(seconds(chance), seconds(chance)) if halves else None,
        issue_s=chance.choice((0.0, 0.1 * chance.random())),
        slowdown=chance.choice((Slowdown(), Slowdown(compute=1.2, wire=1.5), Slowdown(wire=2.0))),
        chunkings=tuple(cut(chunks) for chunks in (1, chance.choice((2, 3, 5, 8)))),
    )


@pytest.mark.skipif(native.planner() is None, reason="compares the compiled core with the reference")
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("deduplicated", [False, True])
def test_the_compiled_price_is_the_reference_to_the_last_bit(phase, deduplicated):
    chance = random.Random(f"{phase} {deduplicated}")
    for _ in range(40):
        problem = window(chance, phase, deduplicated)
        forms = ([], [seconds(chance)], [seconds(chance), seconds(chance)])
        for one in search(problem):
            for groups_s in forms if phase == "forward" else forms[:2]:
                assert priced_s(problem, one, groups_s) == priced_s_reference(problem, one, groups_s)
            assert priced_s(problem, one) == one.predicted_s


@pytest.mark.skipif(native.planner() is None, reason="the compiled core's own checks")
@pytest.mark.parametrize(
    ("changes", "order", "named"),
    [
        ({"fetch_s": [1.0] * 3}, ([0], [0]), "fetch_s must have two entries at most"),
        ({"return_s": [-1.0]}, ([0], [0]), "seconds >= 0"),
        ({}, ([1], [0]), "within the cut"),
        ({}, ([0], [2]), "within the cut"),
        ({}, ([0, 0], [0, 0]), "one entry per chunk"),
    ],
)
def test_the_binding_checks_what_it_is_given(changes, order, named):
    planner = native.planner()
    cut = planner.Cut(0.0, 0.0, 0.0, 1.0, 1.0, [1.0], [1.0], [1.0], [1.0], [], **changes)
    with pytest.raises(ValueError, match=named):
        planner.makespan_s(cut, *order, False)
