"""The experts of one rank: their weights, what they compute, and how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import check_positive
from moe_overlap.schedule.dispatch import ACTIVATIONS

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """Feed-forward experts with stacked weights, in Hugging Face's layout: down(act(up(x))).

    num_experts: E of the whole layer; expert_ids: which of them are held here, in the order of the weights (None: all).
    Parameters: gate_up_proj [e, 2F, D] ("swiglu", gate above up) or up_proj [e, F, D] ("gelu", "relu"), down_proj
    [e, D, F], with e = len(expert_ids).

    forward(x_RD, offs) computes rows that are sorted by expert. A MoELayer does not call it: it reads the weights (as
    attributes, once per forward, so that parametrizations and adapters act) and `activation`, and computes chunk by
    chunk what forward computes at once.
    """

    # Global ranks that hold other experts of the same layer: a weight sharded over one of them is refused.
    held_apart_from: frozenset[int] = frozenset()

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        *,
        expert_ids: Sequence[int] | None = None,
        activation: str = "swiglu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, num_experts=num_experts)
        if activation not in ACTIVATIONS:
            raise ConfigError("activation", activation, f"one of {ACTIVATIONS}")
        ids = tuple(range(num_experts)) if expert_ids is None else tuple(expert_ids)
        if len(set(ids)) != len(ids) or not set(ids) <= set(range(num_experts)):
            raise ConfigError("expert_ids", ids, f"different experts from 0 to {num_experts - 1}")
        self.hidden_size, self.ffn_hidden_size, self.num_experts = hidden_size, ffn_hidden_size, num_experts
        self.expert_ids = ids
        self.activation = activation
        rows = w_in_rows(activation, ffn_hidden_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        w_in = nn.Parameter(torch.empty(len(ids), rows, hidden_size, **factory))
        self.register_parameter(w_in_name(activation), w_in)
        self.down_proj = nn.Parameter(torch.empty(len(ids), hidden_size, ffn_hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of std fan_in ** -0.5. Every expert of the layer is drawn in turn and those held here are
        kept, so that any number of ranks starts alike. Weights on the meta device stay: call it after `to_empty`."""
        w_in, w_out = (_local(weight) for weight in weights_of(self))
        if w_in.is_meta:
            return
        place = {expert: at for at, expert in enumerate(self.expert_ids)}
        with torch.no_grad():
            for expert in range(self.num_experts):
                for weight in (w_in, w_out):
                    drawn = torch.empty(weight.shape[1:], device=weight.device, dtype=weight.dtype)
                    drawn.normal_(std=weight.shape[2] ** -0.5)
                    if expert in place:
                        weight[place[expert]].copy_(drawn)

    def forward(self, x_RD: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """x_RD: [R, D], rows sorted by expert. offs: int32 [e], inclusive ends (of `ops.row_map`). -> y_RD [R, D], rows
        from offs[-1] on zero. Raises ConfigError for what does not fit."""
        w_in, w_out = weights_of(self)
        return ops.expert_mlp(x_RD, w_in, w_out, offs, kind=self.activation)

    def extra_repr(self) -> str:
        held = f"{len(self.expert_ids)} of {self.num_experts}"
        sizes = f"hidden={self.hidden_size}, ffn={self.ffn_hidden_size}"
        return f"{held}, {sizes}, activation={self.activation}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WEIGHTS:
            refuse_sharded(name, value, self.held_apart_from)
        super().__setattr__(name, value)


def w_in_name(activation: str) -> str:
    """The name of the first weight."""
    return "gate_up_proj" if activation == "swiglu" else "up_proj"


def w_in_rows(activation: str, ffn_hidden_size: int) -> int:
    """F', the rows of an expert's first weight: 2F with a gate, F without."""
    return ffn_hidden_size * (2 if activation == "swiglu" else 1)


def weights_of(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up_proj or up_proj, down_proj) of a module with the attributes of `Experts`, each read once."""
    return getattr(experts, w_in_name(experts.activation)), experts.down_proj  # type: ignore[arg-type, return-value]


def old_name(name: str) -> str:
    """What an expert weight was called before the experts were a module, when the layer itself held it."""
    return name.replace(".experts.", ".")


def take_old_names(state_dict: dict[str, Any], prefix: str) -> None:
    """Enter the expert weights of a layer under `prefix` by the names they have now (see `old_name`)."""
    for name in WEIGHTS:
        if f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}experts.{name}"] = state_dict.pop(f"{prefix}{name}")


def refuse_sharded(name: str, value: object, ranks: frozenset[int]) -> None:
    """Raises ConfigError for an expert weight that is sharded over `ranks`, which hold other experts.

    Every rank of the layer's group has its own experts; FSDP over these ranks would mix them, and silently.
    """
    mesh = getattr(value, "device_mesh", None)
    others = set() if mesh is None else ranks & set(mesh.mesh.reshape(-1).tolist())
    if others:
        raise ConfigError(
            name,
            f"sharded over rank(s) {sorted(others)}, which hold other experts of this layer",
            "fully_shard(..., ignored_params=set(layer.expert_weights)), or a mesh of ranks that hold the same experts",
        )


def _local(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself; of a DTensor the part of this rank."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
