"""`assert_overlap` and `why_slow` on steps that were really executed: two gloo ranks over an emulated link, sleeps for
compute, so that what has to come out does not depend on the speed of the machine."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from moe_overlap import ConfigError, MoELayer, OverlapTooLow, ShortcutBlock, assert_overlap, gather_events, why_slow
from moe_overlap.measure.slow import split_waits
from moe_overlap.measure.timeline import record
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.ranks import gloo_pool

D, E, T = 16, 4, 64
LINK = "400kbit:1ms"  # 64 rows of 16 float32 that go to the other rank: about 80 ms
SLEEP_S = 0.2
SLOWER = 4


class Slept(torch.nn.Module):
    """h -> h, after a time in which the core is free."""

    seconds = SLEEP_S

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return h_TD


class SlowLink(EmulatedLinkTransport):
    """One whose bytes are so many times as long on the link, on this rank alone."""

    times = 1

    def _put(self, num_bytes: int) -> tuple[int, int, int]:
        return super()._put(num_bytes * self.times)


def block(seed: int = 0) -> tuple[ShortcutBlock, SlowLink]:
    link = LinkSpec.parse(LINK)
    assert link is not None
    transport = SlowLink(ProcessGroupTransport(timeout_s=30.0), link, NodeTopology(world_size=dist.get_world_size()))
    torch.manual_seed(seed)
    layer = MoELayer(D, D, E, 2, transport=transport)
    # Both ops after the router's tap; experts after the first of them.
    return ShortcutBlock([Slept(), Slept()], layer, tap=0, slot=1), transport


def run(model: ShortcutBlock) -> None:
    with torch.no_grad():
        model(torch.randn(T, D))


def asserted() -> list[str]:
    model, _ = block()
    run(model)
    said = []
    for schedule in (model.schedule, model.schedule.join()):
        model.schedule = schedule
        try:
            with assert_overlap(min=0.5) as result:
                run(model)
            said.append("passed")
            assert result.found is not None and result.found.timeline_overlap >= 0.5
        except OverlapTooLow as error:
            assert error.found.timeline_overlap < 0.5
            said.append(str(error))
    return said


def test_it_passes_with_overlap_and_fails_without():
    """About 80 ms on the wire beside 200 ms of sleep: nearly all of it is hidden, and nothing when joined."""
    for shortcut_said, serial_said in gloo_pool(2).run(asserted):
        assert shortcut_said == "passed"
        assert "of communication had compute beside it, not 50.0%" in serial_said and "longest for" in serial_said


def test_a_block_without_exchanges_fails():
    layer = MoELayer(D, D, E, 2, transport=LocalTransport())
    with pytest.raises(OverlapTooLow, match="no exchange was recorded"), assert_overlap(min=0.1):
        layer(torch.randn(T, D))


def test_an_error_of_the_block_passes():
    with pytest.raises(ZeroDivisionError), assert_overlap(min=0.1):
        raise ZeroDivisionError


@pytest.mark.parametrize("least", [0, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_a_share_that_is_none(least):
    with pytest.raises(ConfigError, match="min"), assert_overlap(min=least):
        pass


def planted() -> list[tuple[str | None, int | None, str]]:
    """Verdicts of a late rank 1, of a slow link of rank 1, and of bytes of rank 1 before the rows."""
    model, transport = block()
    run(model)

    def events():
        dist.barrier()
        with record() as found:
            run(model)
        return gather_events(found)

    usual = [events() for _ in range(3)]
    mine = transport.rank == 1
    steps = []
    Slept.seconds = SLEEP_S * (1 + SLOWER * mine)
    steps.append(events())
    Slept.seconds, transport.times = SLEEP_S, 1 + 12 * mine
    steps.append(events())
    transport.times = 1
    if mine:
        transport.pay(40_000)
    steps.append(events())
    for step in [*usual, *steps]:
        assert {event.rank for event in step} == {0, 1}
        for wait in split_waits(step):
            assert sum(part.seconds for part in wait.parts) == pytest.approx(wait.end_s - wait.start_s)
    found = [why_slow(step, usual) for step in steps]
    return [(one.kind, one.rank, one.action) for one in found]


def test_planted_faults_are_found_in_executed_steps():
    first, second = gloo_pool(2).run(planted)
    assert first == second, "all ranks have the same events"
    (late, late_rank, op), (wire, wire_rank, _), (busy, busy_rank, _) = first
    assert (late, late_rank) == ("late", 1) and op in ("B0", "B1")
    assert (wire, wire_rank) == ("wire", 1)
    assert (busy, busy_rank) == ("contention", 1)


def test_gathered_without_ranks_they_are_what_they_were():
    layer = MoELayer(D, D, E, 2, transport=LocalTransport(), schedule="chunked(2)")  # one chunk runs its ops in a row
    with record() as events:
        layer(torch.randn(T, D))
    assert gather_events(events) == events and len(events) > 0
