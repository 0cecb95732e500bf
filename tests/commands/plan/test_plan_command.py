"""`moe-overlap plan`: its figures by hand, what it refuses, and that a calibrated file gives the same plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.machine import cost_model, place, routed, shapes
from moe_overlap.commands.plan.offload import offload_shape
from moe_overlap.commands.plan.options import KINDS, PlanOptions, parse
from moe_overlap.commands.plan.picture import events_of
from moe_overlap.commands.plan.sweep import CODES, asked, bandwidths, predict, rank_counts, rate_text, sweep
from moe_overlap.errors import ConfigError

OPTIONS = PlanOptions()


def run(words, capsys):
    try:
        status = main(["plan", *words])
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr()


def test_texts_are_read_in_si_units():
    assert parse([]) == OPTIONS
    found = parse("--bandwidth 25GB --latency 2.5us --flops 1pflops --launch 0ms --backbone 1ms,2ms,3ms".split())
    assert (found.bandwidth, found.latency, found.flops, found.launch) == (25e9, 2.5e-6, 1e15, 0.0)
    assert found.backbone == (1e-3, 2e-3, 3e-3) and parse(["--backbone", "auto"]).backbone is None


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--ranks 0", "--ranks"),
        ("--ranks 96", "--ranks"),
        ("--ranks 48 --skew 0", "--skew"),
        ("--ranks many", "--ranks"),
        ("--ranks-per-node 3", "--ranks-per-node"),
        ("--tokens -1", "--tokens"),
        ("--kind shared1 --top-k 1", "--top-k"),
        ("--top-k 65", "--top-k"),
        ("--kind top3", "--kind"),
        ("--phase decode", "--phase"),
        ("--dtype fp8", "--dtype"),
        ("--bandwidth none", "--bandwidth"),
        ("--expert-offload fast", "--expert-offload"),
        ("--bandwidth 400", "--bandwidth"),
        ("--bandwidth 0gbit", "--bandwidth"),
        ("--bandwidth 1gbit:1us", "--bandwidth"),
        ("--intra-bandwidth fast", "--intra-bandwidth"),
        ("--latency 1", "--latency"),
        ("--flops 0tflops", "--flops"),
        ("--flops 4e14", "--flops"),
        ("--memory-bandwidth 2TB", "--memory-bandwidth"),
        ("--compute-slowdown 0.5", "--compute-slowdown"),
        ("--wire-slowdown nan", "--wire-slowdown"),
        ("--backbone 1ms", "--backbone"),
        ("--cost-model no/such/file", "--cost-model"),
        ("--speed 11", "--speed"),
        ("--latency -1us", "--latency"),
        ("--launch -.5us", "--launch"),
        ("--ranks -1", "--ranks"),
        (f"--tokens {10**21}", "--tokens"),
        (f"--tokens {'9' * 400}", "--tokens"),
        (f"--hidden {'9' * 400}", "--hidden"),
        (f"--sequence {'9' * 30}", "--sequence"),
        (f"--flops {'9' * 400}tflops", "--flops"),
        (f"--flops {'0' * 20}.{'0' * 20}1gflops", "--flops"),
        (f"--bandwidth {'9' * 400}gbit", "--bandwidth"),
        (f"--latency {'9' * 400}s", "--latency"),
        (f"--message {'9' * 400}s", "--message"),
        ("--launch 1000000s", "--launch"),
    ],
)
def test_bad_input_is_one_line_naming_the_option_and_exit_2(words, option, capsys, tmp_path):
    status, said = run([*words.split(), "--out", str(tmp_path)], capsys)
    assert status == 2 and not said.out
    assert len(said.err.strip().splitlines()) == 1 and option in said.err and words.split()[-1] in said.err, said.err
    assert not list(tmp_path.iterdir())


def test_a_negative_time_is_told_what_is_expected(capsys):
    assert "a time from 0 to 3600s, such as 10us" in run(["--latency", "-1us"], capsys)[1].err


@pytest.mark.parametrize(
    ("ranks", "experts", "per_node", "expected"),
    [
        (64, 64, 8, (64, 8)),
        (16, 64, 8, (16, 8)),
        (4, 64, 8, (4, 4)),
        (3, 3, 8, (3, 3)),  # one node
        (64, 4, 8, (4, 4)),  # two groups on each node
        (12, 6, 4, (6, 2)),  # ranks 0 to 3 are one node, 4 and 5 part of the next
        (24, 12, 8, (12, 4)),
    ],
)
def test_where_a_group_of_ranks_lies(ranks, experts, per_node, expected):
    at = place(replace(OPTIONS, ranks=ranks, experts=experts, ranks_per_node=per_node), ranks=ranks, bytes_per_s=1e9)
    assert (at.group, at.per_node) == expected


def test_groups_that_do_not_fit_nodes_are_said(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    said = run("--ranks 12 --experts 6 --ranks-per-node 4".split() + out, capsys)[1].out
    assert "groups of 6 ranks do not fit nodes of 4: taken as 2 of a group per node" in said
    for fits in ("--ranks 12 --experts 6 --ranks-per-node 3", "--ranks 3 --experts 3 --ranks-per-node 8"):
        status, said = run(fits.split() + out, capsys)
        assert status == 0 and "do not fit" not in said.out


def test_a_cost_model_from_numbers_by_hand():
    options = replace(
        OPTIONS, ranks=16, experts=32, tokens=1000, hidden=100, ffn=200, flops=1e12, memory_bandwidth=1e10
    )
    at = place(options, ranks=16, bytes_per_s=1e9)
    assert (at.group, at.per_node, at.peers) == (16, 8, {"inter": 8, "intra": 7})
    model = cost_model(options, "top2", at)
    assert model.exchange["inter"].alpha_s == pytest.approx(10e-6 + 8e-6)
    assert model.exchange["inter"].beta_s == pytest.approx(1e-9)
    assert model.exchange["intra"].alpha_s == pytest.approx(10e-6 + 7e-6)
    # A row is 200 bytes. The experts: three matmuls of 2 D F, unpacking and packing read and write each row.
    assert model.experts.beta_s == pytest.approx(6 * 100 * 200 / 1e12 + 4 * 200 / 1e10)
    assert model.experts_wgrad.beta_s == pytest.approx(6 * 100 * 200 / 1e12)
    # An expert's three matrices are read before the matmuls of a chunk, forward and for the gradient of its input.
    assert model.expert_s == model.expert_dgrad_s == pytest.approx(3 * 100 * 200 * 2 / 1e10)
    assert model.permute(2000) == pytest.approx(20e-6 + 2 * 2000 * 200 / 1e10)
    attention_s = (8 * 1000 * 100**2 + 2 * 1000 * 1000 * 100) / 1e12
    mlp_s, router_s = 6 * 1000 * 100 * 200 / 1e12, 2 * 1000 * 100 * 32 / 1e12
    # One round of 15 messages: 5 + 24 words, and two of 16 blocks x 32 counts in each word of 8 bytes.
    agreement_s = 10e-6 + 15e-6 + 15 * (5 + 24 + 16 * 32 // 2) * 8 / 1e9
    assert model.outside_s == pytest.approx(2 * attention_s + mlp_s + router_s + agreement_s)
    assert model.outside_backward_s == pytest.approx(2 * (2 * attention_s + mlp_s + router_s))
    pos2 = cost_model(options, "scmoe_pos2", at)
    assert pos2.backbone_s == pytest.approx((mlp_s, attention_s, mlp_s))
    assert pos2.outside_s == pytest.approx(attention_s + router_s + agreement_s)
    assert cost_model(replace(options, backbone=(1.0, 2.0, 3.0)), "scmoe_pos1", at).backbone_s == (3.0, mlp_s)


def test_the_serial_step_by_hand():
    options = replace(OPTIONS, phase="infer", issue=1e-3, compute_slowdown=1.0, weights="added")
    one = asked(options, "top2")
    model, shape = one.model, shapes(options, "top2", one.at)[0]
    (exchange_s,) = {model.exchange_s({wire: sizes[0] for wire, sizes in shape.bytes_by_lane.items()})}
    rows = 2 * options.tokens
    (expert_s,) = {model.expert_s * count for count in shape.experts}  # one expert on a rank
    expected = model.outside_s + model.permute(rows) + model.unpermute(rows) + model.experts(rows) + expert_s
    assert one.compute_s == pytest.approx(expected)
    assert one.serial_s == pytest.approx(expected + 2 * exchange_s + 4e-3)
    assert one.comm_share == pytest.approx(1 - one.compute_s / one.serial_s)


def test_kinds_of_equal_work_have_equal_serial_times():
    points = {kind: asked(OPTIONS, kind) for kind in KINDS}
    for kind in KINDS[1:]:
        assert points[kind].serial_s == pytest.approx(points["shared1"].serial_s)
        assert routed(OPTIONS, kind) == 1
    assert points["top2"].compute_s == pytest.approx(points["shared1"].compute_s, rel=0.01)
    for one in points.values():
        assert one.bound_s <= one.time_s * (1 + 1e-9) <= one.serial_s * (1 + 2e-9)
        assert one.compute_s <= one.time_s * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["top2", "shared1", "scmoe_pos2"])
def test_a_faster_link_is_never_slower_and_overlap_never_loses(kind):
    found = sweep(replace(OPTIONS, kind=kind, ranks=16))
    assert found.bandwidths == bandwidths(OPTIONS) and OPTIONS.bandwidth in found.bandwidths
    for row in (*found.grid, *found.lines.values()):
        times = [one.time_s for one in row]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(times, times[1:], strict=False))
        assert all(one.speedup >= 1 - 1e-9 for one in row)
    assert 1.2 < max(one.speedup for row in found.grid for one in row)


def test_more_ranks_than_experts_exchange_in_groups():
    assert rank_counts(OPTIONS) == [2, 4, 8, 16, 32, 64, 256, 1024, 4096]
    few, many = (predict(OPTIONS, "top2", ranks=ranks, bytes_per_s=1e10) for ranks in (64, 1024))
    assert many.at.group == 64 and many.time_s == few.time_s and many.ranks == 1024
    assert rank_counts(replace(OPTIONS, experts=6, ranks=3, ranks_per_node=1)) == [2, 3]


def test_one_rank_has_nothing_to_hide(capsys, tmp_path):
    status, said = run(["--ranks", "1", "--ranks-per-node", "1", "--out", str(tmp_path)], capsys)
    assert status == 0 and "Nothing leaves a rank" in said.out and "1.00x serial" in said.out


@pytest.mark.parametrize(("kind", "phase"), [("top2", "train"), ("scmoe_pos2", "infer")])
def test_the_command_says_and_writes_the_plan(kind, phase, capsys, tmp_path):
    words = ["--kind", kind, "--phase", phase, "--out", str(tmp_path), "--ranks", "16"]
    status, said = run(words, capsys)
    assert status == 0, said.err
    point = asked(parse(words), kind)
    assert f"predicted {1e3 * point.time_s:.3g} ms" in said.out.splitlines()[0]
    assert ("backward: " in said.out) == (phase == "train")
    for part in (
        "Nothing was run",
        "--flops",
        "--message",
        "comp | P",
        "What would change",
        "4096 ranks",
        CODES,
        *KINDS,
    ):
        assert part in said.out, part
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["options"]["bandwidth"] == 5e10 and record["options"]["kind"] == kind
    assert [row["kind"] for row in record["point"]] == [kind, *(other for other in KINDS if other != kind)]
    assert record["point"][0]["predicted_ms"] == pytest.approx(1e3 * point.time_s)
    assert len(record["grid"]) == len(bandwidths(OPTIONS)) * len(rank_counts(parse(words)))
    assert {row["kind"] for row in record["kinds"]} == set(KINDS)


@pytest.mark.parametrize(("kind", "top_k"), [("top2", "2"), ("shared1", "1"), ("scmoe_pos3", "1")])
def test_a_calibrated_file_with_the_same_numbers_gives_the_same_plan(kind, top_k, capsys, tmp_path):
    file, sizes = tmp_path / "model.json", ["--ranks", "16"]
    point = asked(parse([*sizes, "--kind", kind]), kind)
    file.write_text(json.dumps(point.model.to_json()))
    words = [*sizes, "--cost-model", str(file), "--top-k", top_k]
    same = asked(parse(words), "calibrated")
    assert same.time_s == pytest.approx(point.time_s) and same.serial_s == pytest.approx(point.serial_s)
    assert [one.best.order for one in same.phases] == [one.best.order for one in point.phases]
    faster = asked(parse([*words, "--bandwidth", "800gbit"]), "calibrated")
    assert faster.model.exchange["inter"].beta_s == pytest.approx(1e-11)
    assert faster.model.exchange["inter"].alpha_s == same.model.exchange["inter"].alpha_s
    status, said = run([*words, "--out", str(tmp_path)], capsys)
    assert status == 0 and "from numbers" in said.out and (tmp_path / "plan.png").exists()


def test_a_cost_model_without_the_wire_that_is_asked_for(capsys, tmp_path):
    file = tmp_path / "model.json"
    one_node = asked(parse(["--ranks", "8"]), "top2")
    assert set(one_node.model.exchange) == {"intra"}
    file.write_text(json.dumps(one_node.model.to_json()))
    status, said = run(["--cost-model", str(file), "--ranks", "16", "--out", str(tmp_path)], capsys)
    assert status == 2 and "--bandwidth" in said.err and "inter" in said.err
    status, said = run(["--cost-model", str(file), "--ranks", "8", "--out", str(tmp_path)], capsys)
    assert status == 0 and "plan.png" not in said.out and (tmp_path / "plan.json").exists()
    words = ["--cost-model", str(file), "--ranks", "16", "--bandwidth", "100gbit", "--latency", "5us"]
    assert asked(parse(words), "calibrated").model.exchange["inter"].alpha_s == 5e-6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"experts": 1}', "[" * 100_000, "\xff", " " * (1 << 20) + "{}"])
def test_files_that_are_no_cost_model(text, capsys, tmp_path):
    file = tmp_path / "model.json"
    file.write_text(text, encoding="latin-1")
    status, said = run(["--cost-model", str(file), "--out", str(tmp_path)], capsys)
    assert status == 2 and "--cost-model" in said.err and len(said.err.strip().splitlines()) == 1


def test_a_cost_model_in_which_nothing_takes_time(capsys, tmp_path):
    def zeros(value):
        if isinstance(value, dict):
            return {key: zeros(one) for key, one in value.items()}
        return [zeros(one) for one in value] if isinstance(value, list) else value if isinstance(value, str) else 0

    model = cost_model(OPTIONS, "top2", place(OPTIONS, ranks=64, bytes_per_s=1e9)).to_json()
    (tmp_path / "model.json").write_text(json.dumps(zeros(model) | {"slowdown": model["slowdown"]}))
    words = ["--cost-model", str(tmp_path / "model.json"), "--ranks", "1", "--ranks-per-node", "1"]
    status, said = run([*words, "--out", str(tmp_path / "out")], capsys)
    assert status == 2 and "takes time" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--leaf 4", "--leaf"),
        ("--backbone 1ms,1ms,1ms --sequence 1024", "--sequence"),
        ("--backbone 1ms,1ms,1ms --heads 8 --kv-heads 2", "--heads"),
        ("--layers 8 --phase infer --recompute on", "--recompute"),
        ("--layers 8 --phase infer --optimizer none", "--optimizer"),
    ],
)
def test_what_would_be_ignored_is_refused(words, option):
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert caught.value.field == option
    assert parse("--backbone 1ms,1ms,1ms --sequence 1024 --layers 8".split()).sequence == 1024


@pytest.mark.parametrize("words", ["--kind top2", "--flops 1tflops", "--launch 1us", "--compute-slowdown 1.5",
                                   "--ffn 4096", "--expert-ffn 512", "--matrices 2"])  # fmt: skip
def test_what_a_cost_model_says_is_not_asked_twice(words, capsys, tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(asked(OPTIONS, "top2").model.to_json()))
    status, said = run(["--cost-model", str(file), *words.split()], capsys)
    assert status == 2 and words.split()[0] in said.err


def test_memory_bound_experts_are_warned_about(capsys, tmp_path):
    words = ["--tokens", "128", "--experts", "1024", "--ranks", "16", "--out", str(tmp_path)]
    said = run(words, capsys)[1].out
    # 64 experts of 3 * 4096 * 8192 weights of 2 bytes at 2500 GB/s.
    assert "WARNING: reading a rank's expert weights takes 5.15 ms" in said
    assert "an expert's weights are read in 0.0805 ms" in said
    assert "WARNING" not in run(["--out", str(tmp_path)], capsys)[1].out


@pytest.mark.parametrize(("tokens", "warned"), [(70, True), (90, False)])
def test_the_warning_begins_where_reading_takes_as_long_as_computing(tokens, warned, capsys, tmp_path):
    """One expert a rank, which computes 2 T rows in one chunk: with an exchange of a second nothing is cut."""
    words = ["--tokens", str(tokens), "--phase", "infer", "--latency", "1s", "--launch", "0us", "--out", str(tmp_path)]
    matmul_s = 2 * tokens * (6 * 4096 * 8192 / 400e12 + 4 * 8192 / 2.5e12)
    assert (matmul_s < 3 * 4096 * 8192 * 2 / 2.5e12) == warned
    assert ("WARNING" in run(words, capsys)[1].out) == warned


def test_chunks_of_tokens_read_all_weights_each_and_expert_groups_their_own():
    options = replace(OPTIONS, ranks=4, ranks_per_node=1, experts=16, memory_bandwidth=1e10, tokens=256)
    at = place(options, ranks=4, bytes_per_s=1e9)
    cuts = {(one.chunks, one.by): one for one in shapes(options, "top2", at)}
    assert set(cuts) == {*((r, "tokens") for r in (1, 2, 4, 8, 16)), (2, "experts"), (4, "experts")}
    assert cuts[4, "tokens"].experts == (4,) * 4 and cuts[4, "experts"].experts == (1,) * 4
    forward = asked(options, "top2").phases[0]
    read_s = 4 * 3 * options.hidden * options.ffn * 2 / 1e10
    whole, by_tokens, by_experts = (
        sum(forward.window.chunking(*cut).experts_s) for cut in ((1, "tokens"), (4, "tokens"), (4, "experts"))
    )
    assert by_tokens - whole == pytest.approx(3 * read_s + 3 * options.launch)
    assert by_experts - whole == pytest.approx(3 * options.launch)
    assert forward.best.by == "experts" and forward.code.startswith("e")
    assert forward.of_chunks(4) == forward.of_chunks(4, "experts") < forward.of_chunks(4, "tokens")


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, said = run(["--out", str(tmp_path / "file")], capsys)
    assert status == 2 and "--out" in said.err and not said.out


def test_the_lanes_of_the_picture_are_the_simulated_schedule():
    for phase in asked(replace(OPTIONS, kind="scmoe_pos2"), "scmoe_pos2").phases:
        events = events_of(phase)
        assert max(event.end_s for event in events) == pytest.approx(phase.best.predicted_s)
        for lanes in (("comp", "wait"), ("wire",)):
            spans = sorted((event.start_s, event.end_s) for event in events if event.lane in lanes)
            assert all(end <= start + 1e-12 for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_rates_as_people_say_them():
    assert [rate_text(rate) for rate in (50e9, 1.25e8, 8e11, 4.6e6)] == [
        "400 Gbit/s", "1 Gbit/s", "6400 Gbit/s", "36.8 Mbit/s"
    ]  # fmt: skip


def test_experts_in_host_memory_are_answered_beforehand(tmp_path, capsys):
    """A copy takes 188.7 us at 50 GB/s, of which reading the weights is 3.8; a row 23.6 ns at 400 TFLOP/s, 6.6 to pack
    and unpack it at 2.5 TB/s, and 1.2 of a launch of 20 us."""
    words = "--ranks 1 --ranks-per-node 1 --experts 16 --hidden 2048 --ffn 768 --expert-offload 50GB --weights added"
    assert main(["plan", *words.split(), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "a copy hides from 5897 rows an expert on; here each has 1024" in text
    assert 'schedule="chunked(16,experts)", expert_offload="host"' in text and "0.0189 GB of experts" in text


def test_the_crossover_of_a_copy_is_one_of_rows_whoever_has_more_of_them(tmp_path):
    """A row takes as long on a rank that has twice as many, and where a layer without offload would send it once."""
    even = PlanOptions(ranks=2, ranks_per_node=2, experts=16, top_k=8, intra_bandwidth=2e9, expert_offload=50e9)
    crossover = offload_shape(even, asked(even, "top2")).crossover_rows
    launch_s = {"launch": 0.0}  # which a rank has once, for all of its rows
    for changes in ({"skew": 2.0}, {"dedup": "off"}, {"phase": "infer"}):
        options, same = replace(even, **changes, **launch_s), replace(even, **launch_s)
        found = offload_shape(options, asked(options, "top2"))
        assert found.crossover_rows == pytest.approx(offload_shape(same, asked(same, "top2")).crossover_rows)
        assert found.rows_per_expert == pytest.approx(8192 * changes.get("skew", 1.0))
    assert crossover < offload_shape(same, asked(same, "top2")).crossover_rows


def test_beside_experts_in_host_memory_nothing_is_forecast_that_a_layer_refuses(tmp_path, capsys):
    words = "--ranks 4 --ranks-per-node 2 --experts 16 --top-k 8 --skew 2 --bandwidth 1gbit --draws 0 --out"
    offload = [*words.split(), str(tmp_path), "--expert-offload", "50GB"]
    assert main(["plan", *offload]) == 0
    text = capsys.readouterr().out
    assert "all other times here are of experts on the device" in text
    text = text.replace("a layer has no deduplication and no copies", "")
    for word in ("dedup=", "--dedup", "dedup ms", "replica", "copies of wanted", "one row for", "wanted more"):
        assert word not in text, word
    for refused in (["--dedup", "on"], ["--dedup", "node"], ["--replica-slots", "1"]):
        assert main(["plan", *offload, *refused]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and refused[0] in error and "--expert-offload" in error


def test_a_routing_without_a_choice_has_nothing_that_hides_copies(tmp_path, capsys):
    path = tmp_path / "r.safetensors"
    save_file({"ids": torch.full((4, 1), -1, dtype=torch.int32), "weights": torch.ones(4, 1)}, str(path),
              metadata={"E": "8"})  # fmt: skip
    words = f"--routing {path} --experts 8 --top-k 1 --ranks 2 --ranks-per-node 2 --tokens 2 --expert-offload 50GB"
    assert main(["plan", *words.split(), "--draws", "0", "--out", str(tmp_path)]) == 0
    assert "here each has 0" in capsys.readouterr().out
