"""Rows that cross nodes once for each token: equal bit for bit to one row for each rank, and right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.equality import CHUNKS, DTYPES, SCHEDULES, Case, check_right, run_both, run_rank
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

NODES = ((4, 2), (6, 2), (6, 3))  # ranks, ranks of a node
LOADS = ("balanced", "with_unused", "one_expert", "one_node", "no_tokens", "uneven", "nobody")


def cases(world: int, node: int, schedule: str) -> list[Case]:
    """Every load, with counts of chunks and dtypes in turn."""
    turn = NODES.index((world, node)) + SCHEDULES.index(schedule)
    found = []
    for i, load in enumerate(LOADS):
        chunks = 1 if schedule == "serial" else CHUNKS[(i + turn) % len(CHUNKS)]
        found.append(Case(world, schedule, chunks, DTYPES[(i + turn) % 3], load, "hierarchical", node))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("world", "node"), NODES)
def test_hierarchical_exchanges_equal_direct_ones_and_the_oracle(world, node, schedule):
    for seed, case in enumerate(cases(world, node, schedule)):
        plain = replace(case, dedup="on")
        both = virtual_world(world, seed=seed).run(
            lambda me, case=case: run_both(case, me.transport(), me.transport(), me.rank)
        )
        one = virtual_world(world, seed=seed).run(
            lambda me, plain=plain: run_rank(plain, me.transport(), me.rank, overlap=True)
        )
        check_right(case, both)
        check_right(plain, one)
        for hierarchical, direct in zip(both, one, strict=True):
            for name in direct:
                if case.dtype == torch.bfloat16:
                    close(hierarchical[name], direct[name], case.dtype)
                else:
                    same_bits(hierarchical[name], direct[name])


def test_the_cases_have_every_load_in_every_dtype_and_every_count_of_chunks():
    every = [case for nodes in NODES for schedule in SCHEDULES for case in cases(*nodes, schedule)]
    assert len({(case.load, case.dtype) for case in every}) == len(LOADS) * len(DTYPES)
    assert {case.chunks for case in every if case.schedule == "chunked-tokens"} == set(CHUNKS)
