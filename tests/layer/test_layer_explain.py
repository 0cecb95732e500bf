"""What a layer with schedule="auto" says of a step is what ran: joined where overlap is off, within its budget, the
last run of each phase, and how far the step is from what was calibrated."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from moe_overlap import ConfigError, ShortcutBlock
from moe_overlap.layer.explain import window_s
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import window
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.words import from_text
from tests.auto.planted import cost_model, line, planted
from tests.layers import D, K, make, tokens
from tests.ranks import virtual_world

FORWARD = Schedule.parse("P D0 E0 C0 U")


def explained(*, model=None, backwards=1, grad=True, **options):
    """What rank 0's layer says after one step on 32 tokens a rank."""

    def rank(me):
        layer = make(me.transport(), schedule="auto", **options)
        y = layer(tokens(32, me.rank).requires_grad_(grad))
        for run in range(backwards):
            y.sum().backward(retain_graph=run + 1 < backwards)
        return layer.explain(), layer.last_events

    with planted(cost_model() if model is None else model):
        return virtual_world(2).run(rank)[0]


def test_overlap_off_is_explained_as_joined():
    on, _ = explained()
    off, _ = explained(overlap=False)
    assert "overlap=False" not in on and "joined" not in on.split("-- forward --")[1].split("predicted")[0]
    assert "every exchange joined (overlap off)" in off and "overlap=False: every exchange of what was chosen" in off
    for phase in ("forward", "backward"):
        page = off.split(f"-- {phase} --")[1]
        assert re.match(rf"\n{phase}: chunked\(\d+.*\), joined, predicted ", page), page[:80]
        (runs,) = (line for line in page.split("What would change")[0].splitlines() if "<- runs" in line)
        assert "joined" in runs


def test_the_budget_is_part_of_the_explanation():
    free, _ = explained()
    held = max(float(one) for one in re.findall(r"([0-9.e-]+) MB", free))
    tight, _ = explained(max_in_flight_bytes=int(1e6 * held) // 2)
    assert "max_in_flight_bytes" not in free and "no limit on bytes in flight" not in free
    assert tight.count("in flight (max_in_flight_bytes); this holds") == 2
    assert tight.count("no limit on bytes in flight") == 2


def test_what_lies_outside_the_window_is_said():
    text, _ = explained(model=cost_model(outside_s=3e-3, outside_backward_s=5e-3))
    said = re.findall(r"Outside this window, in none of these figures: (.*) in the calibration", text)
    assert said == ["3 ms", "5 ms"]


@pytest.mark.parametrize(("rows", "far"), [(0.0, False), (32.0, False), (31.0, True)])
def test_a_step_far_larger_than_the_calibrated_one_is_said(rows, far):
    """32 tokens with two experts each: 64 rows."""
    text, _ = explained(model=cost_model(measured_rows=rows))
    assert ("measured on 31 rows" in text and "this step had 64" in text) == far
    assert ("WARNING" in text) == far


def event(action, start_s, end_s, lane="comp", phase="forward"):
    return TimelineEvent(0, 1, phase, action, lane, start_s, end_s)


def test_the_last_run_of_a_phase_is_what_counts():
    first = [event("N", 0.0, 1.0, "wire"), event("P", 1.0, 2.0), event("D0", 2.0, 4.0, "wire"), event("E0", 4.0, 5.0),
             event("C0", 5.0, 6.0, "wire"), event("U", 6.0, 8.0)]  # fmt: skip
    assert window_s(first, FORWARD, "forward") == 7.0
    assert window_s(first, FORWARD, "backward") is None
    later = [event(one.action, one.start_s + 1e3, one.end_s + 1e3 + 0.5, one.lane) for one in first]
    assert window_s([*first, *later], FORWARD, "forward") == 7.5
    assert window_s([*first, *later[:-1]], FORWARD, "forward") is None, "only a part of it ran"
    assert window_s([one for one in first if one.action != "P"], FORWARD, "forward") is None


def test_a_backward_run_twice_is_measured_once():
    text, events = explained(backwards=2)
    runs = [one for one in events if one.action == "Ut"]
    assert len(runs) == 2 and text.count("Measured ") == 2
    measured = text.split("-- backward --")[1].split("Measured ")[1].split(",")[0]
    last = [one for one in events if one.phase == "backward" and one.start_s >= runs[1].start_s]
    seconds = max(one.end_s for one in last) - runs[1].start_s
    assert measured == f"{1e3 * seconds:.3g} ms"


def test_a_backward_that_ran_in_part_is_not_compared():
    """x needs no gradient on any rank, so the rows of the dispatch have no way back."""
    text, _ = explained(grad=False)
    assert "x needs no gradient" in text and "not measured yet" not in text
    assert text.count("Measured ") == 1 and "Measured " not in text.split("-- backward --")[1]


def test_the_answer_comes_first_and_says_what_runs():
    on, _ = explained()
    off, _ = explained(overlap=False)
    assert on.startswith("Exchanges run beside compute in ") and 'as schedule="auto" predicts' in on.splitlines()[0]
    assert off.startswith("Overlap is off (overlap=False): ") and "overlap on" not in on + off
    assert "predicts to be fastest" not in off.splitlines()[0]
    assert on.splitlines()[1].startswith("To run exactly this in every step: MoELayer(")
    assert on.splitlines()[3] == "letters:" and "D dispatch a chunk" in on


@pytest.mark.parametrize(("overlap", "schedule"), [(False, "auto"), (True, "auto"), (False, "chunked(2,experts)")])
def test_of_one_rank_with_experts_in_host_memory_it_says_who_turned_overlap_off(overlap, schedule):
    slow = {"experts": line(1e-6), "host_up": line(1e-6), "host_down": line(1e-6), "exchange": {}}
    with planted(cost_model(**slow)):
        layer = make(schedule=schedule, overlap=overlap, expert_offload="host")
        layer(tokens(8))
    first = layer.explain().splitlines()[0]
    assert ("overlap is off (overlap=False)" in first, "predicts to be fastest" in first) == (not overlap, overlap)
    assert ("waited for where they start" in first) == (not overlap)


def test_what_the_planner_leaves_joined_is_not_called_overlap():
    """Cutting is so dear, and ops are so few, that serial is fastest."""
    text, _ = explained(model=cost_model(issue_s=1.0), grad=False)
    first = text.splitlines()[0]
    forward = text.split("-- forward --")[1]
    assert "Overlap is not used" in forward
    assert first.startswith("Nothing is overlapped") or "in backward only" in first


def test_one_rank_says_that_there_is_nothing_to_overlap():
    layer = make(schedule="auto")
    for _ in range(2):
        assert layer.explain().startswith("One rank exchanges nothing")
        layer(tokens(4))
    assert "not measured yet" not in layer.explain()


def test_reasons_are_behind_verbose():
    layer = make()
    short, long = layer.explain(), layer.explain(verbose=True)
    assert "runs everywhere" not in short and "runs everywhere" in long and len(long) > 2 * len(short)
    assert re.search(r"on cpu: reference for \d+ ops \(", short)


def test_stats_begin_with_a_sentence():
    layer = make()
    layer(tokens(6))
    text = str(layer.stats())
    assert text.startswith("12 rows went to 8 experts, ") and len(text) < 2000


def block(layer, **options):
    return ShortcutBlock([nn.Linear(D, D, dtype=torch.float64) for _ in range(3)], layer, tap=1, **options)


def test_a_block_explains_itself_and_its_layers_schedule_is_used_or_refused():
    first = block(make(), slot=1)
    first(tokens(5))
    assert "slot=1" in first.explain() and first.stats().tokens_per_expert.sum() == 5 * K
    assert block(make(schedule="auto")).schedule.name.startswith("auto")
    assert block(make(schedule="auto"), schedule="auto").schedule.name.startswith("auto")
    with pytest.raises(ConfigError, match=r"moe\.schedule"):
        block(make(schedule="auto"), slot=1)
    with pytest.raises(ConfigError, match=r"moe\.schedule"):
        block(make(schedule="chunked(2)"), slot=1)


def test_a_block_runs_a_pair_that_was_written_out():
    def rank(me):
        layer = make(me.transport())
        torch.manual_seed(5)
        return block(layer, **options)(tokens(12, me.rank))

    pair = window(2, 1, chunks=2)
    options = {"slot": 1, "chunks": 2}
    wanted = virtual_world(2).run(rank)
    options = {"schedule": from_text(pair.forward.text, pair.backward.text)}
    for got, want in zip(virtual_world(2).run(rank), wanted, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ConfigError, match="2 backbone ops"):
        block(make(), schedule=window(3, 1))
