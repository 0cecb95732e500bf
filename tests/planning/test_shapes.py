"""The integers of a balanced step that is deduplicated: against routings that are drawn, and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.planning.cost_model import CostModel, DistinctCosts, window
from moe_overlap.planning.shapes import MetadataBytes, balanced_shape, distinct_ranks, metadata_bytes
from moe_overlap.schedule.distinct_rows import gradient_layout, metadata_layout
from tests.planning.test_cost_model import line, model

BESIDE = MetadataBytes(out=48, back=16)


def shape(**changes):
    base = {"tokens": 1024, "top_k": 4, "hidden": 512, "dtype_bytes": 2, "ranks": 8, "ranks_per_node": 4}
    base |= {"local_experts": 4, "chunks": 4, "by": "tokens", "metadata": BESIDE}
    return balanced_shape(**(base | changes))


DISTINCT = DistinctCosts(
    experts=line(5e-5, 5e-6),
    experts_dgrad=line(6e-5, 6e-6),
    experts_wgrad=line(7e-5, 7e-6),
    permute=line(1e-4, 1e-8),
    unpermute=line(2e-4),
    unpermute_backward=line(3e-4),
    permute_backward=line(4e-4),
    expert_s=1e-6,
    expert_dgrad_s=2e-6,
    outside_s=0.5,
    outside_backward_s=0.25,
)


@pytest.mark.parametrize(("by", "chunks"), [("tokens", 1), ("tokens", 4), ("experts", 2), ("experts", 3)])
def test_expected_rows_are_those_of_drawn_routings(by, chunks):
    """All sets of experts equally likely: 4 ranks with 6 experts each, 5 of them for a token."""
    ranks, local, top_k, tokens = 4, 6, 5, 20000
    draw = np.random.default_rng(0)
    ids = np.sort(draw.random((tokens, ranks * local)).argsort(axis=1)[:, :top_k], axis=1)
    found = shape(tokens=tokens, ranks=ranks, ranks_per_node=1, local_experts=local, top_k=top_k, chunks=chunks, by=by,
                  hidden=1, dtype_bytes=1)  # fmt: skip
    rank, slot = ids // local, ids % local
    first, last = [[0] * chunks for _ in range(2)]
    for token in range(tokens):
        for other in range(1, ranks):  # of rank 0's tokens
            here = slot[token][rank[token] == other]
            if len(here):
                at = [token * chunks // tokens] * 2 if by == "tokens" else [here[0], here[-1]]
                group = [at[n] if by == "tokens" else next(
                    c for c in range(chunks) if at[n] < local * (c + 1) // chunks) for n in range(2)]  # fmt: skip
                first[group[0]] += 1
                last[group[1]] += 1
    assert found.bytes_by_lane["inter"] == pytest.approx(first, rel=0.03)
    assert found.distinct.back_by_lane["inter"] == pytest.approx(last, rel=0.03)
    assert sum(found.bytes_by_lane["inter"]) == pytest.approx(tokens * distinct_ranks(24, 4, 5), rel=1e-3)
    assert sum(found.rows) + found.distinct.own_rows == tokens * top_k
    assert found.distinct.own_rows == pytest.approx(tokens * top_k / ranks, rel=0.01)
    assert found.distinct.own_experts == local


def test_the_figures_that_the_literature_and_the_layers_have():
    assert distinct_ranks(32, 2, 8) == pytest.approx(0.9988, abs=1e-4), "4.0 rows of a token leave a rank of two"
    assert distinct_ranks(64, 64, 2) == pytest.approx(2 * 63 / 64), "one expert a rank: every choice is a rank"
    assert distinct_ranks(8, 1, 2) == 0
    for top_k in (1, 2, 8):
        for dtype in (torch.float32, torch.float64):
            beside = metadata_bytes(top_k, dtype.itemsize)
            assert beside.out == metadata_layout(top_k, dtype).row_bytes
            assert beside.back == gradient_layout(top_k, dtype).row_bytes


def test_metadata_are_of_all_rows_at_once():
    found = shape()
    for lane, sizes in found.bytes_by_lane.items():
        rows = sum(sizes) // found.row_bytes
        assert found.distinct.metadata_by_lane[lane] == 48 * rows > 0
        assert found.distinct.gradients_by_lane[lane] == 16 * rows


def test_a_window_has_the_figures_of_deduplicated_steps():
    known = model(distinct=DISTINCT)
    one = shape()
    forward, backward = (window(known, [one, shape(chunks=1)], phase) for phase in ("forward", "backward"))
    assert forward.deduplicated and forward.metadata_s == known.exchange_s(one.distinct.metadata_by_lane)
    assert backward.metadata_s == known.exchange_s(one.distinct.gradients_by_lane) < forward.metadata_s
    own = one.distinct.own_rows
    assert forward.ops_s == pytest.approx((5e-5 + 5e-6 * own + 4e-6, 1e-3, 2e-3, 3e-3))
    assert backward.ops_s == pytest.approx((6e-5 + 6e-6 * own + 8e-6, 6e-3, 4e-3, 2e-3))
    assert forward.head_s == pytest.approx(1e-4 + 1e-8 * 4096) and forward.tail_s == pytest.approx(2e-4)
    cut = forward.chunkings[0]
    assert cut.experts_s == pytest.approx(tuple(5e-5 + 5e-6 * rows + 4e-6 for rows in one.rows))
    assert backward.chunkings[0].deferred_s == pytest.approx((7e-5 + 7e-6 * 4096,))
    sent = [sum(sizes[c] for sizes in one.bytes_by_lane.values()) for c in range(4)]
    assert cut.chunk_bytes == (sent[0] + sum(one.distinct.metadata_by_lane.values()), *sent[1:])
    assert backward.chunkings[0].chunk_bytes == (*sent[:3], sent[3] + sum(one.distinct.gradients_by_lane.values()))


def test_by_groups_rows_leave_early_and_come_back_late():
    found = shape(by="experts", chunks=2)
    for lane, out in found.bytes_by_lane.items():
        back = found.distinct.back_by_lane[lane]
        assert out[0] > out[1] and back == out[::-1]
    cut = window(model(distinct=DISTINCT), [found], "forward").chunkings[0]
    assert cut.first_s[0] > cut.second_s[0] and cut.first_s[1] < cut.second_s[1]


def test_without_figures_of_deduplicated_steps_there_is_no_window():
    with pytest.raises(ConfigError, match="distinct"):
        window(model(), [shape()], "forward")
    with pytest.raises(ConfigError, match="shapes"):
        window(model(distinct=DISTINCT), [shape(), replace(shape(chunks=1), distinct=None)], "forward")
    with pytest.raises(ConfigError, match="one number for each of 4 chunks"):
        replace(shape(), distinct=replace(shape().distinct, back_by_lane={"inter": (1,)}))


def test_deduplicated_figures_replace_those_of_plain_steps():
    found = model(distinct=DISTINCT).deduplicated
    assert found.distinct is None and found.exchange == model().exchange and found.backbone_s == model().backbone_s
    assert (found.experts, found.outside_s) == (DISTINCT.experts, 0.5) and found.outside("forward", 0) == 0.5 + 6e-3


def test_json_holds_them():
    text = json.dumps(model(distinct=DISTINCT).to_json(), allow_nan=False)
    assert CostModel.from_json(json.loads(text)) == model(distinct=DISTINCT)
    assert json.loads(json.dumps(model().to_json()))["distinct"] is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(distinct=[]), "distinct"),
        (lambda d: d.update(distinct=0), "distinct"),
        (lambda d: d.pop("distinct"), "cost model"),
        (lambda d: d["distinct"].pop("experts"), "distinct"),
        (lambda d: d["distinct"].update(exchange={}), "distinct"),
        (lambda d: d["distinct"]["experts"].pop("beta_s"), "distinct.experts"),
        (lambda d: d["distinct"].update(permute=None), "distinct.permute"),
        (lambda d: d["distinct"]["permute"].update(beta_s=-1), "beta_s"),
        (lambda d: d["distinct"].update(expert_s=True), "distinct.expert_s"),
        (lambda d: d["distinct"].update(outside_s=float("nan")), "distinct.outside_s"),
        (lambda d: d["distinct"].update(outside_backward_s=[1.0]), "distinct.outside_backward_s"),
    ],
)
def test_a_file_with_other_figures_says_where(change, field):
    data = model(distinct=DISTINCT).to_json()
    change(data)
    with pytest.raises(ConfigError) as error:
        CostModel.from_json(data)
    assert error.value.field == field
