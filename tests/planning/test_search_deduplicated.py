"""The search of deduplicated windows: ids and weights (M, Mt) and the rows that stay (O, Od) beside everything else."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_overlap.errors import ConfigError
from moe_overlap.planning.explain import bound_s, explain, name_of
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import evaluate, joined_form, search, search_reference, timeline
from moe_overlap.planning.window import Chunking, Slowdown, Window
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, deduplicate, shared_expert, split_own
from moe_overlap.schedule.builders import window as shortcut_window
from moe_overlap.schedule.check import check, problems

seconds = st.floats(0.0, 1.0)


# What runs beside the exchanges, apart from the rows that stay: so many backbone ops, or the shared expert.
besides = st.sampled_from([*(("B", ops) for ops in range(4)), ("S", 1)])


@st.composite
def windows(draw, phase=None, issue=seconds, beside=None):
    """Windows of every kind: chunks equal or not, by tokens or groups, ops or a shared expert, slowdowns."""
    phase = phase or draw(st.sampled_from(["forward", "backward"]))
    verb, ops = beside or draw(besides)
    halves = st.tuples(seconds, seconds) if phase == "forward" else st.none()
    chunkings = []
    for chunks, by in draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["tokens", "experts"])), min_size=1,
                                    max_size=3, unique=True)):  # fmt: skip
        part = st.lists(seconds, min_size=chunks, max_size=chunks).map(tuple)
        deferred_s = (draw(seconds),) if phase == "backward" else ()
        chunkings.append(Chunking(chunks=chunks, by=by, first_s=draw(part), experts_s=draw(part), second_s=draw(part),
                                  deferred_s=deferred_s))  # fmt: skip
    return Window(
        phase=phase, op_verb=verb, head_s=draw(seconds), tail_s=draw(seconds), issue_s=draw(issue),
        ops_s=tuple(draw(seconds) for _ in range(ops + 1)), metadata_s=draw(seconds), chunkings=tuple(chunkings),
        halves_s=draw(st.none() | halves),
        slowdown=Slowdown(compute=draw(st.sampled_from([1.0, 1.3])), wire=draw(st.sampled_from([1.0, 1.2]))),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(windows())
def test_every_candidate_can_run_and_takes_what_it_says(window):
    """The figures are exact simulations of the very orders beside them, the compiled search's as the reference's."""
    found = search(window)
    assert found == search_reference(window)
    own, metadata = ("O", "M") if window.phase == "forward" else ("Od", "Mt")
    for one in found:
        order = Schedule.parse(one.order)
        assert not problems(order, chunks=one.chunks)
        assert evaluate(window, order, chunks=one.chunks, by=one.by, joined=one.joined) == one.predicted_s
        assert one.chunk_order == tuple(range(one.chunks)), "a row comes with the first group and goes with the last"
        words = one.order.split()
        assert words.count(own) == words.count(metadata) == 1
        assert "Or" not in words or (window.halves_s and words[words.index(f"C{one.chunks - 1}") + 1] in ("O", "Or"))
        # Right in front of the first exchange, or of the last one.
        follower = words[words.index(metadata) + 1]
        assert follower == ("D0" if window.phase == "forward" else f"Dt{one.chunks - 1}")


@settings(max_examples=40, deadline=None)
@given(besides.flatmap(lambda of: st.tuples(windows("forward", beside=of), windows("backward", beside=of))))
def test_every_pair_of_candidates_is_a_schedule(both):
    forward, backward = both
    num_ops = 0 if forward.op_verb == "S" else len(forward.user_ops_s)
    for one in search(forward)[:8]:
        for other in (*search(backward)[:8], None):
            pair = pair_of(one, other, num_ops=num_ops, op_verb=forward.op_verb)
            check(pair)
            assert pair.deduplicated and deduplicate(pair) == pair and pair.num_ops == num_ops


@settings(max_examples=40, deadline=None)
@given(windows(issue=st.just(0.0)))
def test_nothing_beats_the_bound(window):
    for one in search(window):
        chunking = window.chunking(one.chunks, one.by)
        assert one.predicted_s >= bound_s(window, chunking) * (1 - 1e-9) - 1e-12


def every_order(window, chunking):
    """The orders of a cut whose chunks are taken in turn: all ways of putting the ops between the experts, the rows
    that stay before the other ops, and one half of them, if that is left for later, at any place behind the experts."""
    forward = window.phase == "forward"
    own, meta, first, experts, second = ("O", "M", "D", "E", "C") if forward else ("Od", "Mt", "Ct", "Ed", "Dt")
    users = [f"B{i}" for i in range(len(window.user_ops_s))]
    if not forward:
        users = [f"Bt{i}" for i in reversed(range(len(users)))]
    last = chunking.chunks - 1
    ops = [own, *users]
    for before in combinations_with_replacement(range(len(ops) + 1), chunking.chunks):
        words = ["P", meta] if forward else ["Ut"]
        words += [f"{first}{c}" for c in range(chunking.chunks)]
        done = 0
        for c, count in enumerate(before):
            words += [*ops[done:count], f"{experts}{c}", *([meta] if c == last and not forward else []), f"{second}{c}"]
            done = count
        rest = [*ops[done:], *(() if forward else ("Ew0",))]
        tail = "U" if forward else "Pt"
        yield Schedule.parse(" ".join([*words, *rest, tail]))
        if forward and window.halves_s is not None:
            for place in range(own in rest, len(rest) + 1):
                yield Schedule.parse(" ".join([*words, *rest[:place], "Or", *rest[place:], tail]))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_no_place_of_the_ops_is_better(phase):
    """Without costs of starting and slowdowns the search is exact for chunks in turn."""
    chance = random.Random(phase)
    for _ in range(40):
        chunks = chance.randint(1, 3)
        parts = [tuple(chance.choice([0.0, chance.random(), 1.0]) for _ in range(chunks)) for _ in range(3)]
        chunking = Chunking(chunks=chunks, by="experts", first_s=parts[0], experts_s=parts[1], second_s=parts[2],
                            deferred_s=(chance.random(),) if phase == "backward" else ())  # fmt: skip
        ops_s = tuple(chance.random() for _ in range(1 + chance.randint(0, 2)))
        halves_s = (0.5 * ops_s[0] + 0.05, 0.5 * ops_s[0]) if phase == "forward" else None
        window = Window(phase=phase, head_s=chance.random(), tail_s=chance.random(), ops_s=ops_s,
                        metadata_s=chance.random(), halves_s=halves_s, chunkings=(chunking,))  # fmt: skip
        least_s = min(evaluate(window, order, chunks=chunks, by="experts") for order in every_order(window, chunking))
        assert search(window)[0].predicted_s == pytest.approx(least_s, rel=1e-9)


def test_one_chunk_by_hand():
    """The rows that stay fill the time of the dispatch; M is in front of it, on the wire."""
    cut = Chunking(chunks=1, by="tokens", first_s=(3.0,), experts_s=(2.0,), second_s=(4.0,))
    window = Window(phase="forward", head_s=1.0, tail_s=1.0, ops_s=(3.0, 4.0), metadata_s=0.5, chunkings=(cut,))
    best = search(window)[0]
    assert best.order == "P M D0 O E0 C0 B0 U" and best.predicted_s == 1 + 3.5 + 2 + 4 + 1
    assert name_of(best, window) == "0 of 1 ops first"
    spans = timeline(window, Schedule.parse(best.order), chunks=1, by="tokens")
    assert spans[1:4] == [(1.0, 1.5), (1.5, 4.5), (1.0, 4.0)]
    late = next(one for one in search(window) if not one.joined and one.ops_before == (0,))
    assert name_of(late, window) == "own rows after 1 of 1 chunk, 0 of 1 ops first"


def test_half_of_the_own_rows_by_hand():
    """Alone with one chunk, the rows that stay fill the time of the dispatch and of the combine; beside an op that
    fills the latter, or where parting them costs more than it saves, they are one part."""
    cut = Chunking(chunks=1, by="tokens", first_s=(2.0,), experts_s=(2.0,), second_s=(2.0,))
    given = {"phase": "forward", "head_s": 1.0, "tail_s": 1.0, "metadata_s": 0.0, "chunkings": (cut,)}
    window = Window(**given, ops_s=(4.0,), halves_s=(2.0, 2.25))
    best = search(window)[0]
    assert best.order == "P M D0 O E0 C0 Or U" and best.predicted_s == 1 + 2 + 2 + 2.25 + 1
    assert name_of(best, window) == "half of the own rows last"
    joined = joined_form(window, best)
    assert joined.predicted_s == 1 + 2 + 2 + 2 + 2 + 2.25 + 1
    text = explain(window, search(window))
    assert "4250 ms of the experts on rows that stay" in text and "this one is 3.1 % above" in text
    assert search(replace(window, halves_s=None))[0].predicted_s == 1 + 4 + 2 + 2 + 1
    for other in (replace(window, ops_s=(2.0, 2.0), halves_s=(1.0, 1.0)), replace(window, halves_s=(3.5, 3.5))):
        assert "Or" not in search(other)[0].order
    assert search(replace(window, halves_s=(2.0, 2.0)))[0].predicted_s == 8


def test_backward_by_hand():
    """The weights' gradients go before the last rows, so these come later; Od comes before Ew, which reads its rows."""
    cut = Chunking(chunks=1, by="tokens", first_s=(1.0,), experts_s=(2.0,), second_s=(3.0,), deferred_s=(1.0,))
    window = Window(phase="backward", head_s=1.0, tail_s=1.0, ops_s=(4.0,), metadata_s=0.5, chunkings=(cut,))
    best = search(window)[0]
    assert best.order == "Ut Ct0 Ed0 Mt Dt0 Od Ew0 Pt" and best.predicted_s == 1 + 1 + 2 + (4 + 1) + 1
    joined = joined_form(window, best)
    assert joined.predicted_s == 1 + 1 + 2 + 0.5 + 3 + 4 + 1 + 1


@pytest.mark.parametrize("pair", [chunked(4), chunked(2, "experts"), shared_expert(1, chunks=2),
                                  shortcut_window(3, 1, chunks=2)], ids=lambda pair: pair.name)  # fmt: skip
def test_the_order_of_the_builder_is_one_that_can_be_evaluated(pair):
    pair = deduplicate(pair)
    verb = "S" if pair.has_shared else "B"
    for phase, schedule in (("forward", pair.forward), ("backward", pair.backward)):
        part = (0.5,) * pair.chunks
        cut = Chunking(chunks=pair.chunks, by=pair.by, first_s=part, experts_s=part, second_s=part,
                       deferred_s=() if phase == "forward" else (0.5,))  # fmt: skip
        ops = 1 + (1 if verb == "S" else pair.num_ops)
        window = Window(phase=phase, op_verb=verb, head_s=0.1, tail_s=0.1, ops_s=(0.25,) * ops, metadata_s=0.1,
                        chunkings=(cut,))  # fmt: skip
        best_s = search(window)[0].predicted_s
        assert evaluate(window, schedule, chunks=pair.chunks, by=pair.by) >= best_s * (1 - 1e-9)
        if phase == "forward":
            halved = replace(window, halves_s=(0.125, 0.125))
            split = split_own(pair).forward
            best_s = search(halved)[0].predicted_s
            assert evaluate(halved, split, chunks=pair.chunks, by=pair.by) >= best_s * (1 - 1e-9)
            with pytest.raises(ConfigError, match="the actions of the window: Or"):
                evaluate(window, split, chunks=pair.chunks, by=pair.by)
        plain = Window(phase=phase, op_verb=verb, head_s=0.1, tail_s=0.1, ops_s=(0.25,) * (ops - 1), chunkings=(cut,))
        with pytest.raises(ConfigError, match="the actions of the window"):
            evaluate(plain, schedule, chunks=pair.chunks, by=pair.by)


def test_the_page_speaks_of_the_rows_that_stay():
    cut = Chunking(chunks=1, by="tokens", first_s=(3.0,), experts_s=(2.0,), second_s=(4.0,), chunk_bytes=(10,))
    window = Window(phase="forward", head_s=1.0, tail_s=1.0, ops_s=(3.0, 4.0), metadata_s=0.5, chunkings=(cut,))
    text = explain(window, search(window))
    assert "The exchanges take 7500 ms" in text and "3000 ms of the experts on rows that stay" in text
    assert "4000 ms of backbone ops" in text and "a cut point in the middle of every op" in text
    assert "a link that takes no time" in text


@pytest.mark.parametrize(("change", "field"), [({"ops_s": ()}, "window.ops_s"),
                                               ({"metadata_s": -1.0}, "window.metadata_s"),
                                               ({"metadata_s": float("nan")}, "window.metadata_s"),
                                               ({"halves_s": (1.0, -1.0)}, "window.halves_s"),
                                               ({"metadata_s": None, "halves_s": (1.0, 1.0)}, "window.halves_s"),
                                               ({"op_verb": "S", "ops_s": (1.0,) * 3}, "window.ops_s")])  # fmt: skip
def test_windows_that_cannot_be(change, field):
    cut = Chunking(chunks=1, by="tokens", first_s=(1.0,), experts_s=(1.0,), second_s=(1.0,))
    given = {"phase": "forward", "head_s": 0.0, "tail_s": 0.0, "ops_s": (1.0,), "metadata_s": 0.0, "chunkings": (cut,)}
    with pytest.raises(ConfigError) as error:
        Window(**(given | change))
    assert error.value.field == field
