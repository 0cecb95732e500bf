"""The arguments of routers, checked: a user's mistake is a ConfigError."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.routing.balance import LEVELS

SCORES = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = (None, "max", "top2_sum")
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BAD_LOGITS = ("raise", "drop")


def check_count(name: str, value: object) -> None:
    """Raises ConfigError for what is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(name, value, "an integer of at least 1")


def check_sizes(hidden_size: int, num_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1) -> None:
    """Raises ConfigError for sizes that do not go together."""
    sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "n_group": n_group, "topk_group": topk_group}
    for name, value in sizes.items():
        check_count(name, value)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ConfigError("top_k", top_k, f"an integer from 1 to num_experts ({num_experts})")
    if not 1 <= top_k <= num_experts:
        raise ConfigError("top_k", top_k, f"an integer from 1 to num_experts ({num_experts})")
    if n_group < 1 or num_experts % n_group:
        raise ConfigError("n_group", n_group, f"a positive divisor of num_experts ({num_experts})")
    if not 1 <= topk_group <= n_group:
        raise ConfigError("topk_group", topk_group, f"an integer from 1 to n_group ({n_group})")
    if topk_group * (num_experts // n_group) < top_k:
        raise ConfigError("topk_group", topk_group, f"groups with at least top_k ({top_k}) experts together")


def check_words(score: str, bad_logits: str, balance: str = "micro") -> None:
    """Raises ConfigError for a score, a policy or a level of balance that does not exist."""
    if score not in SCORES:
        raise ConfigError("score", score, f"one of {', '.join(SCORES)}")
    if bad_logits not in BAD_LOGITS:
        raise ConfigError("bad_logits", bad_logits, f"one of {', '.join(BAD_LOGITS)}")
    if balance not in LEVELS:
        raise ConfigError("balance", balance, f"one of {', '.join(LEVELS)}")


def check_scale(scale: float) -> None:
    if not is_finite(scale):
        raise ConfigError("scale", scale, "a finite number")


def check_coefficients(**values: float) -> None:
    """Raises ConfigError for a factor of a loss that is below 0 or no finite number."""
    for name, value in values.items():
        if not (is_finite(value) and value >= 0):
            raise ConfigError(name, value, "a finite number of at least 0")


def check_capacity_factor(capacity_factor: float | None) -> None:
    if capacity_factor is not None and not (is_finite(capacity_factor) and capacity_factor > 0):
        raise ConfigError("capacity_factor", capacity_factor, "None or a finite number above 0")


def check_eval_capacity_factor(factor: object) -> None:
    if factor is not None and factor != "same" and not (is_finite(factor) and factor > 0):
        raise ConfigError("eval_capacity_factor", factor, '"same", None or a finite number above 0')


def check_zero_experts(zero_experts: object, n_group: int = 1) -> None:
    if isinstance(zero_experts, bool) or not isinstance(zero_experts, int) or zero_experts < 0:
        raise ConfigError("zero_experts", zero_experts, "an integer of at least 0")
    if zero_experts and n_group > 1:
        raise ConfigError("n_group", n_group, "1 beside zero-computation experts, which belong to no group")


def check_shaping(
    softcap: object, renormalize_eps: object, renormalize_p: object, *, renormalize: bool, expert_scale: bool,
    variable_k: bool,
) -> None:  # fmt: skip
    """Raises ConfigError for options of logits and weights that do not fit, or not together."""
    if softcap is not None and not (is_finite(softcap) and softcap > 0):
        raise ConfigError("softcap", softcap, "None or a finite number above 0")
    if not (is_finite(renormalize_eps) and renormalize_eps >= 0):
        raise ConfigError("renormalize_eps", renormalize_eps, "a finite number of at least 0")
    if not (is_finite(renormalize_p) and renormalize_p >= 1):
        raise ConfigError("renormalize_p", renormalize_p, "a finite number of at least 1")
    for name, value, default in (("renormalize_eps", renormalize_eps, 0.0), ("renormalize_p", renormalize_p, 1.0)):
        if value != default and not renormalize:
            raise ConfigError(name, value, f"{default:g} without renormalize=True")
    none_beside = {"renormalize_eps": renormalize_eps, "expert_scale": expert_scale,
                   "renormalize_p": renormalize_p != 1}  # fmt: skip
    for name, given in none_beside.items():
        if given and variable_k:
            raise ConfigError(name, given, "none beside variable_k, which makes weights of its own")


def check_selection(group_score: object, logits_dtype: object) -> None:
    """Raises ConfigError for a rule of groups that does not exist, or a dtype that logits cannot have."""
    if group_score not in GROUP_SCORES:
        raise ConfigError("group_score", group_score, 'None, "max" or "top2_sum"')
    if logits_dtype is not None and logits_dtype not in LOGITS_DTYPES:
        raise ConfigError("logits_dtype", logits_dtype, f"None or one of {LOGITS_DTYPES}")


def check_tokens(x_TD: torch.Tensor, hidden_size: int, device: torch.device) -> None:
    """Raises ConfigError unless x is floating [T, D] on the router's device."""
    if x_TD.dim() != 2 or x_TD.shape[-1] != hidden_size:
        raise ConfigError("x.shape", tuple(x_TD.shape), f"[tokens, {hidden_size}]")
    if not x_TD.is_floating_point():
        raise ConfigError("x.dtype", x_TD.dtype, "a floating-point dtype")
    if x_TD.device != device:
        raise ConfigError("x.device", str(x_TD.device), f"the router's device, {device}")


def is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
