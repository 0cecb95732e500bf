"""The fit: synthetic probes of a known cost model give that model back, with noise, and by hand where it matters."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import numpy as np
import pytest
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.auto import auto
from moe_overlap.auto import calibrate as measuring
from moe_overlap.auto.calibrate import StepTimes, _probe, step_shape
from moe_overlap.auto.fit import MAX_SCALE, MAX_SLOWDOWN, NOISE, _compute_slowdown, _scale, fit, with_wire
from moe_overlap.auto.probe_pairs import CHUNKS, OVERLAPPED
from moe_overlap.measure.timeline import TimelineEvent
from moe_overlap.planning.predict import predict
from moe_overlap.planning.window import Slowdown
from moe_overlap.schedule.builders import chunked
from tests.auto.planted import build, cost_model, exchange, line, step
from tests.auto.probes import ROW_BYTES, TRUE, probe
from tests.ranks import virtual_world

ROWS = 3 * BLOCKS * 8
"""T * K of `exchange()`."""


# ---------------------------------------------------------------- the integers of a step


def uneven():
    """Four ranks with a slot each. Only block 0 of rank 0 and block 15 of rank 1 send."""
    counts = np.zeros((4, BLOCKS, 4), dtype=np.int64)
    counts[0, 0] = (5, 1, 2, 3)
    counts[1, 15] = (7, 0, 4, 0)
    return exchange(counts)


def test_one_chunk_by_hand():
    shape = step_shape(uneven().chunked(1), row_bytes=ROW_BYTES)
    assert (shape.chunks, shape.by, shape.row_bytes) == (1, "tokens", ROW_BYTES)
    assert shape.rows == (12,), "rank 0's expert has 5 + 7"
    assert shape.slots_rows == 11, "rank 0 has 11 slots and rank 1 as many"
    assert shape.bytes_by_lane == {"inter": (1100,)}, "rank 1 sends 7 + 4 away; rank 0 gets 7, sends 6"


def test_two_chunks_by_hand():
    shape = step_shape(uneven().chunked(2), row_bytes=ROW_BYTES, joined=True)
    assert shape.rows == (5, 7) and shape.experts == (1, 1)
    assert shape.bytes_by_lane == {"inter": (600, 1100)}
    assert shape.slots_rows == 11


def test_unjoined_chunks_share_the_busiest_ranks_rows_as_all_ranks_do():
    shape = step_shape(uneven().chunked(2), row_bytes=ROW_BYTES)
    assert shape.rows == (6, 6), "rank 0's expert has 12 rows; of all 22 rows half are in either chunk"
    assert shape.bytes_by_lane == {"inter": (300, 800)}, "rank 1 sends 11 rows away; of all 17, 6 and then 11"


def test_groups_of_experts_by_hand():
    counts = np.zeros((2, BLOCKS, 4), dtype=np.int64)
    counts[0, 0] = (4, 1, 2, 3)
    shape = step_shape(exchange(counts).chunked(2, "experts"), row_bytes=ROW_BYTES)
    assert (shape.by, shape.experts) == ("experts", (1, 1))
    assert shape.rows == (3, 2), "both ranks have 5 rows; of all 10, 6 in the first expert of either"


def test_two_nodes_by_hand():
    shape = step_shape(uneven().chunked(1), row_bytes=ROW_BYTES, nodes=(0, 0, 1, 1))
    # Within a node: 0 -> 1 one row, 1 -> 0 seven. Between: 0 -> {2, 3} five, 1 -> 2 four; rank 2 gets 2 + 4.
    assert shape.bytes_by_lane == {"intra": (700,), "inter": (600,)}


def test_one_node_has_no_wire_to_others():
    shape = step_shape(uneven().chunked(4), row_bytes=ROW_BYTES, nodes=(0,) * 4, joined=True)
    assert set(shape.bytes_by_lane) == {"intra"} and shape.bytes_by_lane["intra"] == (600, 0, 0, 1100)


def test_one_rank_has_no_wire():
    assert step_shape(exchange(world=1).chunked(2), row_bytes=ROW_BYTES).bytes_by_lane == {}


# ---------------------------------------------------------------- the fit


def flat(model):
    """name -> number, without `misfit`: probes here have the times of joined schedules, whatever their pair."""
    found = {}
    for name, value in model.to_json().items():
        if value is None or name == "misfit":
            continue
        values = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
        )
        for key, number in values:
            inner = number.items() if isinstance(number, dict) else [("", number)]
            found |= {f"{name}.{key}.{part}": one for part, one in inner if not isinstance(one, str)}
    return found


def test_the_model_behind_the_probes_is_found():
    joined = [probe(TRUE, chunks, compute_s=1.0) for chunks in CHUNKS]
    # 1 s of compute beside the wire: 1 / 1.25 of it would have been enough alone.
    overlapped, grouped = probe(TRUE, OVERLAPPED, hidden_s=1.0, compute_s=1.2), probe(TRUE, 4, by="experts")
    found = fit(joined, overlapped, grouped, source="synthetic")
    assert found.source == "synthetic"
    assert flat(found) == pytest.approx(flat(replace(TRUE, measured_rows=ROWS)), rel=1e-6, abs=1e-12)


def test_a_shared_expert_is_found():
    true = cost_model(shared_s=1e-4, shared_backward_s=3e-4)
    joined = [probe(true, chunks, pair_of=lambda c: chunked(c, shared=True)) for chunks in CHUNKS]
    found = fit(joined, joined[1], None, source="planted")
    assert found.backbone_s == () and flat(found) == pytest.approx(
        flat(replace(true, measured_rows=ROWS)), rel=1e-6, abs=1e-12
    )


def test_noise_moves_the_model_little():
    draw = random.Random(5)

    def noise(seconds):
        return seconds * (1 + abs(draw.gauss(0, 0.02))) * (3.0 if draw.random() < 0.03 else 1.0)

    joined = [probe(TRUE, chunks, noise=noise, compute_s=1.0) for chunks in CHUNKS]
    found = fit(joined, joined[1], probe(TRUE, 4, by="experts", noise=noise), source="noisy")
    shape = joined[1].shape
    for c in range(4):
        sizes = {lane: each[c] for lane, each in shape.bytes_by_lane.items()}
        assert found.exchange_s(sizes) == pytest.approx(TRUE.exchange_s(sizes), rel=0.15)
        known, true = (m.experts(shape.rows[c]) + m.expert_s * shape.experts[c] for m in (found, TRUE))
        assert known == pytest.approx(true, rel=0.15)
    assert found.backbone_s == pytest.approx(TRUE.backbone_s, rel=0.15)


def test_without_a_probe_by_groups_all_overhead_is_the_chunks():
    joined = [probe(TRUE, chunks, compute_s=1.0) for chunks in CHUNKS]
    found = fit(joined, joined[1], None, source="tokens")
    assert found.expert_s == 0 and found.experts(100) == pytest.approx(TRUE.experts(100) + 4 * TRUE.expert_s)


def test_the_fewest_probes_are_enough():
    joined = [probe(TRUE, chunks, compute_s=1.0) for chunks in CHUNKS[:2]]
    found = fit(joined, probe(TRUE, OVERLAPPED, hidden_s=1.0, compute_s=1.2), None, source="slow steps")
    lines = {"experts": line(2e-7, 4e-6 + 4 * 1.5e-5), "experts_dgrad": line(3e-7, 5e-6 + 4 * 2.5e-5)}
    want = replace(TRUE, measured_rows=ROWS, expert_s=0.0, expert_dgrad_s=0.0, **lines)
    assert flat(found) == pytest.approx(flat(want), rel=1e-6, abs=1e-12)


def test_forward_alone():
    def only_forward(one):
        keep = {
            text: s for text, s in one.seconds.items() if text.rstrip("0123456789") in ("P", "D", "E", "C", "U", "B")
        }
        return replace(one, seconds=keep, host_s={"forward": one.host_s["forward"]}, hidden_s=0.0, compute_s=1.0,
                       whole_s={"forward": one.whole_s["forward"]})  # fmt: skip

    joined = [only_forward(probe(TRUE, chunks)) for chunks in CHUNKS]
    found = fit(joined, joined[1], None, source="forward")
    assert found.outside_backward_s == 0 and found.backbone_backward_s == (0.0, 0.0)
    assert found.backbone_s == pytest.approx(TRUE.backbone_s) and found.issue_s == pytest.approx(TRUE.issue_s)


def test_a_step_without_rows_costs_nothing_and_is_no_error():
    empty = exchange(rows=0)
    joined = [probe(cost_model(2), chunks, plan=empty) for chunks in CHUNKS]
    found = fit(joined, joined[1], None, source="empty")
    assert found.exchange["inter"](1000) == 0 and found.experts(1000) == 0


def test_what_a_whole_step_took_longer_than_its_parts_is_compute():
    one = probe(TRUE, 4)
    assert _scale(one, "forward", TRUE.issue_s) == pytest.approx(1.0)
    compute = ("P", "U", "B0", "B1", "E0", "E1", "E2", "E3")
    compute_s = sum(one.seconds[text] for text in compute) + TRUE.outside_s
    slower = {"forward": one.whole_s["forward"] + 0.1 * compute_s, "backward": one.whole_s["backward"] * 9}
    slow = replace(one, whole_s=slower)
    assert _scale(slow, "forward", TRUE.issue_s) == pytest.approx(1.1)
    assert _scale(slow, "backward", TRUE.issue_s) == MAX_SCALE
    assert _scale(replace(one, whole_s={"forward": 0.0}), "forward", TRUE.issue_s) == 1.0
    assert _scale(replace(one, whole_s={}), "backward", TRUE.issue_s) == 1.0


@pytest.mark.parametrize(
    ("hidden_s", "compute_s", "factor"),
    [(0.0, 9.0, 1.0), (1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 1.5, 2.0), (1.0, 9.0, MAX_SLOWDOWN)],
)
def test_the_slowdown_is_what_the_overlapped_probe_computed_longer(hidden_s, compute_s, factor):
    joined = [probe(TRUE, chunks, compute_s=1.0) for chunks in CHUNKS]
    overlapped = probe(TRUE, OVERLAPPED, hidden_s=hidden_s, compute_s=compute_s)
    assert _compute_slowdown(joined, overlapped) == pytest.approx(factor)


SLOW_WIRE = replace(TRUE, exchange={"inter": line(3e-8, 3e-5)}, slowdown=Slowdown())
"""The wire decides what a step takes."""


def waits_s(model):
    overlapped = probe(TRUE, OVERLAPPED)
    found = predict(model, overlapped.pair, dict.fromkeys(("forward", "backward"), overlapped.shape))
    return sum(phase.waited_s for phase in found.values())


def fitted_wire(waited_s):
    joined = [probe(SLOW_WIRE, chunks, compute_s=1.0) for chunks in CHUNKS]
    overlapped = probe(SLOW_WIRE, OVERLAPPED, compute_s=1.0, waited_s=waited_s)
    return fit(joined, overlapped, probe(SLOW_WIRE, 4, by="experts"), source="planted").slowdown.wire, overlapped


@pytest.mark.parametrize("factor", [1.3, 2.0])
def test_a_wire_that_compute_slows_down_is_found_by_how_long_compute_waits(factor):
    found, _ = fitted_wire(waits_s(with_wire(SLOW_WIRE, factor)))
    assert found == pytest.approx(factor, rel=1e-4)


def test_waits_no_longer_than_noise_are_no_slow_wire():
    alone_s = waits_s(SLOW_WIRE)
    found, overlapped = fitted_wire(alone_s)
    assert found == 1.0
    step_s = sum(overlapped.whole_s.values())
    assert fitted_wire(alone_s + 0.99 * NOISE * step_s)[0] == 1.0 < fitted_wire(alone_s + 1.01 * NOISE * step_s)[0]
    assert fitted_wire(alone_s + 100 * step_s)[0] == MAX_SLOWDOWN


def test_both_wires_have_their_lines():
    """In the step the slower one is seen; the one within the nodes is measured without the other."""
    within = line(1e-9, 5e-6)
    true = replace(TRUE, exchange={"inter": line(2e-9, 3e-5), "intra": within})
    plan = exchange(world=4)
    joined = [probe(true, chunks, plan=plan, nodes=(0, 0, 1, 1)) for chunks in CHUNKS]
    points = [(n, within(n)) for n in (100, 400, 1600)]
    found = fit(joined, joined[1], None, within_node=points, source="planted")
    assert found.exchange["inter"].beta_s == pytest.approx(2e-9) and found.exchange["inter"].alpha_s == pytest.approx(
        3e-5
    )
    assert found.exchange["intra"].beta_s == pytest.approx(1e-9) and found.exchange["intra"].alpha_s == pytest.approx(
        5e-6
    )


@pytest.mark.parametrize(
    ("nodes", "lanes"), [((0, 0, 1, 1), {"inter", "intra"}), ((0,) * 4, {"intra"}), (None, {"inter"})]
)
def test_every_wire_is_measured(nodes, lanes):
    """Real steps on four ranks; where both wires are taken, the one within the nodes alone too."""

    def rank(me):
        model = build("layer", me.transport())
        step(model, me.rank, (12, 9, 8, 11))
        (planned,) = model.schedule.found.values()
        return planned.model, planned.nodes

    with patch.object(auto, "nodes_of", lambda _: nodes), patch.object(measuring, "ROUNDS", (1, 1)):
        found = virtual_world(4).run(rank)
    assert all(one == (found[0][0], nodes) for one in found)
    assert set(found[0][0].exchange) == lanes
    assert all(line.beta_s > 0 or line.alpha_s > 0 for line in found[0][0].exchange.values())


# ---------------------------------------------------------------- the budget


class OwnClock(threading.local):
    """A clock for each virtual rank, which stands still between the probes."""

    now_s = 0.0

    def perf_counter(self):
        return self.now_s


def probes_run(step_s, groups=4):
    """What each of two ranks ran, as (chunks, by, joined), and the most seconds that one took; the fit's arguments.
    step_s(rank, call, chunks): seconds of a probe."""
    clock, fitted = OwnClock(), []

    def rank(me):
        calls = []

        def run(pair):
            calls.append((pair.chunks, pair.by, pair.joined))
            clock.now_s += step_s(me.rank, len(calls), pair.chunks)
            return StepTimes(events=[], forward_s=0.1, backward_s=0.0, exchange=exchange(grad=False))

        clock.now_s = 100.0 * me.rank
        measuring.calibrate(run, chunked, me.transport(), groups=groups, row_bytes=8, device=torch.device("cpu"),
                            source="planted")  # fmt: skip
        return calls, clock.now_s - 100.0 * me.rank

    with patch.object(measuring, "time", clock), patch.object(measuring, "fit", lambda *a, **_: fitted.append(a)):
        (first, first_s), (second, second_s) = virtual_world(2).run(rank)
    assert first == second, "ranks that run different probes deadlock"
    return first, max(first_s, second_s), fitted[0]


@pytest.mark.parametrize(
    ("probe_s", "rounds", "probes"),
    [
        (0.01, 9, 5),
        (0.2, 9, 5),
        (0.5, 5, 5),
        (0.7, 3, 5),
        (1.0, 2, 5),
        (1.4, 1, 5),
        (1.6, 2, 3),
        (3.0, 1, 3),
        (9.0, 1, 3),
    ],
)
def test_as_many_rounds_as_fit_the_budget(probe_s, rounds, probes):
    """And where not even one fits: fewer probes, each of them twice."""
    calls, taken_s, (joined, overlapped, grouped) = probes_run(lambda *_: probe_s)
    assert len(calls) == probes * (rounds + 1)
    assert taken_s <= max(measuring.BUDGET_S, 6 * probe_s) + 1e-9
    assert [one.chunks for one in joined] == [1, 4, 16][: (probes + 1) // 2] and overlapped.chunks == OVERLAPPED
    assert (grouped is not None) == (probes == 5)


def test_rounds_follow_from_the_slowest_rank_whose_clock_goes_otherwise():
    alike, _, _ = probes_run(lambda *_: 1.0)
    for slow in (0, 1):
        calls, taken_s, _ = probes_run(lambda rank, *_, slow=slow: 1.0 if rank == slow else 0.3)
        assert calls == alike and taken_s <= measuring.BUDGET_S + 1e-9


def test_a_first_call_that_takes_long_does_not_break_the_budget():
    calls, taken_s, _ = probes_run(lambda _, call, __: 12.0 if call == 1 else 0.3)
    assert taken_s <= measuring.BUDGET_S and len(calls) > 6


def test_a_wire_whose_messages_take_long_has_fewer_probes():
    """In sixteen chunks a step takes far longer than in four."""
    calls, taken_s, _ = probes_run(lambda _, __, chunks: 0.1 + 0.3 * chunks)
    assert (16, "tokens", True) not in calls and taken_s <= measuring.BUDGET_S + 1e-9


def test_one_expert_on_a_rank_has_no_groups():
    calls, _, (joined, _, grouped) = probes_run(lambda *_: 0.2, groups=1)
    assert len(joined) == 3 and grouped is None and {by for _, by, _ in calls} == {"tokens"}


# ---------------------------------------------------------------- gathering a probe


def gathered_probe(times_of_rank):
    """`_probe` of a joined serial step on two ranks; times_of_rank(rank) -> [(seconds by action, forward_s)]."""
    pair = chunked(1).join()

    def rank(me):
        runs = []
        for seconds, forward_s in times_of_rank(me.rank):
            at_s, events = 0.0, []
            for action in pair.forward:
                lane = "wire" if action.lane == "wire" else "comp"
                events.append(
                    TimelineEvent(me.rank, 1, "forward", action.text, lane, at_s, at_s + seconds[action.text])
                )
                at_s += seconds[action.text]
            events.append(TimelineEvent(me.rank, 1, "forward", "N", "wire", 0.0, seconds.get("N", 0.0)))
            runs.append(StepTimes(events=events, forward_s=forward_s, backward_s=0.0, exchange=exchange(grad=False)))
        return _probe(pair, runs, me.transport(), row_bytes=8, device=torch.device("cpu"), nodes=None)

    found = virtual_world(2).run(rank)
    assert found[0] == found[1], "ranks that fit different models deadlock"
    return found[0]


def test_compute_is_the_slowest_ranks_and_an_exchange_that_of_the_last_to_come():
    def times(rank):
        return [({"N": 4.0 - rank, "P": 1.0 + rank, "D0": 5.0 - rank, "E0": 3.0 - rank, "C0": 2.0, "U": 0.5}, 20.0)]

    found = gathered_probe(times)
    assert found.agree_s == 3.0, "as of an exchange, of the rank that came last"
    assert found.seconds == {"P": 2.0, "D0": 4.0, "E0": 3.0, "C0": 2.0, "U": 0.5}
    assert found.whole_s == {"forward": 20.0}
    assert set(found.host_s) == {"forward"}


def test_the_quicker_half_of_the_rounds_counts():
    """By the slowest rank of each round; the median of the half."""
    rounds = [9.0, 1.0, 2.0, 8.0, 3.0]

    def times(rank):
        return [
            ({"P": s, "D0": s, "E0": s, "C0": s, "U": s}, 100 - s if rank == 0 and s < 2 else 10 * s) for s in rounds
        ]

    # Rank 0 took 99 s for the round of 1.0: the quicker half of five is 2, 3 and 8.
    found = gathered_probe(times)
    assert set(found.seconds.values()) == {median([2.0, 3.0, 8.0])}
