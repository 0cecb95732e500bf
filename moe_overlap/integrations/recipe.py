"""What an experts module of transformers computes, in the words of this library; nothing here imports transformers.

Such a module says how its weights lie (`has_gate`, `has_bias`, `is_transposed`, put there by transformers' decorator)
and has its activation as code: `act_fn`, or `_apply_gate` of a row [gate | up]. Which activation that is, is found by
its values, and what no known form has is registered as it is. Two things are rewritten for the operators:

- weights [E, D, F'] are read as transposed views;
- expert biases become columns: a row gets a 1, the first weight the bias beside it; the activation gets a 1 for the
  second (`with_ones_kind`). Any schedule and any number of ranks can then run them, for a copy of the weights in a call
  and ONES more columns on the wire; and a bias is added before the matmul's result is rounded.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.record import DTYPES
from moe_overlap.errors import ConfigError
from moe_overlap.ops import activation_kinds as kinds

FLAGS = ("has_gate", "has_bias", "is_transposed")
CLOSE = 1e-6
"""Relative: activations that compute in float32 whatever they are given are still the known forms."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """activation: a name; first: the parameter of the first matmul; transposed: weights are [E, D, F'], [E, F, D];
    biased: there are `<weight>_bias` [E, F'] and [E, D]."""

    activation: str
    first: str
    transposed: bool
    biased: bool

    def arguments(self, experts: Any, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
        """(x, w_in, w_out, activation) of `moe_forward`. With biases x and its result have ONES columns more."""
        w_in, w_out = getattr(experts, self.first), experts.down_proj
        if self.transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        if not self.biased:
            return x_TD, w_in, w_out, self.activation
        b_in, b_out = getattr(experts, f"{self.first}_bias"), experts.down_proj_bias
        beside = kinds.ONES * (1 + kinds.is_gated(self.activation))
        w_in = nn.functional.pad(torch.cat([w_in, b_in[:, :, None]], dim=2), (0, kinds.ONES - 1, 0, beside))
        w_out = nn.functional.pad(torch.cat([w_out, b_out[:, :, None]], dim=2), (0, kinds.ONES - 1, 0, kinds.ONES))
        x_TD = torch.cat([x_TD, _unit(x_TD)], dim=1)
        return x_TD, w_in, w_out, kinds.with_ones_kind(self.activation)


def recipe_of(experts: nn.Module) -> Recipe:
    """Raises ConfigError naming the family and why this library cannot run it; nothing is changed."""
    if not all(hasattr(experts, flag) for flag in FLAGS):
        raise refusal(experts, "experts with transformers' experts interface (@use_experts_implementation)")
    if getattr(experts, "has_post_expert_norm", False):
        raise refusal(experts, "experts whose results are summed as they are, without a norm of each")
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    weights = [first, "down_proj"]
    expected = weights + [f"{name}_bias" for name in weights] if experts.has_bias else weights
    _check_plain(experts, expected)
    recipe = Recipe(activation=activation_of(experts), first=first, transposed=bool(experts.is_transposed),
                    biased=bool(experts.has_bias))  # fmt: skip
    return recipe


def refusal(experts: nn.Module, expected: str) -> ConfigError:
    """The error for experts that cannot be expressed."""
    family = getattr(getattr(experts, "config", None), "model_type", None)
    name = type(experts).__name__
    return ConfigError("experts", name if family is None else f"{name} of {family}", expected)


def _check_plain(experts: nn.Module, expected: list[str]) -> None:
    """Raises ConfigError for quantised experts, and for weights beside those that are read."""
    for name in expected:
        weight = getattr(experts, name, None)
        if not isinstance(weight, torch.Tensor):
            raise refusal(experts, f"experts with {', '.join(expected)}")
        if weight.dtype not in DTYPES:
            raise refusal(experts, f"experts that are not quantised: {name} is {weight.dtype}")
        if not name.endswith("_bias") and weight.dim() != 3:
            raise refusal(experts, f"experts that are stacked: {name} is {tuple(weight.shape)}")
    beside = sorted({*experts._parameters, *experts._buffers} - set(expected))
    if beside:
        raise refusal(experts, f"no weights beside {', '.join(expected)}, such as scales: there is {', '.join(beside)}")


def activation_of(experts: nn.Module) -> str:
    """The name of what stands between the two matmuls. Raises ConfigError."""
    act = getattr(experts, "act_fn", None)
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        raise refusal(experts, f"an activation without weights of its own, not {type(act).__name__}")
    # Without the weights, so that what is registered keeps none of them alive.
    shell: Any = object.__new__(type(experts))
    plain = {key: value for key, value in experts.__dict__.items() if not key.startswith("_") and key != "forward"}
    shell.__dict__.update(plain, _parameters={}, _buffers={}, _modules=experts._modules)
    f = shell._apply_gate if experts.has_gate else shell.act_fn
    generator = torch.Generator().manual_seed(0)
    h = 6 * torch.randn(64, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        want = f(h)
        for kind in _candidates(experts):
            got = kinds.function_of(kind).forward(h)
            if got.shape == want.shape and (got - want).abs().max() <= CLOSE * want.abs().max():
                return kind
    said = zlib.crc32(str([f"{value:.4g}" for value in want.flatten().tolist()]).encode())
    name = f"{type(experts).__name__} {said:08x}"
    if kinds.is_activation(name):
        return name
    try:
        return kinds.register_activation(name, f, gated=bool(experts.has_gate))
    except ConfigError as error:
        raise refusal(experts, f"an activation of known form, or a function of a row: {error}") from error


def _candidates(experts: nn.Module) -> list[str]:
    """Names of the same width that it may be, by what the module says of itself."""
    if not experts.has_gate:
        return ["gelu", "relu", "relu2"]
    known = ["swiglu", "geglu", "geglu_tanh"]
    limit = _number(experts, "limit", "swiglu_limit")
    alpha = _number(experts, "alpha", "swiglu_alpha")
    if limit is not None and limit > 0:
        known.append(kinds.swiglu_kind(limit=limit))
        if alpha is not None:
            known += [kinds.swiglu_kind(limit=limit, alpha=alpha, offset=1.0, interleaved=turns)
                      for turns in (False, True)]  # fmt: skip
    act = getattr(experts, "act_fn", None)
    caps = [getattr(getattr(act, f"{part}_softcap", None), "softcap", None) for part in ("gate", "up")]
    numbers = [float(cap) for cap in caps if isinstance(cap, (int, float))]
    if len(numbers) == 2:
        known.append(kinds.softcapped_swiglu_kind(gate_cap=numbers[0], up_cap=numbers[1]))
    return known


def _number(experts: nn.Module, *names: str) -> float | None:
    found = next((getattr(experts, name) for name in names if hasattr(experts, name)), None)
    return float(found) if isinstance(found, (int, float)) else None


def _unit(x_TD: torch.Tensor) -> torch.Tensor:
    """[T, ONES]: 1, 0, 0, ..."""
    unit = x_TD.new_zeros(x_TD.shape[0], kinds.ONES)
    unit[:, 0] = 1
    return unit
