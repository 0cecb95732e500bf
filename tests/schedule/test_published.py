"""Schedules of published systems: drawn in docs/schedules.md as here, ScheMoE's theorem, what filling gains."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.errors import ConfigError
from moe_overlap.schedule import published
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import chunked, deduplicate, parse_choice, serial, shared_expert, shortcut, split_own
from moe_overlap.schedule.check import check, draw, makespan_s
from moe_overlap.schedule.simulate import simulate
from moe_overlap.schedule.words import from_text, python_of

PAGE = Path(__file__).parents[2] / "docs/schedules.md"
PAIRS = {
    "serial()": serial(),
    "chunked(3)": chunked(3),
    "expert_stages(3)": published.expert_stages(3),
    "pairwise(3)": published.pairwise(3),
    "compressed(3)": published.compressed(3),
    "filled(3)": published.filled(3),
    "megatron_shared()": published.megatron_shared(),
    "shared_expert(0)": shared_expert(0),
    "shortcut(1, 1)": shortcut(1, 1),
    "shortcut(2, 1)": shortcut(2, 1),
    "shortcut(3, 2)": shortcut(3, 2),
    "longcat()": published.longcat(),
    "arctic()": published.arctic(),
    "farskip()": published.farskip(),
    "split_own(deduplicate(chunked(2)))": split_own(deduplicate(chunked(2))),
}
BLOCK = re.compile(r"```text\n(\S[^\n]*?)(, backward)?\n(comp \|[^\n]*\nwire \|[^\n]*)\n```")


def test_the_page_draws_every_builder_as_it_is():
    found = {(call, bool(backward)): drawing for call, backward, drawing in BLOCK.findall(PAGE.read_text())}
    assert {call for call, _ in found} == set(PAIRS)
    for (call, backward), drawing in found.items():
        pair = PAIRS[call]
        assert drawing == draw(pair.backward if backward else pair.forward), call
    assert ("filled(3)", True) in found and ("chunked(3)", True) in found


def test_the_page_names_every_function_of_the_module():
    text = PAGE.read_text()
    defined = [
        name for name, value in vars(published).items() if getattr(value, "__module__", "") == published.__name__
    ]
    assert len(defined) == 8
    for name in defined:
        assert f"`{name}" in text, name


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_every_one_can_run_and_is_written_as_python(pair):
    check(pair)
    forward, backward = Schedule.parse(pair.forward.text), Schedule.parse(pair.backward.text)
    assert (forward, backward) == (pair.forward, pair.backward)
    assert "schedule=" in python_of(pair) or "slot=" in python_of(pair)


def test_words_and_refusals():
    assert parse_choice("chunked(3,peers)").digest == published.pairwise(3).digest
    assert python_of(published.pairwise(3)) == 'MoELayer(..., schedule="chunked(3,peers)")'
    pair = published.filled(2)
    text = f'from_text("{pair.forward}", "{pair.backward}", by="experts")'
    assert text in python_of(pair)
    assert from_text(pair.forward.text, pair.backward.text, by="experts").digest == pair.digest
    with pytest.raises(ConfigError, match="Eg"):
        from_text(pair.forward.text, pair.backward.text, by="experts", backward_by="tokens")
    for backward in (
        "Ut Ct0 Ct1 Ed0 Dt0 Eg0 Ed1 Dt1 Pt",
        f"{pair.backward} Ew0",
        "Ut Ct0 Ct1 Ed0 Dt0 Eg1 Ed1 Dt1 Eg0 Pt",
    ):
        with pytest.raises(ConfigError, match="Eg"):
            from_text(pair.forward.text, backward, by="experts")
    with pytest.raises(ConfigError, match="backward_by"):
        check(published.pairwise(2).with_backward(chunked(2)))
    with pytest.raises(NotImplementedError, match="peers"):
        deduplicate(published.pairwise(2))
    with pytest.raises(ConfigError, match="slot"):
        published.longcat(slot=4)
    with pytest.raises(ConfigError, match="chunks"):
        published.filled(BLOCKS + 1)


# ---------------------------------------------------------------- ScheMoE, theorem 1

TASKS = ("C1", "D1", "E", "C2", "D2")  # of a chunk on the compute lane; A1 is behind C1, A2 behind C2


def seconds_of(order: list[tuple[str, int]], seconds: dict[str, float]) -> float:
    """Makespan of an order of the compute tasks, each exchange started as soon as its rows are there."""
    number: dict[tuple[str, int], int] = {}
    lanes, durations, needs = [], [], []
    before = {"D1": "A1", "E": "D1", "C2": "E", "D2": "A2", "A1": "C1", "A2": "C2"}
    for task, chunk in order:
        for one in (task, "A1" if task == "C1" else "A2" if task == "C2" else ""):
            if one:
                number[one, chunk] = len(lanes)
                lanes.append(int(one[0] == "A"))
                durations.append(seconds[one])
                needs.append([number[before[one], chunk]] if one in before else [])
    return max(end for _, end in simulate(lanes, durations, needs))


def theorem(chunks: int) -> list[tuple[str, int]]:
    first = [("C1", c) for c in range(chunks)]
    return [*first, *((t, c) for c in range(chunks) for t in TASKS[1:4]), *(("D2", c) for c in range(chunks))]


def test_schemoes_order_is_the_best_of_all_and_is_ours():
    """Of all 252 orders of two chunks, for random task times; and our actions stand in that order."""
    chance = random.Random(4)
    orders = []
    for places in itertools.combinations(range(10), 5):
        parts = iter(TASKS), iter(TASKS)
        orders.append([(next(parts[chunk]), chunk) for at in range(10) for chunk in [int(at not in places)]])
    assert theorem(2) in orders
    for _ in range(40):
        seconds = {task: chance.random() for task in (*TASKS, "A1", "A2")}
        best = min(seconds_of(order, seconds) for order in orders)
        assert seconds_of(theorem(2), seconds) == pytest.approx(best, rel=1e-12)
    words = [word for word in published.compressed(3).forward.text.split() if word[0] in "DEC"]
    assert words == ["D0", "D1", "D2", "E0", "C0", "E1", "C1", "E2", "C2"]


# ---------------------------------------------------------------- Lancet


def test_what_filling_gains():
    """The figures of docs/schedules.md: against all weight gradients behind the last input gradient."""
    chance = random.Random(3)
    gains = []
    for _ in range(4000):
        r, a, d, w = chance.randint(2, 8), *(chance.random() for _ in range(3))
        filled = makespan_s(published.filled(r).backward, {"Ct": a, "Dt": a, "Ed": d, "Eg": w})
        behind = makespan_s(chunked(r, "experts").backward, {"Ct": a, "Dt": a, "Ed": d, "Ew": r * w})
        gains.append(behind / filled)
    assert sum(gains) / len(gains) == pytest.approx(1.015, abs=0.003)
    assert 1.30 < max(gains) < 1.45 and 0.87 < min(gains) < 0.93
    faster, slower = (sum(wins(gain) for gain in gains) / len(gains) for wins in (above_one, below_one))
    assert faster == pytest.approx(0.20, abs=0.02) and slower == pytest.approx(0.14, abs=0.02)


def above_one(gain: float) -> bool:
    return gain > 1 + 1e-9


def below_one(gain: float) -> bool:
    return gain < 1 - 1e-9
