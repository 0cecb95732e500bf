"""Decisions about gradients that all ranks have to make alike: the norm, clipping, whether to skip a step.

Every rank has the gradients of its own experts. A norm, or a search for NaN, that looks at these alone comes to
another end on every rank: dense parameters are then scaled or stepped differently, and ranks drift apart. Here the
ranks that share experts out among them put together what each found; replicas have equal gradients and find the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.parallel.optimizers import require_reduced
from moe_overlap.parallel.ownership import Ownership, owners

Parameters = torch.Tensor | Iterable[torch.Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """As torch.nn.utils.clip_grad_norm_, with the norm of the whole model: that of one process with all experts.

    parameters: of the model on this rank, dense ones and experts, plain ones and DTensors of any meshes. Call it after
    the gradients are complete on all ranks (collective over the ranks that share experts; the order of `parameters`
    must be the same). norm_type: above 0, or inf. Returns the norm before clipping, a plain scalar, equal on all ranks.
    Raises RuntimeError as torch does for `error_if_nonfinite`, on all ranks alike.
    """
    given = _listed(parameters)
    total = grad_norm(given, norm_type, foreach=foreach)
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}: nothing was clipped")
    for group in _kinds(given).values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total, foreach)
    return total


@torch.no_grad()
def grad_norm(parameters: Parameters, norm_type: float = 2.0, *, foreach: bool | None = None) -> torch.Tensor:
    """The norm of all gradients of the model: what `clip_grad_norm_` returns, without clipping. Collective likewise."""
    order = float(norm_type)
    if not order > 0:
        raise ConfigError("norm_type", norm_type, "a number above 0, or inf")
    given = _listed(parameters)
    require_reduced(owners(given))
    sums: dict[Ownership | None, torch.Tensor] = {}
    device = given[0].device if given else torch.device("cpu")
    for (owner, _, _), group in _kinds(given).items():
        powered = _powered(group, order, foreach).to(device)
        sums[owner] = _joined(order, sums[owner], powered) if owner in sums else powered
    total = torch.zeros((), dtype=torch.float64, device=device)
    for owner, powered in sums.items():
        total = _joined(order, total, *(_of_all_ranks(owner, powered) if owner is not None else (powered,)))
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in given) else torch.float32
    return (total if math.isinf(order) else total ** (1 / order)).to(dtype)


@torch.no_grad()
def gradients_are_finite(parameters: Parameters) -> bool:
    """Whether no gradient of the model has NaN or inf, on any rank that shares experts with this one: for skipping a
    step on all ranks alike. To be called when the gradients are complete; collective as `clip_grad_norm_`; the host
    waits."""
    given = _listed(parameters)
    device = given[0].device if given else torch.device("cpu")
    require_reduced(owners(given))
    bad = torch.zeros((), device=device)
    for group in _kinds(given).values():
        flag = torch.zeros((), device=device)
        for parameter in group:
            if parameter.grad is not None:
                flag = torch.maximum(flag, (~_local(parameter.grad).isfinite().all()).float())
        bad = torch.maximum(bad, _over_mesh(group, flag, dist.ReduceOp.MAX))
    return not bool(_anywhere(given, bad))


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler whose ranks skip a step together: an overflow in the experts of one rank is found by all."""

    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, *args: Any) -> dict[torch.device, torch.Tensor]:
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not given:
            return {}
        device = given[0].device
        worst = torch.zeros((), device=device)
        for group in _kinds(given).values():  # torch's own takes one kind of tensors at a time
            some: Any = SimpleNamespace(param_groups=[{"params": group}])
            for found in super()._unscale_grads_(some, *args).values():
                worst = torch.maximum(worst, _whole(found).to(device).reshape(()))
        return {device: _anywhere(given, worst)}  # also where no parameter has a gradient on this rank


def _listed(parameters: Parameters) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


Kind = tuple[Ownership | None, object, object]


def _kinds(parameters: list[torch.Tensor]) -> dict[Kind, list[torch.Tensor]]:
    """Parameters that are reduced alike: (owner, mesh, placements), dense ones without an owner, plain ones without a
    mesh. One owner stands for all layers that the same ranks share out."""
    owned = owners(parameters)
    first: dict[tuple[int, ...], Ownership] = {}
    kinds: dict[Kind, list[torch.Tensor]] = {}
    for parameter in parameters:
        owner = owned.get(parameter)
        if owner is not None:
            owner = first.setdefault(owner.expert_ranks, owner) if owner.others else None
        key = owner, getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
        kinds.setdefault(key, []).append(parameter)
    return kinds


def _powered(group: list[torch.Tensor], order: float, foreach: bool | None) -> torch.Tensor:
    """The sum of |g| ** order over the gradients of one kind (the maximum for inf), float64, the whole of DTensors."""
    grads = [_without_sums(parameter.grad) for parameter in group if parameter.grad is not None]
    parts = [local for local in map(_local, grads) if local.numel()]  # torch has no maximum of an empty shard
    norm = nn.utils.get_total_norm(parts, order, foreach=foreach).double()
    powered = norm if math.isinf(order) else norm**order
    return _over_mesh(group, powered, dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM)


def _over_mesh(group: list[torch.Tensor], value: torch.Tensor, op: Any) -> torch.Tensor:
    """What each rank found in its shards of the gradients of one kind, over all of them; plain ones are whole."""
    mesh: Any = getattr(group[0], "device_mesh", None)
    if mesh is None:
        return value
    value = value.to(mesh.device_type)
    for dim, placement in enumerate(group[0].placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            dist.all_reduce(value, op=op, group=mesh.get_group(dim))
    return value


def _without_sums(grad: torch.Tensor) -> torch.Tensor:
    """A gradient whose sum over ranks is still to be made (Partial) is made whole."""
    placements = getattr(grad, "placements", ())
    return _whole(grad) if any(placement.is_partial() for placement in placements) else grad


def _of_all_ranks(owner: Ownership, value: torch.Tensor) -> torch.Tensor:
    """The scalar of every rank that shares experts with this one, [W] in their order, the same bits everywhere."""
    values = value.new_zeros(owner.transport.world_size)
    values[owner.transport.rank] = value
    return owner.transport.all_reduce(values, action="norm").wait()  # each sum has one part that is not zero


def _anywhere(parameters: list[torch.Tensor], flag: torch.Tensor) -> torch.Tensor:
    """The largest flag of all ranks that share any of the experts."""
    for owner in dict.fromkeys(owner for owner, _, _ in _kinds(parameters) if owner is not None):
        flag = torch.maximum(flag, _of_all_ranks(owner, flag).max())
    return flag


def _joined(order: float, *parts: torch.Tensor) -> torch.Tensor:
    """Sums of powers, or maxima, added up in order."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return flat.max() if math.isinf(order) else flat.sum()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the whole of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
