"""`moe-overlap plan --dedup`: what one row for each (token, rank) gives, from numbers alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.command import _assumptions
from moe_overlap.commands.plan.machine import SMALL_OPS, agreement_s, cost_model, place, shapes
from moe_overlap.commands.plan.options import PlanOptions, parse
from moe_overlap.commands.plan.sweep import asked, total_s
from moe_overlap.planning.cost_model import CostModel, window
from moe_overlap.planning.shapes import distinct_ranks

TOP8 = PlanOptions(ranks=16, experts=128, top_k=8)
TOP2 = PlanOptions(ranks=2, experts=64, top_k=2)


def run(words, capsys):
    status = main(["plan", *words])
    return status, capsys.readouterr()


@pytest.mark.parametrize("per_node", [1, 8])
@pytest.mark.parametrize("phase", ["infer", "train"])
def test_two_choices_over_two_ranks_do_not_pay(per_node, phase):
    """Where weights are added: beside the matmuls, of which deduplication makes two parts, one may hide what the other
    cannot."""
    one = asked(replace(TOP2, ranks_per_node=per_node, phase=phase, weights="added"), "top2")
    assert not one.deduplicated and one.phases == one.plain and one.distinct is not None
    assert total_s(one.plain) < total_s(one.distinct)


def test_eight_choices_over_a_slow_wire_pay():
    slow = replace(TOP8, ranks=2, ranks_per_node=1, experts=32, bandwidth=2e9)
    one = asked(slow, "top2")
    assert one.deduplicated and one.time_s < total_s(one.plain) and one.code.startswith("d ")
    assert one.serial_s == asked(replace(slow, dedup="off"), "top2").serial_s, "compared with plain serial"
    # Where the wire is all, the step takes the share of the bytes: 0.9988 rows of a token instead of 4.
    wire = replace(slow, bandwidth=1e6, latency=0.0)
    one = asked(wire, "top2")
    beside = 1 + (3 * 8 * 8 - 8 * 4) / 4 / (4096 * 2)  # ids and weights, their gradients, of four exchanges of rows
    assert one.time_s / one.serial_s == pytest.approx(distinct_ranks(32, 2, 8) / 4 * (beside - 0.002), rel=0.01)


def test_on_and_off_are_what_they_say():
    on, off, auto = (asked(replace(TOP2, dedup=dedup), "top2") for dedup in ("on", "off", "auto"))
    assert on.deduplicated and not off.deduplicated and off.distinct is None
    assert auto.time_s == off.time_s < on.time_s == total_s(auto.distinct)
    assert all("M" in phase.best.order for phase in on.phases)


def test_nothing_is_looked_at_where_nothing_can_be_saved():
    """One expert on a rank, one choice of a token, one rank."""
    for options, kind in ((replace(TOP8, ranks=128), "top2"), (TOP2, "shared1"), (replace(TOP2, ranks=1), "top2")):
        assert asked(options, kind).distinct is None
    assert asked(replace(TOP2, dedup="on"), "shared1").deduplicated, "asked for"
    assert not asked(replace(TOP2, ranks=1, dedup="on"), "top2").deduplicated


def test_the_figures_of_deduplicated_steps_by_hand():
    options = replace(TOP8, ranks=4, ranks_per_node=1, experts=16, top_k=4, tokens=1000, hidden=100, ffn=200,
                      flops=1e12, memory_bandwidth=1e10)  # fmt: skip
    at = place(options, ranks=4, bytes_per_s=1e9)
    found, plain = cost_model(options, "top2", at).distinct, cost_model(options, "top2", at)
    kept = distinct_ranks(16, 4, 4) * 4 / 3 / 4  # rows for each choice
    matmul_s, row_s, small_s = 6 * 100 * 200 / 1e12, 200 / 1e10, 20e-6 / 8
    assert found.experts.beta_s == pytest.approx(matmul_s + (1 + 3 * kept) * row_s)
    assert found.experts.beta_s < plain.experts.beta_s and found.expert_s == plain.expert_s
    assert found.permute.alpha_s == pytest.approx(20e-6 + SMALL_OPS["P"] * small_s)
    assert found.permute.beta_s == pytest.approx(2 * kept * row_s + 410 / 1e10)
    assert found.unpermute.beta_s == pytest.approx(2 * kept * row_s)
    tables_s = agreement_s(options, at, distinct=True) - agreement_s(options, at)
    beside_s = SMALL_OPS["M"] * small_s + 250 * 4000 / 1e10
    assert found.outside_s - plain.outside_s == pytest.approx(tables_s + beside_s)
    assert 0 < tables_s < 3 * agreement_s(options, at)
    shape = shapes(options, "top2", at, distinct=True)[0]
    assert shape.distinct.metadata_by_lane["inter"] == shape.bytes_by_lane["inter"][0] // 200 * 32


def test_the_command_says_it_and_writes_it(capsys, tmp_path):
    words = ["--ranks", "2", "--experts", "32", "--top-k", "8", "--ranks-per-node", "1", "--bandwidth", "2GB",
             "--out", str(tmp_path)]  # fmt: skip
    status, said = run(words, capsys)
    assert status == 0, said.err
    lines = said.out.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["top2"] and line.rstrip().endswith("yes"))
    assert "0.9988" in row and " 4 " in row and "64+32 B of 8192" in row and "-" in row
    assert any("dedup: " in line for line in lines)
    record = json.loads((tmp_path / "plan.json").read_text())
    point = record["point"][0]
    assert record["options"]["dedup"] == "auto" and point["deduplicated"]
    assert point["deduplicated_ms"] < point["plain_ms"] and point["predicted_ms"] == point["deduplicated_ms"]
    assert point["deduplication"] == {
        "rows_per_token": 4.0, "distinct_rows_per_token": pytest.approx(0.9988, abs=1e-4), "row_bytes": 8192,
        "metadata_out_bytes": 64, "metadata_back_bytes": 32,
    }  # fmt: skip
    assert record["cost_model"]["distinct"]["permute"]["beta_s"] > 0
    status, said = run(["--ranks", "2", "--out", str(tmp_path)], capsys)
    row = next(line for line in said.out.splitlines() if line.split()[:2] == ["top2", "0.754"])
    assert row.rstrip().endswith("no") and "no two experts of a token are on one rank" in said.out
    assert "deduplicated" not in run(["--dedup", "off", "--out", str(tmp_path)], capsys)[1].out.split("\n\n")[3]


def test_a_cost_model_with_and_without_such_figures(capsys, tmp_path):
    file = tmp_path / "model.json"
    sizes = ["--ranks", "2", "--experts", "32", "--top-k", "8", "--ranks-per-node", "1", "--bandwidth", "2GB"]
    point = asked(parse(sizes), "top2")
    words = [*sizes, "--cost-model", str(file)]
    file.write_text(json.dumps(point.model.to_json()))
    same = asked(parse(words), "calibrated")
    assert same.deduplicated and same.time_s == pytest.approx(point.time_s)
    file.write_text(json.dumps(point.model.to_json() | {"distinct": None}))
    assert not asked(parse(words), "calibrated").deduplicated
    status, said = run([*words, "--out", str(tmp_path)], capsys)
    assert status == 0 and "not in the cost model" in said.out
    status, said = run([*words, "--dedup", "on"], capsys)
    assert status == 2 and "--dedup" in said.err and said.err.count("\n") == 1


def test_a_word_that_is_none(capsys):
    status, said = run(["--dedup", "maybe"], capsys)
    assert status == 2 and "--dedup" in said.err and "off, on, node, auto" in said.err


def test_the_work_of_gateways_is_memory_traffic_by_hand():
    """4 nodes of 8 ranks, 8 of 256 experts: every token crosses to each other node that has one of its experts, and is
    passed on there to each rank that has one."""
    options = PlanOptions(ranks=32, experts=256, top_k=8, tokens=1000, hidden=512, dedup="node", phase="infer",
                          memory_bandwidth=1e12)  # fmt: skip
    at = place(options, ranks=32, bytes_per_s=options.bandwidth)
    model = cost_model(options, "top2", at)
    cuts = shapes(options, "top2", at, distinct=True)
    crossing = round(distinct_ranks(256, 4, 8) * 1000) * 1024
    passed_on = round(distinct_ranks(256, 32, 8) / 31 * 24 * 1000) * 1024
    one, four = cuts[0], next(cut for cut in cuts if cut.chunks == 4)

    def work_s(shape, phase="forward"):
        hops = model.hops_s(shape, phase)
        return sum(model.inside_s(shape, phase)) - sum(hops.out) - sum(hops.back)

    read_s, written_s = 2 * passed_on / 1e12, (passed_on + crossing) / 1e12  # passed on: both; added up: one of each
    assert work_s(one) == pytest.approx(read_s + written_s, rel=1e-3)
    assert work_s(one) == pytest.approx(work_s(one, "backward")) and one.distinct.gateway.kept == 0
    kept = four.distinct.gateway.kept
    assert kept == pytest.approx(crossing + passed_on, rel=1e-2)
    assert work_s(four) == pytest.approx(read_s + written_s + 2 * kept / 1e12, rel=1e-2)
    free = replace(model, distinct=replace(model.distinct, gateway_byte_s=0.0))
    worked, idle = (window(each, [one], "forward").chunkings[0] for each in (model, free))
    assert worked.experts_s[0] - idle.experts_s[0] == pytest.approx(work_s(one))
    assert (worked.first_s, worked.second_s) == (idle.first_s, idle.second_s)
    direct = shapes(replace(options, dedup="on"), "top2", at, distinct=True)[0]
    assert model.inside_s(direct, "forward") == (0.0,), "no gateways"
    record = model.to_json()
    assert CostModel.from_json(record) == model
    del record["distinct"]["gateway_byte_s"]
    assert CostModel.from_json(record) == free, "as files had it before"


def test_it_is_said_what_gateways_do():
    for dedup, expected in (("node", True), ("on", False)):
        options = replace(TOP8, ranks=32, dedup=dedup)
        said = "\n".join(_assumptions(options, asked(options, "top2"), None))
        assert ("a gateway reads and writes" in said) == expected


def test_compute_waits_for_the_wire_inside_a_node_by_hand():
    """Of the rows that a gateway passes on, those of its own experts need no wire: 7 of 8. Ids and weights go with the
    first ones; narrower rows are narrower here too."""
    options = PlanOptions(ranks=32, experts=256, top_k=8, tokens=1000, hidden=512, dedup="node", phase="infer",
                          intra_bandwidth=1e11, latency=1e-5, message=1e-6)  # fmt: skip
    at = place(options, ranks=32, bytes_per_s=options.bandwidth)
    model, shape = cost_model(options, "top2", at), shapes(options, "top2", at, distinct=True)[0]
    rows = round(distinct_ranks(256, 32, 8) / 31 * 24 * 1000) * 7 // 8
    each_s = 1e-5 + 7e-6
    hops = model.hops_s(shape, "forward")
    assert hops.back[0] == pytest.approx(each_s + rows * 1024 / 1e11, rel=1e-3)
    assert hops.out[0] == pytest.approx(2 * each_s + rows * (1024 + 64) / 1e11, rel=1e-3)
    backward = model.hops_s(shape, "backward")
    assert backward.back[0] == pytest.approx(2 * each_s + rows * (1024 + 32) / 1e11, rel=1e-3)
    narrow = shapes(replace(options, dispatch_dtype="fp8"), "top2", at, distinct=True)[0]
    fewer = model.hops_s(narrow, "forward")
    assert hops.out[0] - fewer.out[0] == pytest.approx(rows * (1024 - 528) / 1e11, rel=1e-3)
    assert fewer.back == hops.back and model.hops_s(narrow, "backward") == backward
    direct = shapes(replace(options, dedup="on"), "top2", at, distinct=True)[0]
    assert shape.bytes_by_lane["intra"] == direct.bytes_by_lane["intra"], "rows of the own node go there directly"
