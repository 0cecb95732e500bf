"""What every transport around another one shares: all that the contract names goes to the inner one."""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import BackwardRecord, StepRecord
from moe_overlap.transport.base import Agreement, Announcement, Transport, TransportStats, Work
from moe_overlap.transport.exchange import Exchange


class Wrapper:
    """`inner`, except for what a subclass does otherwise: its name, `_start` instead of `start`, any other method."""

    name: str

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.global_ranks = inner.global_ranks
        self.timeout_s = inner.timeout_s

    @property
    def stats(self) -> TransportStats:
        return self.inner.stats

    @property
    def openings(self) -> int:
        return self.inner.openings

    @property
    def group(self) -> Any:
        return self.inner.group

    @property
    def exchange_sms(self) -> int:
        return self.inner.exchange_sms

    def open(self, header: Header) -> bool:
        return self.inner.open(header)

    def agree(self, record: StepRecord) -> ExchangePlan:
        return self.inner.agree(record)

    def begin_agree(self, record: StepRecord) -> Agreement:
        return self.inner.begin_agree(record)

    def begin_backward(self, record: BackwardRecord) -> Announcement:
        return self.inner.begin_backward(record)

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
        return self._start(Exchange(rows, plan, layout, chunk, reverse, out, action))

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        return self.inner.all_reduce(tensor, action=action)

    def join(self) -> int:
        return self.inner.join()

    def call_it(self, path: str) -> None:
        self.inner.call_it(path)

    def close(self, reason: str) -> None:
        self.inner.close(reason)

    def reopen(self) -> None:
        self.inner.reopen()

    def _start(self, exchange: Exchange) -> Work:
        """The exchange as it was asked for: that the chunk exists is for the inner transport to check."""
        rows, plan, layout, chunk, reverse, out, action = exchange
        return self.inner.start(rows, plan, layout, chunk, reverse=reverse, out=out, action=action)
