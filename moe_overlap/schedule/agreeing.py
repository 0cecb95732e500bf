"""An agreement under way (N), as a step knows it: what it waits for, and when that was on the wire."""

from __future__ import annotations

from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.schedule.clocks import HostClock
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.lanes import Lanes, last_sender
from moe_overlap.transport.base import Agreement


class Agreeing:
    """N of one step: begun where this is made."""

    def __init__(self, dispatcher: Dispatcher, agreement: Agreement, lanes: Lanes) -> None:
        self._dispatcher, self._agreement, self._lanes = dispatcher, agreement, lanes
        self._start = lanes.now()
        self._plan: ExchangePlan | None = None

    def hear(self) -> ExchangePlan:
        """The agreed counts, waited for once. Raises as `Dispatcher.finish`."""
        if self._plan is None:
            lanes, begin = self._lanes, self._lanes.now()
            self._plan = self._dispatcher.finish(self._agreement)
            start, end = self._start, lanes.now()
            lanes.note("N", "wait", begin, end)
            if isinstance(lanes.clock, HostClock):
                start, end = self._agreement.interval() or (start, end)
            lanes.note("N", "wire", start, end, self._start, last_sender(self._agreement))
        return self._plan
