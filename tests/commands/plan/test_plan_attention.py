"""Latent attention (MLA) in `moe-overlap plan`: configs of DeepSeek and Kimi against what their authors say."""

import json
from dataclasses import replace

import pytest

from moe_overlap.commands.cli import main
from moe_overlap.commands.plan.machine import backbone_s
from moe_overlap.commands.plan.options import PlanOptions, parse
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.commands.plan.whole_model import parameters, whole_model
from moe_overlap.planning.attention import grouped_query, latent

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = MLA | {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "vocab_size": 129280, "head_dim": 64,
}  # fmt: skip
V2 = V3 | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "num_hidden_layers": 60, "first_k_dense_replace": 1,
    "vocab_size": 102400,
}  # fmt: skip
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
}  # fmt: skip
KIMI_K2 = V3 | {
    "n_routed_experts": 384, "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
    "vocab_size": 163840,
}  # fmt: skip
# Billions, total and active: arXiv 2412.19437, 2405.04434 (V2 and V2-Lite), 2507.20534 (32 by its model card).
SAID = {"V3": (V3, 671, 37), "V2": (V2, 236, 21), "V2-Lite": (V2_LITE, 15.7, 2.4), "Kimi-K2": (KIMI_K2, 1040, 32)}


def options_of(config, tmp_path, *words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return parse(["--model", str(path), "--ranks", "16", "--tokens", "512", *words])


@pytest.mark.parametrize("name", SAID)
def test_parameters_are_those_that_the_authors_say(name, tmp_path):
    config, total, active = SAID[name]
    options = options_of(config, tmp_path)
    found = parameters(options, asked(options, "shared1"))
    assert found.total / 1e9 == pytest.approx(total, rel=0.015)
    assert found.active / 1e9 == pytest.approx(active, rel=0.025)  # said in two digits


def test_attention_of_deepseek_v3_by_hand():
    options = PlanOptions(hidden=7168, heads=128, q_lora_rank=1536, tokens=8192, sequence=4096, **MLA)
    weights = 7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168
    assert options.attention_block.params == weights
    core = 2 * 8192 * 4096 * 128 * (192 + 128) / 2  # queries by keys, then values; causal
    assert backbone_s(options)[0] == pytest.approx((2 * 8192 * weights + core) / options.flops)
    direct = replace(options, q_lora_rank=0)
    assert direct.attention_block.params - weights == 7168 * 128 * 192 - 1536 * (7168 + 128 * 192)


def test_a_latent_as_wide_as_its_heads_and_without_turning_parts_is_nearly_grouped():
    """What is left are the products that make keys and values of the latent."""
    wide = latent(hidden=64, heads=4, q_lora_rank=0, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=0,
                  v_head_dim=16)  # fmt: skip
    plain = grouped_query(hidden=64, width=64, kv_share=1.0)
    assert wide.params == plain.params + 64 * 64 and wide.core == plain.core
    assert wide.cached == plain.cached / 2 and wide.saved == plain.saved + 64


def test_what_is_cached_and_saved_is_the_latent(tmp_path):
    options = options_of(V3, tmp_path, "--phase", "infer")
    held = whole_model(options, asked(options, "shared1")).held
    assert held["keys and values"] == 576 * 512 * 61 * 2
    train = options_of(V3, tmp_path, "--kind", "top2", "--top-k", "8")
    again = replace(
        train, kv_heads=128, kv_lora_rank=0, q_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0
    )
    latent_bytes, plain_bytes = (whole_model(one, asked(one, "top2")).held["activations"] for one in (train, again))
    saved = 1536 + 576 + 2 * 128 * 192 + 2 * 128 * 128 - 4 * 7168
    assert latent_bytes - plain_bytes == 61 * 512 * 2 * saved


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--qk-nope-head-dim 128", "--qk-nope-head-dim = 128: expected --kv-lora-rank"),
        ("--kv-lora-rank 512", "--qk-nope-head-dim = 0"),
        ("--kv-lora-rank -1", "--kv-lora-rank = -1"),
        ("--kv-lora-rank 512 --qk-nope-head-dim 8 --v-head-dim 8 --attention-width 64", "--attention-width = 64"),
        ("--kv-lora-rank 512 --qk-nope-head-dim 8 --v-head-dim 8 --heads 4 --kv-heads 2", "--kv-heads = 2"),
    ],
)
def test_widths_that_do_not_go_together_are_one_line(words, said, capsys):
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_a_config_with_half_of_the_widths_is_one_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in V3.items() if key != "v_head_dim"}))
    assert main(["plan", "--model", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error and "v_head_dim" in error


def test_an_option_asks_for_another_attention_than_the_config_has(tmp_path):
    """What the config says of the one that it has is not held against the other."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V3))
    grouped = parse(["--model", str(path), "--kv-lora-rank", "0"])
    assert grouped.q_lora_rank == grouped.v_head_dim == 0
    assert grouped.attention_block == grouped_query(hidden=V3["hidden_size"], width=V3["hidden_size"], kv_share=1.0)
    path.write_text(json.dumps({key: value for key, value in V3.items() if key not in MLA | {"q_lora_rank": 0}}
                               | {"head_dim": 64, "num_key_value_heads": 8}))  # fmt: skip
    words = ["--kv-lora-rank", "512", "--qk-nope-head-dim", "128", "--v-head-dim", "128"]
    assert parse(["--model", str(path), *words]).attention_block.cached == 512
