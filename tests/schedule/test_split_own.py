"""One half of the experts' own rows under the last combine: another order of the same arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_overlap import ConfigError
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, deduplicate, serial, split_own, window
from moe_overlap.schedule.check import check
from tests.layers import make, tokens
from tests.ranks import virtual_world
from tests.tolerances import same_bits


def test_the_other_half_stands_behind_the_last_combine():
    pair = split_own(deduplicate(chunked(2)))
    assert pair.forward.text == "P M D0 D1 O E0 C0 E1 C1 Or U"
    assert pair.backward == deduplicate(chunked(2)).backward
    assert split_own(deduplicate(window(2, 1))).forward.text == "P M D0 O B0 E0 C0 Or B1 U"
    check(pair)


@pytest.mark.parametrize(
    "text", ["P M D0 D1 E0 C0 E1 C1 Or U", "P D0 D1 E0 C0 E1 C1 Or U", "P M D0 D1 Or O E0 C0 E1 C1 U"]
)
def test_the_other_half_without_the_first_one_before_it_is_refused(text):
    with pytest.raises(ConfigError, match=r"O is missing|Or runs before O|M is missing"):
        check(replace(deduplicate(chunked(2)), forward=Schedule.parse(text)))


@pytest.mark.parametrize("schedule", [serial(), chunked(1), chunked(3, "experts")])
def test_halves_have_the_bits_of_the_whole(schedule):
    def step(me, pair):
        layer = make(me.transport(), schedule=pair, dedup="on")
        x = tokens(24, seed=me.rank).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        return layer.stats().schedule, [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    whole = virtual_world(2).run(lambda me: step(me, deduplicate(schedule)))
    halves = virtual_world(2).run(lambda me: step(me, schedule))
    for (text, one), (other_text, other) in zip(whole, halves, strict=True):
        assert "Or" not in text.split() and "Or" in other_text.split()
        for a, b in zip(one, other, strict=True):
            same_bits(a, b)
