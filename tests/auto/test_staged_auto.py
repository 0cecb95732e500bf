"""schedule="auto" of one rank whose rows go over a wire to itself: what is measured, what is chosen, and what it takes.

Steps are timed by a clock of their own (`slept.py`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_overlap import ShortcutBlock
from moe_overlap.agreement.loads import LOOPBACK, moves
from moe_overlap.auto.auto import ONE_RANK, AutoSchedule
from moe_overlap.auto.calibrate import step_shape
from moe_overlap.routing import GivenRouter
from moe_overlap.transport import LocalTransport, StagedTransport, staged
from moe_overlap.transport.host_link import EmulatedHostLink
from moe_overlap.transport.link import nodes_of
from moe_overlap.transport.nocomm import NoCommTransport
from tests.auto.planted import OPS, cost_model, exchange, planted
from tests.auto.slept import CLOCK, ROW_S, SLEPT, set_clock
from tests.layers import D, E, F, Op, check_same, make, results, tokens
from tests.tolerances import same_bits
from tests.transport.played import PlayedEngine
from tests.transport.timed import TimedEngine

TOKENS = 64
ROW_BYTES = D * 8
FIXED = ("serial", "chunked(2)", "chunked(4)", "chunked(8)", "chunked(16)", "chunked(2,experts)", "chunked(4,experts)",
         "chunked(8,experts)")  # fmt: skip


@pytest.fixture
def own_clock(monkeypatch):
    set_clock(monkeypatch)


def wire(monkeypatch, **seconds):
    """A transport over a wire that takes so long for a byte, which is sent in small pieces."""
    monkeypatch.setattr(staged, "Engine", partial(TimedEngine, clock=CLOCK, **seconds))
    return StagedTransport(piece_bytes=ROW_BYTES)


def even_layer(transport, schedule="auto", **options):
    """Every expert has as many rows. They take ROW_S in E and twice that in Ed, which makes the activation again; the
    wire what it takes, all else nothing."""
    return make(transport, schedule=schedule, activation=SLEPT, top_k=1, router=GivenRouter(E, 1), **options)


def step_of(layer):
    """Seconds of a step by the clock, and its results."""
    x = tokens(TOKENS).requires_grad_()
    ids = (torch.arange(TOKENS) % E)[:, None]
    begin_s = CLOCK.now_s
    y = layer(x, topk_ids=ids, topk_weights=torch.ones(TOKENS, 1, dtype=torch.float64))
    y.square().sum().backward()
    return CLOCK.now_s - begin_s, [y.detach(), x.grad, *(weight.grad for weight in layer.expert_weights)]


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, 3.0])
def test_predictions_are_exact_and_no_fixed_schedule_is_faster(share, own_clock, monkeypatch):
    """share: seconds of an exchange over those of the experts."""
    byte_s = share * ROW_S / ROW_BYTES
    layer = even_layer(wire(monkeypatch, down_s=byte_s))
    step_of(layer)
    layer.zero_grad()
    took_s, got = step_of(layer)
    (schedule,) = layer.schedule.found.values()
    model, planned = schedule.model, schedule.planned(layer.last_exchange)
    assert model.exchange["inter"].beta_s == pytest.approx(byte_s) and model.misfit < 1e-6
    assert model.exchange["inter"].alpha_s == pytest.approx(0.0, abs=1e-9)
    assert took_s == pytest.approx(planned.predicted_s)
    assert planned.pair.chunks > 1 and planned.pair.backward_chunks > 1
    times = {name: step_of(even_layer(wire(monkeypatch, down_s=byte_s), name))[0] for name in FIXED}
    assert took_s <= min(times.values()) * (1 + 1e-9), times
    assert times["serial"] == pytest.approx((4 * share + 3) * ROW_S * TOKENS)
    _, fixed = step_of(even_layer(wire(monkeypatch, down_s=byte_s), replace(planned.pair, name="as chosen")))
    _, local = step_of(even_layer(LocalTransport(), replace(planned.pair, name="as chosen")))
    check_same(got, fixed)
    check_same(got, local)
    text = layer.explain()
    assert "on one rank, over its wire to itself" in text and 'as schedule="auto" predicts to be fastest' in text


def test_where_both_directions_take_time_only_the_pipe_is_unknown(own_clock, monkeypatch):
    """The next exchange goes down while one goes up, which a line over bytes does not say: a piece an exchange."""
    byte_s = ROW_S / ROW_BYTES
    layer = even_layer(wire(monkeypatch, down_s=byte_s, up_s=byte_s))
    step_of(layer)
    took_s, _ = step_of(layer)
    (schedule,) = layer.schedule.found.values()
    planned = schedule.planned(layer.last_exchange)
    assert schedule.model.exchange["inter"].alpha_s == pytest.approx(byte_s * ROW_BYTES)
    exchanges = 2 * (planned.pair.chunks + planned.pair.backward_chunks)
    assert 0 <= planned.predicted_s - took_s <= exchanges * byte_s * ROW_BYTES


def test_a_wire_that_takes_no_time_is_not_cut_for(own_clock, monkeypatch):
    layer = even_layer(wire(monkeypatch, down_s=0.0))
    step_of(layer)
    pair = layer._last_step.pair
    assert (pair.chunks, pair.backward_chunks) == (1, 1)


@pytest.mark.parametrize("link_share", [0.3, 2.0])
def test_beside_experts_in_host_memory_both_are_planned(link_share, own_clock, monkeypatch):
    """link_share: seconds of the copies of all experts over those of their rows."""
    expert_bytes = 2 * F * D * 8
    rate = E * expert_bytes / (link_share * ROW_S * TOKENS)
    byte_s = 0.5 * ROW_S / ROW_BYTES

    def away(schedule):
        return even_layer(wire(monkeypatch, down_s=byte_s), schedule, expert_offload=EmulatedHostLink(rate))

    layer = away("auto")
    step_of(layer)
    layer.zero_grad()
    took_s, got = step_of(layer)
    (schedule,) = layer.schedule.found.values()
    planned = schedule.planned(layer.last_exchange)
    assert schedule.model.host_up.beta_s == pytest.approx(1 / rate)
    assert schedule.model.exchange["inter"].beta_s == pytest.approx(byte_s)
    assert took_s == pytest.approx(planned.predicted_s)
    fixed = [name for name in FIXED if "experts" in name or name == "serial"]
    times = {name: step_of(away(name))[0] for name in fixed}
    assert took_s <= min(times.values()) * (1 + 1e-9), times
    check_same(got, step_of(away(replace(planned.pair, name="as chosen")))[1])


def played_wire(monkeypatch, seed=3):
    monkeypatch.setattr(staged, "Engine", partial(PlayedEngine, seed=seed))
    return StagedTransport(piece_bytes=300)


@pytest.mark.parametrize("kind", ["layer", "shared", "block"])
def test_what_is_chosen_has_the_bits_of_the_same_schedule_fixed(kind, monkeypatch):
    """On streams that come late; overlapped and not, with gradients and without."""
    ops = OPS if kind == "block" else 0

    def build(schedule, **options):
        transport, overlap = played_wire(monkeypatch), options.pop("overlap", True)
        if kind != "block":
            size = F if kind == "shared" else None
            return make(transport, schedule=schedule, shared_expert_size=size, overlap=overlap)
        torch.manual_seed(3)
        chosen = [Op() for _ in range(OPS)]
        return ShortcutBlock(chosen, make(transport), tap=0, schedule=schedule, overlap=overlap)

    model = cost_model(backbone_s=(1e-6,) * ops, backbone_backward_s=(2e-6,) * ops)
    with planted(model) as calls:
        on, off, inference = build("auto"), build("auto", overlap=False), build("auto")
        got = results(on, tokens(33))
        check_same(got, results(off, tokens(33)))
        with torch.no_grad():
            same_bits(inference(tokens(33)), got[0])
    layer = on.moe if kind == "block" else on
    (schedule,) = on.schedule.found.values()
    pair = replace(schedule.planned(layer.last_exchange).pair, name="as chosen")
    assert pair.chunks > 1
    check_same(got, results(build(pair), tokens(33)))
    assert {call["nodes"] for call in calls} == {LOOPBACK}


def test_the_bytes_of_a_wire_to_itself_are_those_of_all_rows(monkeypatch):
    step = exchange(world=1, slots=4, rows=3)
    for chunks, by in ((1, "tokens"), (4, "tokens"), (2, "experts")):
        shape = step_shape(step.chunked(chunks, by), row_bytes=10, nodes=LOOPBACK)
        assert shape.bytes_by_lane == {"inter": tuple(10 * rows for rows in shape.rows)}
    assert moves(1, LOOPBACK).tolist() == [[[True]], [[False]]]
    assert nodes_of(played_wire(monkeypatch)) == LOOPBACK and nodes_of(LocalTransport()) is None
    assert nodes_of(NoCommTransport(played_wire(monkeypatch))) is None


def test_each_share_of_the_wire_has_costs_of_its_own(cache, monkeypatch):
    monkeypatch.setattr(staged, "Engine", PlayedEngine)
    with planted(cost_model()) as calls:
        for share in (1.0, 1.0, 0.5):
            make(StagedTransport(share=share), schedule="auto")(tokens(4))
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2


def test_deduplication_on_one_rank_is_nothing(monkeypatch):
    with planted(cost_model()):
        given = AutoSchedule(op_verb="B", num_ops=0, dedup="auto")
        layers = [make(played_wire(monkeypatch), schedule=schedule, dedup="auto") for schedule in ("auto", given)]
        plain = make(played_wire(monkeypatch), schedule="auto")
        want = results(plain, tokens(9))
        for layer in layers:
            check_same(results(layer, tokens(9)), want)
    assert make(LocalTransport(), schedule="auto").schedule.name == ONE_RANK
