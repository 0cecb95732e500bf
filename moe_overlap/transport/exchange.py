"""One exchange as `start` was asked for it, and what follows from that."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_overlap.agreement.plan import ChunkPlan, RowLayout
from moe_overlap.transport.where import Where


class Exchange(NamedTuple):
    """The arguments of `start`. A tuple because one is made at every start, and making a frozen dataclass takes longer.

    Only where the plan has the chunk, anything follows from them.
    """

    rows: torch.Tensor
    plan: ChunkPlan
    layout: RowLayout
    chunk: int
    reverse: bool
    out: torch.Tensor | None
    action: str

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rows to each rank, rows from each rank), [W] both."""
        return self.plan.counts(self.chunk, reverse=self.reverse)

    def where(self) -> Where:
        return Where(self.action, self.plan.exchange.step, self.chunk)
