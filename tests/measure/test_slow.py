"""Why a step was slow: waits parted without rest, and planted faults that are found by kind, rank and action."""

from __future__ import annotations

import random

import pytest

from moe_overlap.measure.slow import BETWEEN, KINDS, OTHER, Part, blame, critical_path, split_waits, why_slow
from moe_overlap.schedule.builders import chunked, serial, shared_expert, shortcut
from moe_overlap.schedule.recorder import TimelineEvent
from tests.measure.played_step import Fault, Player

PAIRS = (serial(), chunked(2), chunked(4), shared_expert(0), shortcut(2, 1))
TRIALS = 200
GOAL = 0.95


def event(rank, action, lane, start_s, end_s, **more) -> TimelineEvent:
    return TimelineEvent(rank, 0, "forward", action, lane, start_s, end_s, **more)


def parts(events, rank, action):
    (wait,) = [wait for wait in split_waits(events) if (wait.rank, wait.action) == (rank, action)]
    assert sum(part.seconds for part in wait.parts) == pytest.approx(wait.end_s - wait.start_s)
    return list(wait.parts)


def test_a_late_rank_and_then_the_wire():
    events = [
        event(0, "D0", "wait", 1.0, 6.0),
        event(0, "D0", "wire", 1.0, 6.0, issued_s=1.0),
        event(1, "attn1", "comp", 0.0, 3.0),
        event(1, "D0", "wire", 4.0, 6.0, issued_s=4.0),
    ]
    assert parts(events, 0, "D0") == [
        Part("late", 1, "attn1", 2.0), Part("late", 1, BETWEEN, 1.0), Part("wire", None, "D0", 2.0)
    ]  # fmt: skip


def test_the_sender_of_the_last_rows_is_named_and_what_was_before_them():
    """Rank 2 is the last to issue, but it is rank 1's rows that are waited for, behind others on its link."""
    events = [
        event(0, "C0", "wait", 2.0, 9.0),
        event(0, "C0", "wire", 2.0, 9.0, issued_s=2.0, last_sender=1),
        event(1, "D1", "wire", 0.0, 5.0, issued_s=0.0, last_sender=1),
        event(1, "C0", "wire", 5.0, 9.0, issued_s=1.0, last_sender=1),
        event(2, "C0", "wire", 6.0, 9.0, issued_s=6.0, last_sender=1),
    ]
    assert parts(events, 0, "C0") == [Part("contention", 1, "D1", 3.0), Part("wire", 1, "C0", 4.0)]
    without = [one for one in events if one.action != "D1"]
    assert parts(without, 0, "C0")[0] == Part("contention", 1, OTHER, 3.0)


def test_without_a_sender_an_unfinished_exchange_is_contention():
    events = [
        event(0, "D0", "wait", 0.0, 2.0),
        event(0, "D0", "wire", 0.0, 2.0, issued_s=0.0),
        event(0, "C0", "wait", 3.0, 7.0),
        event(0, "C0", "wire", 3.0, 7.0, issued_s=3.0),
        event(0, "R", "wire", 1.0, 5.0, issued_s=1.0),
    ]
    assert parts(events, 0, "C0") == [Part("contention", None, "R", 2.0), Part("wire", None, "C0", 2.0)]


def test_a_late_rank_that_waits_itself_passes_the_blame_on():
    """Rank 0 waits in C0 for rank 1, which waited in D0 for rank 2, which computed."""
    events = [
        event(0, "D0", "wire", 0.0, 0.5, issued_s=0.0),
        event(0, "C0", "wait", 1.0, 8.0),
        event(0, "C0", "wire", 1.0, 8.0, issued_s=1.0, last_sender=1),
        event(1, "D0", "wait", 0.0, 5.0),
        event(1, "D0", "wire", 0.0, 5.0, issued_s=0.0, last_sender=2),
        event(1, "E0", "comp", 5.0, 6.0),
        event(1, "C0", "wire", 6.0, 8.0, issued_s=6.0, last_sender=1),
        event(2, "attn1", "comp", 0.0, 4.0),
        event(2, "D0", "wire", 4.0, 5.0, issued_s=4.0),
    ]
    assert parts(events, 0, "C0") == [
        Part("late", 2, "attn1", 3.0), Part("wire", 2, "D0", 1.0), Part("late", 1, "E0", 1.0),
        Part("wire", 1, "C0", 2.0),
    ]  # fmt: skip
    assert blame(split_waits(events))["late", 2, "attn1"] == 3.0 + 4.0


def test_actions_of_one_name_are_paired_in_their_order():
    """Two layers of one step, or the two parts of a hierarchical exchange."""
    first = [event(r, "D0", lane, 0.0, 1.0, issued_s=0.0 if lane == "wire" else None)
             for r in (0, 1) for lane in ("wait", "wire")]  # fmt: skip
    second = [event(0, "D0", "wait", 2.0, 4.0), event(0, "D0", "wire", 2.0, 4.0, issued_s=2.0),
              event(1, "E0", "comp", 1.0, 3.0), event(1, "D0", "wire", 3.0, 4.0, issued_s=3.0)]  # fmt: skip
    found = [wait for wait in split_waits(first + second) if wait.rank == 0]
    assert [(wait.seconds("late"), wait.seconds("wire")) for wait in found] == [(0.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_every_wait_is_parted_without_rest(seed, tells):
    rng = random.Random(seed)
    fault = Fault(kind=rng.choice(KINDS), rank=0, times=3.0, verb="E")
    for pair in PAIRS:
        for wait in split_waits(Player(pair, 4, rng, fault, tells=tells).play()):
            assert all(part.kind in KINDS and part.seconds > 0 for part in wait.parts)
            assert sum(part.seconds for part in wait.parts) == pytest.approx(wait.end_s - wait.start_s, abs=1e-12)


def trial(seed: int) -> tuple[Fault, object]:
    """A step with one planted fault beside eight usual ones, on a link that tells or one that does not."""
    rng = random.Random(seed)
    pair, ranks, tells = rng.choice(PAIRS), rng.choice((2, 3, 4)), rng.random() < 0.5
    verbs = sorted({"attn", "E"} | {a.verb for a in pair.forward if a.verb in ("B", "S")})
    # Contention is not known where the transport does not tell what is on its link.
    kind = rng.choice(KINDS if tells else KINDS[:2])
    fault = Fault(kind=kind, rank=rng.randrange(ranks), times=rng.uniform(2.0, 4.0), verb=rng.choice(verbs))
    usual = [Player(pair, ranks, rng, None, tells=tells).play() for _ in range(8)]
    found = why_slow(Player(pair, ranks, rng, fault, tells=tells).play(), usual)
    return fault, (found, tells)


def is_right(fault: Fault, found, tells: bool) -> bool:
    if found.kind != fault.kind:
        return False
    if fault.kind == "late":
        return found.rank == fault.rank and found.action.rstrip("0123456789") == fault.verb
    return found.rank == (fault.rank if tells else None)


def test_stragglers_slow_links_and_busy_links_are_told_apart():
    trials = [trial(seed) for seed in range(TRIALS)]
    wrong = [(fault, str(found)) for fault, (found, tells) in trials if not is_right(fault, found, tells)]
    assert {fault.kind for fault, _ in trials} == set(KINDS)
    assert len(wrong) <= (1 - GOAL) * TRIALS, wrong


@pytest.mark.parametrize("seed", range(10))
def test_the_path_is_the_whole_step(seed):
    rng = random.Random(seed)
    fault = Fault(kind=rng.choice(KINDS), rank=1, times=2.0, verb="E")
    for pair in PAIRS:
        for tells in (True, False):
            events = Player(pair, 3, rng, fault, tells=tells).play()
            path = critical_path(events)
            begin_s, end_s = (min(one.start_s for one in events), max(one.end_s for one in events))
            assert sum(part.seconds for part in path) == pytest.approx(end_s - begin_s)


def test_what_is_said():
    rng = random.Random(3)
    pair = chunked(2)
    usual = [Player(pair, 3, rng, None, tells=True).play() for _ in range(5)]
    late = why_slow(Player(pair, 3, rng, Fault(kind="late", rank=2, times=3.0, verb="E"), tells=True).play(), usual)
    assert (late.kind, late.rank) == ("late", 2) and late.took_s > late.usual_s and "rank 2 was late" in str(late)
    assert late.excess_s <= late.by_kind["late"] + 1e-3
    alone = why_slow(Player(pair, 3, rng, Fault(kind="wire", rank=1, times=3.0), tells=True).play())
    assert (alone.kind, alone.rank, alone.usual_s) == ("wire", 1, None) and "link of rank 1 was slow" in str(alone)
    nothing = why_slow([event(0, "E0", "comp", 0.0, 1.0)])
    assert nothing.kind is None and "nothing took longer" in str(nothing)
    with pytest.raises(ValueError, match="record"):
        why_slow([])
