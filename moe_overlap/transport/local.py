"""One rank: no collective, no copy."""

from __future__ import annotations

import torch

from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import StepRecord, agree_on
from moe_overlap.transport.base import Work
from moe_overlap.transport.lifecycle import Lifecycle


class LocalWork:
    """An exchange that was over when it began."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        return self._rows

    def done(self) -> bool:
        return True

    def interval(self) -> tuple[float, float] | None:
        return None


class LocalTransport(Lifecycle):
    """The transport of a single rank. `start` returns the rows themselves, or copies them into `out`."""

    name = "local"

    def __init__(self, *, timeout_s: float | None = None) -> None:
        super().__init__(rank=0, world_size=1, timeout_s=timeout_s)

    def open(self, header: Header) -> bool:
        opened = not self._is_open_for(header)
        self._header = header
        return opened

    def agree(self, record: StepRecord) -> ExchangePlan:
        words = self._require_record(record)
        self.stats.agreements += 1
        return agree_on(words[None], rank=0, num_slots=record.counts.shape[1])

    def start(
        self,
        rows: torch.Tensor,
        plan: ChunkPlan,
        layout: RowLayout,
        chunk: int = 0,
        *,
        reverse: bool = False,
        out: torch.Tensor | None = None,
        action: str = "D",
    ) -> Work:
        self._require_rows(rows, out, plan, layout, chunk, reverse=reverse)
        self.stats.exchanges += 1
        return LocalWork(rows if out is None else out.copy_(rows))

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        """The sum over one rank is the tensor."""
        self._require_usable()
        return LocalWork(tensor)

    def reopen(self) -> None:
        self._cause = None
        self._header = None
