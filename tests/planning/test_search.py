"""The search: closed forms, the compiled one against the reference, what a candidate says against what it is.

That it misses nothing among all orders is tested in tests/native/test_search.cpp, on 100,000 windows.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_overlap.errors import ConfigError
from moe_overlap.native import native
from moe_overlap.planning.search import Candidate, evaluate, search, search_reference, timeline
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule, dependencies
from moe_overlap.schedule.builders import chunked
from moe_overlap.schedule.check import problems
from moe_overlap.schedule.simulate import simulate_reference
from tests import equality
from tests.ranks import virtual_world

DEGREES = (1, 2, 4, 8, 16)


def equal_chunks(chunks, first_s, experts_s, second_s=None, **more):
    """`chunks` equal chunks; durations are of one chunk."""
    second_s = first_s if second_s is None else second_s
    return Chunking(chunks=chunks, by="tokens", first_s=(first_s,) * chunks, experts_s=(experts_s,) * chunks,
                    second_s=(second_s,) * chunks, **more)  # fmt: skip


def forward(*chunkings, ops_s=(), **more):
    return Window(phase="forward", head_s=0.0, tail_s=0.0, ops_s=tuple(ops_s), chunkings=chunkings, **more)


def backward(*chunkings, ops_s=(), **more):
    return Window(phase="backward", head_s=0.0, tail_s=0.0, ops_s=tuple(ops_s), chunkings=chunkings, **more)


def overlapped(window):
    return next(candidate for candidate in search(window) if not candidate.joined)


# ---------------------------------------------------------------- closed forms (DESIGN: T(r), T_b(r), shortcut, N*)


def test_forward_with_equal_chunks_is_the_closed_form():
    chance = random.Random(1)
    for _ in range(2000):
        r, a, e = chance.randint(1, 16), chance.random(), chance.random()
        best = overlapped(forward(equal_chunks(r, a, e)))
        assert best.predicted_s == pytest.approx(max(2 * r * a, 2 * a + r * e, (r + 1) * a + e), rel=1e-12)


def test_backward_reaches_its_bound_exactly_when_weight_gradients_do_not_wait_for_the_last_chunk():
    """The bound lets weight gradients run as soon as there is room. They read every chunk, so they come after the last
    dgrad, which ends at max(a + rd, ra + d). That is no later than the bound allows if and only if there is one chunk,
    or d >= a (compute never waits in between), or they are short enough to end with the wire: rw <= max(a, ra - d).
    """
    chance = random.Random(2)
    reached = 0
    for _ in range(3000):
        r = chance.choice([1, 2, 3, 4, 8, 16])
        a, d = (chance.randint(1, 32) / 16 for _ in range(2))  # dyadic: sums and comparisons are exact
        w = chance.randint(0, 16 * (1 + chance.randint(0, 1) * r)) / 64
        best = overlapped(backward(equal_chunks(r, a, d, deferred_s=(r * w,))))
        bound_s = max(2 * r * a, 2 * a + r * d, (r + 1) * a + d, a + r * (d + w))
        assert best.predicted_s == max(bound_s, r * a + d + r * w)
        assert (best.predicted_s == bound_s) == (r == 1 or d >= a or r * w <= max(a, r * a - d))
        reached += best.predicted_s == bound_s
    assert 500 < reached < 2900


def test_one_chunk_beside_ops_is_the_shortcut_formula_at_its_best_slot():
    chance = random.Random(3)
    for _ in range(1000):
        d, e, c = (chance.random() for _ in range(3))
        ops_s = [chance.random() for _ in range(chance.randint(0, 4))]
        window = forward(equal_chunks(1, d, e, c), ops_s=ops_s)
        by_slot = [max(sum(ops_s[:k]), d) + e + max(sum(ops_s[k:]), c) for k in range(len(ops_s) + 1)]
        found = {candidate.ops_before[0]: candidate.predicted_s for candidate in search(window) if not candidate.joined}
        assert [found[k] for k in range(len(by_slot))] == pytest.approx(by_slot, rel=1e-12)
        assert search(window)[0].predicted_s == pytest.approx(min(by_slot), rel=1e-12)
        assert min(by_slot) >= (e + max(sum(ops_s), d + c)) * (1 - 1e-12)


def test_shortcut_bound_is_reached_where_a_slot_splits_the_ops_as_the_exchanges():
    window = forward(equal_chunks(1, 3.0, 2.0, 4.0), ops_s=[1.0, 2.0, 4.0])
    expected = Candidate(chunks=1, by="tokens", joined=False, chunk_order=(0,), ops_before=(2,),
                         order="P D0 B0 B1 E0 C0 B2 U", predicted_s=9.0, in_flight_bytes=0)  # fmt: skip
    assert search(window)[0] == expected


def test_regret_of_the_eps_moe_heuristic():
    """N* = sqrt(C / k), C = min(T_comm, T_comp), k the cost of one more chunk: a heuristic, so never better than the
    search, and not always as good (EPS-MoE, arXiv 2410.12247)."""
    chance = random.Random(4)
    regrets = []
    for _ in range(2000):
        exchange_s, experts_s = (10 ** chance.uniform(-1, 1) for _ in range(2))  # of one direction, and of all rows
        alpha_a, alpha_e = (10 ** chance.uniform(-3, -1) for _ in range(2))
        cuts = {r: equal_chunks(r, alpha_a + exchange_s / r, alpha_e + experts_s / r) for r in range(1, 17)}
        times_s = {r: search(forward(cut))[0].predicted_s for r, cut in cuts.items()}
        wanted = math.sqrt(min(2 * exchange_s, experts_s) / (2 * alpha_a + alpha_e))
        degree = min(16, max(1, round(wanted)))
        regrets.append(times_s[degree] / search(forward(*cuts.values()))[0].predicted_s - 1)
    print(f"N* of EPS-MoE: {100 * sum(regrets) / len(regrets):.1f} % slower than the search on average, "
          f"{100 * max(regrets):.1f} % at worst")  # fmt: skip
    assert min(regrets) >= 0
    assert max(regrets) > 0.01


# ---------------------------------------------------------------- the compiled search equals the reference


def durations() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([0.0, 1.0, 0.25]), st.floats(0.0, 2.0, allow_nan=False, width=32))


@st.composite
def windows(draw) -> Window:
    phase = draw(st.sampled_from(["forward", "backward"]))
    op_verb = draw(st.sampled_from(["B", "S"]))
    cuts = []
    for chunks in draw(st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True)):
        equal = draw(st.booleans())

        def per_chunk(equal=equal, chunks=chunks):
            values = draw(st.lists(durations(), min_size=1 if equal else chunks, max_size=1 if equal else chunks))
            return tuple(values * chunks if equal else values)

        groups = draw(st.lists(durations(), min_size=1, max_size=3)) if phase == "backward" else []
        cuts.append(
            Chunking(chunks=chunks, by=draw(st.sampled_from(["tokens", "experts"])), first_s=per_chunk(),
                     experts_s=per_chunk(), second_s=per_chunk(), deferred_s=tuple(groups),
                     chunk_bytes=tuple(draw(st.lists(st.integers(0, 9), min_size=chunks, max_size=chunks))))
        )  # fmt: skip
    factor = st.one_of(st.just(1.0), st.floats(1.0, 2.0))
    return Window(
        phase=phase,
        op_verb=op_verb,
        head_s=draw(durations()),
        tail_s=draw(durations()),
        ops_s=tuple(draw(st.lists(durations(), max_size=1 if op_verb == "S" else 4))),
        issue_s=draw(st.sampled_from([0.0, 0.01, 0.3])),
        slowdown=Slowdown(compute=draw(factor), wire=draw(factor)),
        chunkings=tuple(cuts),
    )


@settings(max_examples=300, deadline=None)
@given(windows())
def test_compiled_equals_reference_and_every_candidate_is_what_it_says(window):
    candidates = search(window)
    assert candidates == search_reference(window)
    assert [c.predicted_s for c in candidates[:1]] == pytest.approx([min(c.predicted_s for c in candidates)], rel=1e-8)
    for candidate in candidates:
        schedule = Schedule.parse(candidate.order)
        assert not problems(schedule, chunks=candidate.chunks)
        assert candidate.order == in_words(window, candidate)
        predicted_s = evaluate(window, schedule, chunks=candidate.chunks, by=candidate.by, joined=candidate.joined)
        assert candidate.predicted_s == predicted_s
        chunking = window.chunking(candidate.chunks, candidate.by)
        assert candidate.in_flight_bytes == bytes_in_flight(schedule, chunking, candidate.joined)


def in_words(window, candidate):
    """The schedule's text, put together from `chunk_order` and `ops_before`."""
    n = len(window.ops_s)
    ops = [f"B{i}" for i in range(n)] if window.phase == "forward" else [f"Bt{i}" for i in reversed(range(n))]
    if window.op_verb == "S":
        ops = ["S" if window.phase == "forward" else "St"] * n
    head, first, experts, second, tail = "P D E C U".split() if window.phase == "forward" else "Ut Ct Ed Dt Pt".split()
    places = [0, *candidate.ops_before, n]
    words = [head, *(first + str(c) for c in candidate.chunk_order)]
    for i, c in enumerate(candidate.chunk_order):
        words += [*ops[places[i] : places[i + 1]], f"{experts}{c}", f"{second}{c}"]
    groups = len(window.chunking(candidate.chunks, candidate.by).deferred_s)
    return " ".join([*words, *(f"Ew{g}" for g in range(groups)), *ops[places[-2] :], tail])


def bytes_in_flight(schedule, chunking, joined):
    """The definition of schedule.check: an exchange is under way from its start to the first action that reads it."""
    waiting, most = {}, 0
    for position, (action, needs) in enumerate(zip(schedule, dependencies(schedule), strict=True)):
        for need in needs:
            waiting.pop(need, None)
        if action.lane == "wire":
            waiting = {} if joined else waiting
            waiting[position] = chunking.chunk_bytes[action.index]
            most = max(most, sum(waiting.values()))
    return most


def test_without_compiled_parts_the_search_gives_the_same(monkeypatch):
    window = forward(*(equal_chunks(r, 1 / r, 0.7 / r) for r in DEGREES), ops_s=(0.3, 0.2), issue_s=0.001)
    expected = search(window)
    absent = native.NativePart("planner", False, None, "left out for this test")
    monkeypatch.setattr(native, "_load_planner", lambda: (None, absent))
    assert search(window) == expected


# ---------------------------------------------------------------- orders


def linear_extensions(chains: list[list[str]]) -> Iterator[list[str]]:
    """Every way of merging lists that keeps the order of each."""
    if not any(chains):
        yield []
    for i, chain in enumerate(chains):
        if chain:
            for rest in linear_extensions([*chains[:i], chain[1:], *chains[i + 1 :]]):
                yield [chain[0], *rest]


def test_with_slowdowns_no_order_of_two_chunks_is_more_than_one_percent_better():
    chance = random.Random(5)
    for _ in range(20):
        a, e = chance.uniform(0.2, 1), chance.uniform(0.2, 1)
        size = [chance.uniform(0.5, 1.5), chance.uniform(0.5, 1.5)]
        exchange_s, experts_s = tuple(a * x for x in size), tuple(e * x for x in size)
        chunking = Chunking(chunks=2, by="tokens", first_s=exchange_s, experts_s=experts_s, second_s=exchange_s)
        slowdown = Slowdown(compute=chance.uniform(1, 1.5), wire=chance.uniform(1, 2))
        window = forward(chunking, ops_s=(chance.random(),), slowdown=slowdown)
        best_s = search(window)[0].predicted_s
        for words in linear_extensions([["D0", "E0", "C0"], ["D1", "E1", "C1"], ["B0"]]):
            schedule = Schedule.parse(" ".join(["P", *words, "U"]))
            assert best_s <= 1.01 * evaluate(window, schedule, chunks=2, by="tokens")


def test_five_unequal_chunks_are_within_one_percent_of_their_best_order():
    """Beyond four chunks the order is a heuristic; chunks as they come are up to 10 % slower in these windows."""
    chance = random.Random(6)
    in_turn_regret = 0.0
    for _ in range(15):
        a, e = chance.random(), chance.random()
        size = [0.1 + chance.random() for _ in range(5)]

        def cut(order, size=size, a=a, e=e):
            exchange_s = tuple(a * size[c] for c in order)
            return Chunking(chunks=5, by="experts", first_s=exchange_s, second_s=exchange_s,
                            experts_s=tuple(e * size[c] for c in order))  # fmt: skip

        in_turn = Schedule.parse(chunked(5).forward.text)
        # An order and its reverse take the same time, as both exchanges of a chunk do.
        orders = [order for order in permutations(range(5)) if order[0] < order[4]]
        every_s = [evaluate(forward(cut(order)), in_turn, chunks=5, by="experts") for order in orders]
        best_s = search(forward(cut(range(5))))[0].predicted_s
        assert best_s <= 1.01 * min(every_s)
        own_s = evaluate(forward(cut(range(5))), in_turn, chunks=5, by="experts")
        in_turn_regret = max(in_turn_regret, own_s / best_s - 1)
    assert in_turn_regret > 0.02


def test_ties_take_what_is_simplest():
    free = forward(*(equal_chunks(r, 0.0, 0.3 / r) for r in DEGREES), ops_s=(0.1,))
    assert (search(free)[0].chunks, search(free)[0].joined) == (1, True)
    # The wire takes 2 s however it is cut; two chunks already hide the experts.
    wire_bound = forward(*(equal_chunks(r, 1 / r, 0.1 / r) for r in DEGREES))
    assert (search(wire_bound)[0].chunks, search(wire_bound)[0].chunk_order) == (2, (0, 1))


def test_serial_is_a_candidate_and_wins_where_chunks_and_overlap_cost_more_than_they_give():
    window = forward(*(equal_chunks(r, 1.0 + 0.1 / r, 0.2 + 0.1 / r) for r in DEGREES), ops_s=(0.05,),
                     slowdown=Slowdown(compute=2.5, wire=2.5))  # fmt: skip
    serial = [candidate for candidate in search(window) if candidate.chunks == 1 and candidate.joined]
    assert len(serial) == 1 and search(window)[0] == serial[0]
    assert serial[0].predicted_s == pytest.approx(2 * 1.1 + 0.3 + 0.05)


def test_experts_are_cut_where_whole_ops_leave_gaps():
    """One op of 4 s beside exchanges of 3 s: before the experts or after them, it covers one exchange and no more. Cut
    in four, the experts run under the dispatches and the op under the combines."""
    cuts = [equal_chunks(r, 3 / r, 2 / r) for r in (1, 2, 4)]
    whole, cut = (search(forward(*chunkings, ops_s=(4.0,)))[0] for chunkings in (cuts[:1], cuts))
    assert whole.predicted_s == 9.0
    assert (cut.order, cut.predicted_s) == ("P D0 D1 D2 D3 E0 C0 E1 C1 E2 C2 E3 C3 B0 U", 7.5)


def test_limit_keeps_the_best():
    window = forward(*(equal_chunks(r, 1 / r, 0.7 / r) for r in DEGREES), ops_s=(0.3, 0.2))
    assert search(window, limit=3) == search(window)[:3]


def test_default_space_takes_the_best_schedule():
    cuts = [equal_chunks(r, 0.05 + 4 / r, 0.05 + 3 / r) for r in DEGREES]
    cuts += [replace(equal_chunks(r, 0.05 + 4 / r, 0.02 + 3 / r), by="experts") for r in (2, 4, 8)]
    window = forward(*cuts, ops_s=(1.0, 1.5, 1.0, 2.0), issue_s=0.01)
    seconds = []
    for _ in range(5):
        start_s = time.perf_counter()
        best = search(window)[0]
        seconds.append(time.perf_counter() - start_s)
    print(f"default space: {1e3 * min(seconds):.2f} ms ({native.reason('planner')})")
    assert best.by == "experts" and best.predicted_s == min(candidate.predicted_s for candidate in search(window))


def test_the_executor_gives_the_same_bits_for_any_order_of_the_chunks(monkeypatch):
    def shuffled(chunks, by):
        pair = chunked(chunks, by)
        there = "P D2 D0 D3 D1 E2 C2 E0 C0 E3 C3 E1 C1 U"
        back = "Ut Ct3 Ct1 Ct0 Ct2 Ed3 Dt3 Ed1 Dt1 Ed0 Dt0 Ed2 Dt2 Ew0 Pt"
        return replace(pair, forward=Schedule.parse(there), backward=Schedule.parse(back))

    for by in ("tokens", "experts"):
        case = equality.Case(2, f"chunked-{by}", 4, torch.float32, "uneven")
        by_builder = []
        for builder in (chunked, shuffled):
            monkeypatch.setattr(equality, "chunked", builder)
            by_builder.append(
                virtual_world(2).run(
                    lambda me, case=case: equality.run_rank(case, me.transport(), me.rank, overlap=True)
                )
            )
        for own, other in zip(*by_builder, strict=True):
            assert all(torch.equal(own[name], other[name]) for name in own)


# ---------------------------------------------------------------- bytes in flight


def test_every_order_holds_all_second_exchanges_at_its_end():
    """So a budget chooses among cuts, and joins; no order of a cut makes do with less."""
    chunking = Chunking(chunks=2, by="tokens", first_s=(1.0,) * 2, experts_s=(1.0,) * 2, second_s=(1.0,) * 2,
                        chunk_bytes=(5, 3))  # fmt: skip
    for words in linear_extensions([["D0", "E0", "C0"], ["D1", "E1", "C1"], ["B0"]]):
        assert bytes_in_flight(Schedule.parse(" ".join(["P", *words, "U"])), chunking, joined=False) >= 8


def test_a_budget_below_all_bytes_joins_every_exchange():
    cuts = [equal_chunks(r, 8 / r, 8 / r, chunk_bytes=(16 // r,) * r) for r in DEGREES]
    assert not search(forward(*cuts), max_in_flight_bytes=16)[0].joined
    candidates = search(forward(*cuts), max_in_flight_bytes=4)
    assert {(c.chunks, c.joined) for c in candidates} == {(4, True), (8, True), (16, True)}
    with pytest.raises(ConfigError, match="at least 1,"):
        search(forward(*cuts), max_in_flight_bytes=0)
    with pytest.raises(ConfigError, match="no chunk_bytes"):
        search(forward(equal_chunks(1, 1.0, 1.0)), max_in_flight_bytes=4)


# ---------------------------------------------------------------- evaluate, timeline


def test_evaluate_counts_starting_and_waiting():
    window = replace(forward(equal_chunks(1, 3.0, 2.0, 4.0), ops_s=(1.0,), issue_s=0.25), head_s=1.0, tail_s=1.0)
    order = Schedule.parse("P D0 B0 E0 C0 U")
    # Starts of D0 and C0: 1-1.25 and 6.5-6.75; waits for them: 4.25-4.5 and 10.75-11.
    expected = [(0.0, 1.0), (1.25, 4.25), (1.25, 2.25), (4.5, 6.5), (6.75, 10.75), (11.0, 12.0)]
    assert timeline(window, order, chunks=1, by="tokens") == expected
    assert evaluate(window, order, chunks=1, by="tokens") == 12.0
    # Joined, B0 begins when D0 has been waited for.
    joined = timeline(window, order, chunks=1, by="tokens", joined=True)
    assert joined[2] == (4.5, 5.5) and joined[-1] == (12.0, 13.0)


def test_an_exchange_cannot_start_before_what_is_issued_before_it():
    window = forward(equal_chunks(2, 1.0, 2.0), ops_s=(3.0,))
    late = timeline(window, Schedule.parse("P D0 B0 D1 E0 C0 E1 C1 U"), chunks=2, by="tokens")
    assert late[3] == (3.0, 4.0)


def test_joined_takes_the_sum_of_everything_whatever_slows_down():
    chunking = equal_chunks(4, 0.5, 0.25)
    window = forward(chunking, ops_s=(1.0, 2.0), issue_s=0.125, slowdown=Slowdown(compute=2.0, wire=3.0))
    joined = next(candidate for candidate in search(window) if candidate.joined)
    assert joined.predicted_s == 8 * 0.5 + 4 * 0.25 + 3.0 + 16 * 0.125


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P D0 E0 C0 B0 U", "C1 is missing|D1 is missing"),
        ("P D0 D1 E1 E0 C0 C1 U", "B0 not in both"),
        ("P D0 D1 B0 B1 E0 C0 E1 C1 U", "window: B1 not in both"),
        ("P D0 D1 S E0 C0 E1 C1 U", "window: B0 S not in both"),
        ("P D0 D1 E0 C0 E1 C1 U B0 C2", "no chunk"),
    ],
)
def test_evaluate_refuses_schedules_of_other_windows(text, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(forward(equal_chunks(2, 1.0, 1.0), ops_s=(1.0,)), Schedule.parse(text), chunks=2, by="tokens")


def test_a_cut_the_window_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"a cut of this window: \[\(2, 'tokens'\)\]"):
        evaluate(forward(equal_chunks(2, 1.0, 1.0)), chunked(4).forward, chunks=4, by="tokens")


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: equal_chunks(0, 1.0, 1.0), "chunking.chunks"),
        (lambda: equal_chunks(17, 1.0, 1.0), "chunking.chunks"),
        (lambda: replace(equal_chunks(2, 1.0, 1.0), by="rows"), "chunking.by"),
        (lambda: replace(equal_chunks(2, 1.0, 1.0), second_s=(1.0,)), "chunking.second_s"),
        (lambda: replace(equal_chunks(2, 1.0, 1.0), chunk_bytes=(1,)), "chunking.chunk_bytes"),
        (lambda: replace(equal_chunks(1, 1.0, 1.0), chunk_bytes=(-1,)), "chunking.chunk_bytes"),
        (lambda: equal_chunks(1, -1.0, 1.0), "chunking.first_s"),
        (lambda: equal_chunks(1, 1.0, math.nan), "chunking.experts_s"),
        (lambda: Slowdown(wire=0.9), "slowdown.wire"),
        (lambda: Slowdown(compute=math.inf), "slowdown.compute"),
        (lambda: forward(), "window.chunkings"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), equal_chunks(1, 1.0, 1.0)), "window.chunkings"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0, deferred_s=(1.0,))), "chunking.deferred_s"),
        (lambda: backward(equal_chunks(1, 1.0, 1.0)), "chunking.deferred_s"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), op_verb="S", ops_s=(1.0, 1.0)), "window.ops_s"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), op_verb="X"), "window.op_verb"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), issue_s=-0.1), "window.issue_s"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), ops_s=(1.0, -0.1)), "window.ops_s"),
        (lambda: forward(equal_chunks(1, 1.0, 1.0), ops_s=(math.nan,)), "window.ops_s"),
        (lambda: replace(forward(equal_chunks(1, 1.0, 1.0)), phase="sideways"), "window.phase"),
        (lambda: search(forward(equal_chunks(1, 1.0, 1.0)), limit=0), "limit"),
    ],
)
def test_bad_numbers_are_refused_by_name(build, field):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field


def test_simulating_a_window_by_hand_gives_the_figures_of_evaluate():
    """The exchange as three actions, written out for the reference simulator: two chunks, one op, a slow wire."""
    window = forward(equal_chunks(2, 1.0, 0.5), ops_s=(0.75,), issue_s=0.125, slowdown=Slowdown(wire=1.5))
    comp, wire = 0, 1
    actions = [  # P, start D0, D0, start D1, D1, B0, wait D0, E0, start C0, C0, wait D1, E1, start C1, C1, waits, U
        (comp, 0.0, []), (comp, 0.125, []), (wire, 1.0, [1]), (comp, 0.125, []), (wire, 1.0, [3]), (comp, 0.75, []),
        (comp, 0.125, [2]), (comp, 0.5, []), (comp, 0.125, []), (wire, 1.0, [8]), (comp, 0.125, [4]), (comp, 0.5, []),
        (comp, 0.125, []), (wire, 1.0, [12]), (comp, 0.125, [9]), (comp, 0.125, [13]), (comp, 0.0, []),
    ]  # fmt: skip
    lanes, seconds, deps = zip(*actions, strict=True)
    times = simulate_reference(lanes, seconds, deps, {wire: 1.5})
    schedule = Schedule.parse("P D0 D1 B0 E0 C0 E1 C1 U")
    assert evaluate(window, schedule, chunks=2, by="tokens") == times[-1][1]
