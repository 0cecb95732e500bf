"""From a cost model and agreed counts to schedules: pure, never worse than serial, and always one that can run."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.auto.kinds import StepKind, rounded
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.planning.cost_model import LEAST, CostModel, window
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import evaluate, search
from moe_overlap.planning.window import Slowdown
from moe_overlap.schedule.builders import serial
from moe_overlap.schedule.check import check, problems
from tests.auto.planted import BACKWARD, FORWARD, cost_model, exchange, line

ROW_BYTES = 128


def planned(model, *, num_ops=0, op_verb="B", **options):
    return PlannedSchedule(model=model, num_ops=num_ops, op_verb=op_verb, row_bytes=ROW_BYTES, **options)


def candidates(phase, num_ops=0, op_verb="B"):
    """Everything the search proposes, over models of different balance."""
    found = {}
    for beta_s in (1e-10, 1e-9, 1e-8):
        model = cost_model(num_ops, exchange={"inter": line(beta_s, 1e-6)}, shared_s=3e-5, shared_backward_s=6e-5)
        kind = StepKind(grad=True, rows=768, slots_rows=384, bytes_by_lane=(("inter", 49152),), local_experts=4,
                        shares=(), row_bytes=ROW_BYTES)  # fmt: skip
        problem = window(model, kind.shapes(), phase, op_verb=op_verb, num_ops=num_ops)
        found |= {(one.order, one.joined): one for one in search(problem)}
    return list(found.values())


@pytest.mark.parametrize(("num_ops", "op_verb"), [(0, "B"), (1, "B"), (4, "B"), (0, "S")])
def test_every_combination_of_the_two_phases_can_run(num_ops, op_verb):
    forward, backward = (candidates(phase, num_ops, op_verb) for phase in ("forward", "backward"))
    assert {(one.chunks, one.joined) for one in forward} >= {(1, True), (2, False), (16, False)}
    for one, other in itertools.product(forward, [*backward, None]):
        pair = pair_of(one, other, num_ops=num_ops, op_verb=op_verb)
        check(pair)
        assert pair.num_ops == num_ops and pair.has_shared == (op_verb == "S")
        assert pair.joined == (one.joined and (other is None or other.joined))
        assert (pair.chunks, pair.by) == (one.chunks, one.by)
        assert (pair.backward_chunks, pair.backward_by) == ((other or one).chunks, (other or one).by)
        for schedule, candidate in ((pair.forward, one), (pair.backward, other)):
            if candidate is not None and (pair.joined or not candidate.joined):
                assert schedule.text == candidate.order


@pytest.mark.parametrize("num_ops", [0, 3])
def test_a_joined_phase_beside_an_overlapped_one_has_nothing_beside_its_exchanges(num_ops):
    """Its exchanges are waited for by the action right behind them, as where they are joined."""
    forward, backward = (
        [one for one in candidates(phase, num_ops) if one.joined and one.chunks == 1]
        for phase in ("forward", "backward")
    )
    apart = next(one for one in candidates("backward", num_ops) if not one.joined)
    text = pair_of(forward[0], apart, num_ops=num_ops, op_verb="B").forward.text
    assert text.split() == ["P", "D0", "E0", "C0", "U", *(f"B{op}" for op in range(num_ops))]
    apart = next(one for one in candidates("forward", num_ops) if not one.joined)
    text = pair_of(apart, backward[0], num_ops=num_ops, op_verb="B").backward.text
    ops = [f"Bt{op}" for op in reversed(range(num_ops))]
    assert text.split() == ["Ut", "Ct0", "Ed0", "Dt0", "Pt", "Ew0", *ops]


def test_rounding_keeps_five_binary_digits():
    for count in range(5000):
        assert abs(rounded(count) - count) <= count / 32
        assert rounded(rounded(count)) == rounded(count)
    assert [rounded(count) for count in (0, 1, 31, 32, 33, 1 << 40)] == [0, 1, 31, 32, 34, 1 << 40]
    assert all(rounded(count) <= rounded(count + 1) for count in range(5000))


def test_the_same_counts_give_the_same_schedules_whoever_asks():
    counts = np.random.default_rng(3).integers(0, 40, (4, 16, 8))
    first, second = planned(cost_model()), planned(CostModel.from_json(cost_model().to_json()))
    seen = first.pair_for(exchange(counts))
    assert seen == second.pair_for(replace(exchange(counts), rank=3, step=9, phase="recompute"))
    assert first.digest == second.digest
    assert seen.digest == second.pair_for(exchange(counts)).digest


def test_only_sums_that_all_ranks_know_count():
    """Which blocks the rows come from changes nothing, nor what rounding takes away."""
    counts = np.random.default_rng(4).integers(10, 40, (2, 16, 8)) * 64
    schedule = planned(cost_model())
    moved = counts[:, ::-1].copy()
    moved[0, 0, 0] += 1
    assert schedule.planned(exchange(counts)) is schedule.planned(exchange(moved))


def test_the_digest_tells_models_and_settings_apart():
    base = planned(cost_model())
    others = [
        planned(cost_model(alpha_s=LEAST)),
        planned(replace(cost_model(), slowdown=Slowdown(compute=1.5))),
        planned(cost_model(), overlap=False),
        planned(cost_model(), op_verb="S"),
        planned(cost_model(2), num_ops=1),
        replace(base, row_bytes=2 * ROW_BYTES),
    ]
    assert len({base.digest, *(one.digest for one in others)}) == 1 + len(others)


@pytest.mark.parametrize(("num_ops", "op_verb"), [(0, "B"), (3, "B"), (0, "S")])
@pytest.mark.parametrize("seed", range(8))
def test_never_predicted_worse_than_serial(seed, num_ops, op_verb):
    draw = np.random.default_rng(seed)

    def some(low=-9, high=-6):
        return line(float(10 ** draw.uniform(low, high)), float(draw.choice([0.0, 1e-6, 1e-4])))

    names = ("experts", "experts_dgrad", "experts_wgrad", "permute", "unpermute")
    given = {name: some() for name in names} | {"exchange": {"inter": some(-10, -7)}}
    issue_s, slowdown = float(draw.choice([0.0, 1e-6, 1e-4])), Slowdown(compute=float(draw.uniform(1, 3)))
    model = cost_model(num_ops, issue_s=issue_s, slowdown=slowdown, **given)
    schedule = planned(model, num_ops=num_ops, op_verb=op_verb)
    for counts in (None, draw.integers(0, 50, (2, 16, 8)), np.zeros((2, 16, 8))):
        found = schedule.planned(exchange(counts))
        for phase, problem in found.windows.items():
            plain = next(one for one in search(problem) if one.joined and one.chunks == 1)
            chosen = found.candidates[phase][0]
            assert chosen.predicted_s <= plain.predicted_s * (1 + 1e-9)
            order = found.pair.forward if phase == "forward" else found.pair.backward
            again = evaluate(problem, order, chunks=chosen.chunks, by=chosen.by, joined=chosen.joined)
            if found.pair.joined or not chosen.joined:
                assert again == chosen.predicted_s
        check(found.pair)


def test_a_free_wire_is_not_overlapped_and_one_chunk_is_serial():
    found = planned(cost_model(exchange={"inter": line(0.0)})).planned(exchange())
    assert found.pair.joined and found.pair.chunks == found.pair.backward_chunks == 1
    assert found.pair.forward == serial().forward
    assert {action.verb for action in found.pair.backward} == {action.verb for action in serial().backward}


def test_without_gradients_only_forward_is_planned():
    found = planned(cost_model(2), num_ops=2).planned(exchange(grad=False))
    assert set(found.windows) == set(found.candidates) == {"forward"}
    assert found.pair.backward_chunks == found.pair.chunks
    assert not problems(found.pair.backward, chunks=found.pair.chunks)


def test_phases_are_planned_apart():
    forward = planned(cost_model(hide=FORWARD)).pair_for(exchange())
    assert forward.chunks > 1 and forward.backward_chunks == 1 and not forward.joined
    backward = planned(cost_model(hide=BACKWARD)).pair_for(exchange())
    assert backward.backward_chunks > 1 and backward.chunks == 1 and not backward.joined


def test_overlap_off_joins_what_was_chosen():
    on = planned(cost_model()).pair_for(exchange())
    off = planned(cost_model(), overlap=False).pair_for(exchange())
    assert off == on.join() and not on.joined


@pytest.mark.parametrize(("num_ops", "num_ahead", "op_verb"), [(1, 1, "B"), (4, 1, "B"), (4, 4, "B"), (0, 1, "S")])
@pytest.mark.parametrize("grad", [True, False])
def test_ops_ahead_of_the_agreement_are_in_no_window_of_forward(num_ops, num_ahead, op_verb, grad):
    for beta_s in (1e-10, 1e-9, 1e-8):
        model = cost_model(num_ops, exchange={"inter": line(beta_s, 1e-6)}, shared_s=3e-5, shared_backward_s=6e-5,
                           outside_s=1e-4, agree_s=1e-5)  # fmt: skip
        schedule = planned(model, num_ops=num_ops, op_verb=op_verb, num_ahead=num_ahead)
        assert schedule.digest != planned(model, num_ops=num_ops, op_verb=op_verb).digest
        found = schedule.planned(exchange(grad=grad))
        check(found.pair)
        assert found.pair.ahead == schedule.ahead and len(schedule.ahead) == num_ahead
        assert (found.pair.num_ops, found.pair.has_shared) == (num_ops, op_verb == "S")
        assert found.windows["forward"].ops_s == model.backbone_s[num_ahead:]
        ahead_s = 3e-5 if op_verb == "S" else num_ahead * 1e-6
        assert found.outside_s["forward"] == pytest.approx(1e-4 + max(0.0, ahead_s - 1e-5))
        if grad:
            assert len(found.windows["backward"].ops_s) == (num_ops or 1)


def test_a_larger_step_may_be_cut_otherwise():
    schedule = planned(cost_model(alpha_s=2e-6))
    cuts = [schedule.pair_for(exchange(rows=rows)).chunks for rows in (0, 1, 8, 64, 512)]
    assert cuts == sorted(cuts) and len(set(cuts)) > 2


@pytest.mark.parametrize("op_verb", ["B", "S"])
def test_ops_beside_the_exchanges_grow_with_the_tokens(op_verb):
    """They were measured at the first step; the exchanges of a later one may be twice as long, and so are they."""
    step = exchange()
    ops = 2 if op_verb == "B" else 0
    model = cost_model(ops, shared_s=3e-6, shared_backward_s=5e-6)
    fixed, growing = (
        planned(one, num_ops=ops, op_verb=op_verb).planned(step).windows
        for one in (model, replace(model, measured_rows=192.0))
    )
    for phase in ("forward", "backward"):
        assert growing[phase].ops_s == tuple(2 * seconds for seconds in fixed[phase].ops_s), "384 rows, not 192"
        assert fixed[phase].ops_s


def test_the_digest_knows_the_nodes():
    model = cost_model(exchange={"inter": line(1e-9), "intra": line(1e-10)})
    digests = {planned(model, nodes=nodes).digest for nodes in (None, (0, 0), (0, 1))}
    assert len(digests) == 3


def fluctuating(seed, *, world=8, slots=64, tokens=1024):
    """A step of balanced routing: every token draws its expert anew."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(2 * tokens // BLOCKS, [1 / slots] * slots, size=(world, BLOCKS))


def test_routing_that_only_fluctuates_stays_of_one_kind_or_few():
    schedule = planned(cost_model(alpha_s=1e-6))
    found = {id(schedule.planned(exchange(fluctuating(seed), world=8, slots=64))) for seed in range(40)}
    assert len(found) <= 12


def test_a_hot_expert_is_seen_in_its_group():
    counts = np.full((2, BLOCKS, 8), 3)
    counts[:, :, (0, 4)] = 30  # the first expert of either rank
    windows = planned(cost_model()).planned(exchange(counts)).windows
    rows = {cut.chunks: cut.chunk_bytes for cut in windows["forward"].chunkings if cut.by == "experts"}
    first, *others = rows[4]
    assert first == pytest.approx(10 * others[0], rel=0.3) and sum(rows[4]) == sum(rows[2])
