"""What the ranks still have to say where copies of experts were chosen from a step's counts, and rows are deduplicated.

Which of an expert's slots a choice goes to follows from the counts; how many choices of a token meet on one rank does
not. So where a rule gave the step other seats, every rank counts its (token, rank) pairs anew, by the seats that all of
them know by now, and sends them to all: one message to each, of

    2 * 16 * seats * 4 bytes        pairs by lowest and by highest seat (see `counts.py`), int32

Pairs by seat and not by rank alone (16 * ranks * 4 bytes), so that any number of chunks and both cuts follow here too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS, block_counts_of_rows
from moe_overlap.agreement.loads import Counts, impossible_rows
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.errors import PlanMismatch


@dataclass(frozen=True, kw_only=True)
class GatherPlan(ChunkPlan):
    """One row from every rank to every rank, itself too, in one chunk."""

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (1,) * self.world_size, (1,) * self.world_size

    @cached_property
    def stays_local(self) -> tuple[bool, ...]:
        return (self.world_size == 1,)


def gather_plan(exchange: ExchangePlan) -> GatherPlan:
    """Of a step."""
    nothing = np.zeros(0, dtype=np.int64)
    return GatherPlan(exchange=exchange, chunks=1, by="tokens", sent=nothing, received=nothing)


def gather_layout(exchange: ExchangePlan) -> RowLayout:
    """Of a rank's pairs."""
    return RowLayout(width=2 * BLOCKS * exchange.num_slots, dtype=torch.int32, metadata=True)


def pairs_of(ids_TK: torch.Tensor, exchange: ExchangePlan) -> torch.Tensor:
    """int32 [width] on the device of the ids: the pairs of this rank's choices, [T, K] logical experts. One
    device-to-host read."""
    assert exchange.seats is not None
    seats_TK = exchange.seats.of_ids(ids_TK, exchange.rank)
    _, first, last = block_counts_of_rows(seats_TK, exchange.num_slots, exchange.world_size)
    return torch.cat([first.reshape(-1), last.reshape(-1)]).to(torch.int32).to(ids_TK.device)


def with_pairs(exchange: ExchangePlan, said: torch.Tensor) -> ExchangePlan:
    """The step with `first` and `last`, from what all ranks said, int32 [W, width] on the CPU. Raises PlanMismatch
    alike on all ranks where they do not go with the counts."""
    world, table = exchange.world_size, exchange.counts.table
    assert table is not None, "rules are for ranks that hear all counts"
    first, last = said.to(torch.int64).numpy().reshape(world, 2, BLOCKS, -1).swapaxes(0, 1)
    odd = np.nonzero(impossible_rows(*(one.reshape(world, BLOCKS, world, -1) for one in (table, first, last))))[0]
    if len(odd):
        text = f"rank {odd[0]} announced rows that do not go with its counts; no row was sent"
        raise PlanMismatch(text, rank=exchange.rank, peer=int(odd[0]), step=exchange.step, action="N")
    return replace(exchange, first=Counts.of(first, exchange.rank), last=Counts.of(last, exchange.rank))
