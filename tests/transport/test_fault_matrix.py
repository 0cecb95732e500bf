"""A rank is killed or stopped in the middle of any action, under any schedule.

All others raise a typed error that names it, in time. A stopped one that goes on learns of it, and after reopen() the
next step is the first one, bit for bit.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import MoELayer, MoeTransportError, ShortcutBlock
from moe_overlap.placement import Placement
from moe_overlap.schedule.builders import parse_choice
from moe_overlap.schedule.lanes import Lanes
from tests.ranks import Ranks, mark
from tests.tolerances import same_bits

D, F, E = 16, 24, 12
PHASES = ("route", "N", "D0", "E0", "C0", "Ut", "Ct0", "Ed0")
SCHEDULES = ("serial", "chunked(2)", "chunked(2,experts)", "shortcut")
BESIDE_N = {"op": {"ahead": 1}, "op before the tap": {"router_tap": 0}}  # N is under way in this op
COPIES = {"copied": False, "relayed": True}  # of an expert, on all ranks: whether they go from rank to rank
OPENING_S = 60.0  # of a busy machine
LIMIT_S = 3.0
MARGIN_S = 15.0  # a busy machine may be late; a hang would be later


def model(schedule):
    torch.manual_seed(0)
    if schedule in ("shortcut", *BESIDE_N):
        moe = MoELayer(D, F, E, 2, group=dist.group.WORLD, dtype=torch.float64, timeout_s=OPENING_S)
        ops = [nn.Linear(D, D, dtype=torch.float64) for _ in range(3)]
        return ShortcutBlock(ops, moe, tap=1, slot=1, **BESIDE_N.get(schedule, {})), moe
    options = {"schedule": schedule}
    if schedule in COPIES:
        pair = replace(parse_choice("chunked(2)"), relayed_copies=COPIES[schedule])
        options = {"schedule": pair, "placement": copied(dist.get_world_size())}
    moe = MoELayer(D, F, E, 2, group=dist.group.WORLD, dtype=torch.float64, timeout_s=OPENING_S, **options)
    return moe, moe


def copied(world):
    """Expert 0 is on all ranks."""
    first, *others = Placement.identity(E, world).experts_of_ranks()
    return Placement.of_ranks([first, *([*experts, 0] for experts in others)])


def step(made, rank):
    """Output and gradients; copies are fetched anew, as behind a step of an optimizer."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.0)
    x = torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    made.zero_grad()
    y = made(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in made.parameters())]


@contextmanager
def hit_in(phase, made, moe, number):
    """This rank gets a signal when it comes to the phase."""
    done = []

    def hit():
        if not done:
            done.append(True)
            os.kill(os.getpid(), number)

    act, agree = Lanes.act, moe.transport.begin_agree
    if phase == "route":
        hook = moe.router.register_forward_pre_hook(lambda *_: hit())
    if phase in BESIDE_N:
        hook = made.backbone[made.tap if phase == "op" else 0].register_forward_pre_hook(lambda *_: hit())
    if phase == "N":
        moe.transport.begin_agree = lambda record: (hit(), agree(record))[1]

    def noted(self, action, body, *arguments, timed=True):
        if action.text == phase:
            hit()
        return act(self, action, body, *arguments, timed=timed)

    Lanes.act = noted
    try:
        yield
    finally:
        Lanes.act = act
        if phase in ("route", *BESIDE_N):
            hook.remove()
        if phase == "N":
            del moe.transport.begin_agree


def one_fault(phase: str, schedule: str, number: int, victim: int) -> Any:
    rank = dist.get_rank()
    made, moe = model(schedule)
    want, weights = step(made, rank), [parameter.detach().clone() for parameter in made.parameters()]
    moe.transport.timeout_s = LIMIT_S
    begin = time.monotonic()
    if rank == victim:
        with hit_in(phase, made, moe, number):
            try:
                step(made, rank)
            except MoeTransportError as error:
                found = type(error).__name__, error.peer, 0.0
            else:
                raise AssertionError("the others had given up")
    else:
        with pytest.raises(MoeTransportError) as caught:
            for _ in range(3):
                step(made, rank)
        found = type(caught.value).__name__, caught.value.peer, time.monotonic() - begin
        mark()
    for parameter, before in zip(made.parameters(), weights, strict=True):
        same_bits(parameter.detach(), before)
    if number == signal.SIGSTOP:
        moe.transport.timeout_s = OPENING_S
        moe.transport.reopen()
        for got, wanted in zip(step(made, rank), want, strict=True):
            same_bits(got, wanted)
    return found


def run(phase: str, schedule: str, world: int, number: signal.Signals) -> None:
    victim = world - 1
    others = list(range(world - 1))
    with Ranks(world) as ranks:
        pids = [ranks.pid(rank) for rank in range(world)]
        ranks.start(one_fault, phase, schedule, int(number), victim)
        if number == signal.SIGSTOP:
            ranks.wait_for_marks(ranks=others)
            assert state(pids[victim]) in "Tt"
            ranks.signal(victim, signal.SIGCONT)
        ended = ranks.wait(limit_s=60, ranks=others if number == signal.SIGKILL else None)
        for rank in others:
            name, peer, seconds = ended[rank].value or (ended[rank].error, None, 0.0)
            expected = ("PeerFailed",) if number == signal.SIGKILL else ("TransportTimeout", "RemoteAbort")
            assert name in expected and peer == victim, (rank, ended[rank])
            assert seconds < LIMIT_S + MARGIN_S
        if number == signal.SIGSTOP:
            assert ended[victim].value[0] in ("RemoteAbort", "TransportTimeout"), ended[victim]
    for pid in pids:
        assert not alive(pid)


def state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def alive(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while state(pid) not in ("gone", "Z", "X") and time.monotonic() < deadline:
        time.sleep(0.05)
    return state(pid) not in ("gone", "Z", "X")


ALL = list(product(PHASES, SCHEDULES, (2, 3), (signal.SIGKILL, signal.SIGSTOP)))


# Each phase with each signal, and with every schedule and world over them; the others are soaked.
def short(case):
    """A case of the short matrix: one of two schedules and one of two worlds for each phase and signal."""
    phase, schedule, world, number = PHASES.index(case[0]), SCHEDULES.index(case[1]), case[2], case[3]
    return schedule == (phase + 2 * (world == 3)) % 4 and (world == 2) == (phase % 2 == (number == signal.SIGKILL))


SHORT = [case for case in ALL if short(case)]


@pytest.mark.parametrize(("phase", "schedule", "world", "number"), SHORT)
def test_a_rank_is_killed_or_stopped(phase, schedule, world, number):
    run(phase, schedule, world, number)


@pytest.mark.parametrize(
    ("phase", "world", "number"), [("op", 3, signal.SIGKILL), ("op before the tap", 2, signal.SIGSTOP)]
)
def test_a_rank_is_killed_or_stopped_while_ranks_agree(phase, world, number):
    run(phase, phase, world, number)


@pytest.mark.parametrize(
    ("phase", "schedule", "world", "number"),
    [
        ("Wf0", "copied", 2, signal.SIGKILL), ("Wf0", "copied", 3, signal.SIGSTOP),
        ("Wf1", "relayed", 4, signal.SIGKILL), ("Wg", "copied", 3, signal.SIGKILL),
        ("Wg", "copied", 2, signal.SIGSTOP),
    ],
)  # fmt: skip
def test_a_rank_is_killed_or_stopped_while_copies_or_their_gradients_travel(phase, schedule, world, number):
    run(phase, schedule, world, number)


@pytest.mark.soak
@pytest.mark.parametrize(("phase", "schedule", "world", "number"), [case for case in ALL if case not in SHORT])
def test_a_rank_is_killed_or_stopped_in_all_other_ways(phase, schedule, world, number):
    run(phase, schedule, world, number)


def test_the_short_matrix_has_every_phase_schedule_world_and_signal():
    assert len(SHORT) == 16
    for column in range(4):
        assert {case[column] for case in SHORT} == {case[column] for case in ALL}
