"""Leave it, move rows, copy experts: the decision against its reference, against all possibilities, and its prices."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.planning.copy_costs import (
    Computed,
    PhaseCosts,
    break_even,
    break_even_text,
    costs_of,
    nominal_costs,
)
from moe_overlap.planning.copy_load import Load, rank_rows
from moe_overlap.planning.cost_model import AlphaBeta, CostModel
from moe_overlap.planning.replication import check_limits, decide, decide_reference, priced
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.check import makespan_s

FREE = AlphaBeta(alpha_s=0.0, beta_s=0.0)


def line(beta_s, alpha_s=0.0):
    return AlphaBeta(alpha_s=alpha_s, beta_s=beta_s)


def phase(*, row_s=1.0, wire_s=0.0, copy_s=0.0, **more):
    """One wire's price everywhere, in seconds a row and a copy."""
    return PhaseCosts(row_s=row_s, exchange=(line(wire_s),) * 2, copy=(line(copy_s),) * 2, **more)


def drawn(rng, ranks, experts, per_node, *, copies=0):
    """A skewed load with some copies that share their expert's rows."""
    popularity = np.array([(place + 1) ** -1.2 for place in range(experts)])
    rng.shuffle(popularity)
    counts = rng.multinomial(rng.integers(1, 400), popularity / popularity.sum(), size=ranks)
    homes = rng.integers(0, ranks, experts).tolist()
    load = Load.at_home(counts, homes, rng.integers(0, 3, ranks).tolist(), ranks_per_node=per_node)
    seats = [list(seat) for seat in load.seats]
    for _ in range(copies):
        expert, rank = int(rng.integers(experts)), int(rng.integers(ranks))
        if all((seat[0], seat[1]) != (expert, rank) for seat in seats):
            moved = seats[expert][2] // 2
            seats[expert][2] -= moved
            seats.append([expert, rank, moved])
    return replace(load, seats=tuple(tuple(seat) for seat in seats), refetched=bool(rng.integers(2)))


def random_phase(rng):
    prices = rng.uniform(0, 1, 9)
    return PhaseCosts(
        row_s=prices[0], wgrad_row_s=prices[0] * float(rng.choice([0.0, 0.5])),
        expert_s=prices[1], exchange=(line(prices[2], prices[3]), line(prices[4])),
        copy=(line(20 * prices[5], prices[6]), line(20 * prices[7])), beside_s=20 * prices[8],
        chunks=int(rng.integers(1, 5)), joined=bool(rng.integers(2)), exposed_copies=bool(rng.integers(2)),
        relays=bool(rng.integers(2)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_compiled_decision_is_the_reference_to_the_last_bit(seed):
    if native.planner() is None:
        pytest.skip("not built")
    rng = np.random.default_rng(seed)
    ranks = int(rng.choice([2, 4, 6, 8]))
    per_node = int(rng.choice([1, 2, ranks // 2, ranks]))
    load = drawn(rng, ranks, int(rng.integers(1, 20)), per_node, copies=int(rng.integers(0, 4)))
    phases = [random_phase(rng) for _ in range(int(rng.integers(1, 3)))]
    most, margin = int(rng.integers(0, 12)), float(rng.choice([0.0, 0.01, 0.2]))
    found = decide(load, phases, most_copies=most, margin=margin)
    assert found == decide_reference(load, phases, most_copies=most, margin=margin)


@pytest.mark.parametrize(("ranks", "experts"), [(16, 32), (16, 64), (64, 64), (32, 256)])
def test_the_compiled_decision_is_the_reference_where_tries_are_few(ranks, experts):
    if native.planner() is None:
        pytest.skip("not built")
    rng = np.random.default_rng(ranks * experts)
    for joined in (False, True):
        load = drawn(rng, ranks, experts, 8, copies=4)
        phases = [replace(random_phase(rng), joined=joined, row_s=1.0, relays=True), random_phase(rng)]
        found = decide(load, phases)
        assert found == decide_reference(load, phases, most_copies=sum(load.spare), margin=0.01)
        assert found.predicted_s <= found.left_s


@pytest.mark.parametrize("bits", [31, 33, 38])
def test_the_compiled_decision_is_the_reference_for_the_rows_of_many_steps(bits):
    if native.planner() is None:
        pytest.skip("not built")
    rng = np.random.default_rng(bits)
    for _ in range(20):
        load = Load.at_home(rng.integers(0, 1 << bits, (6, 5)), [0, 1, 2, 3, 3], (2,) * 6, ranks_per_node=2)
        phases = [random_phase(rng)]
        assert decide(load, phases) == decide_reference(load, phases, most_copies=12, margin=0.01)


def test_more_slots_than_experts_are_as_many_as_experts():
    few, many = (Load.at_home([[40, 1, 1], [30, 2, 1]], [0, 1, 1], (slots,) * 2) for slots in (3, 1 << 70))
    assert decide(many, [phase()], most_copies=1 << 70) == decide(few, [phase()])


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_the_compiled_decision_relays_as_the_reference_does(per_node):
    if native.planner() is None:
        pytest.skip("not built")
    rng, relayed = np.random.default_rng(per_node), 0
    for _ in range(20):
        load = replace(drawn(rng, 8, 6, per_node, copies=6), spare=(3,) * 8)
        phases = [replace(random_phase(rng), relays=True, exposed_copies=True), random_phase(rng)]
        found = decide(load, phases, margin=0.0)
        assert found == decide_reference(load, phases, most_copies=24, margin=0.0)
        relayed += found.relayed
    assert relayed > 3


@pytest.mark.parametrize("seed", range(20))
def test_a_decision_keeps_every_row_and_every_limit(seed):
    rng = np.random.default_rng(100 + seed)
    load = drawn(rng, 8, 16, 4, copies=2)
    phases = [random_phase(rng)]
    found = decide(load, phases, most_copies=5)
    copies = found.copies(load)
    by_expert = np.zeros(16, dtype=np.int64)
    for expert, _, rows in found.seats:
        by_expert[expert] += rows
    assert by_expert.tolist() == load.counts.sum(axis=0).tolist()
    assert len(copies) <= 5 and len({seat[:2] for seat in found.seats}) == len(found.seats)
    used = [sum(rank == to for _, to in copies) for rank in range(8)]
    assert all(a <= b for a, b in zip(used, load.spare, strict=True))
    assert found.predicted_s == priced(load, found.seats, phases) <= found.left_s == priced(load, load.seats, phases)
    assert found.left or found.predicted_s < 0.99 * found.left_s


def best_of_all(load, phases, most_copies):
    """The least price over all sets of copies and all ways to share rows out over them: 2 ranks."""
    ranks, experts = load.counts.shape
    assert ranks == 2
    ranges = []
    for expert in range(experts):
        home, rows = load.seats[expert][1], load.seats[expert][2]
        ranges.append([((expert, home, rows - moved), *([(expert, 1 - home, moved)] if moved else []))
                       for moved in range(rows + 1)])  # fmt: skip
    best = priced(load, load.seats, phases)
    for choice in itertools.product(*ranges):
        homes = [seats[0] for seats in choice]
        copies = [seats[1] for seats in choice if len(seats) > 1]
        if len(copies) <= most_copies and all(
            sum(rank == to for _, to, _ in copies) <= load.spare[rank] for rank in range(2)
        ):
            best = min(best, priced(load, (*homes, *copies), phases))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_close_to_the_best_of_all_possibilities(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, (2, 3)) * np.array([4, 1, 1])
    load = Load.at_home(counts, [0, 0, 1], [1, 1])
    phases = [phase(row_s=1.0, wire_s=0.1, copy_s=float(rng.uniform(0, 8)), joined=bool(seed % 2), chunks=2)]
    best = best_of_all(load, phases, 2)
    assert best <= decide(load, phases, most_copies=2, margin=0.0).predicted_s <= best / 0.99


def test_copies_for_the_wire_alone_are_made():
    """Balanced, but every row crosses from node to node: a copy of the other node's expert spares it."""
    counts = np.array([[0, 40], [40, 0]])
    load = Load.at_home(counts, [0, 1], [1, 1])
    joined = phase(row_s=1.0, wire_s=1.0, copy_s=10.0, joined=True)
    found = decide(load, [joined])
    assert sorted(found.copies(load)) == [(0, 1), (1, 0)] and found.predicted_s == 50.0
    assert decide(load, [replace(joined, copy=(line(90.0),) * 2)]).left


def test_leaving_it_wins_where_nothing_pays():
    counts = np.array([[8, 0], [8, 0]])
    load = Load.at_home(counts, [0, 1], [1, 1])
    dear = decide(load, [phase(copy_s=8.1, joined=True)])
    assert dear.left and dear.seats == load.seats and dear.predicted_s == dear.left_s == 16.0
    cheap = decide(load, [phase(copy_s=7.0, joined=True)])
    assert cheap.copies(load) == ((0, 1),) and cheap.predicted_s == 15.0
    assert decide(load, [phase(copy_s=7.0, joined=True)], margin=0.07).left
    balanced = Load.at_home(np.array([[8, 8], [8, 8]]), [0, 1], [1, 1])
    assert decide(balanced, [phase()]).left


def test_a_copy_under_other_work_costs_nothing_until_that_is_used_up():
    counts = np.array([[8, 0], [8, 0]])
    load = Load.at_home(counts, [0, 1], [1, 1])
    under = [phase(copy_s=20.0, beside_s=20.0)]
    assert decide(load, under).predicted_s == 28.0
    assert decide(load, [replace(under[0], exposed_copies=True)]).left


def hot_expert():
    """64 rows, all for expert 0, on 8 ranks."""
    counts = np.zeros((8, 8), dtype=int)
    counts[:, 0] = 8
    return Load.at_home(counts, range(8), [1] * 8)


def test_copies_go_from_rank_to_rank_where_that_is_faster():
    load, joined = hot_expert(), phase(copy_s=3.0, joined=True)
    one, two = decide(load, [joined]), decide(load, [replace(joined, relays=True)])
    # From home three copies, of 17 rows at most: 17 + 3 * 3. From rank to rank five, of 11: 11 + 3 * (1 + 2).
    assert (one.predicted_s, len(one.copies(load)), one.relayed) == (26.0, 3, False)
    assert (two.predicted_s, len(two.copies(load)), two.relayed) == (20.0, 5, True)
    assert two == decide_reference(load, [replace(joined, relays=True)], most_copies=8, margin=0.01)
    # Each group pays its latency; gradients go home directly.
    late = replace(joined, relays=True, copy=(line(3.0, 40.0),) * 2)
    assert priced(load, two.seats, [replace(joined, relays=True), joined]) == 20.0 + 11 + 3 * 5
    assert priced(load, two.seats, [late]) == 11 + 40.0 + 3 * 5


def test_copies_that_are_hidden_come_from_their_homes():
    load = hot_expert()
    hidden = phase(copy_s=1.0, beside_s=50.0, relays=True)
    found = decide(load, [hidden])
    assert len(found.copies(load)) > 1 and not found.relayed
    assert decide(load, [replace(hidden, exposed_copies=True)]).relayed


def test_rows_move_to_a_copy_that_exists_before_another_is_made():
    counts = np.array([[12, 0], [12, 0]])
    load = Load(counts=counts, seats=((0, 0, 24), (1, 1, 0), (0, 1, 0)), spare=(1, 1))
    found = decide(load, [phase(copy_s=1e6)])
    assert rank_rows(found.seats, 2) == [12, 12] and not found.copies(load)
    assert decide(replace(load, refetched=True), [phase(copy_s=1e6)]).left


def test_what_is_best_without_new_copies_is_refined_without_new_copies():
    """Rows move among the seats that are there; new copies cost so much that none is ever made on the way."""
    rng, moved = np.random.default_rng(5), 0
    for _ in range(40):
        load = replace(drawn(rng, 6, 12, 2, copies=8), refetched=False)
        dear = PhaseCosts(row_s=1.0, exchange=(line(0.01),) * 2, copy=(line(1e4),) * 2)
        found = decide(load, [dear], margin=0.0)
        assert found == decide_reference(load, [dear], most_copies=sum(load.spare), margin=0.0)
        without = decide(load, [dear], most_copies=0, margin=0.0)
        assert not found.copies(load) and found.predicted_s <= without.predicted_s
        moved += not found.left
    assert moved > 20


def test_copies_go_to_ranks_of_the_node_that_want_the_expert():
    counts = np.zeros((4, 4), dtype=int)
    counts[:, 0] = [8, 2, 2, 8]
    near = PhaseCosts(row_s=1.0, exchange=(line(0.5), line(0.1)), copy=(line(50.0), line(0.1)))
    load = Load.at_home(counts, [0, 1, 2, 3], [1] * 4, ranks_per_node=2)
    assert decide(load, [near]).copies(load)[0] == (0, 1)
    wanted = PhaseCosts(row_s=1.0, exchange=(line(0.5), line(0.5)), copy=(line(0.1), line(0.1)))
    assert decide(load, [wanted], most_copies=1).copies(load) == ((0, 3),)


def test_break_even_in_bytes_is_that_of_the_closed_form():
    D, F = 64, 100
    for param_bytes, training, rows in ((2, False, 1.5), (2, True, 2.25), (4, True, 1.5)):
        costs = [phase(copy_s=1.0)] * (2 if training else 1)
        found = break_even(costs, row_bytes=D * param_bytes, expert_params=3 * D * F, param_bytes=param_bytes)
        assert [one.bytes_rows for one in found] == [rows * F] * 2
        assert found[0].seconds_rows == 1.0 and found[0].copy_s == len(costs)
    text = break_even_text(found)
    assert len(text) == 2 and text[0].startswith("copy of an expert over inter: 2e+03 ms; as many bytes as 150 rows")


def test_costs_come_from_the_calibrated_model():
    wires = {"inter": line(1e-9, 2e-5)}
    parts = dict.fromkeys(("permute", "unpermute", "unpermute_backward", "permute_backward"), FREE)
    model = CostModel(
        exchange=wires, experts=line(1e-6), experts_dgrad=line(2e-6), experts_wgrad=line(3e-6), **parts,
        backbone_s=(0.1,), backbone_backward_s=(0.2,), shared_s=0.3, expert_s=4e-6, source="test",
    )  # fmt: skip
    forward, backward = costs_of(
        model, ("forward", "backward"), row_bytes=10, expert_params=100, param_bytes=2, chunks=3
    )
    assert (forward.row_s, forward.expert_s, forward.beside_s, forward.chunks) == (1e-6, 4e-6, 0.4, 3)
    assert forward.exchange == (line(1e-8, 2e-5),) * 2, "one wire was measured for all ranks"
    assert forward.copy[1] == forward.copy[0] and forward.copy[0].beta_s == pytest.approx(2e-7)
    assert backward.row_s == pytest.approx(5e-6) and backward.copy[0].beta_s == pytest.approx(4e-7)
    assert backward.beside_s == 0.2 and forward.relays and not backward.relays
    assert not any(one.relays for one in costs_of(model, ("forward",), row_bytes=1, expert_params=1, param_bytes=1,
                                                  relays=False))  # fmt: skip
    with pytest.raises(ConfigError, match="row_bytes = 0"):
        costs_of(model, ("forward",), row_bytes=0, expert_params=1, param_bytes=1)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seats": ((0, 0, 3), (1, 1, 0))}, "all rows of every expert"),
        ({"seats": ((1, 0, 0), (0, 1, 16))}, "homes in order"),
        ({"seats": ((0, 0, 16), (1, 5, 0))}, "homes in order"),
        ({"seats": ((0, 0, 16), (1, 1, 0), (0, 0, 0))}, "homes in order"),
        ({"spare": (1,)}, "spare"),
        ({"spare": (1, -1)}, "spare"),
        ({"ranks_per_node": 3}, "ranks_per_node"),
        ({"counts": np.array([[-1, 0], [17, 0]])}, "counts"),
        ({"counts": np.zeros((0, 2))}, "counts"),
    ],
)
def test_loads_that_cannot_be_are_refused(change, named):
    load = Load.at_home(np.array([[8, 0], [8, 0]]), [0, 1], [1, 1])
    with pytest.raises(ConfigError, match=named):
        replace(load, **change)
    with pytest.raises(ConfigError, match="most_copies"):
        decide(load, [phase()], most_copies=-1)
    with pytest.raises(ConfigError, match="phases"):
        decide(load, [])
    for margin in (1.5, -0.1, 1, "x", None, True, math.nan, 0.1j, [0.1], np.array([0.1, 0.2])):
        with pytest.raises(ConfigError, match="margin"):
            decide(load, [phase()], margin=margin)
    for most in ("x", 1.5, True, [1]):
        with pytest.raises(ConfigError, match="most_copies"):
            check_limits(most, 0.1)
    for phases in (None, 3, "x", [None], np.zeros(2), phase()):
        with pytest.raises(ConfigError, match="phases"):
            decide(load, phases)
    check_limits(None, np.float32(0.25))


def test_the_binding_checks_what_it_is_given():
    planner = native.planner()
    if planner is None:
        pytest.skip("not built")
    good = (np.array([[8, 0], [8, 0]]), 1, ((0, 0, 16), (1, 1, 0)), [1, 1], False, [phase().numbers], 2, 0.0)
    assert planner.decide_replication(*good)[2] is False
    for place, bad in ((0, np.zeros(3)), (1, 0), (2, ((0, 0, 16),)), (2, ((0, 0, 16), (1, 2, 0))), (2, ((0, 0),)),
                       (3, [1]), (5, [])):  # fmt: skip
        with pytest.raises(ValueError):
            planner.decide_replication(*good[:place], bad, *good[place + 1 :])


def simulated_s(phase, computed, rows, copy_s):
    """An exact simulation of equal chunks on two ranks' lanes: all of compute is one rank's, and the wire's."""
    r, wire_s = phase.chunks, 2.0 * phase.exchange[0].beta_s * rows
    chunk_s = wire_s / 2 / r
    (n,), (copied,), _ = computed.rows, computed.copied, computed.experts
    chunks = range(r)
    if not phase.wgrad_row_s:
        text = " ".join(["Wf0", "P", *(f"D{i}" for i in chunks), *(f"E{i} C{i}" for i in chunks), "U"])
        seconds = {"Wf0": copy_s, "P": 0.0, "U": 0.0, **{f"D{i}": chunk_s for i in chunks},
                   **{f"C{i}": chunk_s for i in chunks}, **{f"E{i}": phase.row_s * n / r for i in chunks}}  # fmt: skip
    else:
        dgrad_s, wgrad_s = (phase.row_s - phase.wgrad_row_s) * n, phase.wgrad_row_s
        text = " ".join(["Ut", *(f"Ct{i}" for i in chunks), *(f"Ed{i} Dt{i}" for i in chunks), "Wd Wg Ew0 Pt Wa"])
        seconds = {"Ut": 0.0, "Pt": 0.0, "Wa": 0.0, "Wd": wgrad_s * copied, "Wg": copy_s, "Ew0": wgrad_s * (n - copied),
                   **{f"Ct{i}": chunk_s for i in chunks}, **{f"Dt{i}": chunk_s for i in chunks},
                   **{f"Ed{i}": dgrad_s / r for i in chunks}}  # fmt: skip
    return makespan_s(Schedule.parse(text), seconds)


@pytest.mark.parametrize("backward", [False, True])
def test_a_price_is_near_an_exact_simulation(backward):
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(300):
        n = int(rng.integers(100, 1000))
        computed = Computed(rows=[n], copied=[int(rng.integers(0, n + 1))], experts=[0])
        one = phase(row_s=1.0, wire_s=1.0, chunks=int(rng.integers(1, 6)), wgrad_row_s=0.5 if backward else 0.0)
        rows, copies = int(rng.integers(1, 1000)), int(rng.integers(0, 1000))
        one = replace(one, copy=(line(1.0), FREE))
        price_s = one.window_s(computed, (rows, 0), (copies, 0))
        ratios.append(price_s / simulated_s(one, computed, rows, float(copies)))
    ratios = np.array(ratios)
    assert 0.98 < ratios.min() and ratios.max() < 1.25
    assert np.mean(np.abs(ratios - 1) < 0.1) > (0.95 if backward else 0.8) and abs(np.median(ratios) - 1) < 0.03


def test_weights_are_waited_for_by_all_experts_and_gradients_go_home_beside_those_of_the_homes():
    """A rank computes for 10 s in forward and 20 s in backward; what travels for copies takes 6 s, rows nothing."""
    computed, free = Computed(rows=[10, 2], copied=[0, 0], experts=[1, 1]), (0, 0)
    forward = phase(copy_s=3.0, chunks=4)
    backward = replace(forward, row_s=2.0, wgrad_row_s=1.0)
    assert forward.window_s(computed, free, (2, 0)) == 10.0 + 6.0
    assert replace(forward, beside_s=4.0).window_s(computed, free, (2, 0)) == 10.0 + 6.0
    assert replace(forward, beside_s=9.0).window_s(computed, free, (2, 0)) == 10.0 + 9.0
    assert backward.window_s(computed, free, (2, 0)) == 20.0, "under ten weight gradients"
    copied = replace(computed, copied=[7, 0])
    assert backward.window_s(copied, free, (2, 0)) == 10.0 + 7.0 + 6.0, "three weight gradients are at home"
    assert replace(backward, beside_s=3.0).window_s(copied, free, (2, 0)) == 20.0 + 3.0
    assert replace(backward, exposed_copies=True).window_s(copied, free, (2, 0)) == 20.0 + 6.0


def test_a_backward_that_waits_for_the_gradients_of_copies_waits_for_the_slowest_before_and_after():
    """One rank has the most rows of copies, the other one of homes: 10 + 9 + 8 s, and 6 s of gradients."""
    computed, free = Computed(rows=[8, 10], copied=[0, 9], experts=[1, 1]), (0, 0)
    backward = phase(row_s=2.0, wgrad_row_s=1.0, copy_s=3.0, chunks=4)
    assert replace(backward, joined=True).window_s(computed, free, (2, 0)) == 10.0 + 9.0 + 8.0 + 6.0
    assert replace(backward, exposed_copies=True).window_s(computed, free, (2, 0)) == 10.0 + 9.0 + 8.0 + 6.0
    unpaid = replace(backward, joined=True, copy=(FREE, FREE))
    assert unpaid.window_s(computed, free, (2, 0)) == 10.0 + 9.0 + 8.0, "also where gradients travel for nothing"
    assert backward.window_s(computed, free, (2, 0)) == 10.0 + 9.0 + 6.0
    assert replace(backward, joined=True).window_s(replace(computed, copied=[0, 0]), free) == 20.0


@pytest.mark.parametrize("bad", [
    {"row_s": float("nan")}, {"row_s": -1.0}, {"row_s": float("inf")}, {"row_s": "1"}, {"row_s": True},
    {"wgrad_row_s": 1.5}, {"wgrad_row_s": float("nan")}, {"expert_s": -1e-9}, {"beside_s": float("inf")},
    {"chunks": 0}, {"chunks": 1.5}, {"exchange": FREE}, {"copy": (0.1, 0.1)}, {"copy": (FREE,)},
])  # fmt: skip
def test_prices_that_cannot_be_are_refused(bad):
    """The compiled decision and its reference answered differently to them, or with an error of arithmetic."""
    with pytest.raises(ConfigError, match=list(bad)[0]):
        replace(phase(), **bad)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_nominal_costs_break_even_where_the_bytes_do(training, dtype_bytes):
    hidden, ffn, numbers = 64, 256, 3 * 64 * 256
    found = nominal_costs(hidden=hidden, ffn=ffn, flop_per_s=1e12, inter_bytes_per_s=1e9, intra_bytes_per_s=1e11,
                          dtype_bytes=dtype_bytes, training=training)  # fmt: skip
    forward = found[0]
    assert len(found) == 1 + training and forward.row_s == 2 * numbers / 1e12
    if training:
        assert found[1].row_s == 2 * forward.row_s == 2 * found[1].wgrad_row_s and found[1].copy[0](1) == pytest.approx(
            4 * numbers / 1e9
        )
    even = 0.75 * ffn * (1 + 4 / dtype_bytes) if training else 1.5 * ffn
    for one in break_even(found, row_bytes=hidden * dtype_bytes, expert_params=numbers, param_bytes=dtype_bytes):
        assert one.bytes_rows == even
        crossings_s = 2 * sum(phase.exchange[one.wire == "intra"].beta_s for phase in found)
        assert one.copy_s == pytest.approx(even * crossings_s)


@pytest.mark.parametrize("bad", [
    {"hidden": 0}, {"ffn": True}, {"dtype_bytes": 0.5}, {"matrices": 0}, {"chunks": 0}, {"flop_per_s": 0.0},
    {"inter_bytes_per_s": float("inf")}, {"intra_bytes_per_s": float("nan")}, {"flop_per_s": True},
    {"flop_per_s": "1e12"}, {"flop_per_s": 1e-320},
])  # fmt: skip
def test_nominal_costs_refuse_what_is_no_figure(bad):
    good = {"hidden": 64, "ffn": 256, "flop_per_s": 1e12, "inter_bytes_per_s": 1e9, "intra_bytes_per_s": 1e9}
    with pytest.raises(ConfigError, match=list(bad)[0]):
        nominal_costs(**{**good, **bad})
