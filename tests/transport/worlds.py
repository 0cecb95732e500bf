"""Data for the transport tests: headers, records, plans and the exchange written down as a permutation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.header import Header
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import AGREED_FIELDS, StepRecord
from moe_overlap.transport.base import Transport

F32 = RowLayout(width=3, dtype=torch.float32)


def header(num_slots: int, **changes: int) -> Header:
    fields = {
        "num_experts": num_slots, "num_slots": num_slots, "hidden": 3, "ffn_hidden": 8, "top_k": 2, "weight_dtype": 0,
        "activation": 0,
    }  # fmt: skip
    return Header(**{**fields, **changes})


def record(
    counts: torch.Tensor, *, step: int = 0, first: torch.Tensor | None = None, last: torch.Tensor | None = None,
    **changes: int,
) -> StepRecord:  # fmt: skip
    fields = dict.fromkeys(AGREED_FIELDS, 1) | {"phase": 0, "status": 0, "status_value": 0, "x_requires_grad": 1,
                                              "dedup": 0, "ranks_per_node": 0, "hierarchical": 0}  # fmt: skip
    return StepRecord(counts=counts, first=first, last=last, **{**fields, "step": step, **changes})


def counts_of(rank: int, world: int, slots: int, seed: int, high: int = 4) -> torch.Tensor:
    """int64 [BLOCKS, P] of one rank: many zeros, sometimes a rank that sends nothing or a slot that gets nothing."""
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    counts = torch.randint(0, high, (BLOCKS, slots), generator=generator)
    counts *= torch.rand(BLOCKS, slots, generator=generator) < 0.5
    if seed % 3 == 1:
        counts[:, seed % slots] = 0
    if seed % 4 == 2 and rank == seed % world:
        counts.zero_()
    return counts


def sent_by(rank: int, plan: ChunkPlan, chunk: int) -> np.ndarray:
    """int64 [P]: rows of a chunk that any rank sends to slot p."""
    table = plan.exchange.counts.table
    assert table is not None
    part = replace(plan.exchange, rank=rank, counts=Counts.of(table, rank)).chunked(plan.chunks, plan.by)
    return part.sent[chunk]


def rows_of(rank: int, plan: ChunkPlan, chunk: int, layout: RowLayout) -> torch.Tensor:
    """Rows whose values say where they come from: 1000 rank + 100 chunk + row, in every column (modulo 256)."""
    count = int(sent_by(rank, plan, chunk).sum())
    first = torch.arange(count, dtype=torch.float64) + 1000 * rank + 100 * chunk
    return (first[:, None] + torch.arange(layout.width) / 4).remainder(256).to(layout.dtype)


def received(rank: int, plan: ChunkPlan, chunk: int, layout: RowLayout) -> torch.Tensor:
    """What `rank` must receive: for each source in order, the source's rows that go to `rank`."""
    parts = [torch.empty(0, layout.width, dtype=layout.dtype)]
    for source in range(plan.world_size):
        to_rank = sent_by(source, plan, chunk).reshape(plan.world_size, -1).sum(axis=1)
        first = int(to_rank[:rank].sum())
        parts.append(rows_of(source, plan, chunk, layout)[first : first + int(to_rank[rank])])
    return torch.cat(parts)


def agreed(transport: Transport, *, slots: int, seed: int, step: int = 0) -> ExchangePlan:
    """Open (again) and agree on the seeded counts of this rank."""
    transport.open(header(slots))
    counts = counts_of(transport.rank, transport.world_size, slots, seed)
    return transport.agree(record(counts, step=step))


def plan_of(world: int, slots: int, seed: int, *, rank: int = 0, step: int = 0) -> ExchangePlan:
    """The plan that `agreed` comes to, without a transport."""
    counts = np.stack([counts_of(source, world, slots, seed).numpy() for source in range(world)])
    return ExchangePlan(rank=rank, world_size=world, step=step, phase="forward", grad_enabled=True,
                        x_requires_grad=True, counts=Counts.of(counts, rank))  # fmt: skip


def exchange_all(
    transport: Transport, plan: ChunkPlan, layout: RowLayout, *, wait_order: list[int], use_out: bool = False
) -> list[torch.Tensor]:
    """Start every chunk, wait in the given order; the received rows of each chunk."""
    works = []
    for chunk in range(plan.chunks):
        out = torch.empty(plan.recv_rows[chunk], layout.width, dtype=layout.dtype) if use_out else None
        rows = rows_of(transport.rank, plan, chunk, layout)
        works.append(transport.start(rows, plan, layout, chunk, out=out, action=f"D{chunk}"))
        del rows, out
    result: dict[int, torch.Tensor] = {chunk: works[chunk].wait() for chunk in wait_order}
    return [result[chunk] for chunk in range(plan.chunks)]
