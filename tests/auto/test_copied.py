"""Schedules of steps with copies of experts: priced with what travels for them, and chosen by that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.seats import seats_of
from moe_overlap.auto.copied import CopiesKind, copies_kind
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.placement import Placement
from moe_overlap.planning.copied import with_copies_priced
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import _seconds, evaluate, search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, with_copies
from moe_overlap.schedule.check import makespan_s, problems
from tests.auto.planted import cost_model, exchange
from tests.layers import make, tokens
from tests.ranks import virtual_world
from tests.tolerances import close

ROW_BYTES = 128
# Expert 0 is also on ranks 1 and 2, expert 3 on rank 0.
COPIED = Placement.of_ranks([[0, 1, 3], [2, 3, 0], [4, 5, 0], [6, 7]], homes=[0, 0, 1, 1, 2, 2, 3, 3])
# Expert 0 is everywhere: from its home three times, or once in each of two groups.
HOT = Placement.of_ranks([[0, 1], [2, 3, 0], [4, 5, 0], [6, 7, 0]], homes=[0, 0, 1, 1, 2, 2, 3, 3])
EXPERT_BYTES = (100_000, 200_000)


def step(placement=COPIED, *, rows=3, **changes):
    """An agreed step in which every seat of a rank gets rows of every block of every rank."""
    seats = seats_of(placement)
    counts = np.full((placement.world_size, BLOCKS, seats.num_seats), rows)
    return replace(exchange(counts), **{"seats": seats, "weights_require_grad": True, **changes})


def planned(**options):
    num_ops = options.get("num_ops", 0)
    model = cost_model(num_ops, backbone_s=(3e-4,) * num_ops, issue_s=options.pop("issue_s", 0.0))
    return PlannedSchedule(model=model, row_bytes=ROW_BYTES, **{"num_ops": 0, "expert_bytes": EXPERT_BYTES, **options})


@pytest.mark.parametrize("nodes, lanes", [(None, (("inter", 2),)), ((0, 0, 1, 1), (("inter", 1), ("intra", 1)))])
def test_copies_are_counted_at_the_busiest_port(nodes, lanes):
    assert copies_kind(step(), nodes) == CopiesKind(by_lane=lanes, fetched=True, returned=True)
    assert copies_kind(exchange(), nodes) is None
    assert copies_kind(step(Placement.identity(8, 4)), nodes) is None


@pytest.mark.parametrize("num_ops", [0, 2])
def test_what_is_predicted_is_the_makespan_of_the_very_schedules_that_run(num_ops):
    found = planned(num_ops=num_ops).planned(step())
    runs = with_copies(found.pair, 1, True)
    more = {"Wf0": 2 * EXPERT_BYTES[0] * 1e-9, "Wd": 0.0, "Wg": 2 * EXPERT_BYTES[1] * 1e-9, "Wa": 0.0}
    for phase, schedule in (("forward", runs.forward), ("backward", runs.backward)):
        best, window = found.best(phase), found.windows[phase]
        seconds = _seconds(window, window.chunking(best.chunks, best.by)) | more
        assert best.predicted_s == pytest.approx(makespan_s(schedule, seconds, joined=best.joined), rel=1e-12)
        assert best.predicted_s >= more["Wf0" if phase == "forward" else "Wg"] > 0
        assert best.predicted_s >= found.candidates[phase][0].predicted_s  # equal where an op hides all of it
    assert found.predicted_s == pytest.approx(sum(found.best(phase).predicted_s for phase in found.windows))


@pytest.mark.parametrize("nodes", [None, (0, 0, 1, 1)])
def test_relayed_copies_are_counted_by_group(nodes):
    size = 0 if nodes is None else 2
    kind = copies_kind(step(HOT, ranks_per_node=size), nodes)
    if nodes is None:
        assert kind.by_lane == (("inter", 3),) and kind.relayed == ((("inter", 1),), (("inter", 1),))
    else:
        assert kind.by_lane == (("inter", 2), ("intra", 1))
        assert kind.relayed == ((("inter", 1), ("intra", 0)), (("inter", 0), ("intra", 1)))


@pytest.mark.parametrize("num_ops", [0, 2, 3])
@pytest.mark.parametrize("issue_s", [0.0, 2e-5])
def test_two_groups_run_where_they_are_faster_and_are_predicted_as_they_run(num_ops, issue_s):
    found = planned(num_ops=num_ops, issue_s=issue_s).planned(step(HOT))
    best, window = found.best("forward"), found.windows["forward"]
    one, two = (
        min(other.predicted_s for other in found.copied["forward"] if other.relayed == relayed)
        for relayed in (False, True)
    )
    assert best.relayed == found.pair.relayed_copies == (two < one)
    assert best.relayed == (num_ops == 0), "under ops of 0.3 ms three copies of 0.1 ms cost nothing"
    assert not found.best("backward").relayed, "gradients go home directly"
    runs = with_copies(found.pair, 1 + best.relayed, True)
    assert ("Wf1" in runs.forward.text) == best.relayed
    if issue_s == 0.0:
        groups = {"Wf0": 1e-4, "Wf1": 1e-4} if best.relayed else {"Wf0": 3e-4}
        seconds = _seconds(window, window.chunking(best.chunks, best.by)) | groups
        assert best.predicted_s == pytest.approx(makespan_s(runs.forward, seconds, joined=best.joined), rel=1e-12)


def test_a_layer_runs_and_explains_the_form_that_was_chosen():
    schedule = planned()

    def rank(me):
        found = []
        for chosen in (schedule, chunked(2)):
            layer = make(me.transport(), placement=HOT)
            with torch.no_grad():
                homes = list(seats_of(HOT).homes[me.rank])
                for weight, whole in zip(layer.expert_weights, make().expert_weights, strict=True):
                    weight.copy_(whole[homes])
            layer.schedule = replace(chosen) if chosen is schedule else chosen
            x = tokens(9, me.rank).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
            if chosen is schedule:
                assert layer.stats().schedule.startswith("Wf0 P Wf1 ")
                assert "With copies, sent from rank to rank, in two groups, this schedule" in layer.explain()
        for one, other in zip(*found, strict=True):
            close(one, other)

    virtual_world(4).run(rank)


def test_an_op_goes_where_it_hides_the_weights():
    """Before the experts and after them an op hides the same rows; weights are hidden before them alone."""
    found = planned(num_ops=1).planned(step())
    order = found.best("forward").order.split()
    assert order.index("B0") < order.index("E0")
    window = found.windows["forward"]
    behind = next(
        one for one in found.copied["forward"] if one.order.split().index("B0") > one.order.split().index("E0")
    )
    assert behind.predicted_s > found.best("forward").predicted_s + 1e-4
    plain = evaluate(window, Schedule.parse(behind.order), chunks=behind.chunks, by=behind.by, joined=behind.joined)
    assert plain < behind.predicted_s


@pytest.mark.parametrize(
    "changes, phases",
    [({}, {"forward", "backward"}), ({"weights_require_grad": False}, {"forward"}), ({"grad_enabled": False}, set()),
     ({"grad_enabled": False, "copies_kept": False}, {"forward"})],
)  # fmt: skip
def test_only_what_travels_is_priced(changes, phases):
    schedule = planned()
    assert set(schedule.planned(step(**changes)).copied) == phases
    assert schedule.planned(exchange(np.full((4, BLOCKS, 12), 3))).copied == {}, "another kind of step"


def test_ranks_that_price_copies_otherwise_are_told_apart():
    assert planned().digest != planned(expert_bytes=(1, 2)).digest


def test_gradients_of_copies_wait_for_the_rows_that_stay():
    """Deduplicated and with nothing else to put beside the last exchange, a search leaves these rows for it."""
    cut = Chunking(chunks=1, by="tokens", first_s=(0.2,), experts_s=(1.0,), second_s=(1.0,), deferred_s=(0.3,))
    window = Window(phase="backward", head_s=0.1, tail_s=0.1, ops_s=(0.5,), metadata_s=0.1, chunkings=(cut,))
    best = search(window)[0]
    assert best.order.split().index("Od") > best.order.split().index("Dt0")
    (priced, *_) = with_copies_priced(window, [best], [[10.0]])
    # Head, Ct, Ed, Mt and Dt, behind which Wg has the wire; Ew and Pt are done before it is.
    assert priced.predicted_s == pytest.approx(0.1 + 0.2 + 1.0 + 0.1 + 1.0 + 10.0)
    backward = with_copies(pair_of(replace(best, order="P D0 E0 C0 U"), best, num_ops=0, op_verb="B"), 0, True).backward
    assert [action.text for action in backward] == "Ut Ct0 Ed0 Mt Dt0 Od Wd Wg Ew0 Pt Wa".split()
    assert not problems(backward, chunks=1)
