"""Rows passed on inside their nodes on a lane of their own, by hand and beside the schedules that wait for that."""

from __future__ import annotations

import pytest

from moe_overlap.commands.plan.alternatives import alternatives
from moe_overlap.commands.plan.machine import cost_model, place, shapes
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import Hops, window
from moe_overlap.planning.search import search
from moe_overlap.planning.three_lanes import _simulated_s, three_lanes_s
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule

TWO_NODES = PlanOptions(ranks=16, experts=64, top_k=8, tokens=2048, hidden=1024, ffn=512, dedup="node", issue=0.0,
                        compute_slowdown=1.0, wire_slowdown=1.0, intra_bandwidth=100e9)  # fmt: skip


def problem(
    chunks: int, across: float, experts: float, hop: float, *, back: float | None = None, **more: object
) -> tuple[Window, Hops]:
    """Equal chunks, whose experts wait for a hop on either side."""
    second_s = (across if back is None else back,) * chunks
    cut = Chunking(chunks=chunks, by="tokens", first_s=(across,) * chunks, second_s=second_s,
                   experts_s=(experts + 2 * hop,) * chunks)  # fmt: skip
    given = {"phase": "forward", "head_s": 0.5, "tail_s": 0.25, "chunkings": (cut,)} | more
    return Window(**given), Hops(out=(hop,) * chunks, back=(hop,) * chunks)


def test_one_chunk_is_one_thing_after_the_other():
    assert _simulated_s(*problem(1, 2.0, 3.0, 1.0), 0) == pytest.approx(0.5 + 2 + 1 + 3 + 1 + 2 + 0.25)
    joined = search(problem(1, 2.0, 3.0, 1.0)[0])[0]
    assert joined.predicted_s == pytest.approx(_simulated_s(*problem(1, 2.0, 3.0, 1.0), 0))


def test_all_three_lanes_are_busy():
    """Every step takes a second: the lane inside has eight, between D0 and C3."""
    assert _simulated_s(*problem(4, 1.0, 1.0, 1.0, head_s=0.0, tail_s=0.0), 0) == pytest.approx(10.0)
    waited = search(problem(4, 1.0, 1.0, 1.0, head_s=0.0, tail_s=0.0)[0])[0]
    assert waited.predicted_s >= 1 + 4 * 3 + 1, "on the compute lane each chunk takes three"


def test_ops_stand_before_or_after_the_experts():
    """An op of 2 s and two chunks of 1 s, with the long exchange behind the experts, or ahead of them."""
    long_back = problem(2, 0.5, 1.0, 0.0, back=2.0, head_s=0.0, tail_s=0.0, ops_s=(2.0,))
    assert [_simulated_s(*long_back, before) for before in (0, 1)] == pytest.approx([0.5 + 1 + 2 + 2, 2 + 1 + 2 + 2])
    long_out = problem(2, 2.0, 1.0, 0.0, back=0.5, head_s=0.0, tail_s=0.0, ops_s=(2.0,))
    assert [_simulated_s(*long_out, before) for before in (0, 1)] == pytest.approx([2 + 2 + 1 + 2, 2 + 2 + 1 + 0.5])


def test_starting_waiting_and_slowdowns_count():
    free = _simulated_s(*problem(2, 1.0, 1.0, 0.5), 0)
    issued = _simulated_s(*problem(2, 1.0, 1.0, 0.5, issue_s=0.01), 0)
    slowed = _simulated_s(*problem(2, 1.0, 1.0, 0.5, slowdown=Slowdown(compute=1.5, wire=1.5)), 0)
    assert free < issued <= free + 8 * 0.01 + 1e-9 and free < slowed <= 1.5 * free


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_waits_takes_longer_by_what_it_waits_for(phase):
    at = place(TWO_NODES, ranks=16, bytes_per_s=TWO_NODES.bandwidth)
    model = cost_model(TWO_NODES, "top2", at)
    cuts = [cut for cut in shapes(TWO_NODES, "top2", at, distinct=True) if cut.by == "tokens"]
    here = {
        one.chunkings[0].chunks: search(one)[0].predicted_s for one in (window(model, [cut], phase) for cut in cuts)
    }
    three = {cut.chunks: three_lanes_s(model, cut, phase) for cut in cuts}
    assert three[1] == pytest.approx(here[1], rel=0.02), "in one chunk there is nothing beside it but ops"
    for cut in cuts[1:]:
        hops = model.hops_s(cut, phase)
        assert here[cut.chunks] - sum(hops.out) - sum(hops.back) <= three[cut.chunks] < here[cut.chunks]


def test_steps_without_such_exchanges_are_refused():
    at = place(TWO_NODES, ranks=16, bytes_per_s=TWO_NODES.bandwidth)
    model = cost_model(TWO_NODES, "top2", at)
    with pytest.raises(ConfigError, match="cross nodes once"):
        three_lanes_s(model, shapes(TWO_NODES, "top2", at)[0], "forward")


def test_the_planner_cuts_what_crosses_nodes_beside_what_stays_in_them():
    """FSMoE's order with two lanes (docs/schedules.md), and what a third would give among what else would."""
    one = asked(TWO_NODES, "top2")
    chunks = one.phases[0].best
    assert one.deduplicated and chunks.chunks > 1 and not chunks.joined and chunks.by == "tokens"
    words = [action.text for action in Schedule.parse(chunks.order)]
    assert words.index("D1") < words.index("E0")
    (third,) = [other for other in alternatives(TWO_NODES, one) if "beside compute" in other.what]
    assert third.seconds < one.time_s
