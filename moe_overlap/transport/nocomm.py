"""No communication, on purpose: wrong numbers, right shapes. For the T_nocomm of the benchmarks and nothing else."""

from __future__ import annotations

import time

from moe_overlap.transport.base import Work
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.work import DoneWork
from moe_overlap.transport.wrapper import Wrapper


class NoCommTransport(Wrapper):
    """`inner` without its exchanges: `start` copies this rank's own rows into a buffer of the received shape.

    THE RESULTS OF A LAYER ON THIS TRANSPORT ARE WRONG: every rank computes on its own rows instead of those meant for
    its experts. The plan is agreed on as usual, so every rank computes on as many rows as it would have received, and
    the time of a step is the time of the same step with a network that costs nothing. What goes beside rows (ids and
    weights) does go through `inner`: nobody could compute without.
    """

    name = "nocomm"

    def _start(self, exchange: Exchange) -> Work:
        if exchange.layout.metadata:
            return super()._start(exchange)
        start_s = time.perf_counter()
        rows, plan, layout, chunk, reverse, out, _ = exchange
        count = sum(plan.counts(chunk, reverse=reverse)[1])
        if out is None:
            out = rows.new_empty(count, layout.width)
        own = min(count, rows.shape[0])
        out[:own].copy_(rows[:own])
        out[own:].zero_()
        self.stats.exchanges += 1
        return DoneWork(out, (start_s, time.perf_counter()))
