"""Deduplicated probes: what is measured of them gives the figures of deduplicated steps back, within the budget."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from moe_overlap.auto import calibrate as measuring
from moe_overlap.auto.calibrate import StepTimes
from moe_overlap.auto.fit import fit
from moe_overlap.auto.probe_pairs import CHUNKS, OVERLAPPED
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.predict import predict
from moe_overlap.schedule.builders import chunked
from tests.auto.planted import choices, cost_model, distinct_costs, line, planted, routed
from tests.auto.probes import BESIDE, TRUE, probe
from tests.layers import make, tokens
from tests.ranks import virtual_world

STEP = routed([choices(160, 5, seed=rank) for rank in range(2)])
DISTINCT = distinct_costs(
    TRUE,
    experts=line(2.5e-7, 9e-6),
    experts_dgrad=line(3.5e-7, 8e-6),
    experts_wgrad=line(4e-7),
    permute=line(9e-8),
    unpermute=line(5e-8),
    unpermute_backward=line(6e-8),
    permute_backward=line(7e-8),
    outside_s=9e-5,
    outside_backward_s=8e-5,
)
# As on four ranks, of which two share a node: what is passed on inside it has a price of its own.
STEP_OF_NODES = routed([choices(10, 5, seed=rank).repeat(16, 1) for rank in range(4)], nodes=2)
DISTINCT_OF_NODES = replace(DISTINCT, distinct=replace(DISTINCT.distinct, inside=line(5e-10, 6e-6)))
STEPS = [(STEP, DISTINCT), (STEP_OF_NODES, DISTINCT_OF_NODES)]
BOTH = pytest.mark.parametrize(("step", "true"), STEPS, ids=["direct", "hierarchical"])


def fitted(distinct, true=DISTINCT, step=STEP):
    joined = [probe(true, chunks, compute_s=1.0, plan=step) for chunks in CHUNKS]
    overlapped = probe(true, OVERLAPPED, hidden_s=1.0, compute_s=1.2, plan=step)
    grouped = probe(true, min(4, step.num_slots // step.world_size), by="experts", plan=step)
    return fit(joined, overlapped, grouped, distinct=distinct, source="synthetic")


def numbers(value):
    return {key: one for key, part in value.items() for key, one in
            ([(f"{key}.{n}", v) for n, v in part.items()] if isinstance(part, dict) else [(key, part)])}  # fmt: skip


@BOTH
@pytest.mark.parametrize("cuts", [(4,), (4, 1)], ids=str)
def test_the_figures_behind_the_probes_are_found(cuts, step, true):
    """Of one deduplicated probe too, which is all that slow steps allow: the rows that stay are of another number."""
    found = fitted([probe(true, chunks, plan=step, distinct=True) for chunks in cuts], true, step)
    assert numbers(found.distinct.to_json()) == pytest.approx(numbers(true.distinct.to_json()), rel=1e-6, abs=1e-12)
    plain = fitted([], true, step)
    assert plain.distinct is None and replace(found, distinct=None) == plain


def test_what_an_expert_costs_by_itself_is_the_plain_steps():
    """At most: of a line that has no such rest, nothing is left below zero."""
    cheap = replace(DISTINCT, distinct=replace(DISTINCT.distinct, experts=line(2e-7), expert_s=1e-6))
    found = fitted([probe(cheap, chunks, plan=STEP, distinct=True) for chunks in (4, 1)], cheap)
    assert found.expert_s == pytest.approx(TRUE.expert_s)
    assert found.distinct.expert_s == pytest.approx(1e-6) and found.distinct.experts.alpha_s == pytest.approx(
        0, abs=1e-12
    )


@BOTH
def test_predictions_of_deduplicated_steps_are_the_sum_of_their_parts(step, true):
    """A joined step takes what its actions take, the starts and waits of M and Mt too, and what lies outside."""
    one = probe(true, 4, plan=step, distinct=True)
    pair = one.pair.join()
    found = predict(true, pair, dict.fromkeys(("forward", "backward"), one.shape))
    for phase, prediction in found.items():
        assert prediction.whole_s == pytest.approx(one.whole_s[phase])


def test_forward_alone():
    def only_forward(one):
        keep = {action.text: one.seconds[action.text] for action in one.pair.forward}
        return replace(one, seconds=keep, host_s={"forward": one.host_s["forward"]},
                       whole_s={"forward": one.whole_s["forward"]})  # fmt: skip

    joined = [only_forward(probe(DISTINCT, chunks, plan=STEP)) for chunks in CHUNKS]
    distinct = [only_forward(probe(DISTINCT, 4, plan=STEP, distinct=True))]
    found = fit(joined, joined[1], None, distinct=distinct, source="forward").distinct
    assert found.outside_backward_s == 0 and found.permute_backward(100) == 0
    assert found.permute == DISTINCT.distinct.permute


# ---------------------------------------------------------------- which probes run


class OwnClock(threading.local):
    now_s = 0.0

    def perf_counter(self):
        return self.now_s


def probes_run(step_s, groups=4):
    """What both ranks ran, as (chunks, by, joined, deduplicated), seconds, and the arguments of the fit."""
    clock, seen = OwnClock(), []

    def rank(me):
        calls = []

        def run(pair):
            calls.append((pair.chunks, pair.by, pair.joined, pair.deduplicated))
            clock.now_s += step_s
            return StepTimes(events=[], forward_s=0.1, backward_s=0.0, exchange=replace(STEP, rank=me.rank))

        clock.now_s = 100.0 * me.rank
        measuring.calibrate(run, chunked, me.transport(), groups=groups, row_bytes=8, device=torch.device("cpu"),
                            metadata=BESIDE, source="planted")  # fmt: skip
        return calls, clock.now_s - 100.0 * me.rank

    with patch.object(measuring, "time", clock), patch.object(measuring, "fit", lambda *a, **k: seen.append((a, k))):
        (first, seconds), (second, _) = virtual_world(2).run(rank)
    assert first == second, "ranks that run different probes deadlock"
    return first, seconds, seen[0]


@pytest.mark.parametrize(
    ("probe_s", "rounds", "probes"), [(0.01, 9, 7), (0.5, 3, 7), (1.0, 1, 7), (1.5, 1, 4), (9.0, 1, 4)]
)
def test_deduplicated_probes_keep_within_the_budget(probe_s, rounds, probes):
    """Where steps are slow one of them is left out with the others."""
    calls, taken_s, ((joined, overlapped, grouped), more) = probes_run(probe_s)
    assert taken_s <= max(measuring.BUDGET_S, 8 * probe_s) + 1e-9
    assert len(set(calls)) == probes and len(calls) == probes * (rounds + 1)
    assert [one.chunks for one in more["distinct"]] == ([4, 1] if probes == 7 else [4])
    assert all(one.pair.deduplicated and one.pair.joined and one.shape.distinct for one in more["distinct"])
    assert not any(one.pair.deduplicated or one.shape.distinct for one in (*joined, overlapped))
    assert (grouped is not None) == (probes == 7)


def test_real_probes_run_as_they_are_asked_for(cache):
    """A plain probe stays plain where deduplication would pay, and the other way round."""
    seen = []

    def spy(*a, **k):
        seen.extend([*a[0], a[1], *k["distinct"]])
        return distinct_costs(cost_model())

    def rank(me):
        make(me.transport(), schedule="auto", dedup="auto")(tokens(16, me.rank))

    with patch.object(measuring, "ROUNDS", (1, 1)), patch.object(measuring, "fit", spy):
        virtual_world(2).run(rank)
    for one in seen:
        assert ("M" in one.seconds) == one.pair.deduplicated == (one.pair.forward.count("M") > 0)
    assert {one.pair.deduplicated for one in seen} == {True, False}


# ---------------------------------------------------------------- the cache


def chosen(dedup):
    def rank(me):
        layer = make(me.transport(), schedule="auto", dedup=dedup)
        layer(tokens(8, me.rank))
        (found,) = layer.schedule.found.values()
        return found.model, layer.schedule.kept_in

    return virtual_world(2).run(rank)[0]


def test_deduplication_is_another_key_and_old_files_are_measured_again(cache):
    model = distinct_costs(cost_model())
    with planted(model) as calls:
        (_, auto_file) = chosen("auto")
        assert len(calls) == 2
        assert chosen("on")[1] == auto_file and len(calls) == 2, "the same figures"
    with planted(cost_model()) as calls:
        assert chosen("off")[1] != auto_file and len(calls) == 2
    # A file of this key without the figures, or as an older version wrote it, is not believed.
    for spoil in (lambda d: d["model"].update(distinct=None), lambda d: d["model"].pop("distinct"),
                  lambda d: d["key"].update(cache=3)):  # fmt: skip
        entry = json.loads(auto_file.read_text())
        spoil(entry)
        auto_file.write_text(json.dumps(entry))
        with planted(model) as calls:
            assert chosen("auto") == (model, auto_file) and len(calls) == 2
        assert CostModel.from_json(json.loads(auto_file.read_text())["model"]) == model
