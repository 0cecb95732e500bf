"""Steps timed by a clock of their own, which goes on when something waits for a wire or for the link to the host, and
when experts compute, and at no other time: so their seconds are known in advance."""

from __future__ import annotations

import pytest

from moe_overlap.auto import calibrate as measuring
from moe_overlap.ops.activation_kinds import register_activation
from moe_overlap.schedule import clocks
from moe_overlap.transport import host_link
from tests.transport.timed import Clock

ROW_S = 1e-3  # of a row in E; in Ed twice as much, where the activation is made again
CLOCK = Clock()


def _slept(h):
    CLOCK.sleep(ROW_S * len(h))
    return h * h


def _slept_backward(da, h):
    CLOCK.sleep(ROW_S * len(h))
    return 2 * da * h


SLEPT = register_activation("square that takes its time", _slept, _slept_backward)


def set_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """From zero, until the end of the test."""
    CLOCK.now_s = 0.0
    for module in (host_link, measuring):
        monkeypatch.setattr(module, "time", CLOCK)
    monkeypatch.setattr(clocks.HostClock, "now", CLOCK.perf_counter)
    monkeypatch.setattr(measuring, "ROUNDS", (1, 1))
