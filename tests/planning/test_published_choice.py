"""For the published schedules that a search can find: a window in which it does (docs/schedules.md)."""

from __future__ import annotations

import pytest

from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.builders import chunked, serial, shared_expert, shortcut
from moe_overlap.schedule.published import arctic, compressed, expert_stages, farskip, longcat, megatron_shared


def window(
    there: float,
    experts: float,
    *,
    back: float | None = None,
    latency: float = 0.1,
    again: float = 0.0,
    by: tuple[str, ...] = ("tokens",),
    **ops: object,
) -> Window:
    """1 to 4 chunks. there, back: both exchanges; latency of each chunk's; again: what every chunk of tokens costs the
    experts anew, such as reading all weights."""
    cuts = []
    for cut in by:
        for n in range(1, 5):
            ways = [(seconds / n + latency,) * n for seconds in (there, there if back is None else back)]
            each = experts / n + (again if cut == "tokens" else again / n)
            cuts.append(Chunking(chunks=n, by=cut, first_s=ways[0], second_s=ways[1], experts_s=(each,) * n))
    return Window(phase="forward", head_s=0.1, tail_s=0.1, chunkings=tuple(cuts), **ops)


CASES = {
    "serial: nothing to gain from cutting": (serial(), window(0.1, 1.0, latency=1.0)),
    "Tutel: experts as long as both exchanges": (chunked(4), window(1.0, 3.0)),
    "ScheMoE: the same order": (compressed(4), window(1.0, 3.0)),
    "EPS-MoE: a chunk of tokens reads all weights again": (
        expert_stages(4), window(1.0, 3.0, again=0.5, by=("tokens", "experts"))),
    "Megatron: a long dispatch": (
        megatron_shared(), window(1.2, 0.2, back=0.1, latency=0.5, op_verb="S", ops_s=(1.0,))),
    "shared expert under a long combine": (
        shared_expert(0), window(0.1, 0.2, back=1.2, latency=0.5, op_verb="S", ops_s=(1.0,))),
    "Pos-1": (shortcut(1, 1), window(0.9, 1.0, back=0.4, ops_s=(1.0, 0.5))),
    "Pos-2": (shortcut(2, 2), window(0.9, 1.0, ops_s=(0.5, 0.5, 1.0))),
    "Pos-3": (shortcut(3, 2), window(0.9, 1.0, ops_s=(0.5,) * 4)),
    "LongCat": (longcat(), window(0.9, 1.0, ops_s=(1.0, 0.6, 0.6))),
    "Arctic": (arctic(), window(0.9, 1.0, ops_s=(1.0, 1.0))),
    "FarSkip": (farskip(), window(0.9, 1.0, ops_s=(1.0, 1.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_search_chooses_it(name):
    pair, problem = CASES[name]
    best = search(problem)[0]
    assert (best.order, best.by, best.joined) == (pair.forward.text, pair.by, pair.joined)
