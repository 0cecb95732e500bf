"""Traffic counted in training forwards: the transports' bytes, and numbers made by hand from the recorded routing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_overlap import ConfigError, RoutingRecorder, TrafficMonitor
from moe_overlap.measure.heat_map import write_heat_map
from moe_overlap.routing import LinearRouter, max_violation
from tests.layers import D, E, make, tokens
from tests.ranks import virtual_world

SIZES = (9, 0, 20, 3)  # of each rank: uneven, and one without tokens
NODE = 2
ROW = D * 8  # float64


def by_hand(ids_of_rank):
    """(choices of each expert; bytes between ranks of one row for each choice; local share, rank share, distinct ranks
    and nodes of a token) of the ids of all ranks, one choice at a time."""
    ranks = len(ids_of_rank)
    counts, pairs = [0] * E, np.zeros((ranks, ranks), dtype=np.int64)
    near = own = choices = tokens_ = on_ranks = on_nodes = 0
    for rank, ids in enumerate(ids_of_rank):
        for row in ids.tolist():
            experts = [one for one in row if one >= 0]
            homes = [one // (E // ranks) for one in experts]
            for one, home in zip(experts, homes, strict=True):
                counts[one] += 1
                choices += 1
                own += home == rank
                near += home // NODE == rank // NODE
                if home != rank:
                    pairs[rank, home] += ROW
                    pairs[home, rank] += ROW
            tokens_ += bool(experts)
            on_ranks += len(set(homes))
            on_nodes += len({home // NODE for home in homes})
    return counts, pairs, (near / choices, own / choices, on_ranks / tokens_, on_nodes / tokens_)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "chunked(3)", "capacity_factor": 0.5},
        {"schedule": "chunked(2,experts)", "dedup": "on"},
        {"dedup": "on", "hierarchical": True},
    ],
)
def test_bytes_are_the_transports_and_the_rest_is_as_counted_by_hand(k, options):
    def rank(me):
        transport = me.transport()
        layer = make(transport, top_k=k, ranks_per_node=NODE, **options)
        x = tokens(SIZES[me.rank], seed=me.rank)
        with TrafficMonitor(layer) as monitor, RoutingRecorder(layer) as recorder:
            layer(x)
            layer(2 * x)
            stats = transport.stats
            sent = stats.payload_bytes, stats.inter_node_bytes
            report = monitor.report()[""]
            last = layer.stats()
        return report, sent, [call.ids_TK for call in recorder.log.layers[0].calls], last

    results = virtual_world(4).run(rank)
    reports = [report for report, _, _, _ in results]
    counts, pairs, shares = by_hand([torch.cat(ids) for _, _, ids, _ in results])
    of_last = by_hand([ids[-1] for _, _, ids, _ in results])
    for me, (report, (sent, crossing), _, last) in enumerate(results):
        assert report.calls == 2
        assert report.bytes_WW[me].sum() == sent and report.bytes_WW[me, me] == 0
        node = slice(me // NODE * NODE, (me // NODE + 1) * NODE)
        assert sent - report.bytes_WW[me, node].sum() == crossing
        assert report.inter_node_bytes == sum(other for _, (_, other), _, _ in results) > 0
        assert report.tokens_per_expert.tolist() == counts
        found = report.shares
        assert (found.local_share, found.rank_share, found.distinct_ranks, found.distinct_nodes) == shares
        assert report.max_over_mean == max(counts) * E / sum(counts) == 1 + report.max_violation
        assert np.array_equal(report.bytes_WW, reports[0].bytes_WW)
        assert last.tokens_per_expert.tolist() == of_last[0]
        assert last.max_over_mean == max(of_last[0]) * E / sum(of_last[0])
        assert 2 * last.payload_bytes == sent == 2 * sum(last.bytes_to_ranks)  # both calls route alike
        assert 2 * last.inter_node_bytes == crossing
    if "dedup" not in options:
        assert np.array_equal(reports[0].bytes_WW, pairs)


def test_only_training_forwards_count_and_each_once():
    layer, x = make(), tokens(6)
    mask = torch.tensor([True, True, False, True, False, False])
    with TrafficMonitor(layer) as monitor:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer(x, token_mask=mask)
        with torch.no_grad():
            layer(x)
        layer.eval()(x)
        layer.train()
        report = monitor.report()[""]
        assert report.calls == 2 and int(report.tokens_per_expert.sum()) == (6 + 3) * 2
        assert report.shares.distinct_ranks == 1.0 == report.shares.rank_share
        again = monitor.report()[""]
        assert again.calls == 0 and again.shares.local_share is None and again.max_violation == 0.0
    layer(x)
    assert monitor.report()[""].calls == 0  # closed


def test_the_mean_violation_of_calls_is_not_that_of_their_sum():
    """Two calls, each of which wants one expert alone: as uneven as can be, and together half as much."""
    router = LinearRouter(D, E, 1, dtype=torch.float64)
    layer = make(router=router, top_k=1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = router.weight[1, 1] = 1.0
    with TrafficMonitor(layer) as monitor:
        for expert in (0, 1):
            x = torch.zeros(4, D, dtype=torch.float64)
            x[:, expert] = 1.0
            layer(x)
        report = monitor.report()[""]
    assert (report.max_violation_batch, report.max_violation) == (E - 1, E / 2 - 1)
    assert report.max_violation == max_violation(report.tokens_per_expert)


def test_lines_of_the_sink_and_a_picture(tmp_path):
    sink, picture = tmp_path / "traffic.jsonl", tmp_path / "traffic.png"

    def rank(me):
        model = nn.Sequential(*(make(me.transport(), ranks_per_node=NODE) for _ in range(2)))
        with TrafficMonitor(model, sink=sink) as monitor:
            for step in range(2):
                model(tokens(5, seed=me.rank))
                reports = monitor.report(step=step)
                monitor.heat_map(picture, reports)
        return reports

    reports = virtual_world(4).run(rank)
    lines = [json.loads(line) for line in sink.read_text().splitlines()]
    assert [(line["step"], line["layer"]) for line in lines] == [(0, "0"), (0, "1"), (1, "0"), (1, "1")]
    assert lines[-1] == {"step": 1, "layer": "1", **reports[2]["1"].to_json()}
    assert lines[-1]["payload_bytes"] == sum(map(sum, lines[-1]["bytes"])) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_report_before_any_call_is_empty():
    def rank(me):
        return TrafficMonitor(make(me.transport())).report()[""].to_json()

    for row in virtual_world(2).run(rank):
        assert row["calls"] == row["payload_bytes"] == 0 and row["max_over_mean"] == 1.0
        assert row["local_share"] is None and json.dumps(row, allow_nan=False)


def test_a_heat_map_of_many_ranks_and_of_none_of_the_bytes(tmp_path):
    for ranks in (1, 40):
        path = tmp_path / f"{ranks}.png"
        write_heat_map(path, np.zeros((ranks, ranks), dtype=np.int64), ranks_per_node=8, title="nothing")
        assert path.stat().st_size > 1000


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="model"):
        TrafficMonitor(nn.Linear(2, 2))
