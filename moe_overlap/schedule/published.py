"""Schedules of published systems by name, in the words of `builders.py`: docs/schedules.md draws each.

What a system is known for may be an order of actions, a way of cutting the exchange, or what stands in the place of the
ops; all of them run on one executor and have the results of `serial`.
"""

from __future__ import annotations

from dataclasses import replace

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import Action, Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked, shared_expert, window


def pairwise(groups: int, *, shared: bool = False) -> SchedulePair:
    """FasterMoE's smart schedule (PPoPP'22): own rows first, then ring step after ring step, as S, C, R in turn.

    Chunk c is what goes to the ranks that are [W c // groups, W (c + 1) // groups) further on, so with W groups the
    first chunk stays on its rank and every other one is one message each way. Each R is started right behind its C;
    FasterMoE's code starts all of them behind the last C (its issue 213).
    """
    return replace(chunked(groups, "peers", shared=shared), name="fastermoe")


def compressed(chunks: int) -> SchedulePair:
    """ScheMoE's order (EuroSys'24, theorem 1): all compressions, then decompress, experts, compress of chunk after
    chunk, and all last decompressions at the end.

    The tasks stand inside of the actions: P and the starts of D have the first compressions, the wait for D, E and the
    start of C those of a chunk, the waits for C and U the last ones. `MoELayer(payload_dtype=)` is what compresses.
    """
    return replace(chunked(chunks), name="schemoe")


def expert_stages(stages: int, *, shared: bool = False) -> SchedulePair:
    """EPS-MoE's stages (arXiv 2410.12247): groups of experts in turn; `planning.stages.eps_stages` says how many."""
    return replace(chunked(stages, "experts", shared=shared), name="eps_moe")


def filled(chunks: int) -> SchedulePair:
    """Weight gradients in every gap of backward (Lancet, MLSys'24): each group of experts makes its own (Eg) behind the
    start of its last exchange, where the next group's rows may still be on their way.

    Only a cut by experts has them complete so early. Delayed weight gradients as in Megatron-Core and DualPipe, all
    of them behind the last input gradient, are what `chunked` has anyway.
    """
    pair = chunked(chunks, "experts")
    middle = [Action(verb, index) for index in range(chunks) for verb in ("Ed", "Dt", "Eg")]
    first = [Action("Ut"), *(Action("Ct", index) for index in range(chunks))]
    return replace(pair, name="lancet", backward=Schedule((*first, *middle, Action("Pt"))))


def megatron_shared(*, chunks: int = 1) -> SchedulePair:
    """Megatron-Core's shared expert under the dispatch (`--moe-shared-expert-overlap`), as one op: there its first
    matmul is under the dispatch and its second under the combine."""
    return replace(shared_expert(1, chunks=chunks), name="megatron")


def arctic(*, chunks: int = 1) -> SchedulePair:
    """Snowflake Arctic's block (Pos-1 in every block): attention before the experts, the dense MLP behind them."""
    return replace(window(2, 1, chunks=chunks), name="arctic")


def longcat(*, chunks: int = 1, slot: int = 1) -> SchedulePair:
    """LongCat-Flash's double block (Pos-2, arXiv 2509.01322): MLP 0, attention 1 and MLP 1 beside both exchanges, the
    first `slot` of them before the experts (1 in the prefill code of FluentLLM)."""
    if slot not in range(4):
        raise ConfigError("slot", slot, "from 0 to 3, of MLP 0, attention 1 and MLP 1")
    return replace(window(3, slot, chunks=chunks), name="longcat")


def farskip(*, chunks: int = 1) -> SchedulePair:
    """FarSkip-Collective (arXiv 2511.11505): the shared expert before the experts, the next layer's attention behind.

    The attention belongs to the next block: `layer.wirings.FarSkip` runs this order by tickets.
    """
    return replace(window(2, 1, chunks=chunks), name="farskip")
