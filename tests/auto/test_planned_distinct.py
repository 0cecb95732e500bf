"""Plain or deduplicated: which of the two a planted model takes, from which integers, and that all ranks take it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_overlap.agreement.distinct import distinct_plan
from moe_overlap.agreement.node_plan import rows_plan
from moe_overlap.auto.calibrate import distinct_shape, step_shape
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.search import evaluate, search
from moe_overlap.planning.shapes import MetadataBytes
from moe_overlap.schedule.check import check, problems
from tests.auto.planted import FREE, choices, cost_model, distinct_costs, line, routed

ROW_BYTES = 128
BESIDE = MetadataBytes(out=40, back=20)
NONE_BESIDE = MetadataBytes(out=0, back=0)


def planned(model, *, dedup="auto", num_ops=0, **options):
    return PlannedSchedule(model=model, num_ops=num_ops, row_bytes=ROW_BYTES, dedup=dedup,
                           **({"metadata": BESIDE} | options))  # fmt: skip


def agreed(top_k=5, world=2, tokens=64, **options):
    return routed([choices(tokens, top_k, seed=rank) for rank in range(world)], **options)


# ---------------------------------------------------------------- which one


def test_fewer_bytes_win_where_the_wire_is_what_a_step_takes():
    found = planned(distinct_costs(cost_model())).planned(agreed())
    assert found.pair.deduplicated and not found.other.pair.deduplicated
    assert found.predicted_s < found.other.predicted_s
    check(found.pair)


@pytest.mark.parametrize("given", [{"permute": line(1e-3)}, {"outside_s": 1.0}, {"outside_backward_s": 1.0},
                                   {"experts_dgrad": line(1e-3)}], ids=str)  # fmt: skip
def test_what_costs_more_than_it_saves_is_not_taken(given):
    """In a window, or outside of all windows."""
    found = planned(distinct_costs(cost_model(), **given)).planned(agreed())
    assert not found.pair.deduplicated and found.other.pair.deduplicated
    assert found.predicted_s < found.other.predicted_s
    assert planned(distinct_costs(cost_model(), **given), dedup="on").pair_for(agreed()).deduplicated


def test_a_tie_is_plain():
    """Nothing takes any time."""
    free = dict.fromkeys(("experts", "experts_dgrad", "experts_wgrad"), FREE)
    model = distinct_costs(cost_model(exchange={"inter": FREE}, **free))
    assert not planned(model).pair_for(agreed()).deduplicated


def test_one_choice_a_token_has_nothing_to_save():
    """The same rows travel, and metadata beside them. Compute costs nothing here: what a rank's own rows take could
    else be hidden, as they wait for nobody, and that wins with one choice too."""
    model = distinct_costs(cost_model(hide=()))
    for beside in (BESIDE, NONE_BESIDE):
        assert not planned(model, metadata=beside).pair_for(agreed(top_k=1)).deduplicated
    assert planned(model).pair_for(agreed(top_k=8)).deduplicated
    assert planned(distinct_costs(cost_model(alpha_s=1e-6))).pair_for(agreed(top_k=1)).deduplicated


def test_each_step_is_asked_anew():
    schedule = planned(distinct_costs(cost_model(hide=())))
    pairs = [schedule.pair_for(one).deduplicated for one in (agreed(8), agreed(1), agreed(8))]
    assert pairs == [True, False, True]


@pytest.mark.parametrize(("dedup", "kinds"), [("on", {True}), ("auto", {True, False})])
def test_what_is_looked_at(dedup, kinds):
    found = planned(distinct_costs(cost_model()), dedup=dedup).planned(agreed())
    seen = {one.pair.deduplicated for one in (found, found.other) if one is not None}
    assert seen == kinds and (found.other is None) == (dedup == "on")
    for one in (found, found.other):
        for phase, candidates in one.candidates.items() if one is not None else ():
            distinct = one.windows[phase].deduplicated
            assert all((" M " in c.order or " Mt " in c.order) == distinct for c in candidates)


def test_off_looks_at_plain_schedules_alone():
    schedule = PlannedSchedule(model=cost_model(), num_ops=0, row_bytes=ROW_BYTES)
    found = schedule.planned(agreed())
    assert found.other is None and not found.pair.deduplicated


def test_overlap_off_runs_the_same_rows():
    """Joined, this step would be faster plain: the planner compares overlapped times, and both runs give equal bits."""
    for given in ({}, {"permute": line(1e-3)}):
        model = distinct_costs(cost_model(), **given)
        on, off = (planned(model, overlap=overlap).pair_for(agreed()) for overlap in (True, False))
        assert off == on.join() and off.joined


def test_a_budget_that_only_fewer_bytes_keep():
    model = distinct_costs(cost_model(), permute=line(1e-3))
    free = planned(model).planned(agreed(top_k=8))
    assert not free.pair.deduplicated
    least = {
        pair: min(c.in_flight_bytes for window in one.windows.values() for c in search(window))
        for pair, one in ((False, free), (True, free.other))
    }
    assert least[True] < least[False]
    found = planned(model, max_in_flight_bytes=least[False] - 1).planned(agreed(top_k=8))
    assert found.pair.deduplicated and found.other is None
    with pytest.raises(ConfigError, match="max_in_flight_bytes"):
        planned(model, max_in_flight_bytes=1).planned(agreed(top_k=8))


def test_half_of_the_own_rows_is_left_for_the_last_combine_where_that_is_faster():
    found = planned(distinct_costs(cost_model()), dedup="on").planned(agreed())
    assert found.pair.forward.text == "P M D0 O E0 C0 Or U"
    window, best = found.windows["forward"], found.candidates["forward"][0]
    assert sum(window.halves_s) == pytest.approx(window.ops_s[0])
    whole = replace(window, halves_s=None)
    assert best.predicted_s < search(whole)[0].predicted_s
    # What a matmul costs by itself is paid twice then.
    dear = distinct_costs(cost_model(), experts=line(2e-7, alpha_s=1e-3))
    found = planned(dear, dedup="on").planned(agreed())
    assert sum(found.windows["forward"].halves_s) == pytest.approx(1e-3 + found.windows["forward"].ops_s[0])
    assert "Or" not in found.pair.forward.text


def test_one_expert_is_not_parted():
    ids = [torch.arange(2, dtype=torch.int32).expand(64, 2)] * 2
    found = planned(distinct_costs(cost_model()), dedup="on").planned(routed(ids, slots=2))
    assert found.windows["forward"].halves_s is None and found.windows["forward"].ops_s[0] > 0


# ---------------------------------------------------------------- from what


def test_all_ranks_take_the_same_and_so_does_a_recompute():
    model = distinct_costs(cost_model(2), permute=line(1e-7))
    first = planned(model, num_ops=2)
    seen = first.pair_for(agreed(world=4))
    other = planned(CostModel.from_json(model.to_json()), num_ops=2)
    assert first.digest == other.digest
    for rank in range(4):
        again = replace(agreed(world=4, rank=rank), step=9, phase="recompute")
        assert other.pair_for(again) == seen and other.pair_for(again).digest == seen.digest


def test_the_digest_tells_settings_apart():
    model = distinct_costs(cost_model())
    found = [
        planned(model), planned(model, dedup="on"), planned(distinct_costs(cost_model(), permute=line(1e-8))),
        planned(cost_model()), planned(model, metadata=MetadataBytes(out=40, back=24)),
    ]  # fmt: skip
    assert len({one.digest for one in found}) == len(found)


def by_hand():
    """Two ranks with two experts each. Token 0 of rank 0 chose all four, token 1 those of rank 1, token 2 expert 3 and
    0; rank 1 has one token, of experts 0 and 1."""
    first = torch.tensor([[0, 1, 2, 3], [2, 3, -1, -1], [3, 0, -1, -1]], dtype=torch.int32)
    return routed([first, torch.tensor([[0, 1, -1, -1]], dtype=torch.int32)], slots=4)


def test_the_integers_of_a_deduplicated_step_by_hand():
    plan = by_hand().chunked(1)
    shape = distinct_shape(plan, row_bytes=100, metadata=BESIDE)
    # Rows of experts: rank 0 has 3 own ones and 2 of rank 1, rank 1 has 5 of rank 0. Of all 10 choices 3 stay.
    assert step_shape(plan, row_bytes=100).rows == (5,)
    assert (shape.rows, shape.distinct.own_rows, shape.distinct.own_experts) == ((4,), 1, 2)
    assert shape.bytes_by_lane == shape.distinct.back_by_lane == {"inter": (300,)}, (
        "of three tokens, not of five choices"
    )
    assert shape.distinct.metadata_by_lane == {"inter": 120} and shape.distinct.gradients_by_lane == {"inter": 60}
    assert shape.slots_rows == 8


def test_by_groups_of_experts_by_hand():
    shape = distinct_shape(by_hand().chunked(2, "experts"), row_bytes=100, metadata=BESIDE, joined=True)
    # To rank 1: tokens 0 and 1 with expert 2, token 2 with expert 3; all three come back with expert 3.
    assert shape.bytes_by_lane == {"inter": (200, 100)} and shape.distinct.back_by_lane == {"inter": (0, 300)}


@pytest.mark.parametrize(("chunks", "by"), [(1, "tokens"), (4, "tokens"), (3, "experts")])
def test_bytes_are_those_of_the_rows_that_travel(chunks, by):
    """Against the plans of the ranks, which say what each sends."""
    steps = [agreed(world=4, tokens=37, top_k=3, slots=16, rank=rank) for rank in range(4)]
    shape = distinct_shape(steps[0].chunked(chunks, by), row_bytes=1, metadata=BESIDE, joined=True)
    plans = [distinct_plan(one, chunks, by) for one in steps]
    for chunk in range(chunks):
        for reverse, found in ((False, shape.bytes_by_lane), (True, shape.distinct.back_by_lane)):
            both = [plan.counts(chunk, reverse=reverse) for plan in plans]
            assert found["inter"][chunk] == max(sum(rows) for pair in both for rows in pair)


@pytest.mark.parametrize(("chunks", "by"), [(1, "tokens"), (4, "tokens"), (3, "experts")])
def test_bytes_of_rows_that_cross_nodes_once_are_those_of_both_exchanges(chunks, by):
    steps = [agreed(world=4, tokens=37, top_k=5, slots=16, rank=rank, nodes=2) for rank in range(4)]
    shape = distinct_shape(steps[0].chunked(chunks, by), row_bytes=1, metadata=BESIDE, joined=True)
    plans = [rows_plan(one, chunks, by) for one in steps]
    inside = shape.distinct.inside
    for chunk in range(chunks):
        for reverse, across, passed_on in ((False, shape.bytes_by_lane, inside.out),
                                           (True, shape.distinct.back_by_lane, inside.back)):  # fmt: skip
            for found, parts in ((across["inter"], plans), (passed_on, [plan.inside for plan in plans])):
                both = [(rank, part.counts(chunk, reverse=reverse)) for rank, part in enumerate(parts)]
                assert found[chunk] == max(sum(rows) - rows[rank] for rank, pair in both for rows in pair)
    assert (inside.metadata, inside.gradients) == (sum(inside.out) * BESIDE.out, sum(inside.out) * BESIDE.back)


@pytest.mark.parametrize(("chunks", "by"), [(1, "tokens"), (4, "tokens"), (3, "experts")])
def test_what_gateways_keep_is_no_less_than_their_buffers(chunks, by):
    """`Gateway._rows` and `Gateway._sums` of every rank; the bound adds up the most of both."""
    steps = [agreed(world=4, tokens=37, top_k=5, slots=16, rank=rank, nodes=2) for rank in range(4)]
    nodes, plans = (0, 0, 1, 1), [rows_plan(one, chunks, by) for one in steps]
    kept = {distinct_shape(one.chunked(chunks, by), row_bytes=8, metadata=BESIDE, nodes=nodes).distinct.gateway.kept
            for one in steps}  # fmt: skip
    rows = [plan.gateway_arrivals[-1] for plan in plans]
    sums = [sum(map(sum, plan.inside.back[0])) for plan in plans]
    crossing = [sum(plan.exchange.off_node(plan.counts(c, reverse=reverse)[way]) for c in range(chunks))
                for plan in plans for reverse in (False, True) for way in (0, 1)]  # fmt: skip
    assert kept == {8 * (max(crossing) + max(sums)) if chunks > 1 else 0}
    assert chunks == 1 or (max(rows) > 0 and min(kept) >= 8 * max(a + b for a, b in zip(rows, sums, strict=True)))


def test_buffers_of_gateways_count_in_the_budget():
    """Of what a schedule in several chunks holds; one chunk keeps nothing."""
    step = routed([choices(64, 5, seed=rank) for rank in range(4)], nodes=2)
    schedule = planned(distinct_costs(cost_model()), dedup="on")
    found = schedule.planned(step)
    assert all(cut.kept_bytes > 0 for cut in found.windows["forward"].chunkings if cut.chunks > 1)
    for phase, problem in found.windows.items():
        for one in search(problem):
            cut = found.windows[phase].chunking(one.chunks, one.by)
            under_way = max(cut.chunk_bytes) if one.joined else sum(cut.chunk_bytes)
            assert one.in_flight_bytes == under_way + cut.kept_bytes and (one.chunks > 1) == (cut.kept_bytes > 0)
    least = min(one.in_flight_bytes for one in search(found.windows["forward"]))
    tight = planned(distinct_costs(cost_model()), dedup="on", max_in_flight_bytes=least).planned(step)
    assert {one.in_flight_bytes for one in tight.candidates["forward"]} == {least}
    with pytest.raises(ConfigError, match="max_in_flight_bytes"):
        planned(distinct_costs(cost_model()), dedup="on", max_in_flight_bytes=least - 1).planned(step)


def test_what_is_passed_on_may_cost_more_than_it_saves():
    """Dear exchanges inside the nodes: the plain step is faster."""
    step = routed([choices(64, 5, seed=rank) for rank in range(4)], nodes=2)
    model = distinct_costs(cost_model())
    assert planned(model).pair_for(step).deduplicated
    dear = replace(model, distinct=replace(model.distinct, inside=line(1e-6)))
    assert not planned(dear).pair_for(step).deduplicated


def test_nodes_have_their_own_wires():
    shape = distinct_shape(agreed(world=4).chunked(1), row_bytes=1, metadata=BESIDE, nodes=(0, 0, 1, 1))
    assert set(shape.bytes_by_lane) == set(shape.distinct.metadata_by_lane) == {"inter", "intra"}
    assert all(size > 0 for size in shape.distinct.metadata_by_lane.values())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_chosen_runs_and_takes_what_was_predicted(seed):
    draw = np.random.default_rng(seed)

    def some():
        return line(float(10 ** draw.uniform(-9, -6)), float(draw.choice([0.0, 1e-6, 1e-4])))

    num_ops = int(draw.integers(0, 4))
    names = ("experts", "experts_dgrad", "experts_wgrad", "permute", "unpermute")
    model = cost_model(num_ops, exchange={"inter": some()}, issue_s=float(draw.choice([0.0, 1e-5])),
                       **{name: some() for name in names})  # fmt: skip
    schedule = planned(distinct_costs(model, inside=some(), **{name: some() for name in names}), num_ops=num_ops)
    for world, tokens, top_k, grad, nodes in ((2, 50, 5, True, 0), (4, 7, 3, False, 0), (2, 0, 2, True, 0),
                                              (4, 30, 4, True, 2)):  # fmt: skip
        found = schedule.planned(agreed(top_k, world, tokens, grad=grad, nodes=nodes))
        for one in (found, found.other):
            check(one.pair)
            for phase, window in one.windows.items():
                best = one.candidates[phase][0]
                order = one.pair.forward if phase == "forward" else one.pair.backward
                assert not problems(order, chunks=best.chunks)
                again = evaluate(window, order, chunks=best.chunks, by=best.by, joined=best.joined)
                if one.pair.joined or not best.joined:
                    assert again == best.predicted_s
        assert found.predicted_s <= found.other.predicted_s * (1 + 1e-9)
