"""The two lanes of one step at run time: exchanges under way, and notes of what each lane did when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_overlap.autograd import autocast_off, closing_on_error
from moe_overlap.plan import ChunkPlan, RowLayout
from moe_overlap.schedule.actions import Action
from moe_overlap.schedule.recorder import TimelineEvent, emit
from moe_overlap.transport.base import Transport, Work


class Lanes:
    """Starts exchanges and waits for them; keeps `events`, on the clock time.perf_counter."""

    def __init__(self, transport: Transport, phase: str) -> None:
        self.transport = transport
        self.phase = phase
        self.events: list[TimelineEvent] = []
        self._works: dict[Action, Work] = {}
        self._open_op: tuple[str, float] | None = None

    def bind(self, forward: ChunkPlan, backward: ChunkPlan, layout: RowLayout, *, joined: bool) -> None:
        """The agreed plans of the step's two halves and what a row carries; `joined`: overlap off."""
        self._plans = {"forward": forward, "backward": backward}
        self._layout, self._joined = layout, joined

    # ---------------------------------------------------------------- wire

    def start(self, action: Action, rows: torch.Tensor, out: torch.Tensor | None = None) -> None:
        """Start an exchange. C and Dt carry rows back to where they came from."""
        assert action.index is not None
        work = self.transport.start(rows, self._plans[action.spec.phase], self._layout, action.index,
                                    reverse=action.verb in ("C", "Dt"), out=out, action=action.text)  # fmt: skip
        self._works[action] = work
        if self._joined:
            start_s = time.perf_counter()
            work.wait()
            self.note(action.text, "wait", start_s, time.perf_counter())

    def wait(self, action: Action) -> torch.Tensor:
        """The rows of an exchange that was started."""
        work = self._works.pop(action)
        start_s = time.perf_counter()
        rows = work.wait()
        done_s = time.perf_counter()
        if not self._joined:
            self.note(action.text, "wait", start_s, done_s)
        # A transport that cannot tell when bytes moved (one rank: none do) has an interval of length zero.
        self.note(action.text, "wire", *(work.interval() or (done_s, done_s)))
        return rows

    # ---------------------------------------------------------------- compute

    @contextmanager
    def acting(self, action: str, device_type: str, *, timed: bool) -> Iterator[None]:
        """Around the body of an action: peers learn of an error, autocast changes nothing, the time is noted."""
        with closing_on_error(self.transport, action), autocast_off(device_type):
            start_s = time.perf_counter()
            yield
            if timed:
                self.note(action, "comp", start_s, time.perf_counter())

    def open_op(self, action: str) -> None:
        """The backward of a user's op begins now; it ends when the next node of this step runs."""
        self.close_op()
        self._open_op = (action, time.perf_counter())

    def close_op(self) -> None:
        if self._open_op is not None:
            action, start_s = self._open_op
            self._open_op = None
            self.note(action, "comp", start_s, time.perf_counter())

    def note(self, action: str, lane: str, start_s: float, end_s: float) -> None:
        """Record one executed action."""
        in_backward = torch._C._current_graph_task_id() >= 0 and self.phase == "forward"
        phase = "backward" if in_backward else self.phase
        step = self._plans["forward"].exchange.step
        event = TimelineEvent(self.transport.rank, step, phase, action, lane, start_s, end_s)
        self.events.append(event)
        emit(event)
