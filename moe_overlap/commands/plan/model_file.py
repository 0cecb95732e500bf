"""The sizes of a model from the config.json that Hugging Face keeps beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular

FLAG = "--model"
MOST_BYTES = 1 << 20
# What models call the same thing; the first name that a config has counts.
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "moe_top_k")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")
EVERY = ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
DENSE = "mlp_only_layers"  # of Qwen: those without experts, beside decoder_sparse_step
# Of latent attention (MLA); configs and options have the same names.
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def model_figures(path: str, *, layers: int | None = None) -> dict[str, Any]:
    """Fields of `PlanOptions`, by name. A model with shared experts has kind shared1, whose top_k counts the shared one
    too. layers: so many in the place of the config's; 0: nothing about a whole model. Raises ConfigError("--model") for
    a file that is no config, or one without experts, ConfigError("--layers") for too few to have some."""
    config = _config(path)
    experts, top_k = (_count(path, config, names) for names in (EXPERTS, TOP_K))
    if experts is None or top_k is None:
        expected = f"a config of a model with experts: one of {', '.join(EXPERTS)}, and one of {', '.join(TOP_K)}"
        raise ConfigError(FLAG, path, expected)
    hidden, width = (_count(path, config, names) for names in (("hidden_size", "d_model"), EXPERT_WIDTH))
    if hidden is None or width is None:
        raise ConfigError(FLAG, path, f"a config with hidden_size and one of {', '.join(EXPERT_WIDTH)}")
    dense = _count(path, config, ("intermediate_size", "ffn_hidden_size"))
    shared_count, shared_width = _count(path, config, SHARED_COUNT), _count(path, config, SHARED_WIDTH)
    found: dict[str, Any] = {
        "hidden": hidden, "ffn": dense or width, "expert_ffn": width, "experts": experts, "top_k": top_k,
    }  # fmt: skip
    if shared_count or shared_width:
        shared = shared_width or width * (shared_count or 1)
        found |= {"kind": "shared1", "top_k": top_k + 1, "shared_ffn": shared}
    heads = _count(path, config, ("num_attention_heads",))
    if heads:
        found |= {"heads": heads} | _attention(path, config, heads)
    if layers is None:
        layers = _count(path, config, ("num_hidden_layers", "num_layers"))
    if layers and layers > 0:
        found |= {"layers": layers, "moe_layers": _with_experts(path, config, layers)}
        found["vocab"] = _count(path, config, ("vocab_size",)) or 0
    dtype = config.get("torch_dtype", config.get("dtype"))
    return found | ({"dtype": DTYPES[dtype]} if isinstance(dtype, str) and dtype in DTYPES else {})


def _with_experts(path: str, config: Mapping[str, Any], layers: int) -> int:
    """How many of the first `layers` layers have experts: by a list of 0 and 1 for each where the config has one, else
    by every how many, but for those that it begins with and those that it names as dense."""
    pattern = next((config[name] for name in EVERY if isinstance(config.get(name), list)), None)
    if pattern is not None:
        if len(pattern) < layers or not all(one in (0, 1) for one in pattern):
            raise ConfigError(FLAG, path, f"a layer's 0 or 1 for each of {layers} layers in {', '.join(EVERY)}")
        if not any(pattern[:layers]):
            raise ConfigError("--layers", layers, f"as many as {path} has up to the first with experts")
        return sum(map(int, pattern[:layers]))
    every, first = _count(path, config, EVERY) or 1, _count(path, config, DENSE_FIRST) or 0
    if layers <= first:
        raise ConfigError("--layers", layers, f"more than the {first} without experts that {path} begins with")
    named = config.get(DENSE)
    dense = {one for one in named if isinstance(one, int) and first <= one < layers} if isinstance(named, list) else ()
    found = -(-(layers - first) // every) - sum((one + 1) % every == 0 for one in dense)
    if found < 1:
        raise ConfigError(
            FLAG, path, f"a config of a model with experts: {DENSE} names all layers that could have some"
        )
    return found


def _attention(path: str, config: Mapping[str, Any], heads: int) -> dict[str, int]:
    """The widths of latent attention where the config has them, else those of grouped queries."""
    widths = {name: _count(path, config, (name,)) or 0 for name in LATENT}
    if widths["kv_lora_rank"]:
        missing = [name for name in ("qk_nope_head_dim", "v_head_dim") if not widths[name]]
        if missing:
            raise ConfigError(FLAG, path, f"a config with {missing[0]} of at least 1 beside kv_lora_rank")
        return widths
    size = _count(path, config, ("head_dim",))
    kv_heads = _count(path, config, ("num_key_value_heads",)) or heads
    return {"kv_heads": kv_heads} | ({"attention_width": heads * size} if size else {})


def _config(path: str) -> Mapping[str, Any]:
    """The file's object; of a model of several parts, the text's."""
    try:
        config = json.loads(read_regular(Path(path), most_bytes=MOST_BYTES))
    except OSError as error:
        raise ConfigError(FLAG, path, f"a file that can be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError(FLAG, path, "a config.json of a Hugging Face model") from None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if not isinstance(config, dict):
        raise ConfigError(FLAG, path, "a config.json of a Hugging Face model: an object")
    return config


def _count(path: str, config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The value of the first of these names that the config has; None where it has none of them."""
    for name in names:
        value = config.get(name)
        if value is None or isinstance(value, list) or value is False:  # a pattern by layer: no count
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(FLAG, path, f"{name} an integer of at least 0, got {value!r}")
        return value
    return None
