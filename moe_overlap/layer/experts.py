"""The experts of one rank: their weights, what they compute, and how they start."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from moe_overlap import ops
from moe_overlap.agreement.copies import gathered
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import check_positive
from moe_overlap.ops.activation_kinds import check_activation, is_gated
from moe_overlap.ops.devices import check_device
from moe_overlap.parallel.ownership import Ownership, refuse_sharded
from moe_overlap.schedule.dispatch import Dispatcher

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """Feed-forward experts with stacked weights, in Hugging Face's layout: down(act(up(x))).

    num_experts: E of the whole layer; expert_ids: which of them are held here, in the order of the weights (None: all).
    Parameters: gate_up_proj [e, 2F, D] ("swiglu", gate above up) or up_proj [e, F, D] (without a gate), down_proj
    [e, D, F], with e = len(expert_ids).

    forward(x_RD, offs) computes rows that are sorted by expert. A MoELayer does not call it: it reads the weights (as
    attributes, once in a call) and `activation`, and computes chunk by chunk what forward computes at once. So what
    changes the attributes acts, parametrizations do, and what acts in a call of this module does not: hooks, pruning,
    wrappers of its forward. A layer whose experts have forward hooks says so in a warning.
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
        check_activation("activation", activation)
        check_device(device)
        ids = tuple(range(num_experts)) if expert_ids is None else _checked_ids(expert_ids, num_experts)
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
        """Normal weights of std fan_in ** -0.5. One number comes from torch's generator of the CPU, on every rank
        alike; each expert of the layer has its own generator, seeded from it, so that any number of ranks starts alike
        and a rank pays for the experts that it holds. Weights on the meta device stay: call it after `to_empty`.

        Raises ConfigError for parametrized weights, which are computed and cannot be written.
        """
        if parametrize.is_parametrized(self):
            raise ConfigError("experts", "parametrized weights", "reset_parameters() before a parametrization")
        weights = weights_of(self)
        if weights[0].is_meta:
            return
        with _disable_current_modes():  # a fake mode has no number to give
            seed = int(torch.randint(1 << 62, (), device="cpu"))
        with torch.no_grad():
            whole = [_whole(weight) for weight in weights]
            generator = torch.Generator(whole[0].device)
            for at, expert in enumerate(self.expert_ids):
                for number, weight in enumerate(whole):
                    generator.manual_seed(seed + len(whole) * expert + number)
                    weight[at].normal_(std=weight.shape[2] ** -0.5, generator=generator)
            for weight, values in zip(weights, whole, strict=True):
                if weight is not values:
                    weight.copy_(_as_sharded(values, weight))

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
            held = self._parameters.get(name)
            if hasattr(held, "device_mesh") and isinstance(value, nn.Parameter) and not hasattr(value, "device_mesh"):
                gathered(held, value)
        super().__setattr__(name, value)


def w_in_name(activation: str) -> str:
    """The name of the first weight."""
    return "gate_up_proj" if is_gated(activation) else "up_proj"


def w_in_rows(activation: str, ffn_hidden_size: int) -> int:
    """F', the rows of an expert's first weight: 2F with a gate, F without."""
    return ffn_hidden_size * (2 if is_gated(activation) else 1)


def weights_of(experts: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up_proj or up_proj, down_proj) of a module with the attributes of `Experts`, each read once."""
    return getattr(experts, w_in_name(experts.activation)), experts.down_proj  # type: ignore[arg-type, return-value]


def homes_held(ownership: Ownership, dispatcher: Dispatcher) -> int:
    """How many experts are at home on this rank. Raises ConfigError where they are others than the placement says: a
    layer that shares its experts with one that was migrated alone."""
    held = ownership.expert_ids
    if not torch.compiler.is_compiling() and dispatcher.placement.world_size > 1:
        homes = dispatcher.seats.homes[dispatcher.transport.rank]
        if held != homes:
            raise ConfigError("experts", f"{held}, here since another layer with them was migrated", f"{homes}, where "
                              "this layer's placement has them: migrate() a model with both layers")  # fmt: skip
    return len(held)


def check_weights(
    w_in: torch.Tensor, w_out: torch.Tensor, activation: str, *, count: int, hidden: int, ffn: int
) -> None:
    """Raises ConfigError unless the weights of `count` experts have the shapes of this layer, and one dtype."""
    shapes = ((count, w_in_rows(activation, ffn), hidden), (count, hidden, ffn))
    for name, weight, shape in zip((w_in_name(activation), "down_proj"), (w_in, w_out), shapes, strict=True):
        if tuple(weight.shape) != shape:
            raise ConfigError(name, tuple(weight.shape), f"{shape}, the experts of this rank")
    if (w_in.dtype, w_in.device) != (w_out.dtype, w_out.device):
        raise ConfigError("down_proj", f"{w_out.dtype} on {w_out.device}", f"{w_in.dtype} on {w_in.device}")


def reset(module: nn.Module | None) -> None:
    """Have a part of a layer reset itself, or each of its parts. Raises ConfigError where one has values and cannot."""
    if module is None:
        return
    own = getattr(module, "reset_parameters", None)
    if own is not None:
        own()
        return
    if any(value is not None for value in (*module._parameters.values(), *module._buffers.values())):
        raise ConfigError(
            type(module).__name__, "no reset_parameters()", "a module that can reset what it holds itself"
        )
    for part in module.children():
        reset(part)


def warn_of_hooks(experts: nn.Module) -> None:
    """A layer does not call its experts, so what their forward hooks would do does not happen."""
    if experts._forward_pre_hooks or experts._forward_hooks:
        text = "the experts have forward hooks (pruning and older weight norms are such), which a MoELayer never calls"
        warnings.warn(f"{text}: use torch.nn.utils.parametrize instead", stacklevel=2)


def old_name(name: str) -> str:
    """What an expert weight was called before the experts were a module, when the layer itself held it."""
    return re.sub(rf"(^|\.)experts\.({'|'.join(WEIGHTS)})\b", r"\1\2", name)


def take_old_names(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: the expert weights of `layer` by the names they have now (see `old_name`)."""
    for name in WEIGHTS:
        old, new = f"{prefix}{name}", f"{prefix}experts.{name}"
        if old in state_dict and new not in state_dict and name not in layer._parameters:
            state_dict[new] = state_dict.pop(old)


def _checked_ids(given: Sequence[int], num_experts: int) -> tuple[int, ...]:
    expected = f"different experts from 0 to {num_experts - 1}"
    if not isinstance(given, Iterable):
        raise ConfigError("expert_ids", given, expected)
    ids = tuple(given)
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if not whole or len(set(ids)) != len(ids) or not set(ids) <= set(range(num_experts)):
        raise ConfigError("expert_ids", ids, expected)
    return ids


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself; for a DTensor a plain tensor of its whole shape."""
    if not hasattr(weight, "device_mesh"):
        return weight
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _as_sharded(values: torch.Tensor, weight: Any) -> torch.Tensor:
    """`values`, which every rank of the mesh has alike, as `weight` is sharded; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)
