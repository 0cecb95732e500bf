"""No communication, on purpose: wrong numbers, right shapes. For the T_nocomm of the benchmarks and nothing else."""

from __future__ import annotations

import time

import torch

from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import StepRecord
from moe_overlap.transport.base import Transport, TransportStats, Work


class CopiedWork:
    """A copy that is over."""

    def __init__(self, out: torch.Tensor, start_s: float) -> None:
        self._out = out
        self._interval = (start_s, time.perf_counter())

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        return self._out

    def done(self) -> bool:
        return True

    def interval(self) -> tuple[float, float] | None:
        return self._interval


class NoCommTransport:
    """`inner` without its exchanges: `start` copies this rank's own rows into a buffer of the received shape.

    THE RESULTS OF A LAYER ON THIS TRANSPORT ARE WRONG: every rank computes on its own rows instead of those meant for
    its experts. The plan is agreed on as usual, so every rank computes on as many rows as it would have received, and
    the time of a step is the time of the same step with a network that costs nothing.
    """

    name = "nocomm"

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.global_ranks = inner.global_ranks
        self.timeout_s = inner.timeout_s

    @property
    def stats(self) -> TransportStats:
        return self.inner.stats

    def open(self, header: Header) -> bool:
        return self.inner.open(header)

    def agree(self, record: StepRecord) -> ExchangePlan:
        return self.inner.agree(record)

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
        start_s = time.perf_counter()
        count = plan.send_rows[chunk] if reverse else plan.recv_rows[chunk]
        if out is None:
            out = rows.new_empty(count, layout.width)
        own = min(count, rows.shape[0])
        out[:own].copy_(rows[:own])
        out[own:].zero_()
        self.stats.exchanges += 1
        return CopiedWork(out, start_s)

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        return self.inner.all_reduce(tensor, action=action)

    def close(self, reason: str) -> None:
        self.inner.close(reason)

    def reopen(self) -> None:
        self.inner.reopen()
