"""What people ask besides: the whole model, whether it fits, how sure it is, what else would give, other libraries."""

from dataclasses import replace

import pytest

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.alternatives import alternatives
from moe_overlap.commands.plan.elsewhere import elsewhere
from moe_overlap.commands.plan.machine import backbone_s
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.commands.plan.uncertainty import certainty
from moe_overlap.commands.plan.whole_model import fit_line, whole_model
from moe_overlap.planning.interleaved import interleaved_s
from moe_overlap.planning.window import Slowdown

SMALL = PlanOptions(ranks=8, experts=8, hidden=1024, ffn=2048, tokens=1024, machine="h100x8", layers=8, moe_layers=4,
                    vocab=1000, memory=80e9, dedup="off")  # fmt: skip


def test_a_model_of_pairs_is_so_many_pairs_and_its_head():
    one = asked(SMALL, "top2")
    whole = whole_model(SMALL, one)
    head_s = 3 * 2 * 1024 * 1024 * 1000 / SMALL.flops
    assert whole.layers_s == pytest.approx(4 * one.time_s + head_s)
    assert whole.step_s == pytest.approx(whole.layers_s + whole.reduce_s) and whole.bubble_s == 0
    assert whole.tokens_per_s == pytest.approx(8 * 1024 / whole.step_s)


def test_experts_in_every_layer_take_the_dense_layers_out():
    every = replace(SMALL, layers=4)
    one = asked(every, "top2")
    attention_s, mlp_s = backbone_s(SMALL)[:2]
    pairs_s = whole_model(SMALL, one).layers_s
    assert whole_model(every, one).layers_s == pytest.approx(pairs_s - 4 * 3 * (attention_s + mlp_s))


def test_pipeline_micro_batches_and_money():
    one = asked(SMALL, "top2")
    plain = whole_model(SMALL, one)
    piped = whole_model(replace(SMALL, stages=4, micro_batches=8, price=3.0), one)
    stage_s = plain.layers_s / 4
    assert piped.bubble_s == pytest.approx(3 * stage_s) and piped.layers_s == pytest.approx(8 * stage_s)
    assert piped.reduce_s == pytest.approx(plain.reduce_s / 4)
    assert piped.money == pytest.approx(3.0 * 32 / 3600 / piped.tokens_per_s * 1e6)
    assert 0 < piped.mfu < 1 and plain.money is None


def test_weights_and_optimizer_by_hand():
    whole = whole_model(SMALL, asked(SMALL, "top2"))
    attention, mlp, expert = 4 * 1024**2, 3 * 1024 * 2048, 3 * 1024 * 2048
    dense = 8 * attention + 4 * mlp + 4 * 1024 * 8 + 2 * 1000 * 1024
    assert whole.held["weights"] == 2 * (dense + 4 * expert) == whole.held["gradients"]
    assert whole.held["optimizer"] == 12 * (dense / 8 + 4 * expert)
    again = whole_model(replace(SMALL, recompute="on", optimizer="whole"), asked(SMALL, "top2"))
    assert again.held["optimizer"] == 12 * (dense + 4 * expert)
    assert again.held["activations"] < whole.held["activations"] and again.layers_s > whole.layers_s


def test_what_does_not_fit_says_so_first(capsys, tmp_path):
    words = "--machine h100x8 --ranks 8 --experts 64 --layers 60 --hidden 7168 --ffn 8192".split()
    assert main(["plan", *words, "--out", str(tmp_path), "--draws", "0"]) == 0
    assert capsys.readouterr().out.startswith("DOES NOT FIT: ")
    whole = whole_model(SMALL, asked(SMALL, "top2"))
    assert fit_line(SMALL, whole).startswith("It fits: ")
    assert fit_line(replace(SMALL, memory=0.0), whole) == ""


def test_certainty_is_the_same_each_time_and_ordered():
    options = replace(SMALL, ranks=16, experts=16, bandwidth=25e9)
    one = asked(options, "top2")
    found = certainty(options, one, draws=30)
    assert found == certainty(options, one, draws=30)
    assert 1 <= found.p10 <= found.p50 <= found.p90 and found.p10 < found.p90 and 0 < found.stays <= 1
    alone = replace(options, ranks=1)
    nothing = certainty(alone, asked(alone, "top2"), draws=5)
    assert (nothing.p10, nothing.p90, nothing.stays) == (pytest.approx(1), pytest.approx(1), 1.0)


def test_64_of_72_ranks_a_rack_are_faster():
    options = PlanOptions(ranks=576, ranks_per_node=72, experts=64, top_k=9, kind="shared1", hidden=7168, ffn=2048,
                          flops=1800e12, memory_bandwidth=7e12, intra_bandwidth=900e9)  # fmt: skip
    one = asked(options, "shared1")
    found = {other.what: other for other in alternatives(options, one)}
    racks = found["64 ranks of each node's 72"]
    assert racks.seconds < one.time_s / 2
    direct = asked(replace(options, ranks=512, ranks_per_node=64), "shared1")
    assert racks.seconds == direct.time_s


def test_alternatives_are_questions_of_their_own():
    options = PlanOptions(ranks=32, experts=256, top_k=8, hidden=4096, ffn=1024, skew=1.5, dedup="off")
    one = asked(options, "top2")
    found = {other.what.split(" (")[0]: other for other in alternatives(options, one)}
    none = found["no expert parallelism: all experts on every rank, all-reduced"]
    assert none.weights == 256 * 3 * 4096 * 1024 * 2 and none.seconds < one.time_s
    assert found["one row for each"].seconds < one.time_s
    assert found["fp8 rows to the experts"].seconds < one.time_s
    assert found["replicas of wanted experts that even the load out"].seconds < one.time_s
    assert {"groups of 16 ranks", "groups of 64 ranks"} <= set(found)


def test_other_libraries_send_a_row_for_every_choice():
    plain = PlanOptions(ranks=8, experts=64, top_k=8, dedup="off")
    saving = replace(plain, dedup="on")
    by_name = [
        {(one.library, one.what.split(" (")[0]): one.seconds for one in elsewhere(options, asked(options, "top2"))}
        for options in (plain, saving)
    ]
    assert asked(saving, "top2").time_s < asked(plain, "top2").time_s
    assert by_name[0] == pytest.approx(by_name[1])


def test_experts_in_host_memory_are_not_on_the_card():
    host = replace(SMALL, expert_offload=50e9)
    resident, held = (whole_model(options, asked(options, "top2")).held for options in (SMALL, host))
    expert = 3 * 1024 * 2048
    assert resident["weights"] - held["weights"] == 2 * 4 * expert
    assert 0 < held["groups of experts"] <= 2 * 2 * expert * 2


def test_other_libraries_have_serial_or_a_schedule_of_theirs():
    options = PlanOptions(ranks=32, experts=64, top_k=3)
    train = asked(options, "shared1")
    found = elsewhere(options, train)
    assert {one.library for one in found} == {"Megatron-LM", "DeepSpeed", "Tutel"}
    by_what = {(one.library, one.what.split(" ")[0]): one.seconds for one in found}
    assert by_what["DeepSpeed", "serial"] == train.serial_s > by_what["Megatron-LM", "shared"] >= train.time_s
    infer = replace(options, phase="infer")
    assert {one.library for one in elsewhere(infer, asked(infer, "top2"))} == {"vLLM", "SGLang"}
    assert elsewhere(options, asked(options, "scmoe_pos2")) == []


@pytest.mark.parametrize(
    ("compute_s", "wire_s", "expected"), [(2.0, 1.0, 2.4), (1.0, 2.0, 2.25), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_two_micro_batches_side_by_side(compute_s, wire_s, expected):
    slowdown = Slowdown(compute=1.5, wire=1.2)
    assert interleaved_s(compute_s, wire_s, slowdown) == pytest.approx(expected)
