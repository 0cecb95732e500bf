"""What people have: machines, models, shares of a NIC, skew, narrower rows, own widths; and nothing to exchange."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.elsewhere import elsewhere
from moe_overlap.commands.plan.machine import (
    agreement_s,
    backbone_s,
    cost_model,
    expert_params,
    inter_rate,
    place,
    shapes,
)
from moe_overlap.commands.plan.options import KINDS, PlanOptions, parse
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.commands.plan.whole_model import whole_model
from moe_overlap.errors import ConfigError
from moe_overlap.planning.machines import MACHINES

DEEPSEEK = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def at(options):
    return place(options, ranks=options.ranks, bytes_per_s=options.bandwidth)


def config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_plans_and_its_figures_yield_to_those_given(name):
    options = parse(["--machine", name, "--experts", "64", "--tokens", "256", "--phase", "infer", "--flops", "3tflops"])
    assert options.flops == 3e12 and options.ranks_per_node == MACHINES[name].ranks_per_node
    assert options.memory == MACHINES[name].memory_bytes and options.weights == ("added" if name == "cpu" else "beside")
    one = asked(replace(options, ranks=8 * options.ranks_per_node if 8 * options.ranks_per_node <= 64 else 64), "top2")
    assert 0 < one.time_s <= one.serial_s


def test_a_config_of_shared_experts_says_all_sizes(tmp_path):
    options = parse(["--model", config(tmp_path, DEEPSEEK), "--ranks", "32"])
    assert (options.hidden, options.ffn, options.expert_width, options.shared_width) == (7168, 18432, 2048, 2048)
    assert (options.experts, options.top_k, options.kind, options.dtype) == (256, 9, "shared1", "bf16")
    assert (options.layers, options.counted_moe_layers, options.vocab) == (61, 58, 129280)


def test_a_config_without_shared_experts_and_options_that_overrule_it(tmp_path):
    options = parse(["--model", config(tmp_path, MIXTRAL), "--ranks", "8", "--top-k", "1", "--hidden", "2048"])
    assert (options.hidden, options.ffn, options.experts, options.top_k, options.kind) == (2048, 14336, 8, 1, None)
    assert options.kv_share == 0.25 and options.kinds == ("top2",)


QWEN = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip


def test_heads_of_a_size_of_their_own_make_attention_as_wide_as_they_are(tmp_path):
    """Qwen3-30B: 32 heads of 128 beside a hidden size of 2048."""
    options = parse(["--model", config(tmp_path, QWEN), "--tokens", "1024", "--sequence", "1024"])
    assert options.attention == 4096
    flops = 4 * (1 + 4 / 32) * 1024 * 2048 * 4096 + 2 * 1024 * 1024 * 4096
    assert backbone_s(options)[0] == pytest.approx(flops / options.flops)


def test_layers_beside_a_config_count_in_its_place(tmp_path):
    path = config(tmp_path, DEEPSEEK)
    assert parse(["--model", path, "--layers", "8"]).counted_moe_layers == 5
    assert parse(["--model", path, "--layers", "0"]).layers == 0
    with pytest.raises(ConfigError, match="--layers"):
        parse(["--model", path, "--layers", "3"])


@pytest.mark.parametrize(
    ("changes", "with_experts"),
    [
        ({"moe_layer_freq": [0, *[1] * 60]}, 61 - 1),  # as MiMo-V2
        ({"moe_layer_freq": [0, 1] * 31, "first_k_dense_replace": None}, 30),
        ({"first_k_dense_replace": 0, "mlp_only_layers": [0, 5]}, 59),  # as Qwen
        ({"first_k_dense_replace": 0, "decoder_sparse_step": 2, "moe_layer_freq": None, "num_hidden_layers": 60,
          "mlp_only_layers": [0, 5]}, 29),  # layer 0 has none anyway
    ],
)  # fmt: skip
def test_layers_with_experts_may_be_listed(changes, with_experts, tmp_path):
    assert parse(["--model", config(tmp_path, DEEPSEEK | changes)]).counted_moe_layers == with_experts


@pytest.mark.parametrize("pattern", [[1, 1], [2] * 61, [None] * 61, [[]] * 61])
def test_a_list_of_layers_that_is_none_is_one_line(pattern, tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        parse(["--model", config(tmp_path, DEEPSEEK | {"moe_layer_freq": pattern})])


@pytest.mark.parametrize("dtype", [[], {}, ["bfloat16"], 16, None, "int4"])
def test_a_dtype_that_is_none_of_ours_is_passed_over(dtype, tmp_path):
    options = parse(["--model", config(tmp_path, DEEPSEEK | {"torch_dtype": dtype})])
    assert options.dtype == "bf16" == PlanOptions.dtype


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"hidden_size": 64, "intermediate_size": 128}, "experts"),
        (MIXTRAL | {"num_local_experts": "eight"}, "num_local_experts"),
        ("[]", "object"),
        ("{", "config.json"),
    ],
)
def test_a_config_that_is_none(content, said, tmp_path, capsys):
    assert main(["plan", "--model", config(tmp_path, content)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error and said in error


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--machine h1000", "--machine"), ("--nic both", "--nic"), ("--nic node", "--nic"), ("--skew 0.5", "--skew"),
        ("--matrices 4", "--matrices"), ("--heads 8 --kv-heads 3", "--kv-heads"),
        ("--dispatch-dtype int4", "--dispatch"),
        ("--layers 7 --stages 2", "--stages"), ("--stages 2", "--stages"), ("--price 2", "--price"),
        ("--layers 4 --moe-layers 5", "--moe-layers"), ("--memory 80", "--memory"), ("--draws 100000", "--draws"),
        ("--measured /nowhere", "--measured"), ("--spine 0", "--spine"), ("--optimizer adam", "--optimizer"),
        ("--layers 4 --kind scmoe_pos1", "--moe-layers"),
        ("--tokens -1", "--tokens"), ("--tokens 0 --expert-offload 50GB", "--tokens"),
        ("--moe-layers 4", "--moe-layers"), ("--vocab 100", "--vocab"), ("--recompute on", "--recompute"),
        ("--micro-batches 4", "--micro-batches"), ("--optimizer whole", "--optimizer"), ("--memory 80GB", "--memory"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line(words, option, capsys, tmp_path):
    assert main(["plan", *words.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and option in said.err


def test_a_nic_of_the_node_is_shared_by_its_ranks():
    """Four cards on 25 Gbit/s have 6.25 each: what was 49 ms when typed as a rank's is a rate four times lower."""
    shared = PlanOptions(ranks=8, ranks_per_node=4, experts=8, bandwidth=3.125e9, nic="node")
    assert inter_rate(shared, at(shared)) == 3.125e9 / 4
    alone = replace(shared, nic="rank", bandwidth=3.125e9 / 4)
    assert asked(shared, "top2").serial_s == asked(alone, "top2").serial_s


def test_bytes_that_leave_the_first_switch_are_slower():
    options = PlanOptions(ranks=256, ranks_per_node=8, experts=256, spine=0.5, leaf=16, bandwidth=50e9)
    beyond = (32 - 16) / 31
    assert inter_rate(options, at(options)) == pytest.approx(50e9 / (1 - beyond + beyond / 0.5))
    few = replace(options, ranks=128)
    assert inter_rate(few, at(few)) == 50e9


def test_widths_matrices_and_heads_by_hand():
    options = PlanOptions(hidden=1024, ffn=4096, expert_ffn=512, shared_ffn=256, matrices=2, heads=16, kv_heads=4,
                          tokens=100, sequence=50, flops=1e12)  # fmt: skip
    assert expert_params(options) == 2 * 1024 * 512
    attention = (4 * 1.25 * 100 * 1024**2 + 2 * 100 * 50 * 1024) / 1e12
    expected = (attention, 6 * 100 * 1024 * 4096 / 1e12, attention, 6 * 100 * 1024 * 256 / 1e12)
    assert backbone_s(options) == pytest.approx(expected)


def test_ranks_that_do_not_divide_the_experts_wait_for_the_one_with_more():
    even, odd = PlanOptions(ranks=8, experts=16), PlanOptions(ranks=6, ranks_per_node=6, experts=16)
    assert [shapes(options, "top2", at(options))[0].rows[0] for options in (even, odd)] == [
        2 * 8192, -(-2 * 8192 * 3 * 6 // 16)]  # fmt: skip
    assert asked(odd, "top2").serial_s > asked(replace(odd, experts=18), "top2").serial_s


def test_skew_makes_the_busiest_rank_wait_longer_for_rows_and_wires():
    options = PlanOptions(ranks=8, experts=16, phase="infer")
    even, skewed = (shapes(one, "top2", at(one))[0] for one in (options, replace(options, skew=1.5)))
    assert skewed.rows[0] == 1.5 * even.rows[0]
    assert skewed.bytes_by_lane["intra"][0] == pytest.approx(1.5 * even.bytes_by_lane["intra"][0])


@pytest.mark.parametrize(
    "ranks, experts, top_k, most", [(1, 16, 2, 1.0), (2, 16, 2, 2.0), (4, 4, 2, 2.0), (4, 12, 4, 3.0)]
)
def test_no_rank_gets_more_rows_than_there_are(ranks, experts, top_k, most):
    """A token goes to different experts, so that a rank gets at most as many of its choices as it has experts."""
    options = PlanOptions(ranks=ranks, experts=experts, top_k=top_k)
    rows, skewed, beyond = (shapes(replace(options, skew=skew), "top2", at(options))[0].rows[0]
                            for skew in (1.0, most, 100.0))  # fmt: skip
    assert beyond == skewed == most * rows == ranks * options.tokens * min(experts // ranks, top_k)


@pytest.mark.parametrize("ranks, experts, top_k", [(8, 64, 8), (4, 12, 4), (16, 64, 4)])
def test_a_token_has_one_deduplicated_row_on_the_busiest_rank(ranks, experts, top_k):
    options = PlanOptions(ranks=ranks, experts=experts, top_k=top_k, skew=100.0, dedup="on")
    most = (ranks - 1) * options.tokens * options.hidden * options.dtype_bytes
    found = shapes(options, "top2", at(options), distinct=True)
    assert {shape.by for shape in found} >= {"tokens"}
    for shape in found:
        assert sum(map(sum, shape.bytes_by_lane.values())) == pytest.approx(most, rel=1e-3)
    nodes = replace(options, dedup="node", ranks=ranks, ranks_per_node=ranks // 2)
    for shape in shapes(nodes, "top2", at(nodes), distinct=True):
        assert sum(shape.bytes_by_lane["inter"]) <= most // (ranks - 1) * 1.001


def test_fp8_rows_are_narrower_on_their_way_to_the_experts_alone():
    options = PlanOptions(ranks=8, experts=16, hidden=4096, dispatch_dtype="fp8")
    shape = shapes(options, "top2", at(options))[0]
    assert shape.narrow_by_lane["intra"][0] / shape.bytes_by_lane["intra"][0] == pytest.approx((4096 + 128) / 8192)
    wide = asked(replace(options, dispatch_dtype="same"), "top2")
    one = asked(options, "top2")
    saved = [a.serial.predicted_s - b.serial.predicted_s for a, b in zip(wide.plain, one.plain, strict=True)]
    assert saved[0] > 0 and saved[1] == 0, "gradients are as wide as before"


def test_rows_for_nodes_cross_once():
    options = PlanOptions(ranks=32, experts=256, top_k=8, dedup="node", tokens=1000)
    shape = shapes(options, "top2", at(options), distinct=True)[0]
    nodes = shape.bytes_by_lane["inter"][0] / shape.row_bytes / 1000
    assert nodes == pytest.approx(3 * (1 - 0.75**8), rel=0.01), "of 3 other nodes, each is missed by 8 of 256 experts"
    plain = shapes(options, "top2", at(options))[0]
    assert shape.bytes_by_lane["inter"][0] < plain.bytes_by_lane["inter"][0] / 2


# ---------------------------------------------------------------- faults of the machine model that there were

DECODE = PlanOptions(phase="infer", ranks=8, experts=256, top_k=8, hidden=7168, ffn=2048, tokens=1,
                     intra_bandwidth=160e9, backbone=(0.0, 0.0, 0.0), dedup="off")  # fmt: skip


def test_decode_reads_the_experts_that_are_hit():
    """8 tokens of 8 ranks hit at most 8 of a rank's 32 experts: 0.28 ms of reading where it was 1.13."""
    one = asked(DECODE, "top2")
    shape = shapes(DECODE, "top2", at(DECODE))[0]
    assert shape.experts == (8,) and 0.3e-3 < one.time_s < 0.5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["beside", "added"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 4096])
@pytest.mark.parametrize("phase", ["infer", "train"])
def test_where_nothing_is_exchanged_nothing_is_gained(kind, weights, tokens, phase):
    options = PlanOptions(ranks=1, experts=4, tokens=tokens, phase=phase, kind=kind, weights=weights)
    one = asked(options, kind)
    assert one.speedup == pytest.approx(1.0, abs=1e-12) and one.comm_share == pytest.approx(0.0, abs=1e-12)
    assert one.bound_s <= one.time_s * (1 + 1e-12) and one.phases[0].best.chunks == 1


def test_chunks_without_tokens_take_no_time_in_the_window():
    options = PlanOptions(ranks=8, experts=16, tokens=1)
    at_8, model = at(options), cost_model(options, "top2", at(options))
    shape = shapes(options, "top2", at_8)[4]  # one token in 16 chunks: 15 of them are empty
    assert shape.chunks == 16 and sum(shape.rows) == 2 and sum(n > 0 for n in shape.experts) == 1
    assert model.exchange_s({"intra": 0}) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dedup", ["auto", "on", "off", "node"])
@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("phase", ["infer", "train"])
def test_a_step_without_tokens_is_its_agreement(kind, dedup, ranks, phase):
    options = PlanOptions(ranks=ranks, tokens=0, kind=kind, dedup=dedup, phase=phase)
    one = asked(options, kind)
    assert one.time_s == one.serial_s == agreement_s(options, at(options)) and one.speedup == 1.0
    assert one.comm_share == 0.0 and not one.deduplicated and {phase.name for phase in one.phases} == {"serial"}


@pytest.mark.parametrize("words", ["", "--ranks 1", "--machine h100x8 --layers 8 --price 2 --ranks 8", "--phase infer"])
def test_the_command_without_tokens_says_what_an_idle_rank_waits_for(words, capsys, tmp_path):
    assert main(["plan", "--tokens", "0", *words.split(), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "No rank has a token" in said and "takes as long as theirs" in said and "1.00x serial" in said
    assert "What else would give" not in said and "How sure" not in said and "nan" not in said
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["options"]["tokens"] == 0 and {one["speedup_vs_serial"] for one in record["point"]} == {1.0}
    assert not (tmp_path / "plan.png").exists()


def test_ops_of_few_tokens_read_their_weights():
    """One token: attention, MLP, head and experts are bound by memory, and with no other cost that is the step."""
    free = dict.fromkeys(("launch", "issue", "latency", "message"), 0.0)
    options = PlanOptions(ranks=8, experts=16, tokens=1, phase="infer", layers=4, vocab=1000, dedup="off", **free)
    attention_s, mlp_s, _, _ = backbone_s(options)
    assert attention_s == 4 * 4096**2 * 2 / options.memory_bandwidth
    assert mlp_s == 3 * 4096 * 8192 * 2 / options.memory_bandwidth
    whole = whole_model(options, asked(options, "top2"))
    weights_s = (whole.held["weights"] - 2 * 4096 * 1000) / options.memory_bandwidth  # not the embedding
    assert whole.step_s == pytest.approx(weights_s, rel=0.001)
    many = replace(options, tokens=8192)
    assert backbone_s(many)[1] == 6 * 8192 * 4096 * 8192 / options.flops


def test_one_token_makes_no_two_batches():
    options = PlanOptions(ranks=8, experts=16, tokens=1, phase="infer")
    for tokens, expected in ((1, {"serial"}), (2, {"serial", "two batches interleaved, at best"})):
        other = replace(options, tokens=tokens)
        assert {one.what for one in elsewhere(other, asked(other, "top2"))} == expected


def test_weights_beside_matmuls_leave_chunks_their_gain():
    """Mixtral on one node: with the reading added to every chunk it was serial."""
    options = PlanOptions(ranks=8, experts=8, top_k=2, tokens=2048, hidden=4096, ffn=14336, phase="infer",
                          intra_bandwidth=160e9, flops=600e12, backbone=(0.0, 0.0, 0.0), compute_slowdown=1.0,
                          wire_slowdown=1.0, dedup="off")  # fmt: skip
    one = asked(options, "top2")
    hidden = (one.serial_s - one.time_s) / (one.serial_s - one.compute_s)
    assert not one.phases[0].best.joined and hidden > 0.3
    assert asked(replace(options, weights="added"), "top2").speedup < one.speedup


# ---------------------------------------------------------------- how it starts


def test_a_plan_is_made_without_torch_and_matplotlib():
    code = """
import sys
from moe_overlap.commands.plan.command import main
from moe_overlap.commands.plan.options import parse
from moe_overlap.commands.plan.sweep import asked
asked(parse(["--machine", "h100x8"]), "top2")
sys.exit(" ".join(name for name in ("torch", "matplotlib", "pandas", "scipy") if name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
