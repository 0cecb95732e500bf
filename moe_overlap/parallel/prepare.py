"""What a model needs to be told before it is wrapped or trained, and its parameters by owner."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_overlap.errors import ConfigError
from moe_overlap.parallel import ddp
from moe_overlap.parallel.optimizers import guard_optimizers
from moe_overlap.parallel.ownership import marked_modules, owned_tensors, refuse_sharded

M = TypeVar("M", bound=nn.Module)
GRADIENTS = ("mean", "sum")


def prepare(model: M, *, gradients: Literal["mean", "sum"] | None = None, accumulate_fp32: bool = False) -> M:
    """Make `model` ready for data parallelism; returns it. The last step before DistributedDataParallel, which is given
    this very module; before or after fully_shard; again after parametrizations and adapters came to the experts.

    gradients: what an expert's gradient is, over all ranks: of the "mean" of the ranks' losses, which is what DDP and
    FSDP2 make of all other gradients, or of their "sum"; None: as an earlier call has said, else the mean.
    accumulate_fp32: gradients of bfloat16 and float16 experts are kept in float32 over micro-batches, and rounded once
    when an optimizer steps (plain tensors; FSDP2 has a policy of its own).

    DDP is told to leave experts alone that lie spread over ranks. New parameters of experts that have replicas are
    reduced over them. On one rank nothing of this is needed, and nothing happens.

    Raises ConfigError for a model that DDP has already wrapped: its experts are overwritten.
    """
    if gradients not in (None, *GRADIENTS):
        raise ConfigError("gradients", gradients, f"None or one of {GRADIENTS}")
    guard_optimizers()
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError("model", "a DistributedDataParallel module", f"{ddp.RECIPE}; {ddp.RELOAD}")
    for path, module, ownership in marked_modules(model):
        ownership.transport.call_it(path.rpartition(".")[0] or "the whole model")
        for name, parameter in module.named_parameters():
            refuse_sharded(f"experts.{name}", parameter, ownership.others)
        if gradients is not None or not ownership.prepared:
            ownership.mean, ownership.prepared = gradients != "sum", True
        ownership.accumulate_fp32 |= accumulate_fp32
    for tensor, owner in owned_tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            if owner.replicas is not None:
                owner.replicas.watch([tensor], owner.expert_ids)
            if owner.accumulate_fp32:
                _accumulate_fp32(tensor)
    ddp.ignore(model, _left_alone(model))
    return model


def ignore_experts_for_ddp(model: nn.Module) -> list[str]:
    """The old name of `prepare`; returns the names of the experts that DDP is to ignore."""
    warnings.warn("use moe_overlap.prepare(model)", DeprecationWarning, stacklevel=2)
    prepare(model)
    return ddp.ignore(model, _left_alone(model))


def reopen(model: nn.Module) -> None:
    """Make the layers of `model` usable again after an error between ranks: their transports, and what reduces their
    experts over replicas. Collective: all ranks of the job call it."""
    replicas = {}
    for _, _, ownership in marked_modules(model):
        ownership.transport.reopen()
        if ownership.replicas is not None:
            replicas[id(ownership.replicas)] = ownership.replicas
    for one in replicas.values():
        one.reopen()


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backwards in here leave the gradients of experts with replicas to a later one, as DDP's `no_sync` does with its
    own (which the layers follow by themselves). For micro-batches but the last; the result is the same without it."""
    watched = [(owner.replicas, module) for _, module, owner in marked_modules(model) if owner.replicas]
    for replicas, module in watched:
        replicas.synchronise(module.parameters(), False)
    try:
        yield
    finally:
        for replicas, module in watched:
            replicas.synchronise(module.parameters(), True)


def param_groups(
    model: nn.Module, *, expert: dict[str, Any] | None = None, dense: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the dense parameters of `model` with the options `dense`, its experts with `expert`
    (learning rate, weight decay and what else the optimizer knows). Those without requires_grad are left out.

    Kinds of tensors that an optimizer cannot step together (DTensors of one mesh, plain ones) are groups of their own.
    """
    owned = owned_tensors(model)
    groups: dict[tuple[bool, object], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_expert = parameter in owned
            key = (is_expert, getattr(parameter, "device_mesh", None))
            group = groups.setdefault(key, {"params": [], **((expert if is_expert else dense) or {})})
            group["params"].append(parameter)
    return list(groups.values())


def _left_alone(model: nn.Module) -> list[torch.Tensor]:
    """What DDP is to leave alone: experts that ranks share out among them, or that the layer itself reduces."""
    return [tensor for tensor, owner in owned_tensors(model).items() if owner.others or owner.replicas is not None]


def _accumulate_fp32(parameter: nn.Parameter) -> None:
    """Gradients of a half-precision parameter stay float32 until a step (see `optimizers.py`)."""
    if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
        if hasattr(parameter, "device_mesh"):
            raise NotImplementedError(
                "accumulate_fp32 for sharded experts: mp_policy=MixedPrecisionPolicy(reduce_dtype=)"
            )
        if not hasattr(parameter, "grad_dtype"):
            raise NotImplementedError("accumulate_fp32 before torch 2.10, whose tensors have no grad_dtype")
        grad, parameter.grad = parameter.grad, None
        parameter.grad_dtype = torch.float32
        parameter.grad = None if grad is None else grad.float()
