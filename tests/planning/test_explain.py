"""explain(): figures that add up, reasons that are true, and changes that are really searched."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_overlap.planning.explain import Change, bound_s, draw_to_scale, explain, name_of, usual_changes
from moe_overlap.planning.search import Candidate, evaluate, joined_form, search
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule


def cut(chunks, exchange_s, experts_s, *, deferred_s=(), alpha_s=0.0, size=1000):
    each, experts = (exchange_s / chunks + alpha_s,) * chunks, (experts_s / chunks + alpha_s,) * chunks
    return Chunking(chunks=chunks, by="tokens", first_s=each, second_s=each, experts_s=experts, deferred_s=deferred_s,
                    chunk_bytes=(size // chunks,) * chunks)  # fmt: skip


def forward(exchange_s=3e-3, experts_s=1e-3, ops_s=(), alpha_s=0.0, counts=(1, 2, 4), **rest):
    cuts = tuple(cut(chunks, exchange_s, experts_s, alpha_s=alpha_s) for chunks in counts)
    return Window(phase="forward", head_s=1e-4, tail_s=1e-4, ops_s=ops_s, chunkings=cuts, **rest)


def text_of(window, **rest):
    return explain(window, search(window), **rest)


def test_the_page_has_its_parts_in_order():
    text = text_of(forward(ops_s=(2e-3, 2e-3, 2e-3)), outside_s=1e-2, measured_s=2e-2)
    parts = ["forward: ", "comp | P", "to scale", "candidate", "<- runs", "serial", "The exchanges take 6 ms",
             "Bound of the window", "What would change", "a link twice as fast", "Measured 20 ms"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places), text
    assert "10 ms outside its window included" in text


def test_every_candidate_is_on_the_page_by_itself_or_in_a_range():
    window = forward(ops_s=(2e-3, 1e-3))
    found = search(window)
    text = explain(window, found)
    table = text.split("\n\n")[1].splitlines()[1:]
    alone = [line for line in table if "more like it" not in line]
    rest = sum(int(line.split()[0]) for line in table if "more like it" in line)
    assert len(alone) + rest == len(found)
    assert sum("<- runs" in line for line in table) == 1


def test_a_schedule_that_is_no_candidate_can_be_explained():
    window = forward(counts=(1, 2))
    serial = next(one for one in search(window) if one.joined and one.chunks == 1)
    text = explain(window, [one for one in search(window) if one != serial], chosen=serial)
    assert re.search(r"serial +\S+ +<- runs", text) and "the fastest found" in text
    assert "Overlap is not used" in text


def test_hidden_and_waited_add_up():
    # Exchanges of 3 ms each way under ops of 4 ms on either side of 1 ms of experts: nothing shows.
    text = text_of(forward(ops_s=(4e-3, 4e-3), counts=(1,)))
    assert "100 % of that is hidden" in text and "Compute is busy all the time" in text
    # No ops, one chunk: all 6 ms show.
    window = forward(counts=(1,))
    overlapped = next(one for one in search(window) if not one.joined)
    text = explain(window, search(window), chosen=overlapped)
    assert "0 % of that is hidden: compute stands still for 6 ms" in text
    assert "3 ms before E0 for D0" in text and "3 ms before U for C0" in text


def test_the_cost_of_issuing_is_no_wait():
    window = forward(counts=(1,), issue_s=1e-3)
    overlapped = next(one for one in search(window) if not one.joined)
    text = explain(window, search(window), chosen=overlapped)
    assert "stands still for 6 ms" in text and "Compute itself takes 4 ms longer" in text


def test_a_busy_wire_is_said():
    text = text_of(forward(exchange_s=5e-3, experts_s=1e-3, counts=(1, 2, 4)))
    assert "The wire is busy all the time" in text


def test_serial_says_what_cutting_would_cost():
    window = forward(exchange_s=1e-5, experts_s=1e-5, alpha_s=1e-3, counts=(1, 2))
    text = text_of(window)
    assert "Overlap is not used. The best that overlaps is chunked(2)" in text
    assert (
        "Cutting into 2 has its price: exchanges 4.02 ms instead of 2.02 ms, experts 2.01 ms instead of 1.01 ms" in text
    )


def test_nothing_to_hide():
    text = text_of(forward(exchange_s=0.0))
    assert "Nothing leaves a rank" in text and "a link" not in text


def test_two_bounds_of_as_many_chunks_are_told_apart():
    by_experts = Chunking(chunks=4, by="experts", first_s=(5e-4,) * 4, second_s=(5e-4,) * 4, experts_s=(1e-4,) * 4,
                          deferred_s=(), chunk_bytes=(250,) * 4)  # fmt: skip
    window = forward(counts=(1, 4))
    window = replace(window, chunkings=(*window.chunkings, by_experts))
    found = search(window)
    chosen = next(one for one in found if one.chunks == 4 and one.by == "tokens" and not one.joined)
    said = next(line for line in explain(window, found, chosen=chosen).splitlines() if line.startswith("Bound"))
    assert "no order with 4 chunks by tokens takes less than 6.2 ms" in said
    assert "With 4 chunks by experts the bound is 4.2 ms, the smallest of any cut." in said


def test_what_would_help_is_searched():
    window = forward(exchange_s=5e-3, ops_s=(1e-3,))
    text = text_of(window, outside_s=1e-3, changes=[Change(label="half the experts", window=forward(exchange_s=5e-3,
                   experts_s=5e-4, ops_s=(1e-3,)), outside_s=0.0)])  # fmt: skip
    changes = {change.label: change.window for change in usual_changes(window)}
    assert set(changes) == {
        "a link twice as fast",
        "a link that takes no time",
        "a cut point in the middle of every op",
    }
    for label, changed in changes.items():
        expected = 1e3 * (1e-3 + search(changed)[0].predicted_s)
        line = next(line for line in text.splitlines() if line.startswith(f"  {label}"))
        assert f"  {expected:.3g} ms" in line, (line, expected)
    assert "half the experts" in text
    fast = search(changes["a link that takes no time"])[0].predicted_s
    assert fast == pytest.approx(2e-4 + 1e-3 + 1e-3)


def test_a_byte_budget_is_one_of_the_things_to_change():
    window = forward(ops_s=(3e-3,))
    found = search(window, max_in_flight_bytes=500)
    text = explain(window, found, max_in_flight_bytes=500)
    assert "no limit on bytes in flight" in text
    assert "at most 0.0005 MB in flight (max_in_flight_bytes); this holds 0.0005 MB" in text
    assert "max_in_flight_bytes" not in explain(window, search(window))


def test_changes_keep_the_budget():
    """Within 500 bytes nothing overlaps, so a link twice as fast leaves half of 6 ms to wait for."""
    window = forward(counts=(1, 2), ops_s=(3e-3,))
    text = explain(window, search(window, max_in_flight_bytes=500), max_in_flight_bytes=500)
    line = next(line for line in text.splitlines() if line.startswith("  a link twice as fast"))
    assert "7.2 ms" in line, "0.1 + 3 + 1 + 3 + 0.1"


def test_what_was_chosen_with_overlap_off():
    window = forward(ops_s=(2e-3, 1e-3))
    found = search(window)
    best = next(one for one in found if one.chunks == 4 and not one.joined)
    off = joined_form(window, best)
    schedule = Schedule.parse(best.order)
    assert off.joined and off.order == best.order and off.in_flight_bytes == 250
    assert off.predicted_s == evaluate(window, schedule, chunks=4, by="tokens", joined=True) > best.predicted_s
    text = explain(window, found, chosen=off, measured_s=off.predicted_s)
    assert text.startswith("forward: chunked(4), joined, predicted ") and "0.0 % low" in text
    assert sum("<- runs" in line for line in text.splitlines()) == 1
    assert re.search(r"chunked\(4\), joined +\S+ +<- runs", text)
    assert "Overlap is not used" in text and "each searched anew, with overlap:" in text
    assert "slot: chunked" not in text, "other slots of what is joined change nothing"
    comp, wire = draw_to_scale(window, off).splitlines()
    assert all(one == "." or other == "." for one, other in zip(comp[7:], wire[7:], strict=True)), "drawn joined"


@pytest.mark.parametrize(("measured_s", "said"), [(1.1e-2, "9.1 % low"), (8e-3, "25.0 % high")])
def test_predicted_against_measured(measured_s, said):
    window = Window(phase="forward", head_s=1e-2, tail_s=0.0, chunkings=(cut(1, 0.0, 0.0),))
    assert said in text_of(window, measured_s=measured_s)


def named(window, **changes):
    base = {"chunks": 1, "by": "tokens", "joined": False, "chunk_order": (0,), "ops_before": (0,), "order": "P U"}
    return name_of(Candidate(**(base | changes), predicted_s=1.0, in_flight_bytes=0), window)


def test_names():
    plain, ops, shared = forward(), forward(ops_s=(1.0,) * 3), forward(ops_s=(1.0,), op_verb="S")
    four = {"chunks": 4, "chunk_order": (0, 1, 2, 3)}
    assert named(plain, joined=True) == named(ops, joined=True) == "serial"
    assert named(plain) == "one chunk, not joined"
    assert named(plain, **four, ops_before=(0,) * 4) == "chunked(4)"
    assert named(plain, **four, ops_before=(0,) * 4, joined=True, by="experts") == "chunked(4,experts), joined"
    assert named(ops, ops_before=(2,)) == "2 of 3 ops first"
    assert named(ops, **four, ops_before=(0, 1, 1, 3)) == "chunked(4), ops before the chunks: 0 1x2 3 of 3"
    assert named(shared, ops_before=(1,)) == "shared expert first"
    assert named(shared, **four, ops_before=(0, 0, 1, 1)) == "chunked(4), shared expert after 2 of 4 chunks"
    assert named(shared, **four, ops_before=(0,) * 4) == "chunked(4), shared expert last"
    odd = {"chunks": 2, "chunk_order": (1, 0), "ops_before": (0, 0)}
    assert named(plain, **odd) == "chunked(2), chunks taken 1 0"


def test_the_drawing_to_scale():
    window = forward(exchange_s=4e-3, experts_s=1e-3, ops_s=(4e-3,), counts=(1,))
    best = search(window)[0]
    comp, wire = draw_to_scale(window, best, columns=51).splitlines()
    assert best.predicted_s == pytest.approx(9.2e-3)
    # 0.1 ms of P is half a column; 1 ms is 5.5 columns.
    assert comp.startswith("comp | ") and wire.startswith("wire | ") and len(comp) == len(wire) == 58
    assert comp.count("-") + wire.count("-") > 60 and "B0-" in comp and "E0-" in comp and "D0-" in wire
    assert wire[7:].rstrip(".").count(".") <= 8


seconds = st.just(0.0) | st.floats(1e-9, 1.0)


@st.composite
def windows(draw):
    phase = draw(st.sampled_from(["forward", "backward"]))
    ops = draw(st.lists(seconds, max_size=3))
    cuts = []
    for chunks in draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=2, unique=True)):
        row = st.lists(seconds, min_size=chunks, max_size=chunks).map(tuple)
        deferred = (draw(seconds),) if phase == "backward" else ()
        cuts.append(Chunking(chunks=chunks, by="tokens", first_s=draw(row), experts_s=draw(row), second_s=draw(row),
                             deferred_s=deferred))  # fmt: skip
    slow = Slowdown(compute=draw(st.sampled_from([1.0, 1.3])), wire=draw(st.sampled_from([1.0, 1.5])))
    return Window(phase=phase, head_s=draw(seconds), tail_s=draw(seconds), ops_s=tuple(ops), issue_s=draw(
        st.sampled_from([0.0, 1e-3])), slowdown=slow, chunkings=tuple(cuts))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(windows())
def test_any_window_is_explained_and_no_candidate_beats_its_bound(window):
    found = search(window)
    for one in found:
        assert one.predicted_s >= bound_s(window, window.chunking(one.chunks, one.by)) * (1 - 1e-9)
    text = explain(window, found, outside_s=0.5)
    assert all(len(line) < 400 for line in text.splitlines()) and "nan" not in text and "inf" not in text
