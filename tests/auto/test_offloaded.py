"""schedule="auto" beside experts in host memory: what is measured, what is chosen, and that it is what runs.

Steps here are timed by a clock of their own (`slept.py`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, ShortcutBlock
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.fit import fit
from moe_overlap.auto.probe_pairs import offloaded_pairs
from moe_overlap.errors import PlanMismatch
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.explain import bound_s, explain
from moe_overlap.planning.search import search
from moe_overlap.planning.shapes import experts_per_chunk
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.routing import GivenRouter
from moe_overlap.schedule.actions import Schedule
from moe_overlap.schedule.builders import SchedulePair, chunked
from moe_overlap.schedule.check import makespan_s
from moe_overlap.schedule.offload import with_host_experts
from moe_overlap.transport.host_link import EmulatedHostLink
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.auto.offloads import host_model, planned_of
from tests.auto.planted import OPS, exchange, line, planted
from tests.auto.probes import probe
from tests.auto.slept import ROW_S, SLEPT, set_clock
from tests.layers import D, E, F, Op, check_same, make, results, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

EXPERT_BYTES = 3 * F * D * 8


# ---------------------------------------------------------------- the search


def window_of(phase, *, groups, h, c, d=0.0, ops_s=(), experts=16):
    """One rank: a copy of an expert takes h, its rows c, all exchanges of a phase in each direction d."""

    def cut(chunks):
        n = experts // chunks
        return Chunking(
            chunks=chunks, by="experts", first_s=(d / chunks,) * chunks, second_s=(d / chunks,) * chunks,
            experts_s=(n * c,) * chunks, fetch_s=(n * h,) * chunks,
            deferred_s=(n * c,) * chunks if phase == "backward" else (),
            return_s=(n * h,) * chunks if phase == "backward" else (),
        )  # fmt: skip

    return Window(phase=phase, head_s=0.0, tail_s=0.0, ops_s=ops_s, chunkings=tuple(map(cut, groups)))


@pytest.mark.parametrize("hides", [True, False])
def test_of_each_cut_the_predicted_time_is_the_closed_form(hides):
    h, c = (1e-3, 1.5e-3) if hides else (1e-3, 0.5e-3)
    for phase in ("forward", "backward"):
        window = window_of(phase, groups=(1, 2, 4, 8, 16), h=h, c=c)
        found = search(window)
        for groups in (1, 2, 4, 8, 16):
            one = next(one for one in found if one.chunks == groups and not one.joined)
            each = 16 // groups
            # The first weights are bare, or all are; in backward the last gradients too, or all.
            up_s = each * h + 16 * c if hides else 16 * h + each * c
            down_s = 16 * c + each * h if hides else each * c + 16 * h
            assert one.predicted_s == pytest.approx(up_s + (down_s if phase == "backward" else 0.0))
            assert one.predicted_s >= bound_s(window, window.chunking(groups, "experts")) * (1 - 1e-12)
        assert found[0].chunks == 16


def test_every_candidate_is_an_order_of_the_step_with_its_copies():
    """As the executor makes it from the pair, and simulated by the other way to that number."""
    window = window_of("forward", groups=(1, 2, 4), h=2e-3, c=1e-3, d=3e-3, ops_s=(4e-3, 1e-3))
    seconds = {"B0": 4e-3, "B1": 1e-3}
    for one in search(window):
        n = 16 // one.chunks
        for c in range(one.chunks):
            seconds |= {f"Hf{c}": n * 2e-3, f"E{c}": n * 1e-3} | {f"{verb}{c}": 3e-3 / one.chunks for verb in "DC"}
        schedule = Schedule.parse(one.order)
        assert one.predicted_s == pytest.approx(makespan_s(schedule, seconds, joined=one.joined))
        plain = Schedule(tuple(action for action in schedule if action.verb != "Hf"))
        pair = replace(chunked(one.chunks, "experts"), forward=plain)
        assert with_host_experts(pair).forward == schedule


def test_ops_stand_where_they_hide_copies():
    """Of one op as long as the first group's copy: before the experts, although nothing else travels."""
    best = search(window_of("forward", groups=(2,), h=1e-3, c=1e-3, ops_s=(8e-3,)))[0]
    assert best.ops_before[0] == 1 and best.predicted_s == pytest.approx(8e-3 + 16e-3)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"fetch_s": (1.0,)}, "chunking.fetch_s"),
        ({"fetch_s": (1.0, 1.0), "by": "tokens"}, "chunking.by"),
        ({"fetch_s": (1.0, 1.0), "return_s": (1.0, 1.0)}, "chunking.return_s"),
    ],
)
def test_windows_that_cannot_be_are_refused(given, field):
    cut = {"chunks": 2, "by": "experts", "first_s": (0.0,) * 2, "experts_s": (1.0,) * 2, "second_s": (0.0,) * 2} | given
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        Window(phase="forward", head_s=0.0, tail_s=0.0, chunkings=(Chunking(**cut),))


# ---------------------------------------------------------------- the choice


def test_a_slow_link_has_more_groups_than_a_fast_one():
    """16 experts of 48 rows: a fetch of one takes 48 us of compute at 48 ns a byte."""
    found = {name: planned_of(link_s).pair for name, link_s in (("fast", 1e-12), ("between", 5e-9), ("slow", 6e-8))}
    groups = {name: (pair.chunks, pair.backward_chunks) for name, pair in found.items()}
    assert groups["fast"] == (1, 1)
    assert groups["fast"] < groups["between"] < groups["slow"]
    assert all(not pair.forward.count("Hf") for pair in found.values())


def test_the_prediction_is_that_of_the_schedule_as_it_runs():
    """By the other simulation, `schedule.check.makespan_s`, of what the executor makes of the pair."""
    for link_s in (1e-9, 1e-8, 1e-7):
        planned = planned_of(link_s)
        pair = with_host_experts(planned.pair)
        for phase, schedule, chunks in (
            ("forward", pair.forward, pair.chunks),
            ("backward", pair.backward, pair.backward_chunks),
        ):
            assert schedule.text == planned.best(phase).order
            cut, seconds = planned.windows[phase].chunking(chunks, "experts" if chunks > 1 else "tokens"), {}
            for c, experts in enumerate(experts_per_chunk(16, chunks, "experts")):
                seconds |= dict.fromkeys((f"E{c}", f"Ed{c}", f"Ew{c}"), cut.experts_s[c])
                seconds |= dict.fromkeys((f"Hf{c}", f"Hb{c}", f"Hg{c}"), 1000 * experts * link_s)
                assert cut.experts_s[c] == pytest.approx(2e-5 + 48e-6 * experts, rel=0.13)  # in quarters of a share
            joined = planned.best(phase).joined
            assert makespan_s(schedule, seconds, joined=joined) == pytest.approx(planned.best(phase).predicted_s)


def test_uneven_groups_of_several_ranks_are_taken_in_their_own_order():
    counts = exchange(world=2, slots=16).counts.table.copy()
    counts[:, :, ::2] *= 7
    counts[:, :, 3] = 0
    planned = planned_of(2e-8, exchange(counts))
    for phase, found in planned.candidates.items():
        assert {one.by for one in found if one.chunks > 1} == {"experts"}, phase
        assert all(one.chunk_order == tuple(range(one.chunks)) for one in found)
        for candidate in found[:3]:
            assert candidate.predicted_s >= bound_s(
                planned.windows[phase], planned.windows[phase].chunking(candidate.chunks, candidate.by)
            ) * (1 - 1e-12)


def test_explain_speaks_of_the_copies():
    planned = planned_of(6e-8)
    for phase, window in planned.windows.items():
        text = explain(window, planned.candidates[phase])
        assert "copies of experts from and to the host take" in text and "experts on the device" in text
        assert "copy | " in text and ("before E" in text or "The link to the host is busy all the time" in text)


# ---------------------------------------------------------------- the fit


def test_the_model_behind_the_probes_is_found():
    true = host_model(3e-9, host_down=line(5e-9, 1e-6), host_up=line(3e-9, 2e-6), issue_s=3e-6, outside_s=5e-5,
                      experts_wgrad=line(1e-6))  # fmt: skip
    step = exchange(world=2, slots=16)
    fewest, more = offloaded_pairs(lambda chunks, by: chunked(chunks, by), 8)
    assert [(one.chunks, one.by, one.joined) for one in (*fewest, *more)] == [
        (1, "experts", True), (4, "experts", True), (4, "experts", False), (8, "experts", True),
    ]  # fmt: skip
    joined = [probe(true, pair.chunks, by="experts", pair_of=lambda _, pair=pair: pair, plan=step, expert_bytes=1000)
              for pair in (fewest[0], fewest[1], more[0])]  # fmt: skip
    found = fit(joined, joined[1], None, source="planted")
    assert (found.host_up.alpha_s, found.host_up.beta_s) == pytest.approx((2e-6, 3e-9))
    assert (found.host_down.alpha_s, found.host_down.beta_s) == pytest.approx((1e-6, 5e-9))
    assert found.issue_s == pytest.approx(3e-6) and found.outside_s == pytest.approx(5e-5)
    assert found.experts.beta_s == pytest.approx(1e-6) and found.experts.alpha_s == pytest.approx(2e-5)
    assert found.experts_wgrad.beta_s == pytest.approx(1e-6) and found.misfit < 1e-6
    assert CostModel.from_json(found.to_json()) == found


def test_a_single_expert_has_an_empty_group_beside_it():
    fewest, more = offloaded_pairs(chunked, 1)
    assert [one.chunks for one in fewest] == [1, 2, 2] and not more


# ---------------------------------------------------------------- steps on a clock of their own


@pytest.fixture
def own_clock(monkeypatch):
    set_clock(monkeypatch)


def slept_layer(rate, **options):
    """A layer of one rank whose rows take ROW_S in E, and in Ed; everything else takes no time."""
    return make(schedule="auto", activation=SLEPT, expert_offload=EmulatedHostLink(rate), **options)


def seconds_of(layer, phase):
    """From the start of the first action of a phase to the end of its last, on the clock."""
    mine = [event for event in layer.last_events if event.phase == phase and event.action != "N"]
    return max(event.end_s for event in mine) - min(event.start_s for event in mine)


@pytest.mark.parametrize("group_s", [0.05, 0.3, 2.0])
def test_one_rank_measures_its_link_chooses_and_takes_as_long_as_predicted(group_s, own_clock):
    """group_s: seconds of the copy of a quarter of the experts; all rows of a step take 0.128 s."""
    expert_bytes = 2 * F * D * 8  # this activation has no gate
    layer = slept_layer(E / 4 * expert_bytes / group_s)
    for step in range(2):
        x = tokens(64, seed=step).requires_grad_()
        layer(x).sum().backward()
    (schedule,) = layer.schedule.found.values()
    model = schedule.model
    assert model.host_up.beta_s == pytest.approx(group_s / (E / 4) / expert_bytes)
    assert model.host_down.beta_s == pytest.approx(group_s / (E / 4) / expert_bytes)
    assert model.experts.beta_s == pytest.approx(ROW_S) and model.misfit < 1e-6 and model.issue_s == 0.0
    planned = schedule.planned(layer.last_exchange)
    for phase in ("forward", "backward"):
        # Rows are planned from in round numbers, to 3 % and to quarters of an equal share.
        whole = planned.windows[phase].chunkings[0]
        slack_s = sum(whole.experts_s) / 4
        assert abs(seconds_of(layer, phase) - planned.best(phase).predicted_s) <= slack_s
    text = layer.explain()
    assert 'as schedule="auto" predicts to be fastest' in text and "chosen by the planner from a cost model" in text
    assert "the number of groups is the planner's" in text


def test_without_a_wait_for_copies_fewer_groups_are_cut(own_clock):
    """A link that takes no time leaves nothing to cut for; a slow one cuts into as many groups as there are experts."""
    found = []
    for rate in (None, 1e5):
        layer = slept_layer(rate)
        layer(tokens(64).requires_grad_()).sum().backward()
        pair = layer._last_step.pair
        found.append((pair.chunks, pair.backward_chunks))
    assert found == [(1, 1), (E, E)]


def test_of_equal_rows_the_prediction_is_exact(own_clock):
    """No rounding: 64 rows, 8 for each expert."""
    layer = slept_layer(1e6, top_k=1, router=GivenRouter(E, 1))
    ids = (torch.arange(64) % E)[:, None]
    for _ in range(2):
        x = tokens(64).requires_grad_()
        layer(x, topk_ids=ids, topk_weights=torch.ones(64, 1, dtype=torch.float64)).sum().backward()
    (schedule,) = layer.schedule.found.values()
    planned = schedule.planned(layer.last_exchange)
    assert planned.pair.chunks > 1
    for phase in ("forward", "backward"):
        assert seconds_of(layer, phase) == pytest.approx(planned.best(phase).predicted_s)
    # What is waited for the weights is not the experts' time: these have that of their rows.
    forward = [event for event in layer.last_events if event.phase == "forward"]
    experts = [event.end_s - event.start_s for event in forward if event.action in [f"E{c}" for c in range(E)]]
    assert experts == pytest.approx([ROW_S * 64 / planned.pair.chunks] * planned.pair.chunks)
    waited_s = sum(event.end_s - event.start_s for event in forward if event.lane == "wait" and event.action != "N")
    assert waited_s == pytest.approx(planned.best("forward").predicted_s - ROW_S * 64) and waited_s > 0


# ---------------------------------------------------------------- the same answer


def build(kind, transport, schedule, **options):
    """A layer, one with a shared expert, or a block of ops; `schedule`: "auto", or the pair that it runs."""
    if kind != "block":
        size = F if kind == "shared" else None
        return make(transport, schedule=schedule, shared_expert_size=size, **options)
    torch.manual_seed(3)
    ops = [Op() for _ in range(OPS)]
    overlap = options.pop("overlap", True)
    return ShortcutBlock(ops, make(transport, **options), tap=0, schedule=schedule, overlap=overlap)


def layer_of(model):
    return model.moe if isinstance(model, ShortcutBlock) else model


def chosen(model) -> SchedulePair:
    """The pair of the last step, as a caller would give it."""
    layer = layer_of(model)
    found = [one for one in model.schedule.found.values() if one is layer._last_step.schedule]
    return replace(found[0].planned(layer.last_exchange).pair, name="as chosen")


@pytest.mark.parametrize(("ranks", "kind"), [(1, "layer"), (1, "block"), (2, "layer"), (2, "shared"), (2, "block"),
                                             (4, "layer")])  # fmt: skip
@pytest.mark.parametrize("link_s", [1e-6, 1e-12])
def test_what_is_chosen_has_the_bits_of_the_same_schedule_fixed(link_s, kind, ranks):
    """With its experts in host memory and without, overlapped and not, with gradients and without."""
    ops = OPS if kind == "block" else 0
    model = host_model(link_s, backbone_s=(1e-3,) * ops, backbone_backward_s=(2e-3,) * ops)

    def rank(me):
        x = tokens(9 + 4 * me.rank, seed=me.rank)
        on, off, inference = (build(kind, me.transport(), "auto", expert_offload="host", overlap=overlap)
                              for overlap in (True, False, True))  # fmt: skip
        got = results(on, x)
        pair = chosen(on)
        assert layer_of(on)._last_step.pair == replace(with_host_experts(pair), name="auto")
        for options in ({"expert_offload": "host"}, {}):
            check_same(got, results(build(kind, me.transport(), pair, **options), x))
        check_same(got, results(off, x))
        assert chosen(off) == pair.join()
        with torch.no_grad():
            same_bits(inference(x), got[0])
        return pair.chunks, pair.backward_chunks

    with planted(model) as calls:
        found = virtual_world(ranks, seed=2).run(rank)
    assert {call["expert_bytes"] for call in calls} == {EXPERT_BYTES}
    groups = E // ranks if link_s > 1e-9 else 1
    assert found == [(groups, groups)] * ranks


def test_a_recompute_runs_what_its_forward_ran():
    def call(layer):
        return lambda x: checkpoint(layer, x, use_reentrant=False)

    with planted(host_model(1e-6)):
        plain, away = make(schedule="auto", expert_offload="host"), make(schedule="auto", expert_offload="host")
        x = tokens(7)
        check_same(results(plain, x), results(away, x, call(away)))


def really_measured():
    """On a rank with a process of its own; by the clock on the wall, so that anything may be chosen."""
    layer = make(ProcessGroupTransport(timeout_s=30.0), schedule="auto", expert_offload=EmulatedHostLink(40e6))
    x = tokens(6)
    got = results(layer, x)
    fixed = make(ProcessGroupTransport(timeout_s=30.0), schedule=chosen(layer), expert_offload="host")
    check_same(got, results(fixed, x))
    (schedule,) = layer.schedule.found.values()
    assert schedule.model.host_up.beta_s > 0 and schedule.model.host_down.beta_s > 0
    assert "copies of experts from and to the host take" in layer.explain()
    return schedule.digest


def test_ranks_measure_and_choose_alike():
    first, second = gloo_pool(2).run(really_measured)
    assert first == second


def test_each_link_has_costs_of_its_own(cache):
    with planted(host_model(1e-6, exchange={})) as calls:
        for rate in (None, None, 1e6):
            make(schedule="auto", expert_offload=EmulatedHostLink(rate))(tokens(4))
        make(schedule="serial", expert_offload="host")(tokens(4))
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2


# ---------------------------------------------------------------- what is refused


def test_a_rank_without_offload_is_refused_before_anything_is_sent():
    def rank(me):
        layer = make(me.transport(), schedule="auto", expert_offload="host" if me.rank else None)
        with pytest.raises(PlanMismatch, match="nothing was sent"):
            layer(tokens(4))
        return layer.transport.stats.exchanges

    with planted(host_model(1e-6)):
        assert virtual_world(2).run(rank) == [0, 0]


def test_on_one_rank_there_is_nothing_to_deduplicate():
    with planted(host_model(1e-6, exchange={})):
        asked, plain = (make(schedule="auto", dedup=dedup, expert_offload="host") for dedup in ("auto", "off"))
        check_same(results(asked, tokens(4)), results(plain, tokens(4)))


def test_a_given_auto_schedule_is_told_where_the_experts_are():
    with planted(host_model(1e-6)):
        layer = make(schedule=AutoSchedule(op_verb="B", num_ops=0), expert_offload="host")
        results(layer, tokens(6))
    assert layer.last_exchange is not None and layer._last_step.pair.forward.count("Hf") == E
