"""The state that an optimizer keeps of experts says which experts they are, as the model's does (`state.py`).

Two hooks of the optimizer: what `state_dict()` shows, and what `load_state_dict` takes. They are there from its first
step on, which torch's own `get_optimizer_state_dict` and `set_optimizer_state_dict` make of a new one, or from the
functions here on. What a new optimizer loads before that is looked at when it steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from moe_overlap.parallel.ownership import Ownership, owners
from moe_overlap.parallel.state import IDS, alone, refused, shown, taken

Found = Callable[[str, torch.Tensor, torch.Tensor, Ownership], torch.Tensor]


def optimizer_state_dict(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> dict[str, Any]:
    """The state of `optimizer` by the names of the parameters of `model`, flat, for torch.distributed.checkpoint:
    tensors of experts are DTensors of all experts, as in `model.state_dict()`. On every rank; nothing is sent.

    As torch's function it makes a step of an optimizer that has no state yet, with gradients of zero and a learning
    rate of zero.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    with _attended(optimizer):
        return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], state: dict[str, Any]
) -> None:
    """Load what `optimizer_state_dict` has given, here or on another number of ranks, and torch.distributed.checkpoint
    has filled; or the same with whole tensors [E, ...]. Raises ConfigError for parts that are another rank's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    with _attended(optimizer):
        set_optimizer_state_dict(model, optimizer, dict(state), options=options)


_attending: WeakSet[Optimizer] = WeakSet()


def attended(experts: nn.Module) -> list[Optimizer]:
    """The optimizers that keep a state of these experts, of those that have stepped, or whose state was saved here."""
    found = [one for one in _attending if any(parameter in one.state for parameter in experts.parameters())]
    return sorted(found, key=id)


def attend(optimizer: Optimizer, owned: dict[torch.Tensor, Ownership]) -> None:
    """Before a step, or before states are saved or loaded: the hooks are there, and the state is this rank's.

    Raises ConfigError for a state that is another rank's, from a file, before it has changed a weight.
    """
    spread = {parameter: owner for parameter, owner in owned.items() if owner.others and parameter.dim()}
    if not spread:
        return
    _attending.add(optimizer)
    if _show not in optimizer._optimizer_state_dict_post_hooks.values():
        optimizer.register_state_dict_post_hook(_show)
        optimizer.register_load_state_dict_pre_hook(_take)
    for parameter, owner in spread.items():
        state = optimizer.state[parameter] if parameter in optimizer.state else {}
        mesh = getattr(parameter, "device_mesh", None)
        whole = (parameter.shape[0] // max(1, len(owner.expert_ids)) * owner.num_experts, *parameter.shape[1:])
        may_be_whole = 0 < len(owner.expert_ids) < owner.num_experts  # else that is the shape of this rank's own
        for key, value in state.items():
            other_mesh = getattr(value, "device_mesh", mesh) != mesh
            if hasattr(value, IDS) or other_mesh or (may_be_whole and getattr(value, "shape", None) == whole):
                state[key] = _taken(f"the optimizer's {key}", value, parameter, owner)


@contextmanager
def _attended(optimizers: Optimizer | Iterable[Optimizer]) -> Iterator[None]:
    """Torch's functions give a new optimizer gradients of zero in the dtype of the parameters, where another one may be
    asked for (findings/first_state_and_grad_dtype.sh)."""
    asked = []
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        attend(optimizer, owners(parameters))
        asked += [(p, p.grad_dtype) for p in parameters if getattr(p, "grad_dtype", p.dtype) not in (p.dtype, None)]
    asked = [(parameter, dtype) for parameter, dtype in asked if parameter.grad is None]
    for parameter, _ in asked:
        parameter.grad_dtype = None  # any
    try:
        yield
    finally:
        for parameter, dtype in asked:
            parameter.grad_dtype = dtype


def _show(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return _with(optimizer, state_dict, _shown)


def _take(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return _with(optimizer, state_dict, _taken)


def _with(optimizer: Optimizer, state_dict: dict[str, Any], found: Found) -> dict[str, Any]:
    """`state_dict` with other tensors for experts. Its keys, numbers or names, stand for parameters by their place."""
    states = dict(state_dict["state"])
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        owned = owners(group["params"])
        for parameter, key in zip(group["params"], packed["params"], strict=False):
            owner = owned.get(parameter)
            if owner is not None and owner.others and parameter.dim() and key in states:
                states[key] = {
                    name: found(f"{name} of {key}", value, parameter, owner)
                    if isinstance(value, torch.Tensor) and value.dim()
                    else value
                    for name, value in states[key].items()
                }
    return {**state_dict, "state": states}


def _shown(name: str, value: torch.Tensor, parameter: torch.Tensor, owner: Ownership) -> torch.Tensor:
    """Tensors with a row for each expert as those of the model; others, of whatever form, for this rank alone."""
    if value.shape[0] == parameter.shape[0]:
        return shown(name, value, owner)
    return refused(value.view_as(value), owner.expert_ids)


def _taken(name: str, value: torch.Tensor, parameter: torch.Tensor, owner: Ownership) -> torch.Tensor:
    target = parameter
    if value.shape[1:] != parameter.shape[1:]:  # a mean over columns, for instance
        target = torch.empty(parameter.shape[0], *value.shape[1:], device="meta")
    return alone(taken(name, value, target, owner))
