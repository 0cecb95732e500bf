"""schedule="auto": a model measured with few rows is measured again when steps are far larger, on all ranks at once."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_overlap.auto import calibrate as measuring
from moe_overlap.auto.auto import GROWTH
from moe_overlap.transport.process_group import ProcessGroupTransport
from tests.auto.planted import SHAPES, build, cost_model, layer_of, same, step
from tests.layers import K, make, tokens
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import close


@contextmanager
def fitted(ops=0):
    """The probes run, one round of them; of what they measured the model keeps the number of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROUNDS", (1, 1))
        patch.setattr(measuring, "fit",
                      lambda joined, *_, **__: cost_model(ops, measured_rows=joined[0].shape.slots_rows))  # fmt: skip
        yield


def measured_rows(model):
    """Of the cost model that the next step would be planned with."""
    schedule = layer_of(model).schedule if model is layer_of(model) else model.schedule
    return [found.model.measured_rows for found in schedule.found.values()][-1]


# Tokens of both ranks, and the rows that were measured when the step is over.
STEPS = [
    ((1, 0), 1),
    ((GROWTH, 0), 1),  # as many as the model is good for
    ((0, 9), 1),
    ((2, 2), 1),  # the next step would do, but is no larger than what is known
    ((9, 8), 9),
    ((3, 40), 9),
    ((40, 40), 40),
    ((41, 0), 40),
    ((1, 1), 40),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_step_with_far_more_rows_is_measured(shape, caplog):
    """At the first large step after the one that was beyond the model; every answer is that of the fixed schedule."""
    caplog.set_level(logging.INFO, logger="moe_overlap.auto.auto")

    def rank(me):
        model, plain = build(shape, me.transport()), build(shape, me.transport(), "serial")
        rows = []
        for counts, _ in STEPS:
            model.zero_grad()
            plain.zero_grad()
            same(step(model, me.rank, counts), step(plain, me.rank, counts), close)
            rows.append(measured_rows(model))
        return rows

    with fitted(3 if shape == "block" else 0):
        assert virtual_world(2).run(rank) == [[K * tokens for _, tokens in STEPS]] * 2
    said = [record.message for record in caplog.records if record.message.startswith("calibrating again")]
    assert len(said) == 4, "twice on each rank"
    assert f"{9 * K} rows" in said[0] and said[0].endswith(f"with {K}")


@pytest.mark.parametrize("holder", [0, 1])
def test_a_step_that_waits_for_its_backward_on_one_rank_keeps_the_schedules_on_all(holder):
    """And one that nobody can run backward any more, or that ran it, keeps none."""

    def rank(me):
        layer, rows = make(me.transport(), schedule="auto"), []
        layer(tokens(1))
        held = layer(tokens(20))
        if me.rank != holder:
            held = None
        for _ in range(2):
            layer(tokens(20))
            rows.append(measured_rows(layer))
        del held
        layer(tokens(20))
        y = layer(tokens(81))
        rows.append(measured_rows(layer))
        y.sum().backward()
        layer(tokens(81))
        return [*rows, measured_rows(layer)]

    with fitted():
        assert virtual_world(2).run(rank) == [[K, K, 20 * K, 81 * K]] * 2


def two_under_checkpoint(folder):
    """Both recomputes come after both forward calls; the first of these is beyond the model."""
    os.environ["MOE_OVERLAP_CACHE_DIR"] = folder
    rank, results = dist.get_rank(), []
    for schedule in ("serial", "auto"):
        layer = make(ProcessGroupTransport(timeout_s=20.0), schedule=schedule)
        call = partial(checkpoint, layer, use_reentrant=False)
        with fitted():
            layer(tokens(1))
            xs = [tokens(20 + rank, seed).requires_grad_() for seed in (rank, 7 + rank)]
            ys = [call(x) for x in xs]
            (ys[0].square().sum() + ys[1].square().sum()).backward()
            grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
            if schedule == "auto":
                assert measured_rows(layer) == K
                layer(tokens(20 + rank))
                assert measured_rows(layer) == 21 * K
        results.append({"first": xs[0].grad, "second": xs[1].grad} | grads)
    same(*results, close)


def test_a_recompute_takes_the_schedules_of_its_forward(cache):
    gloo_pool(2).run(two_under_checkpoint, str(cache))


def test_a_cached_model_of_far_fewer_rows_is_measured_again(cache):
    """Its key says what rank 0 had; rank 1 may have far more."""

    def rank(me, counts):
        layer = make(me.transport(), schedule="auto")
        layer(tokens(counts[me.rank]))
        (path,) = cache.glob("*.json")
        return measured_rows(layer), json.loads(path.read_text())["model"]["measured_rows"]

    with fitted(), torch.no_grad():
        for counts, rows in (((8, 1), 8), ((8, 32), 8), ((8, 33), 33), ((8, 1), 33)):
            assert virtual_world(2).run(partial(rank, counts=counts)) == [(rows * K, rows * K)] * 2
