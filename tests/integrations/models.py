"""Tiny models of transformers with random weights, and what a training step of one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

disable_progress_bar()
set_verbosity_error()
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "attn_implementation": "eager",
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LENGTH = 12
MODELS = {"qwen3_moe": Qwen3MoeForCausalLM, "gpt_oss": GptOssForCausalLM}


def config_of(family: str) -> Any:
    if family == "gpt_oss":
        return GptOssConfig(num_local_experts=4, **SMALL)
    return Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, norm_topk_prob=True, **SMALL)


def model_of(family: str, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    config = config_of(family)
    config._experts_implementation = implementation
    model = MODELS[family](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25)
    return model.train()


def batch(rank: int) -> torch.Tensor:
    """int64 [2, LENGTH], another one for each rank."""
    return torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(10 + rank))


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the whole gradients, collective where a model is spread over ranks."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def save(model: Any, folder: str | Path) -> None:
    model.save_pretrained(folder)
