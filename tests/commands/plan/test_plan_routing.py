"""`moe-overlap plan --routing`: the counts of a saved routing in the place of equally many rows."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_overlap import ConfigError, MoELayer
from moe_overlap.auto.calibrate import distinct_shape, step_shape
from moe_overlap.commands.bench.routing import ForcedRouter, load
from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.machine import metadata, place, shapes, traffic_of
from moe_overlap.commands.plan.options import PlanOptions, parse
from moe_overlap.commands.plan.sweep import asked, total_s
from tests.ranks import virtual_world

EXPERTS, WIDTH = 8, 16


@pytest.fixture
def file(tmp_path):
    """Three experts of eight for each of 160 tokens, the lower ones more often; two choices were dropped."""
    scores = torch.rand(160, EXPERTS, generator=torch.Generator().manual_seed(2)) + torch.arange(EXPERTS, 0, -1) / 12
    ids = scores.topk(3).indices.to(torch.int32)
    ids[5, 1] = ids[9, 0] = -1
    return saved(tmp_path, ids)


def saved(folder, ids, **metadata):
    path = folder / "routing.safetensors"
    said = {"E": str(EXPERTS), "K": "3", **{key: str(value) for key, value in metadata.items()}}
    save_file({"ids": ids.contiguous(), "weights": torch.ones(ids.shape)}, path, said)
    return str(path)


def options_of(file, **changes):
    base = {"ranks": 4, "ranks_per_node": 2, "tokens": 40, "hidden": WIDTH, "ffn": 8, "experts": EXPERTS, "top_k": 3,
            "dtype": "fp32", "routing": file}  # fmt: skip
    return PlanOptions(**(base | changes))


@pytest.mark.parametrize("kind", ["top2", "shared1"])
@pytest.mark.parametrize("distinct", [False, True])
def test_a_step_has_the_integers_that_a_layer_agrees_on(file, kind, distinct):
    options = options_of(file)
    at = place(options, ranks=4, bytes_per_s=1e9)
    top_k = 3 if kind == "top2" else 2

    def rank(me):
        ids, weights = load(file, out="", tokens=40, experts=EXPERTS, top_k=3, rank=me.rank, ranks=4)
        router = ForcedRouter(ids[:, :top_k], weights[:, :top_k], EXPERTS)
        layer = MoELayer(WIDTH, 8, EXPERTS, top_k, router=router, transport=me.transport(), ranks_per_node=2,
                         dedup="on" if distinct else "off")  # fmt: skip
        layer(torch.randn(40, WIDTH))
        return layer.last_exchange

    (exchange, *_) = virtual_world(4).run(rank)
    nodes, row_bytes = (0, 0, 1, 1), WIDTH * 4
    found = shapes(options, kind, at, distinct=distinct)
    assert len(found) == 6
    for one in found:
        plan = exchange.chunked(one.chunks, one.by)
        if distinct:
            want = distinct_shape(plan, row_bytes=row_bytes, metadata=metadata(options, kind), nodes=nodes)
        else:
            want = step_shape(plan, row_bytes=row_bytes, nodes=nodes)
        assert one == want
    assert sum(found[0].bytes_by_lane["inter"]) > 0


def test_what_is_said_of_the_routing_is_as_counted_by_hand(tmp_path):
    """Two tokens a rank: all choices of rank 0 stay there, one of each of rank 1's goes to the other node."""
    ids = torch.tensor([[0, 1], [1, 0], [2, 6], [3, 7], [4, 5], [5, 4], [6, 7], [7, -1]], dtype=torch.int32)
    path = saved(tmp_path, ids, rank_tokens="[2, 2, 2, 2]")
    options = options_of(path, tokens=2, top_k=2)
    found = traffic_of(options, "top2", place(options, ranks=4, bytes_per_s=1e9))
    assert found.choices_WW.tolist() == [[4, 0, 0, 0], [0, 2, 0, 2], [0, 0, 4, 0], [0, 0, 0, 3]]
    assert (found.rows_per_token, found.distinct_rows_per_token) == (2 / 8, 2 / 8)
    assert found.kept == (1 + 1 + 2 + 2 + 1 + 1 + 1 + 1) / 15
    assert (found.max_over_mean, found.local_share) == (3 * 8 / 15, 13 / 15)  # expert 7: three times


def test_skewed_rows_take_longer_than_balanced_ones_and_local_ones_less(tmp_path):
    """On a slow link the step follows the bytes of the busiest rank."""
    even = torch.arange(64, dtype=torch.int32)[:, None] * 2 % EXPERTS + torch.arange(2, dtype=torch.int32)
    slow = {"tokens": 16, "top_k": 2, "bandwidth": 1e5, "latency": 0.0, "phase": "infer", "dedup": "off",
            "hidden": 1024}  # fmt: skip
    balanced = asked(options_of(None, **slow), "top2")
    times = {}
    for name, ids in (
        ("even", even),
        ("skewed", even % 2),
        ("local", (torch.arange(64) // 16)[:, None].to(torch.int32) * 2 + torch.arange(2, dtype=torch.int32)),
    ):
        (tmp_path / name).mkdir()
        times[name] = asked(options_of(saved(tmp_path / name, ids), **slow), "top2").serial_s
    assert times["even"] == pytest.approx(balanced.serial_s, rel=1e-6)
    assert times["local"] < times["even"] / 10 and times["skewed"] > 1.5 * times["even"]


def test_the_command_says_what_it_took(file, tmp_path, capsys):
    words = [
        *"--ranks 4 --ranks-per-node 2 --tokens 40 --hidden 64 --ffn 64 --experts 8 --top-k 3".split(),
        *["--routing", file, "--out", str(tmp_path / "out")],
    ]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "rows as in routing.safetensors (--routing)" in out and "every expert gets equally many" not in out
    assert "Rows to other ranks, of the routing" in out
    record = json.loads((tmp_path / "out" / "plan.json").read_text())
    options = parse(words)
    for entry in record["point"]:
        one = asked(options, entry["kind"])
        found = traffic_of(options, entry["kind"], one.at)
        assert entry["routing"] == found.to_json()
        assert entry["deduplication"]["distinct_rows_per_token"] == found.distinct_rows_per_token
        assert entry["predicted_ms"] == pytest.approx(1e3 * total_s(one.phases))
    assert main(["plan", *words, "--dedup", "off"]) == 0
    assert "deduplication" not in json.loads((tmp_path / "out" / "plan.json").read_text())["point"][0]


def test_files_that_do_not_fit_are_refused(file, tmp_path):
    for changes in ({"experts": 16}, {"top_k": 4}, {"routing": str(tmp_path / "none")}):
        with pytest.raises(ConfigError) as caught:
            options_of(file, **changes)
        assert caught.value.field == "--routing"
    twice = saved(tmp_path, torch.zeros(8, 3, dtype=torch.int32))
    with pytest.raises(ConfigError, match="no expert twice"):
        asked(options_of(twice), "top2")
    assert asked(options_of(twice, dedup="off"), "top2").time_s > 0


def test_no_tokens_of_a_routing_are_nothing_to_exchange(file, tmp_path):
    words = ["--routing", file, "--ranks", "4", "--experts", "8", "--top-k", "3", "--tokens", "0"]
    assert main(["plan", *words, "--out", str(tmp_path / "out")]) == 0
    point = json.loads((tmp_path / "out" / "plan.json").read_text())["point"][0]
    assert point["routing"]["rows_per_token"] == 0 and point["speedup_vs_serial"] == 1.0


@pytest.mark.parametrize("kind", ["top2", "shared1", "scmoe_pos2"])
@pytest.mark.parametrize("dedup", ["off", "on", "auto"])
def test_a_routing_that_stays_on_its_rank_gains_nothing(kind, dedup, tmp_path):
    """Four choices of eight experts, all on the token's own rank: sent once or not, nothing is sent."""
    ids = (torch.arange(64) // 32)[:, None].to(torch.int32) * 4 + torch.arange(4, dtype=torch.int32)
    options = options_of(saved(tmp_path, ids), ranks=2, ranks_per_node=1, tokens=32, top_k=4, kind=kind, dedup=dedup)
    one = asked(options, kind)
    assert one.speedup == pytest.approx(1.0, abs=1e-12) and one.comm_share == pytest.approx(0.0, abs=1e-12)
    assert one.distinct is None and {phase.best.chunks for phase in one.phases} == {1}
