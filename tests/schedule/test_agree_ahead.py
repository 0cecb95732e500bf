"""The place of N in a schedule: what may stand beside it, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_overlap import ConfigError
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import (
    agree_ahead,
    chunked,
    deduplicate,
    parse_choice,
    serial,
    shared_expert,
    split_own,
    window,
)
from moe_overlap.schedule.check import check, draw, makespan_s, problems


def test_the_first_ops_move_between_n_and_p() -> None:
    pair = window(3, 2, chunks=2)
    assert pair.forward.text == "P D0 D1 B0 B1 E0 C0 E1 C1 B2 U" and pair.ahead == ()
    for ops, text in (
        (0, "P D0 D1 B0 B1 E0 C0 E1 C1 B2 U"),
        (1, "N B0 P D0 D1 B1 E0 C0 E1 C1 B2 U"),
        (3, "N B0 B1 B2 P D0 D1 E0 C0 E1 C1 U"),
    ):
        moved = agree_ahead(pair, ops)
        check(moved)
        assert moved.forward.text == text and moved.backward == pair.backward
        assert [action.text for action in moved.ahead] == [f"B{i}" for i in range(ops)]
        assert Schedule.parse(text) == moved.forward
        assert (moved.digest == pair.digest) == (ops == 0)


def test_a_shared_expert_is_an_op_too_and_has_a_word() -> None:
    assert parse_choice("shared_expert(ahead)", shared=True) == agree_ahead(shared_expert())
    assert agree_ahead(chunked(2, shared=True)).forward.text == "N S P D0 D1 E0 C0 E1 C1 U"
    with pytest.raises(ConfigError):
        parse_choice("shared_expert(ahead)")


def test_it_goes_with_deduplication_in_either_order() -> None:
    pair = window(2, 1)
    for one in (split_own(deduplicate(agree_ahead(pair))), agree_ahead(split_own(deduplicate(pair)))):
        check(one)
        assert one.forward.text == "N B0 P M D0 O E0 C0 Or B1 U"


@pytest.mark.parametrize("ops", [-1, 3, True, 1.0, None])
def test_a_number_of_ops_that_there_are_not(ops: object) -> None:
    with pytest.raises(ConfigError, match="ahead"):
        agree_ahead(window(2, 1), ops)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ahead"):
        agree_ahead(serial(), 1)


@pytest.mark.parametrize(
    "text",
    [
        "P N D0 E0 C0 B0 U",
        "B0 N P D0 E0 C0 U",
        "P D0 N E0 C0 B0 U",
        "N B0 D0 P E0 C0 U",
        "N N B0 P D0 E0 C0 U",
    ],
)
def test_another_place_of_n_is_refused_with_the_reason(text: str) -> None:
    found = problems(Schedule.parse(text), chunks=1)
    assert any("N" in problem.message for problem in found), found
    with pytest.raises(ConfigError, match="schedule.forward"):
        check(replace(window(1, 0), forward=Schedule.parse(text)))


def test_the_simulation_hides_n_under_the_ops_beside_it() -> None:
    pair = window(3, 2)
    seconds = {"N": 4.0, "B": 5.0, "P": 1.0, "D": 3.0, "E": 2.0, "C": 3.0, "U": 1.0}
    ahead = agree_ahead(pair)
    assert makespan_s(ahead.forward, seconds) == makespan_s(pair.forward, seconds) == 19.0, "of which plain has no N"
    assert makespan_s(ahead.forward, seconds, joined=True) == makespan_s(pair.forward, seconds, joined=True) + 4.0
    assert draw(ahead.forward).splitlines()[1].startswith("wire | N ")
