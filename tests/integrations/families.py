"""The experts classes of transformers' families, small and with random weights."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch

D, F, E, K, T = 24, 16, 8, 2, 40

# module of transformers.models, class: one for each row of the table in docs/transformers.md and each form of experts.
FAMILIES = {
    "afmoe": "AfmoeExperts",
    "aria": "AriaExperts",
    "beam": "BeamExperts",
    "cohere2_moe": "Cohere2MoeExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v4": "DeepseekV4Experts",
    "dots1": "Dots1Experts",
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "flex_olmo": "FlexOlmoExperts",
    "gemma4": "Gemma4TextExperts",
    "glm4_moe": "Glm4MoeExperts",
    "gpt_oss": "GptOssExperts",
    "granitemoe": "GraniteMoeExperts",
    "hunyuan_v1_moe": "HunYuanMoEV1Experts",
    "hy_v4": "HYV4Experts",
    "inkling2": "Inkling2Experts",
    "jamba": "JambaExperts",
    "lfm2_moe": "Lfm2MoeExperts",
    "minimax": "MiniMaxExperts",
    "minimax_m2": "MiniMaxM2Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "mistral4": "Mistral4Experts",
    "mixtral": "MixtralExperts",
    "nemotron_h": "NemotronHExperts",
    "olmoe": "OlmoeExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "phimoe": "PhimoeExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_5_moe": "Qwen3_5MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next": "Qwen3NextExperts",
    "solar_open": "SolarOpenExperts",
}
REFUSED = {"muse_spark": ("MuseSparkExperts", "norm"), "llama4": ("Llama4TextExperts", "interface"),
           "dbrx": ("DbrxExperts", "interface"), "longcat_flash": ("LongcatFlashExperts", "interface"),
           "jetmoe": ("JetMoeParallelExperts", "interface")}  # fmt: skip

# By the names that the families have for them.
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "ffn_hidden_size"), D),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size"), F),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k"), K),
    **dict.fromkeys(("post_norm_eps", "rms_norm_eps"), 1e-6),
    "hidden_activation": "gelu_pytorch_tanh", "moe_latent_size": None, "zero_expert_num": 2, "swiglu_limit": 1.5,
    "swiglu_alpha": 1.702, "mlp_gate_softcap": 2.0, "mlp_up_softcap": 3.0, "ffn_act_fn": {"name": "silu"},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {"nemotron_h": {"mlp_hidden_act": "relu2"}}


def experts_of(family: str, name: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> torch.nn.Module:
    """An experts module whose activations reach their limits, with weights that the seed gives."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(model_type=family, _experts_implementation="eager", **(SIZES | OWN.get(family, {})))
    made: Any = getattr(module, name)
    arguments = (E, D, F) if name == "JetMoeParallelExperts" else (config,)
    experts = made(*arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 * 1.5)
    return experts.to(dtype)


def tokens(dtype: torch.dtype = torch.float32, *, count: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], ids [T, K], weights [T, K], and with them a slot that is unused."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, D, generator=generator)
    ids = torch.rand(count, E, generator=generator).argsort(dim=1)[:, :K]
    weights = torch.rand(count, K, generator=generator)
    return x.to(dtype), ids, weights.to(dtype)


def gradients(
    experts: torch.nn.Module, run: Any, dtype: torch.dtype, *, drawn: torch.dtype | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, torch.Tensor]:  # fmt: skip
    """y, dx, dweights and every parameter's gradient of one call of `run(x, ids, weights)`, in float64.

    drawn: inputs are rounded to it first. part: (rank, ranks), of whose tokens."""
    rank, ranks = part
    pull = torch.randn(T, D, generator=torch.Generator().manual_seed(9)).tensor_split(ranks)[rank]
    x, ids, weights = (value.tensor_split(ranks)[rank] for value in tokens(drawn or dtype))
    x, weights = x.to(dtype).clone().requires_grad_(), weights.to(dtype).clone().requires_grad_()
    experts.zero_grad()
    y = run(x, ids, weights)
    (y * pull.to(drawn or dtype).to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {name: value.double() for name, value in found.items()}


def error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """max |a - b| / max |b| of each."""
    assert got.keys() == want.keys()
    return {name: ((got[name] - want[name]).abs().max() / want[name].abs().max()).item() for name in want}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """|a - b| / |b| of each, in the Euclidean norm."""
    return {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}
