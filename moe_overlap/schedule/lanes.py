"""The two lanes of one step at run time: exchanges under way, and notes of what each lane did when."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable

from moe_overlap.agreement.node_plan import InsidePlan
from moe_overlap.agreement.plan import ChunkPlan, RowLayout
from moe_overlap.agreement.record import BackwardRecord, digest
from moe_overlap.schedule.actions import COMP, Action
from moe_overlap.schedule.clocks import Clock, HostClock
from moe_overlap.schedule.gateway import Gateway
from moe_overlap.schedule.recorder import TimelineEvent, recording
from moe_overlap.transport.base import Agreement, Announcement, Transport, Work
from moe_overlap.transport.closing import ClosingUnlessCalled, close_for

ATTACH = "if no rank failed, the peer's loss does not reach this layer: call layer.attach(loss) on that rank"
RETURNING = ("C", "Dt", "Mt", "Wg")
WEIGHTS = ("Wf", "Wg")  # which go to their ranks directly
# Phase, action, lane, the stamps of its start and end; of an exchange that of its issue, and whose rows came last.
Note = tuple[str, str, str, Any, Any, Any, int | None]


@dataclass(slots=True, eq=False)
class _Exchange:
    """One under way. start: when it was issued; end: when the wait for it ended. computed: what its rows are computed
    in, and where they belong, where they travel in another dtype."""

    work: Work
    start: Any
    layout: RowLayout
    computed: tuple[torch.dtype, torch.Tensor | None] | None
    end: Any = None


class Lanes:
    """Starts exchanges and waits for them; keeps `events`, on the clock time.perf_counter.

    `clock`: of the compute lane (None: nothing is noted). The host's knows from the transport when bytes were under
    way. A stream's does not: there they were from the start of the exchange to the end of the wait for it.
    `probe`: backward is a calibration's, which every rank runs, whatever its loss. `caller`: the dispatcher's.
    """

    def __init__(self, transport: Transport, phase: str, clock: Clock | None, *, probe: bool, caller: int = 0) -> None:
        self._caller = caller
        self.step = 0  # its number, known since it was begun to agree on it
        self._backwards = 0
        self._beginning: Announcement | None = None
        self.transport = transport
        self._first_hint = "" if probe else ATTACH
        self.phase = phase
        self.clock = clock
        self.now: Callable[[], Any] = nothing if clock is None else clock.now
        """A stamp of the clock."""
        self._recording = recording()
        self._notes: list[Note] = []
        self._events: list[TimelineEvent] = []
        self._under_way: dict[Action, _Exchange] = {}
        self._open_op: tuple[str, Any] | None = None
        self.gateway: Gateway | None = None  # of the half that runs, where rows are deduplicated

    def bind(
        self, forward: ChunkPlan, backward: ChunkPlan, layout: RowLayout, *, joined: bool, joined_copies: bool = False
    ) -> None:
        """The agreed plans of the step's two halves and what a row carries; `joined`: overlap off, `joined_copies`: of
        copies' weights alone."""
        self._plans = {"forward": forward, "backward": backward}
        self._layout, self._all_joined, self._copies_joined = layout, joined, joined_copies

    def _joined(self, action: Action) -> bool:
        """Whether the exchange is waited for where it starts."""
        return self._all_joined or (self._copies_joined and action.verb in WEIGHTS)

    # ---------------------------------------------------------------- wire

    def begin_backward(self, schedule: str, *, retain_graph: bool) -> None:
        """Tell all ranks that one begins; heard before its first exchange. `schedule`: its text; retain_graph: see
        BackwardRecord."""
        self._backwards += 1
        if self.transport.world_size > 1:
            plan = self._plans["backward"]
            what = digest(schedule, plan.chunks, plan.by, plan.exchange.x_requires_grad)
            record = BackwardRecord(step=plan.exchange.step, run=self._backwards, digest=what,
                                    retain_graph=retain_graph, caller=self._caller)  # fmt: skip
            self._beginning = self.transport.begin_backward(record)
            Variable._execution_engine.queue_callback(ClosingUnlessCalled(self.transport))

    def start(
        self, action: Action, rows: torch.Tensor, out: torch.Tensor | None = None, layout: RowLayout | None = None,
        plan: ChunkPlan | None = None,
    ) -> None:  # fmt: skip
        """Start an exchange. C, Dt, Mt and Wg carry rows back to where they came from. `layout`: of what goes beside
        rows, for those of all chunks at once (M and Mt), or by a `plan` of its own (Wf and Wg)."""
        if self._beginning is not None:
            self._hear_beginning(self._beginning)
        start = self.now()
        if plan is None:
            plan = self._plans[action.spec.phase]
            plan, layout = (plan, self._layout) if layout is None else (plan.cut(1, "tokens"), layout)
        assert layout is not None
        reverse, chunk = action.verb in RETURNING, action.number
        computed = None
        if rows.dtype != layout.dtype:  # the payload's, which is another one
            computed = rows.dtype, out
            rows, out = rows.to(layout.dtype), None
        if self.gateway is not None and reverse and action.verb not in WEIGHTS:
            rows = self.gateway.give_back(chunk, rows, layout, partial(self._inside, action, layout))
        work = self.transport.start(rows, plan, layout, chunk, reverse=reverse, out=out, action=action.text)
        exchange = self._under_way[action] = _Exchange(work, start, layout, computed)
        if self._joined(action):
            self._stand_still(action, exchange)

    def wait(self, action: Action) -> torch.Tensor:
        """The rows of an exchange that was started."""
        exchange = self._under_way.pop(action)
        if not self._joined(action):
            self._stand_still(action, exchange)
        work, layout, end = exchange.work, exchange.layout, exchange.end
        rows, start = work.wait(), exchange.start
        issued = start
        if isinstance(self.clock, HostClock):
            # A transport that cannot tell when bytes moved (one rank: none do) has an interval of length zero.
            start, end = work.interval() or (end, end)
        self.note(action.text, "wire", start, end, issued, last_sender(work))
        if self.gateway is not None and action.verb not in (*RETURNING, *WEIGHTS):
            rows = self.gateway.pass_on(action.number, rows, layout, partial(self._inside, action, layout))
        if exchange.computed is not None:
            dtype, out = exchange.computed
            rows = rows.to(dtype) if out is None else out.copy_(rows)
        return rows

    def _inside(
        self, action: Action, layout: RowLayout, rows: torch.Tensor, plan: InsidePlan, reverse: bool
    ) -> torch.Tensor:
        """The part of an exchange that stays inside the nodes, waited for at once."""
        start = self.now()
        work = self.transport.start(rows, plan, layout, action.number, reverse=reverse,
                                    action=f"{action.text} inside the node")  # fmt: skip
        found = work.wait()
        end = self.now()
        self.note(action.text, "wait", start, end)
        issued = start
        if isinstance(self.clock, HostClock):
            start, end = work.interval() or (end, end)
        self.note(action.text, "wire", start, end, issued, last_sender(work))
        return found

    def _hear_beginning(self, beginning: Announcement) -> None:
        """Wait until all ranks are in this backward. A recorder hears of that time, which is in no schedule; `events`
        are of the schedule alone."""
        self._beginning, start_s = None, time.perf_counter()
        beginning.wait()
        target = recording() or self._recording
        if self.clock is None or target is None or not target.open:
            return
        rank, end_s = self.transport.rank, time.perf_counter()
        event = TimelineEvent(rank, self.step, "backward", "Ut", "wait", start_s, end_s, start_s)
        if isinstance(self.clock, HostClock):
            target.events.append(event)
        else:  # in its place among those of the stream
            target.pending.append(lambda: event)

    def _stand_still(self, action: Action, exchange: _Exchange) -> None:
        """Wait for an exchange, and note the time that takes."""
        start = self.now()
        exchange.work.wait()
        exchange.end = self.now()
        self.note(action.text, "wait", start, exchange.end)

    # ---------------------------------------------------------------- compute

    def act(self, action: Action, body: Callable[..., Any], *arguments: Any, timed: bool = True) -> Any:
        """Run the body of an action: peers learn of an error, and the time is noted where that is the compute lane's
        (`timed`)."""
        start = self.now() if timed and action.lane == COMP else None
        try:
            result = body(*arguments)
        except BaseException as error:
            close_for(error, self.transport, action.text, hint=self._first_hint if action.verb == "Ct" else "")
            raise
        if start is not None:
            self.note(action.text, "comp", start, self.now())
        return result

    def open_op(self, action: str) -> None:
        """The backward of a user's op begins now; it ends when the next node of this step runs."""
        self.close_op()
        self._open_op = (action, self.now())

    def close_op(self) -> None:
        if self._open_op is not None:
            action, start = self._open_op
            self._open_op = None
            self.note(action, "comp", start, self.now())

    # ---------------------------------------------------------------- time

    def note(self, action: str, lane: str, start: Any, end: Any, issued: Any = None, sender: int | None = None) -> None:
        """Record one executed action, between two stamps; `issued`, `sender`: see `TimelineEvent`."""
        if self.clock is None:
            return
        in_backward = self.phase == "forward" and torch._C._current_graph_task_id() >= 0
        self._notes.append(("backward" if in_backward else self.phase, action, lane, start, end, issued, sender))
        # On CUDA backward runs in a thread of the engine: there the recorder of the forward call counts.
        target = recording() or self._recording
        if target is None or not target.open:
            return
        position = len(self._events) + len(self._notes) - 1
        if isinstance(self.clock, HostClock):
            target.events.append(self.events[position])
        else:
            target.pending.append(lambda: self.events[position])

    @property
    def events(self) -> list[TimelineEvent]:
        """What was executed so far. On CUDA this waits for it."""
        for phase, action, lane, start, end, issued, sender in self._notes:
            assert self.clock is not None
            times = self.clock.seconds(start), self.clock.seconds(end)
            issued_s = None if issued is None else self.clock.seconds(issued)
            self._events.append(
                TimelineEvent(self.transport.rank, self.step, phase, action, lane, *times, issued_s, sender)
            )
        self._notes.clear()
        return self._events


def nothing() -> None:
    """The stamp where there is no clock."""


def last_sender(work: Work | Agreement) -> int | None:
    """The rank whose rows came last, of a transport that knows it (see `transport.base.Work`)."""
    known = getattr(work, "last_sender", None)
    found: int | None = None if known is None else known()
    return found


def payload_of(rows: torch.dtype, payload: torch.dtype | None) -> torch.dtype:
    """The dtype in which rows travel: as they are computed, but for float32 ones where another one was asked for."""
    return payload if payload is not None and rows == torch.float32 else rows


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """The dtype of the rows was chosen at the entry; the bodies compute in it, whatever autocast says."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
