"""What a step of fixed shapes could not do, said late: a few words that stay on the device while steps run.

A word of a rank: choices that found no row, the capacity factor that would have held all (thousandths), whether an id
was none, the router's status. It goes to all ranks beside the rows, by an exchange that nobody waits for before the
end of the forward, so that all ranks read the same words, and raise the same error before the same step. The largest
values since the last look are kept, on the device and in one place for good: a CUDA graph that is replayed adds to them
too, after `reopen()` as before it. On CUDA the host reads a copy in pinned memory. With several ranks it waits before a
step for the copy of the step before it, which was made early in that step's work on the device; with one rank it reads
what has come and waits for nothing.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.static_plan import word_plan
from moe_overlap.schedule.static_rows import WORD
from moe_overlap.transport.base import Transport, Work

WIDTH = WORD + 1
LAYOUT = RowLayout(width=WIDTH, dtype=torch.int32, metadata=True)
Words = list[list[int]]


class Watch:
    """The words of all ranks, [W, WIDTH], kept as their maxima since the last `clear`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._work: Work | None = None
        self._own: torch.Tensor | None = None
        self._latched: torch.Tensor | None = None
        self._host: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._plan: ChunkPlan | None = None

    def begin(self, word: torch.Tensor, step: int) -> None:
        """word: int32 [WIDTH] of this rank; on its way when this returns."""
        ranks = self._transport.world_size
        if ranks == 1:
            self._own = word[None]
            return
        if self._plan is None:
            self._plan = word_plan(self._transport.rank, ranks)
        plan = copy.copy(self._plan)
        object.__setattr__(plan, "exchange", _of_step(plan.exchange, step))
        self._work = self._transport.start(word.expand(ranks, WIDTH).contiguous(), plan, LAYOUT, action="word")

    def end(self) -> None:
        """At the end of a forward: keep what all ranks have said. On CUDA the stream waits, not the host."""
        if self._work is not None:
            words, self._work = self._work.wait(), None
        elif self._own is not None:
            words, self._own = self._own, None
        else:
            return
        if self._latched is None:
            with torch.inference_mode(False):  # steps with gradients write into it as well
                self._latched = torch.zeros_like(words)
        torch.maximum(self._latched, words, out=self._latched)
        if not words.is_cuda:
            return
        if self._host is None:
            with torch.inference_mode(False):
                self._host = torch.zeros(words.shape, dtype=words.dtype, pin_memory=True)
        self._host.copy_(self._latched, non_blocking=True)
        if self._transport.world_size > 1 and not torch.cuda.is_current_stream_capturing():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Words:
        """The words of all ranks, as far as this may wait for them; [] before the first step."""
        if self._latched is None:
            return []
        if self._host is None:
            return self._latched.tolist()
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()

    def clear(self) -> None:
        """After an error: what follows begins anew. Waits for the device, whose copies would undo it."""
        if self._latched is None:
            return
        self._latched.zero_()
        if self._host is not None:
            torch.cuda.current_stream(self._latched.device).synchronize()
            self._host.zero_()


def _of_step(exchange: ExchangePlan, step: int) -> ExchangePlan:
    return replace(exchange, step=step)
