"""schedule="auto" with deduplication, executed: the right numbers whatever is chosen, on 2 and on 4 ranks."""

from __future__ import annotations

import itertools
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, MoELayer, ShortcutBlock, moe_forward
from moe_overlap.auto import calibrate as measuring
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.errors import PlanMismatch
from moe_overlap.planning.pair import pair_of
from moe_overlap.planning.search import search
from tests import equality
from tests.auto.planted import choices, cost_model, distinct_costs, line, planted, same, step
from tests.layers import D, E, F, tokens
from tests.ranks import virtual_world
from tests.tolerances import close, same_bits

DEAR = {"permute": line(1e-3)}  # what makes deduplicated steps lose
SHAPES = ("serial", "shared_expert-1", "shortcut-pos2")
TAKES = {"serial": (0, "B"), "shared_expert-1": (0, "S"), "shortcut-pos2": (3, "B")}


def model_of(shape, **given):
    """Figures of a planted step with the ops of that shape; `given`: of deduplicated steps."""
    num_ops, _ = TAKES[shape]
    plain = {"shared_s": 1e-6, "shared_backward_s": 2e-6} if shape.startswith("shared") else {}
    return distinct_costs(cost_model(num_ops, alpha_s=1e-6, **plain), **given)


def with_auto(build, made):
    """`equality.build`, and then "auto" instead of the schedule of the case."""

    def instead(case, transport, rank, *, overlap):
        model = build(case, transport, rank, overlap=overlap)
        num_ops, verb = TAKES[case.schedule]
        model.schedule = AutoSchedule(op_verb=verb, num_ops=num_ops, overlap=overlap, dedup=case.dedup)
        made.append(getattr(model, "moe", model))
        return model

    return instead


@pytest.mark.parametrize("load", ["balanced", "one_expert", "no_tokens", "uneven"])
@pytest.mark.parametrize(("dedup", "given", "taken"), [("on", DEAR, True), ("auto", {}, True), ("auto", DEAR, False)],
                         ids=["on", "auto_wins", "auto_loses"])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", [2, 4])
def test_overlap_changes_no_bit_and_the_numbers_are_the_oracles(world, shape, dedup, given, taken, load, monkeypatch):
    case = equality.Case(world, shape, 1, torch.float64, load, dedup)
    made = []
    monkeypatch.setattr(equality, "build", with_auto(equality.build, made))
    with planted(model_of(shape, **given)):
        results = virtual_world(world, seed=3).run(lambda me: equality.run_both(case, me.transport(), me.transport(),
                                                                                me.rank))  # fmt: skip
    equality.check_right(case, results)
    pairs = [layer._last_step.pair for layer in made]
    assert len(pairs) == 2 * world and len({(pair.deduplicated, pair.forward.text) for pair in pairs}) == 1
    if load == "balanced":
        assert pairs[0].deduplicated == taken
        assert not all(pair.joined for pair in pairs), "it overlaps"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", [2, 4])
def test_every_ordering_that_could_be_chosen_is_right(world, shape, monkeypatch):
    """Every candidate of a phase beside one of the other phase, overlapped and joined."""
    case = equality.Case(world, shape, 1, torch.float64, "uneven", "on")
    num_ops, verb = TAKES[shape]
    made = []
    monkeypatch.setattr(equality, "build", with_auto(equality.build, made))
    with planted(model_of(shape)):
        virtual_world(world).run(lambda me: equality.run_rank(case, me.transport(), me.rank, overlap=True))
    last = made[0]._last_step
    windows = last.schedule.planned(last.plan.exchange).windows
    found = {phase: search(window) for phase, window in windows.items()}
    forward, backward = ([one for one in found[phase] if one.chunks <= 4] for phase in ("forward", "backward"))
    assert {one.by for one in forward} == {"tokens", "experts"}
    most = max(len(forward), len(backward))
    both = itertools.islice(zip(itertools.cycle(forward), itertools.cycle(backward), strict=False), most)
    pairs = [pair_of(one, other, num_ops=num_ops, op_verb=verb) for one, other in both]
    assert len(pairs) >= 8
    monkeypatch.undo()
    build = equality.build
    for pair in pairs:

        def given(case, transport, rank, *, overlap, pair=pair):
            model = build(case, transport, rank, overlap=overlap)
            model.schedule = pair if overlap else pair.join()
            return model

        monkeypatch.setattr(equality, "build", given)  # here, and not by ranks, which are threads
        results = virtual_world(world, seed=5).run(
            lambda me: equality.run_both(case, me.transport(), me.transport(), me.rank)
        )
        equality.check_right(case, results)


# ---------------------------------------------------------------- modes


def layer(me, top_k=5, **options):
    torch.manual_seed(3)
    return MoELayer(D, F, E, top_k, transport=me.transport(), dtype=torch.float64, **options)


def test_a_recompute_takes_the_schedule_of_its_forward():
    def rank(me):
        model = layer(me, schedule="auto", dedup="auto")
        want = step(layer(me), me.rank, (12, 9))
        same(step(model, me.rank, (12, 9)), want, close)
        first = model._last_step
        model.zero_grad()
        call = partial(checkpoint, model, use_reentrant=False)
        same(step(model, me.rank, (12, 9), call=call), want, close)
        assert model._last_step.pair == first.pair and first.pair.deduplicated
        return first.pair.digest

    with planted(model_of("serial")):
        assert len(set(virtual_world(2).run(rank))) == 1


def test_steps_of_one_layer_are_deduplicated_or_not(monkeypatch):
    """Tokens whose choices are all on one other rank, and such whose choices are on both ranks: the same layer, step by
    step. Compute costs nothing here, so that there is nothing to hide under the rows that stay."""

    def rank(me):
        model = layer(me, top_k=2, schedule="auto", dedup="auto")
        taken = []
        for near in (True, False, True):
            # In one step both experts are of the other rank, in the next each is of another rank.
            def forced(x_TD, near=near, route=model.router.forward):
                decision = route(x_TD)
                others = torch.tensor([4, 5] if me.rank == 0 else [0, 1]) if near else torch.tensor([1, 6])
                ids = others.to(torch.int32).expand(x_TD.shape[0], 2).contiguous()
                return type(decision)(**(vars(decision) | {"topk_ids_TK": ids}))

            with patch.object(model.router, "forward", forced):
                model(tokens(16, me.rank))
            taken.append(model._last_step.pair.deduplicated)
        return taken

    monkeypatch.setattr(PlannedSchedule, "measure_search", lambda *_: 0.0)  # each kind of step is searched for
    with planted(distinct_costs(cost_model(hide=()))):
        assert virtual_world(2).run(rank) == [[True, False, True]] * 2


def test_nothing_is_measured_with_a_step_without_rows():
    def rank(me):
        model = layer(me, schedule="auto", dedup="on")
        step(model, me.rank, counts=(0, 0))
        assert not model.schedule.found and model._last_step.pair.deduplicated
        step(model, me.rank)
        return model._last_step.pair.deduplicated

    with planted(model_of("serial", **DEAR)):
        assert virtual_world(2).run(rank) == [True, True]


def test_tickets_with_deduplication_on():
    def rank(me):
        model = layer(me, schedule="auto", dedup="on")
        x = tokens(8, me.rank)
        ticket = model.begin(x)
        model.run_experts(ticket)
        close(model.finish(ticket), layer(me)(x))
        return model._last_step.pair.deduplicated

    with planted(model_of("serial")) as calls:
        assert virtual_world(2).run(rank) == [True, True]
    assert not calls


@pytest.mark.parametrize("ranks", [("on", "off"), ("auto", "off"), ("on", "auto"), ("off", "on")], ids=str)
@pytest.mark.parametrize("shape", ["layer", "block"])
def test_ranks_that_are_told_otherwise_are_refused_before_anything_is_sent(ranks, shape):
    def rank(me):
        options = {"dedup": ranks[me.rank]}
        if shape == "layer":
            model = layer(me, schedule="auto", **options)
        else:
            model = ShortcutBlock([torch.nn.Linear(D, D, dtype=torch.float64)], layer(me, **options), tap=0,
                                  schedule="auto")  # fmt: skip
        with pytest.raises(PlanMismatch) as error:
            model(tokens(4))
        return getattr(model, "moe", model).transport.stats.exchanges, type(error.value)

    with planted(model_of("serial")):
        assert virtual_world(2).run(rank) == [(0, PlanMismatch)] * 2


def test_an_auto_schedule_that_is_given_has_the_layers_setting():
    def rank(me):
        given = AutoSchedule(op_verb="B", num_ops=0, dedup="on")
        assert layer(me, schedule=given, dedup="on").schedule is given
        with pytest.raises(ConfigError, match="dedup"):
            layer(me, schedule=AutoSchedule(op_verb="B", num_ops=0), dedup="auto")

    virtual_world(2).run(rank)


# ---------------------------------------------------------------- moe_forward


@pytest.mark.parametrize("schedule", ["auto", "chunked(2)", "serial"])
@pytest.mark.parametrize("dedup", ["on", "auto", "off"])
def test_routed_rows_without_a_layer(schedule, dedup):
    def rank(me):
        weights = [torch.randn(4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(me.rank + n))
                   for n, size in enumerate(((2 * F, D), (D, F)))]  # fmt: skip
        x = tokens(10, me.rank).requires_grad_()
        ids, scores = choices(10, 5, seed=me.rank), torch.rand(10, 5, dtype=torch.float64)
        scores.requires_grad_()
        results = []
        asked = {"schedule": schedule, "dedup": dedup}
        for options in (asked, asked | {"overlap": False}, {}):
            transport = me.transport()
            y = moe_forward(x, ids, scores, *weights, transport=transport, **options)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, scores])))
        for on, off, plain in zip(*results, strict=True):
            same_bits(on, off)
            close(on, plain)

    with planted(model_of("serial")):
        virtual_world(2).run(rank)


def test_without_a_layer_metadata_are_of_one_width():
    """Ranks with other numbers of choices would read each other's metadata wrongly: refused alike, nothing sent."""

    def rank(me):
        weights = [torch.zeros(4, *size, dtype=torch.float64) for size in ((2 * F, D), (D, F))]
        ids = choices(6, 3 + me.rank)
        transport = me.transport()
        with pytest.raises(PlanMismatch, match="another configuration"):
            moe_forward(tokens(6), ids, torch.ones(ids.shape), *weights, transport=transport, dedup="on")
        return transport.stats.exchanges

    assert virtual_world(2).run(rank) == [0, 0]
    with pytest.raises(ConfigError, match="dedup"):
        moe_forward(tokens(2), choices(2, 2), torch.ones(2, 2), *[torch.zeros(8, D, D)] * 2, dedup="yes")


def test_bad_ids_on_one_rank_leave_the_transport_as_it_is():
    def rank(me):
        weights = [torch.zeros(4, *size, dtype=torch.float64) for size in ((2 * F, D), (D, F))]
        transport, ids = me.transport(), choices(6, 3)

        def call(ids):
            return moe_forward(tokens(6), ids, torch.ones(6, 3), *weights, transport=transport, dedup="on")

        call(ids)
        for bad in (ids[0], ids.float(), [1, 2]):
            with pytest.raises(ConfigError):
                call(bad if me.rank else ids)
        return call(ids).shape[0], transport.stats.exchanges

    # Metadata, rows and rows back in each of the calls that were not refused.
    assert virtual_world(2).run(rank) == [(6, 6)] * 2


# ---------------------------------------------------------------- measured


@pytest.mark.parametrize("shape", SHAPES)
def test_a_real_calibration(shape, cache, monkeypatch):
    """Nothing planted: deduplicated probes run, their figures are kept, and the answer is right."""
    case = equality.Case(2, shape, 1, torch.float64, "balanced", "auto")
    made = []
    monkeypatch.setattr(measuring, "ROUNDS", (1, 2))
    monkeypatch.setattr(equality, "build", with_auto(equality.build, made))
    results = virtual_world(2).run(lambda me: equality.run_rank(case, me.transport(), me.rank, overlap=True))
    equality.check_right(case, results)
    (first,), (second,) = ([found.model for found in getattr(one, "schedule", one).found.values()] if shape !=
                           "shortcut-pos2" else [one._last_step.schedule.model] for one in made)  # fmt: skip
    assert first == second and first.distinct is not None
    assert first.distinct.permute(100) > 0 and first.distinct.experts(100) > 0 and first.distinct.outside_s > 0
    text = made[0].explain()
    assert 'dedup="auto": ' in text and "with what lies outside the windows" in text
    assert ("less than" in text or "the same" in text) and "  forward: " in text and "  backward: " in text


@pytest.mark.parametrize(
    ("dedup", "given", "parts", "absent"),
    [
        ("auto", {}, ['dedup="auto": deduplicated: one row for each (token, rank), predicted', "less than plain:"], []),
        ("auto", DEAR, ['dedup="auto": not deduplicated, predicted', "less than deduplicated:", "P M D0 "], []),
        ("on", DEAR, ['dedup="on": deduplicated'], ["less than plain", "not deduplicated"]),
        ("off", {}, ["chosen by the planner"], ["dedup"]),
    ],
    ids=["wins", "loses", "on", "off"],
)
def test_explain_says_by_how_much(dedup, given, parts, absent):
    """Which of the two runs, how much the other one would take, and what that is."""

    def rank(me):
        model = layer(me, schedule="auto", dedup=dedup)
        model(tokens(16, me.rank))
        return model.explain()

    with planted(model_of("serial", **given)):
        text, _ = virtual_world(2).run(rank)
    assert all(part in text for part in parts) and not any(part in text for part in absent)
