"""Whose weight is this: which parameters are experts of this rank, and which ranks hold others, or the same ones.

A layer marks the module that has its experts. The parameters are looked up there when the question is asked, by
identity: whatever wraps, shards, parametrizes or copies a model makes new parameters or new names, and the answer does
not grow old. A parameter that stands in no such module can be marked by itself (`mark_parameter`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.parallel.replicas import Replicas
from moe_overlap.transport.base import Transport

# Modules whose parameters are experts. Weak: a mark lives as long as its module.
REPLACED = "_moe_overlap_replaced"
"""An attribute of expert parameters that a migration has put others in the place of."""

_marked: weakref.WeakKeyDictionary[nn.Module, Ownership] = weakref.WeakKeyDictionary()
_ATTRIBUTE = "_moe_overlap_ownership"


@dataclass(eq=False, kw_only=True)
class Ownership:
    """What the experts of one layer are to the ranks of a job; layers with tied experts share it.

    transport: over the ranks that share the layer's experts out among them; expert_ids: those held here, in the order
    of the weights; num_experts: of the whole layer; in_order: whether all ranks hold equal parts, in the order of the
    ranks, which a state dict of the whole asks for; replicas: the ranks that hold the same ones, None where this rank
    alone does; mesh: the DeviceMesh (replicas, experts) that the layer was made with, if it was.

    Gradients of experts are, by definition, those of the sum over all ranks of the ranks' losses, or of the mean where
    `mean` is set: `grad_scale` is what backward multiplies them by for that. `prepared`: the caller has said which.
    `accumulate_fp32`: half-precision gradients are kept in float32 until a step.
    """

    transport: Transport
    expert_ids: tuple[int, ...]
    num_experts: int
    in_order: bool = True
    replicas: Replicas | None = None
    mean: bool = False
    prepared: bool = False
    accumulate_fp32: bool = False
    mesh: Any = None
    shown_on: dict[tuple[str, bool], Any] = field(default_factory=dict)  # meshes of state dicts (state.py)

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """Global ranks that hold the layer's experts, in order; this one among them."""
        return self.transport.global_ranks

    @property
    def others(self) -> frozenset[int]:
        """Global ranks that hold other experts of the layer."""
        return frozenset(self.expert_ranks) - {self.expert_ranks[self.transport.rank]}

    @property
    def num_replicas(self) -> int:
        return 1 if self.replicas is None else self.replicas.count

    @property
    def grad_scale(self) -> float:
        """Rows of this layer's own ranks are summed by its exchanges; `Replicas` makes the mean of the replicas."""
        return 1.0 / self.transport.world_size if self.mean else float(self.num_replicas)

    @property
    def ranks_reached(self) -> int:
        """How many ranks an expert's gradient comes from."""
        return self.transport.world_size * self.num_replicas

    def holds_like(self, other: Ownership) -> bool:
        """Whether the experts of both are the same ones on the same ranks."""
        alike = (self.expert_ids, self.expert_ranks) == (other.expert_ids, other.expert_ranks)
        return alike and self.replicas is other.replicas

    def __getstate__(self) -> dict[str, Any]:
        """Raises ConfigError where one rank is not the layer: pickled, a part would look like the whole."""
        if self.others or self.replicas is not None:
            held = f"a layer with experts {self.expert_ids} of {self.num_experts}, on one rank of several"
            raise ConfigError("torch.save", held, "its state_dict(), by torch.distributed.checkpoint.save on all ranks")
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, object]) -> Ownership:
        return replace(self)


def mark(module: nn.Module, ownership: Ownership) -> None:
    """All parameters and buffers that `module` has, now or later, are experts of this rank."""
    _marked[module] = ownership


def ownership_of(module: nn.Module) -> Ownership | None:
    """The mark of a module; None where it has none."""
    return _marked.get(module)


def mark_parameter(parameter: nn.Parameter, ownership: Ownership) -> None:
    """`parameter`, which stands in no marked module, holds or adapts experts of this rank."""
    setattr(parameter, _ATTRIBUTE, ownership)


def marked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Ownership]]:
    """The marked modules of `model`, in its order, and their names."""
    for name, module in model.named_modules():
        ownership = _marked.get(module)
        if ownership is not None:
            yield name, module, ownership


def owned_tensors(model: nn.Module) -> dict[torch.Tensor, Ownership]:
    """The parameters and buffers of `model` that are experts of this rank, in its order."""
    found: dict[torch.Tensor, Ownership] = {}
    for _, module, ownership in marked_modules(model):
        found.update(dict.fromkeys((*module.parameters(), *module.buffers()), ownership))
    for parameter in model.parameters():
        ownership_ = getattr(parameter, _ATTRIBUTE, None)
        if ownership_ is not None:
            found.setdefault(parameter, ownership_)
    return found


def owners(parameters: Iterable[torch.Tensor]) -> dict[torch.Tensor, Ownership]:
    """Those of `parameters` that are experts of this rank, in the order given; no model is needed for it."""
    by_identity: dict[int, Ownership] = {}
    for module, ownership in list(_marked.items()):
        by_identity.update((id(parameter), ownership) for parameter in module.parameters())
    found = {}
    for parameter in parameters:
        owner = by_identity.get(id(parameter), getattr(parameter, _ATTRIBUTE, None))
        if owner is not None:
            found[parameter] = owner
    return found


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
            "fully_shard(..., ignored_params=set(layer.experts.parameters())), or a mesh of ranks that hold the same "
            "experts",
        )
