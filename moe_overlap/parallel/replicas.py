"""R: the mean of the experts' gradients over the ranks that hold the same experts (expert parallel in data parallel).

A hook of each parameter starts R as soon as its gradient of a backward is complete, beside the rest of that backward,
on connections of its own; the engine waits for it in its final callback. One rank adds up one slice of the gradient, in
float32 (float64 for float64) and in the order of the replicas, rounds once, and sends the sum to all: every replica has
the same bits, whatever arrived first. A gradient that was a mean already stays one, so that R may run after every
micro-batch or after the last alone (`no_sync`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import DTYPES, digest
from moe_overlap.errors import ConfigError, PlanMismatch
from moe_overlap.transport.base import Work
from moe_overlap.transport.closing import closing_on_error
from moe_overlap.transport.endpoint import Endpoint
from moe_overlap.transport.groups import resolve_group
from moe_overlap.transport.opening import open_transport
from moe_overlap.transport.where import Where

# What replicas must have in common of a parameter, in the words of the table that they compare.
COMPARED = ("its place among the parameters: they run other layers, or made them in another order",
            "its number of elements", "its dtype", "its experts")  # fmt: skip
EXTRA = 4  # behind each row: the parameter's number, and a digest of its values in three parts
PART = 1 << 21  # which float32 holds exactly
LINE = 4096


@dataclass(eq=False, kw_only=True)
class _Watched:
    """What is known of one parameter. `number`: its place, which travels with its rows; `agreed`: the replicas were
    compared; `local`: its gradient has parts that no other replica has; `hook`: what starts its reduction."""

    number: int
    expert_ids: tuple[int, ...]
    hook: RemovableHandle
    synchronise: bool = True
    agreed: bool = False
    local: bool = False


@dataclass(eq=False, kw_only=True)
class _Pending:
    """A parameter's gradient under way: first its slices, [R, n + EXTRA], then their means. `seen`: the gradient and
    its version when its slices left."""

    parameter: nn.Parameter
    work: Work
    seen: tuple[torch.Tensor, int]


class Replicas:
    """One rank's end of R, for the layers whose experts lie alike on the ranks of `transport`.

    Slices and means have a transport each, so that on both of them the order of the parameters is the order of the
    exchanges, however far each rank has come with the other one.

    Raises what the transports raise, and PlanMismatch where replicas differ in weights or in what they reduce.
    """

    def __init__(self, transport: Endpoint, returning: Endpoint) -> None:
        self.transport, self.returning = transport, returning
        self.count = transport.world_size
        self._watched: MutableMapping[torch.Tensor, _Watched] = WeakTensorKeyDictionary()
        self._numbers = 0
        self._slices: deque[_Pending] = deque()
        self._means: deque[_Pending] = deque()
        self._task = -1

    def watch(self, parameters: Iterable[nn.Parameter], expert_ids: tuple[int, ...]) -> None:
        """Reduce the gradients of `parameters` from now on. DTensors are left to what sharded them."""
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._watched and not hasattr(parameter, "device_mesh"):
                self._numbers += 1
                hook = parameter.register_post_accumulate_grad_hook(self._accumulated)
                self._watched[parameter] = _Watched(number=self._numbers, expert_ids=expert_ids, hook=hook)

    def moved(self, old: nn.Parameter, new: nn.Parameter, expert_ids: tuple[int, ...]) -> None:
        """On all replicas: a migration has put `new`, which may be `old`, in its place, with these experts."""
        watched = self._watched.pop(old, None)
        if watched is not None:
            watched.hook.remove()
            trained = new.requires_grad
            hook = new.requires_grad_().register_post_accumulate_grad_hook(self._accumulated)
            new.requires_grad_(trained)  # frozen ones may be trained again
            self._watched[new] = replace(watched, expert_ids=expert_ids, hook=hook, agreed=False, local=False)

    def watches(self, parameter: torch.Tensor) -> bool:
        return parameter in self._watched

    def is_local(self, parameter: torch.Tensor) -> bool:
        """Whether the gradient of `parameter` has parts that the other replicas do not have."""
        watched = self._watched.get(parameter)
        return watched is not None and watched.local and parameter.grad is not None

    def synchronise(self, parameters: Iterable[torch.Tensor], on: bool) -> None:
        """Whether the coming backwards end with R for `parameters`."""
        for parameter in parameters:
            if parameter in self._watched:
                self._watched[parameter].synchronise = on

    def reopen(self) -> None:
        """Usable again after a failure; collective over the replicas. What was under way is forgotten."""
        self._forget()
        for watched in self._watched.values():
            watched.agreed = False
        self.transport.reopen()
        self.returning.reopen()

    # ---------------------------------------------------------------- in backward

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """The gradient of a backward is complete: start its exchange."""
        watched = self._watched[parameter]
        watched.local = True
        if not watched.synchronise:
            return
        task = torch._C._current_graph_task_id()
        with self._closing_on_error():
            if task != self._task and (self._slices or self._means):
                self._forget()
                text = "the last backward was broken off before its gradients were reduced over replicas"
                raise RuntimeError(f"{text}: moe_overlap.reopen(model) on all ranks")
            if not watched.agreed:
                self._agree(parameter, watched)
            self._slices.append(self._start(parameter, watched.number))
            self._advance(wait=False)
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Wait for what is under way: the gradients are means over the replicas then."""
        self._task = -1
        with self._closing_on_error():
            self._advance(wait=True)

    @torch.no_grad()
    def _advance(self, *, wait: bool) -> None:
        """Send the means of slices that have come, and take those that have. `wait`: until there are none."""
        while self._slices and (wait or self._slices[0].work.done()):
            one = self._slices.popleft()
            mean = self._mean(one).expand(self.count, -1).contiguous()
            work = self._exchange(self.returning, mean, self._watched[one.parameter].number)
            self._means.append(replace(one, work=work))
        while self._means and (wait or self._means[0].work.done()):
            one = self._means.popleft()
            grad = self._unchanged(one)
            grad.copy_(one.work.wait().reshape(-1)[: grad.numel()].view_as(grad))
            self._watched[one.parameter].local = False

    def _start(self, parameter: nn.Parameter, number: int) -> _Pending:
        """Slices of the gradient to the ranks that add them up, each with the parameter's number behind it, and a
        digest of its values: replicas that differ would train different models."""
        assert parameter.grad is not None
        grad = parameter.grad.detach()
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        size = -(-grad.numel() // self.count)
        flat = torch.zeros(self.count * size, dtype=wide, device=grad.device)
        flat[: grad.numel()] = grad.reshape(-1)
        said = torch.cat([flat.new_tensor([number]), _digest_of(parameter.detach()).to(wide)])
        rows = torch.cat([flat.view(self.count, size), said.expand(self.count, -1)], dim=1)
        work = self._exchange(self.transport, rows, number)
        return _Pending(parameter=parameter, work=work, seen=(parameter.grad, parameter.grad._version))

    def _unchanged(self, pending: _Pending) -> torch.Tensor:
        """The gradient, which R is about to write. Raises ConfigError where somebody has changed it meanwhile."""
        grad, version = pending.seen
        if pending.parameter.grad is not grad or grad._version != version:
            given = f"a gradient {tuple(grad.shape)} of experts that a hook changed while it is reduced over replicas"
            expected = "hooks of the parameter (register_hook), which run before, or changes after backward"
            raise ConfigError("experts", given, expected)
        return grad

    def _mean(self, pending: _Pending) -> torch.Tensor:
        """The mean of this rank's slice, rounded once: [n] in the dtype of the gradient."""
        rows = pending.work.wait()
        self._require_same(pending, rows[:, -EXTRA:])
        total = rows[0, :-EXTRA].clone()
        for row in rows[1:, :-EXTRA]:  # in the order of the replicas
            total += row
        return (total / self.count).to(self._unchanged(pending).dtype)

    def _require_same(self, pending: _Pending, said: torch.Tensor) -> None:
        """Raises PlanMismatch, alike on all replicas, where they mean other parameters or have other values."""
        different = (said != said[0]).nonzero()
        if not len(different):
            return
        replica, column = (int(n) for n in different[0])
        first, second = self.transport.global_ranks[0], self.transport.global_ranks[replica]
        if column == 0:
            numbers = f"{int(said[0, 0])} and {int(said[replica, 0])}"
            text = (
                f"ranks {first} and {second} reduce the gradients of expert parameters {numbers}: replicas have to run"
            )
            text += " the same layers"
        else:
            shape, number = tuple(pending.parameter.shape), int(said[0, 0])
            text = (
                f"ranks {first} and {second} hold the same experts and differ in the values of an expert parameter "
                f"{shape}, number {number}: load the same weights, or start from one seed"
            )
        self._close(text)
        raise PlanMismatch(text, rank=self.transport.rank, action="R")

    def _exchange(self, transport: Endpoint, rows: torch.Tensor, number: int) -> Work:
        """Row r of [R, n] to replica r; the result has a row from each. `number`: the parameter's, for errors."""
        plan = one_row_each(self.transport.rank, self.count, number)
        return transport.start(rows, plan, RowLayout(width=rows.shape[1], dtype=rows.dtype), action="R")

    def _agree(self, parameter: nn.Parameter, watched: _Watched) -> None:
        """Before the first reduction of a parameter, whose rows could not be exchanged if they had other lengths."""
        kind = DTYPES.index(parameter.dtype)
        words = [watched.number, parameter.numel(), kind, digest(watched.expert_ids)]
        said = torch.tensor(words, dtype=torch.int64)
        # On both: connections are made when first used, and here all ranks are at the same point.
        table, _ = (transport.gather(said, Where(action="R")) for transport in (self.transport, self.returning))
        different = (table != table[0]).nonzero()
        if len(different):
            replica, column = (int(n) for n in different[0])
            first, second = self.transport.global_ranks[0], self.transport.global_ranks[replica]
            text = (
                f"ranks {first} and {second} are replicas and differ in {COMPARED[column]} (an expert parameter "
                f"{tuple(parameter.shape)}, number {watched.number})"
            )
            raise PlanMismatch(text, rank=self.transport.rank, action="R")
        watched.agreed = True

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """A rank that fails tells its peers on both transports."""
        with closing_on_error(self.transport, "R"), closing_on_error(self.returning, "R"):
            yield

    def _close(self, reason: str) -> None:
        self.transport.close(reason)
        self.returning.close(reason)

    def _forget(self) -> None:
        self._slices.clear()
        self._means.clear()
        self._task = -1


_of_group: weakref.WeakKeyDictionary[Any, Replicas] = weakref.WeakKeyDictionary()


def replicas_of(group: Any, *, timeout_s: float | None, device: torch.device | str | None) -> Replicas | None:
    """R over `group`, a ProcessGroup or a one-dimensional DeviceMesh: one for all layers; None for a single rank.

    The first one for a group is made by all its ranks.
    """
    resolved, ranks = resolve_group(group)
    if len(ranks) == 1:
        return None
    known = _of_group.get(resolved)
    if known is None or known.transport.life.ended:
        first, second = (
            open_transport(resolved, timeout_s=timeout_s, device=device, lane=lane) for lane in ("slices", "means")
        )
        assert isinstance(first, Endpoint) and isinstance(second, Endpoint)
        _of_group[resolved] = Replicas(first, second)
    return _of_group[resolved]


def check_replicas(transport: Endpoint, expert_ranks: tuple[int, ...]) -> None:
    """Raises ConfigError where a rank is to hold the same experts as this one and other ones as well."""
    own = transport.global_ranks[transport.rank]
    both = sorted(set(transport.global_ranks) & set(expert_ranks) - {own})
    if own not in expert_ranks or both:
        raise ConfigError(
            "replicate_group",
            list(transport.global_ranks),
            f"ranks that hold the same experts as this one; group {list(expert_ranks)} holds other ones",
        )


def _digest_of(values: torch.Tensor) -> torch.Tensor:
    """Three integers from 0 to PART - 1 that change with the bits of `values` and with their order (int64 sums are
    exact, in whatever order they are made)."""
    flat = values.reshape(-1)
    bits = flat.view(torch.int16 if values.dtype.itemsize == 2 else torch.int32)
    full = bits[: bits.numel() // LINE * LINE].view(-1, LINE)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for sums in (full.sum(dim=0, dtype=torch.int64), full.sum(dim=1, dtype=torch.int64), bits[full.numel() :].long()):
        weights = torch.arange(1, sums.numel() + 1, device=bits.device, dtype=torch.int64)
        total = total * 1_000_003 + (sums * weights * 2_654_435_761).sum()
    return torch.stack([total % PART, (total >> 21) % PART, (total >> 42) % PART])


def one_row_each(rank: int, count: int, step: int) -> ChunkPlan:
    """A row from every rank to every rank."""
    counts = np.zeros((count, BLOCKS, count), dtype=np.int64)
    counts[:, 0] = 1
    return ExchangePlan(rank=rank, world_size=count, step=step, phase="backward", grad_enabled=True,
                        x_requires_grad=True, counts=Counts.of(counts, rank)).chunked(1)  # fmt: skip
