"""Before an optimizer steps: what it must not do to experts, and what it needs done to their gradients.

A hook that torch runs before every step of every optimizer: the last moment before a mistake has changed a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from moe_overlap.agreement.copies import count_steps
from moe_overlap.errors import ConfigError
from moe_overlap.parallel.optimizer_state import attend
from moe_overlap.parallel.ownership import REPLACED, Ownership, owners, refuse_sharded

_registered = False
_rounded = WeakTensorKeyDictionary()  # in the step under way


def guard_optimizers() -> None:
    """Register the hooks, once."""
    global _registered
    if not _registered:
        _registered = True
        register_optimizer_step_pre_hook(before_step)
        register_optimizer_step_post_hook(after_step)


@torch.compiler.disable
def before_step(
    optimizer: Optimizer, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Raises ConfigError for an optimizer or gradients with which replicas or experts would be mixed or drift apart.

    An optimizer that is given a closure makes its gradients there: they are looked at after each call of it.
    """
    kwargs = kwargs or {}
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _check(optimizer)
        return None

    def checked() -> Any:
        loss = closure()
        _check(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": checked}
    return (args[0], checked, *args[2:]), kwargs


def _check(optimizer: Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(hasattr(parameter, REPLACED) for parameter in parameters):
        given = f"{type(optimizer).__name__} with experts that have moved since"
        raise ConfigError("optimizer", given, "every optimizer of experts given to migrate() or experts_in_order()")
    owned = owners(parameters)
    if not owned:
        return
    _refuse_sharded_states(optimizer, owned)
    attend(optimizer, owned)
    _refuse_sums_beside_means(parameters, owned)
    require_reduced(owned)
    for parameter, owner in owned.items():
        if parameter.grad is None:
            continue
        if owner.accumulate_fp32 and parameter.dtype.itemsize == 2 and parameter.grad_dtype == parameter.dtype:
            given = (
                f"gradients in {parameter.grad.dtype} of an expert parameter that came after prepare(accumulate_fp32)"
            )
            raise ConfigError("optimizer", given, "moe_overlap.prepare(model) after copies and other new parameters")
        if parameter.grad.dtype != parameter.dtype:
            _round(parameter)


def require_reduced(owned: dict[torch.Tensor, Ownership]) -> None:
    """Raises ConfigError for gradients that are not those of all ranks. Waits for replicas whose exchange is under way:
    an optimizer that steps inside backward finds them so."""
    for parameter, owner in owned.items():
        refuse_sharded("experts", parameter, owner.others)
        mesh = getattr(parameter, "device_mesh", None)
        if parameter.grad is None:
            continue
        if mesh is not None and mesh.size() > 1 and owner.replicas is None and not owner.mean:
            given = "sums, of experts that fully_shard has spread over replicas which the layer was not told of"
            raise ConfigError("gradients", given, "replicate_group=, or means: moe_overlap.prepare(model)")
        if owner.replicas is not None and mesh is None:
            _finish_replicas(parameter, owner)
        elif owner.replicas is not None and mesh is not None:
            ranks, alike = mesh.mesh.reshape(-1).tolist(), owner.replicas.transport.global_ranks
            if not set(alike) <= set(ranks):
                given = f"those of experts that fully_shard reduces over ranks {ranks}, and ranks {list(alike)} hold"
                expected = "fully_shard over all of these, or ignored_params: the layer reduces what is left plain"
                raise ConfigError("gradients", given, expected)


def _refuse_sharded_states(optimizer: Optimizer, owned: dict[torch.Tensor, Ownership]) -> None:
    """ZeroRedundancyOptimizer sends every parameter from the one rank that steps it to all ranks of its group."""
    group = getattr(optimizer, "process_group", None)
    if group is None or not hasattr(optimizer, "_partition_parameters"):
        return
    ranks = set(dist.get_process_group_ranks(group))
    mixed = sorted({rank for owner in owned.values() for rank in owner.others & ranks})
    if mixed:
        given = (
            f"{type(optimizer).__name__} over ranks {sorted(ranks)}, with experts, of which ranks {mixed} hold others"
        )
        expected = "dense parameters only: give the experts (moe_overlap.param_groups) an optimizer that is not sharded"
        raise ConfigError("optimizer", given, expected)


def _refuse_sums_beside_means(parameters: list[torch.Tensor], owned: dict[torch.Tensor, Ownership]) -> None:
    """FSDP2 makes means over its mesh, and experts have sums unless the model was prepared."""
    sums = {rank for owner in owned.values() if not owner.mean and not owner.prepared for rank in owner.others}
    fewest = min(owner.ranks_reached for owner in owned.values())
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and parameter not in owned and mesh.size() > fewest > 1:
            given = f"dense gradients over {mesh.size()} ranks, and those of experts over {fewest}"
            expected = "replicate_group= (or a two-dimensional group=) with all ranks that hold the same experts"
            raise ConfigError("model", given, expected)
        if sums and mesh is not None and parameter not in owned and sums & set(mesh.mesh.reshape(-1).tolist()):
            raise ConfigError(
                "model",
                "sharded over ranks by FSDP2, with experts whose gradients are sums over the same ranks",
                "moe_overlap.prepare(model), for means as FSDP2 makes them, or with gradients='sum'",
            )


def _finish_replicas(parameter: torch.Tensor, owner: Ownership) -> None:
    """An optimizer that steps inside backward finds the gradients under way: wait for them."""
    assert owner.replicas is not None
    owner.replicas.finish()
    if not owner.replicas.watches(parameter):
        given = f"an expert parameter {tuple(parameter.shape)} that came after its layer, with replicas on other ranks"
        raise ConfigError("optimizer", given, "moe_overlap.prepare(model) after parametrizations, adapters and copies")
    assert parameter.grad is not None
    if owner.replicas.is_local(parameter) and bool(parameter.grad.any()):
        given = f"gradients of one replica alone for an expert parameter {tuple(parameter.shape)}"
        raise ConfigError("optimizer", given, "a backward outside of no_sync() before the step")


def _round(parameter: torch.Tensor) -> None:
    """A gradient that was accumulated in float32, in the dtype of the parameter: optimizers want no other."""
    assert parameter.grad is not None
    rounded = parameter.grad.to(parameter.dtype)
    parameter.grad = None
    parameter.grad_dtype = None  # any
    parameter.grad = rounded
    _rounded[parameter] = None


@torch.compiler.disable
def after_step(optimizer: Optimizer, *_: Any) -> None:
    """Copies of the experts that it stepped are out of date."""
    count_steps(parameter for group in optimizer.param_groups for parameter in group["params"])
    accumulate_again()


def accumulate_again() -> None:
    """The next micro-batches are accumulated in float32 again."""
    for parameter in list(_rounded):
        grad = parameter.grad
        parameter.grad = None
        parameter.grad_dtype = torch.float32
        parameter.grad = None if grad is None else grad.float()
    _rounded.clear()
