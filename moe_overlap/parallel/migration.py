"""Experts that move: their parameters and what optimizers keep of them go to other ranks, and are theirs from then on.

Everything arrives in new tensors beside the old ones; then all ranks say that they have it, and only after that each
one puts the new in the place of the old, without a word to the others. A rank that fails before leaves all others as
they were. Where experts have replicas each group of ranks moves its own, which are equal; agreed is over all of them.
What FSDP2 has sharded over the replicas is gathered there, moved, and cut into the same shards, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from moe_overlap.agreement.copies import CopyPlan, copy_plan
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan, RowLayout
from moe_overlap.agreement.record import digest
from moe_overlap.agreement.seats import Copy, Seats
from moe_overlap.errors import ConfigError, PlanMismatch
from moe_overlap.parallel.ownership import REPLACED, Ownership
from moe_overlap.parallel.shards import check_shards, cut, is_sharded, put_shard, whole
from moe_overlap.parallel.state import tensors_of
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_all

ACTION = "migrate"
Put = Callable[[torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class _Held:
    """One tensor of this rank's experts, [e * k, ...], and what puts another one in its place, or this rank's shard of
    it. rows: e * k as it has to be: of a parameter's state that of the parameter, of a buffer e."""

    name: str
    tensor: torch.Tensor
    put: Put
    rows: int


def migrated(
    module: nn.Module, ownership: Ownership, old: Seats, new: Seats, optimizers: Sequence[Optimizer], tag: int,
    error: ConfigError | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Send what moves between two placements; the result puts what has come in its place, which cannot fail.

    module: the experts that are marked with `ownership`. tag: what all ranks must have in common. error: why this rank
    refuses. Collective over the layer's ranks and their replicas. Raises ConfigError where a rank refuses (on all
    ranks), PlanMismatch where they mean different moves or keep different states, and MoeTransportError; all tensors
    are then as before.
    """
    transport, rank, replicas = ownership.transport, ownership.transport.rank, ownership.replicas
    held = _held(module, optimizers, len(ownership.expert_ids))
    try:
        _check(module, ownership, held, len(new.homes[rank]))
    except ConfigError as refused:
        error = error or refused
    device = next(module.parameters()).device
    each = _agree(ownership, held, error, tag, device)
    plan = _plan(rank, old, new)
    commits = []
    with closing_all(_groups(ownership), ACTION), torch.no_grad():
        for one, rows in zip(held, each, strict=True):
            moved = _moved(transport, plan, whole(one.tensor, ownership, ACTION), rows, old, new)
            commits.append(partial(one.put, cut(moved, one.tensor)))
        _everyone(ownership, torch.zeros(1, dtype=torch.int64, device=device))  # all of it is here, on all ranks
    ids = new.homes[rank]

    @torch.no_grad()
    def commit() -> None:
        before = list(module.parameters())
        for put in commits:
            put()
        if replicas is not None:
            for was, now in zip(before, module.parameters(), strict=True):
                replicas.moved(was, now, ids)
        ownership.expert_ids, ownership.in_order = ids, new.homes_in_order
        ownership.shown_on.clear()
        if hasattr(module, "expert_ids"):
            setattr(module, "expert_ids", ids)  # noqa: B010 - no tensor, whatever modules declare

    return commit


def _held(module: nn.Module, optimizers: Sequence[Optimizer], count: int) -> list[_Held]:
    """All that has a row for each expert, in an order that all ranks share."""
    found: list[_Held] = []
    seen: set[int] = set()
    for name, tensor in tensors_of(module).items():
        if tensor.dim() and id(tensor) not in seen:
            seen.add(id(tensor))
            rows = tensor.shape[0] if isinstance(tensor, nn.Parameter) else count
            put = partial(put_shard, tensor) if is_sharded(tensor) else partial(_replace, module, tensor, optimizers)
            found.append(_Held(name, tensor, put, rows))
            for number, optimizer in enumerate(optimizers):
                state = optimizer.state.get(tensor, {})
                for key in sorted(state):
                    value = state[key]
                    if isinstance(value, torch.Tensor) and value.dim():
                        where = f"{key} of {name} in optimizer {number}"
                        put = partial(put_shard, value) if is_sharded(value) else partial(state.__setitem__, key)
                        found.append(_Held(where, value, put, rows))
    return found


def _replace(module: nn.Module, old: torch.Tensor, optimizers: Sequence[Optimizer], value: torch.Tensor) -> None:
    """Into the memory of `old`; of another shape, as another parameter (or buffer) in its place, in the module and in
    the optimizers: a graph that is still there would hold autograd to the shape that the old one had."""
    if old.shape == value.shape:
        old.copy_(value)
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    new.__dict__.update(old.__dict__)
    setattr(old, REPLACED, True)
    if getattr(old, "grad_dtype", old.dtype) != old.dtype:
        new.grad_dtype = old.grad_dtype
    for owner in module.modules():
        for kept in (owner._parameters, owner._buffers):
            kept.update((name, new) for name, found in list(kept.items()) if found is old)  # type: ignore[misc]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new if one is old else one for one in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def _check(module: nn.Module, ownership: Ownership, held: list[_Held], coming: int) -> None:
    """coming: how many experts are to be here."""
    count = len(ownership.expert_ids)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            given = f"a gradient of {name}"
            raise ConfigError("migrate", given, "zero_grad(set_to_none=True) before: experts move between two steps")
        reduced = ownership.replicas is not None and ownership.replicas.watches(parameter)  # by a hook, which moves too
        if len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ()) > reduced:
            raise ConfigError(
                "migrate", f"hooks of {name}", "none: where its size changes it becomes another parameter"
            )
    for one in held:
        check_shards(one.name, one.tensor, ownership)
        if is_sharded(one.tensor) and coming != count:
            given = f"{coming} experts for a rank whose {one.name} is sharded by fully_shard"
            raise ConfigError("migrate", given, f"{count}, as before: what is sharded keeps its shape")
        rows = one.tensor.shape[0]
        if rows % count if count else rows:
            given = f"{one.name} {tuple(one.tensor.shape)}"
            raise ConfigError("migrate", given, f"a row for each of the {count} experts of this rank")
        if rows != one.rows:
            given = f"{one.name} {tuple(one.tensor.shape)}"
            raise ConfigError("migrate", given, f"{one.rows} rows, as what cannot be told from a table is not cut up")


def _agree(
    ownership: Ownership, held: list[_Held], error: ConfigError | None, tag: int, device: torch.device
) -> list[int]:
    """Rows of an expert in each tensor. Raises `error`, or its like, on all ranks; PlanMismatch where they differ."""
    transport, count = ownership.transport, len(ownership.expert_ids)
    said = [(one.name, str(one.tensor.dtype), tuple(one.tensor.shape[1:]), is_sharded(one.tensor)) for one in held]
    own = transport.global_ranks[transport.rank]
    words = [own, int(error is not None), tag, digest(said), transport.rank]
    with closing_all(_groups(ownership), ACTION):
        table = _everyone(ownership, torch.tensor(words, dtype=torch.int64, device=device))
    ranks, refuses, same, place = table[:, 0].tolist(), table[:, 1], table[:, 2:4], table[:, 4]
    if refuses.any():
        first = ranks[int(refuses.nonzero()[0])]
        raise error or ConfigError("migrate", f"what rank {first} has", "a migration that no rank refuses")
    odd = (same != same[0]).any(dim=1).nonzero()
    if len(odd):
        peer = ranks[int(odd[0])]
        text = f"ranks {ranks[0]} and {peer} migrate to different placements, or differ in the tensors and states of "
        raise PlanMismatch(f"{text}experts; nothing was sent", rank=own, peer=peer, action=ACTION)
    if not torch.equal(place, torch.arange(transport.world_size).repeat_interleave(ownership.num_replicas)):
        text = "replicas are in different places among the ranks that share their layer's experts; nothing was sent"
        raise PlanMismatch(text, rank=own, action=ACTION)
    rows = torch.tensor([one.tensor.shape[0] // count if count else 0 for one in held], dtype=torch.int64)
    with closing_all(_groups(ownership), ACTION):
        return _everyone(ownership, rows.to(device)).amax(dim=0).tolist()


def _everyone(ownership: Ownership, words: torch.Tensor) -> torch.Tensor:
    """int64 [W * R, n] on the CPU: what each rank says, int64 [n]. First over the replicas, then over the ranks that
    share the experts out, so that all have heard of all: the same table, and what follows from it, on every rank."""
    table = words
    for transport in reversed(_groups(ownership)):
        heard = table.new_zeros(transport.world_size, *table.shape)
        heard[transport.rank] = table
        table = transport.all_reduce(heard, action=ACTION).wait()
    return table.reshape(-1, words.numel()).cpu()


def _groups(ownership: Ownership) -> list[Transport]:
    """The ranks that share the experts out, and those that hold the same ones, where there are any."""
    return [ownership.transport] + ([] if ownership.replicas is None else [ownership.replicas.transport])


def _plan(rank: int, old: Seats, new: Seats) -> CopyPlan:
    """Who sends which expert to whom: from its old home to its new one."""
    home_of = {expert: home for home, experts in enumerate(old.homes) for expert in experts}
    wanted = tuple(
        tuple(sorted(Copy(home_of[expert], expert) for expert in experts if home_of[expert] != there))
        for there, experts in enumerate(new.homes)
    )
    world = old.world_size
    nothing = Counts.of(np.zeros((world, BLOCKS, world), dtype=np.int64), rank)
    exchange = ExchangePlan(rank=rank, world_size=world, step=0, phase=ACTION, grad_enabled=False,
                            x_requires_grad=False, counts=nothing)  # fmt: skip
    return copy_plan(exchange, wanted)


def _moved(
    transport: Transport, plan: CopyPlan, tensor: torch.Tensor, each: int, old: Seats, new: Seats
) -> torch.Tensor:
    """The tensor of this rank's experts in the new placement. each: rows of an expert."""
    rank, trailing = plan.rank, tensor.shape[1:]
    width = each * trailing.numel()
    before = {expert: place for place, expert in enumerate(old.homes[rank])}
    stack = tensor.reshape(len(before), width)
    rows = stack[[before[expert] for expert in plan.sent_experts(0)]].contiguous()
    layout = RowLayout(width=width, dtype=tensor.dtype, weights=True)
    came = transport.start(rows, plan, layout, action=ACTION).wait()
    arrived = {one.expert: row for row, one in enumerate(plan.group(rank, 0))}
    moved = stack.new_empty(len(new.homes[rank]), width)
    for place, expert in enumerate(new.homes[rank]):
        moved[place] = came[arrived[expert]] if expert in arrived else stack[before[expert]]
    return moved.reshape(len(moved) * each, *trailing)
