"""From the events of a step to the figures of a probe, by hand; and which probes a calibration runs and fits."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from moe_overlap.auto import calibrate as measuring
from moe_overlap.auto.calibrate import StepTimes, _rest, _seconds
from moe_overlap.auto.probe_pairs import CHUNKS, OVERLAPPED
from moe_overlap.measure.timeline import TimelineEvent
from moe_overlap.schedule.actions import Schedule
from tests.auto.planted import OPS, SHAPES, build, cost_model, exchange, planted, step
from tests.ranks import virtual_world

# A step in which the wire is busy from 2 to 6 and 9 to 12 in forward and from 21 to 24 in backward. "N" is the
# agreement; "recompute" is no part of a probe's phases.
EVENTS = [
    ("forward", "N", "wire", 0.0, 1.0),
    ("forward", "P", "comp", 1.0, 2.0),
    ("forward", "B0", "comp", 2.5, 5.0),
    ("forward", "D0", "wait", 5.0, 6.0),
    ("forward", "D0", "wire", 2.0, 6.0),
    ("forward", "E0", "comp", 6.25, 8.25),
    ("forward", "C0", "wait", 9.0, 12.0),
    ("forward", "C0", "wire", 9.0, 12.0),
    ("forward", "U", "comp", 12.0, 12.5),
    ("backward", "Ut", "comp", 20.0, 21.0),
    ("backward", "Ct0", "wait", 21.0, 23.5),
    ("backward", "Ct0", "wire", 21.0, 24.0),
    ("backward", "Ed0", "comp", 23.5, 27.5),
]
FORWARD_S, BACKWARD_S = 14.0, 11.0


def run(events=EVENTS):
    """The step of these events."""
    timeline = [TimelineEvent(0, 1, *event) for event in events]
    return StepTimes(events=timeline, forward_s=FORWARD_S, backward_s=BACKWARD_S, exchange=exchange())


def test_every_figure_of_a_step_by_hand():
    host_s, host_backward_s, hidden_s, compute_s, waited_s, forward_s, backward_s = _rest(run())
    # P 1, B0 2.5, E0 2, U 0.5 and waits of 1 and 3; Ut 1, Ed0 4 and a wait of 2.5.
    assert (host_s, host_backward_s) == (14.0 - 6.0 - 4.0, 11.0 - 5.0 - 2.5)
    assert hidden_s == 2.5 + 0.5, "B0 under D0; Ed0 under the end of Ct0; the agreement hides nothing"
    assert compute_s == 6.0 + 5.0
    assert waited_s == 1.0 + 3.0 + 2.5
    assert (forward_s, backward_s) == (FORWARD_S, BACKWARD_S)


def test_seconds_of_each_action_by_hand():
    actions = [*Schedule.parse("P D0 B0 E0 C0 U"), *Schedule.parse("Ut Ct0 Ed0 Dt0 Pt")]
    assert _seconds(run(), actions) == [1.0, 4.0, 2.5, 2.0, 3.0, 0.5, 1.0, 3.0, 4.0, 0.0, 0.0]


def test_an_action_in_several_pieces_takes_their_sum():
    """A backbone op's backward may be interrupted by other nodes."""
    pieces = [("backward", "Bt0", "comp", 0.0, 1.0), ("backward", "Bt0", "comp", 2.0, 2.5)]
    assert _seconds(run(pieces), Schedule.parse("Bt0")) == [1.5]


def test_where_nobody_knows_when_bytes_moved_the_wait_counts():
    """A transport without intervals: they have length zero."""
    found = [("forward", "D0", "wire", 3.0, 3.0), ("forward", "D0", "wait", 1.0, 3.0)]
    assert _seconds(run(found), Schedule.parse("D0")) == [2.0]


def test_compute_beside_the_agreement_is_not_hidden_communication():
    found = [("forward", "N", "wire", 0.0, 4.0), ("forward", "P", "comp", 1.0, 3.0)]
    assert _rest(run(found))[2:5] == [0.0, 2.0, 0.0]


# ---------------------------------------------------------------- which probes there are


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("world", "groups"), [(2, 4), (4, 2), (8, 1)])
def test_a_ranks_experts_are_cut_into_as_many_groups_as_there_are_up_to_four(world, groups, shape):
    """Eight experts on so many ranks."""
    with planted(cost_model(OPS if shape == "block" else 0)) as calls:
        virtual_world(world).run(lambda me: step(build(shape, me.transport()), me.rank, (3,) * world))
    assert [call["groups"] for call in calls] == [groups] * world


@pytest.mark.parametrize(("world", "groups"), [(2, 4), (8, 1)])
def test_the_probes_that_are_fitted(world, groups):
    """Joined in more and more chunks, one overlapped, and one by groups of experts where a rank has several."""
    fitted = []

    def instead(joined, overlapped, grouped, **_):
        fitted.append((joined, overlapped, grouped))
        return cost_model()

    no_limit = patch.dict(measuring.calibrate.__kwdefaults__, budget_s=1e6)  # on a busy machine fewer probes would run
    with no_limit, patch.object(measuring, "ROUNDS", (1, 1)), patch.object(measuring, "fit", instead):
        virtual_world(world).run(lambda me: step(build("layer", me.transport()), me.rank, (9,) * world))
    assert len(fitted) == world
    for joined, overlapped, grouped in fitted:
        assert [(one.chunks, one.pair.by, one.pair.joined) for one in joined] == [(n, "tokens", True) for n in CHUNKS]
        assert (overlapped.chunks, overlapped.pair.by, overlapped.pair.joined) == (OVERLAPPED, "tokens", False)
        if groups == 1:
            assert grouped is None
        else:
            assert (grouped.chunks, grouped.pair.by, grouped.pair.joined) == (groups, "experts", True)
            assert grouped.shape.by == "experts" and grouped.shape.experts == (1,) * groups
