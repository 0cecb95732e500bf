"""Schedules as data: text, validation, drawing, simulation against the closed forms."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import VERBS, Action, Schedule, dependencies
from moe_overlap.schedule.builders import (
    chunked,
    parse_choice,
    serial,
    shared_expert,
    shortcut,
    tap_of_position,
    window,
)
from moe_overlap.schedule.check import check, draw, makespan_s, problems, spans
from moe_overlap.schedule.order import backward_stretches

PAIRS = [
    serial(),
    serial(shared=True),
    *(chunked(r, by) for r in range(1, 17) for by in ("tokens", "experts")),
    *(shared_expert(slot, chunks=r) for slot in (0, 1) for r in (1, 4)),
    *(
        window(n, k, chunks=r, backward_slot=b)
        for n in range(5)
        for k in range(n + 1)
        for b in range(n + 1)
        for r in (1, 3)
    ),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.forward.text}/{p.backward.text}".replace(" ", ""))
def test_every_builder_validates_and_its_text_parses_back(pair):
    check(pair)
    for schedule in (pair.forward, pair.backward):
        assert Schedule.parse(schedule.text) == schedule
        assert Schedule.parse(draw_words(schedule)) == schedule


def draw_words(schedule):
    """The actions read back from the drawing, column by column, in the order of the schedule."""
    words = {word for line in draw(schedule).splitlines() for word in line.split("|")[1].split() if word != "."}
    assert words == {action.text for action in schedule}
    return " ".join(action.text for action in schedule if action.text in words)


@pytest.mark.parametrize("text", ["D", "P0", "D-1", "D01", "X0", "d0", "D0@", "D0x", "", "0", "D٣"])
def test_bad_action_text_is_refused(text):
    with pytest.raises(ConfigError):
        Action.parse(text)


def test_drawings_of_the_published_strategies():
    assert draw(serial().forward) == "comp | P .  E0 .  U\nwire | . D0 .  C0 ."
    assert draw(chunked(3).forward) == "comp | P .  E0 E1 E2 .  .  U\nwire | . D0 D1 D2 C0 C1 C2 ."
    assert draw(shortcut(2, 1).forward) == "comp | P B0 E0 B1 B2 U\nwire | . D0 .  C0 .  ."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P D0 E1 D1 E0 C0 C1 U", "E1 runs before D1"),
        ("P D0 D1 E0 E1 C0 U", "C1 is missing"),
        ("P D0 D0 D1 E0 E1 C0 C1 U", "D0 appears twice"),
        ("P D0 D1 D2 E0 E1 C0 C1 U", "D2 has no chunk"),
        ("D0 D1 E0 E1 C0 C1 P U", "D0 runs before P"),
        ("P D0 D1 E0 E1 C0 U C1", "U runs before C1"),
        ("P D0 D1 E0 E1 C0 C1 B1 U", "B has the indices"),
        ("P D0 D1 E0 E1 C0 C1 Ut U", "exactly one phase"),
    ],
)
def test_an_invalid_schedule_is_refused_with_the_offending_action_marked(text, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(chunked(2), forward=Schedule.parse(text)))


def test_too_many_exchanges_under_way():
    assert not problems(chunked(4).forward, chunks=4, max_in_flight=4)
    assert any("limit is 2" in p.message for p in problems(chunked(4).forward, chunks=4, max_in_flight=2))


def test_the_backward_of_the_ops_must_mirror_the_forward():
    pair = window(2, 1)
    swapped = Schedule.parse("Ut Ct0 Bt0 Ed0 Dt0 Ew0 Bt1 Pt")
    with pytest.raises(ConfigError):
        check(replace(pair, backward=swapped))


def test_every_mutation_that_breaks_a_dependency_is_found():
    chance = random.Random(5)
    refused = 0
    for _ in range(2000):
        pair = chance.choice(PAIRS)
        words = list(pair.forward.actions)
        i, j = sorted(chance.sample(range(len(words)), 2))
        words[i], words[j] = words[j], words[i]
        mutated = Schedule(tuple(words))
        broken = any(need > position for position, needs in enumerate(dependencies(mutated)) for need in needs)
        found = problems(mutated, chunks=pair.chunks)
        assert bool(found) == broken
        refused += broken
    assert refused > 500


def test_chunked_forward_makespan_is_the_closed_form():
    chance = random.Random(1)
    for _ in range(2000):
        r = chance.randint(1, 16)
        a, e = chance.random(), chance.random()
        simulated = makespan_s(chunked(r).forward, {"D": a, "C": a, "E": e})
        assert simulated == pytest.approx(max(2 * r * a, 2 * a + r * e, (r + 1) * a + e), rel=1e-12)


def test_shortcut_makespan_is_the_closed_form():
    chance = random.Random(2)
    for _ in range(2000):
        n = chance.randint(0, 4)
        k = chance.randint(0, n)
        d, c, e = (chance.random() for _ in range(3))
        ops = [chance.random() for _ in range(n)]
        durations = {"D0": d, "C0": c, "E0": e} | {f"B{i}": s for i, s in enumerate(ops)}
        expected = max(sum(ops[:k]), d) + e + max(sum(ops[k:]), c)
        assert makespan_s(window(n, k).forward, durations) == pytest.approx(expected, rel=1e-12)


def test_chunked_backward_reaches_its_bound_where_weight_gradients_fill_the_wire():
    chance = random.Random(3)
    for _ in range(2000):
        r = chance.randint(1, 16)
        a, d, w = (chance.random() for _ in range(3))
        simulated = makespan_s(chunked(r).backward, {"Ct": a, "Dt": a, "Ed": d, "Ew": r * w})
        bound = max(2 * r * a, 2 * a + r * d, (r + 1) * a + d, a + r * (d + w))
        assert bound - 1e-12 <= simulated <= bound + max(0.0, (r - 1) * (a - d)) + 1e-12


def test_joined_means_the_sum_of_everything():
    durations = {"P": 1.0, "D": 2.0, "E": 3.0, "C": 4.0, "U": 5.0, "B": 6.0}
    for pair in (chunked(3), window(3, 1, chunks=2)):
        total = sum(durations[action.verb] for action in pair.forward)
        assert makespan_s(pair.forward, durations, joined=True) == pytest.approx(total)


def test_lanes_never_run_two_actions_at_once():
    for pair in PAIRS:
        timed = list(zip(pair.backward, spans(pair.backward, 1.0), strict=True))
        for lane in ("comp", "wire"):
            ends = [span for action, span in timed if action.lane == lane]
            assert all(first[1] <= second[0] for first, second in zip(ends, ends[1:], strict=False))


def test_backward_nodes_wait_just_before_the_first_reader():
    words = [[str(half) for half in stretch] for stretch in backward_stretches(window(2, 1, chunks=2))]
    assert words == [
        ["Ut", "Ct0.start", "Ct1.start"],
        ["Ct0.wait", "Ed0", "Dt0.start", "Ct1.wait", "Ed1", "Dt1.start", "Ew0"],
        [],
        ["Dt0.wait", "Dt1.wait", "Pt"],
    ]


def test_verbs_that_read_something_read_what_a_verb_of_their_phase_writes_or_an_input():
    inputs = {"x", "dy", "hidden", "dhidden"}
    for spec in VERBS.values():
        written = {r.name for other in VERBS.values() if other.phase == spec.phase for r in other.writes}
        assert all(r.name in written | inputs for r in spec.reads)


def test_positions_of_the_paper():
    assert [tap_of_position(p) for p in (1, 2, 3)] == [2, 1, 0]
    with pytest.raises(ConfigError, match="position"):
        tap_of_position(4)


def test_choices():
    assert parse_choice("serial") == serial()
    assert parse_choice(" chunked( 4 , experts ) ") == chunked(4, "experts")
    assert parse_choice("shared_expert(0)", shared=True) == shared_expert(0)
    with pytest.raises(ConfigError, match="auto .of a MoELayer"):
        parse_choice("auto")
    for text in (
        "chunked",
        "chunked(0)",
        "chunked(17)",
        "chunked(x)",
        "chunked(2,rows)",
        "serial(1)",
        "",
        "eps",
        "shared_expert",
    ):
        with pytest.raises(ConfigError):
            parse_choice(text)
    for slot in (-1, 3, 1.0, None):
        with pytest.raises(ConfigError, match="slot"):
            window(2, slot)
