"""The ranks of a torch.distributed group: gloo on the CPU, NCCL on CUDA. The connections are in connections.py."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from moe_overlap.agreement.cost import Grid
from moe_overlap.agreement.header import Header
from moe_overlap.config import EXCHANGE_SMS, check_environment
from moe_overlap.transport.base import Work
from moe_overlap.transport.connections import Connections, connections_of
from moe_overlap.transport.endpoint import Endpoint, checked_timeout
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.groups import device_of, resolve_group
from moe_overlap.transport.where import Where

GLOO_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


class GroupWork:
    """An operation under way in a process group. `kept`: tensors that stay alive until it is over."""

    def __init__(
        self, transport: ProcessGroupTransport, begun: tuple[Any, int], where: Where, kept: Any, out: torch.Tensor,
        *, on_host: bool,
    ) -> None:  # fmt: skip
        self._transport = transport
        self._work, self._position = begun
        self._where = where
        self._kept = kept
        self._out = out
        self._on_host = on_host
        self._generation = transport.life.generation
        self._start_s = time.perf_counter()
        self._end_s: float | None = None

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        """What was received. `timeout_s` may shorten the transport's limit. CUDA: the current stream waits."""
        if self._end_s is None:
            transport = self._transport
            transport._require_begun_in(self._generation, self._where)
            limit_s = transport.timeout_s if timeout_s is None else min(timeout_s, transport.timeout_s)
            if self._on_host:
                transport.connections.finish(self._work, self._where, self._position, limit_s)
            else:
                transport.connections.finish_on_stream(self._work)
            self._end_s = time.perf_counter()
            self._kept = None
        return self._out

    def done(self) -> bool:
        over = self._end_s is not None or self._transport._is_void(self._generation)
        return over or bool(self._work.is_completed())

    def interval(self) -> tuple[float, float] | None:
        """From the start to the end of the wait: the bytes were under way at most so long."""
        return None if self._end_s is None else (self._start_s, self._end_s)


class ProcessGroupTransport(Endpoint):
    """All-to-All over `group`: None (all ranks), a ProcessGroup or a one-dimensional DeviceMesh.

    Transports on one group share its connections: one that fails poisons all, and `reopen` of one makes all usable
    again. Collective over the ranks of the group in `open` and `reopen`, not in the constructor; the transports of a
    group are told apart by the order in which they are made. `timeout_s` (default MOE_OVERLAP_TIMEOUT_S) bounds every
    wait. `device` defaults to what the group's backend is for: the CPU for gloo, the current CUDA device for NCCL. On
    CUDA `wait` orders the current stream and the host does not wait, so there the NCCL watchdog bounds the exchanges,
    with twice `timeout_s`; records and headers travel on the host in either case. `lane`: transports of one lane share
    connections, those of another have their own.

    Raises ConfigError for a group that is closed or that this rank is not in, when torch.distributed is not
    initialised, for CUDA tensors on gloo, and for a variable MOE_OVERLAP_* with a value that it cannot have.
    """

    name = "process_group"

    def __init__(
        self,
        group: Any = None,
        *,
        timeout_s: float | None = None,
        device: torch.device | str | None = None,
        lane: str = "",
    ) -> None:
        check_environment()  # before it counts among the transports of the group
        limit_s = checked_timeout(timeout_s)
        resolved, ranks = resolve_group(group)
        self.device = device_of(resolved, device)
        self.backend = "gloo" if self.device.type == "cpu" else "nccl"
        self.connections: Connections = connections_of(resolved, ranks, backend=self.backend, lane=lane)
        self.connections.transports += 1
        self.connections.limit_s = max(self.connections.limit_s, limit_s)
        super().__init__(
            rank=ranks.index(dist.get_rank()), world_size=len(ranks), timeout_s=limit_s,
            life=self.connections.life, number=self.connections.transports,
        )  # fmt: skip
        self.group = resolved
        self.global_ranks = tuple(ranks)
        self._device_type = self.device.type
        self.name = f"process_group({self.backend})"
        self._seen = self.life.generation
        self._made_after_failure = self.life.cause is not None
        self._options = dist.AllToAllOptions()
        if hasattr(self._options, "asyncOp"):
            self._options.asyncOp = True

    @property
    def exchange_sms(self) -> int:
        """NCCL's kernels run on so many (`groups.nccl_options`)."""
        return int(EXCHANGE_SMS.read()) if self.backend == "nccl" and self.world_size > 1 else 0

    def open(self, header: Header) -> bool:
        """As the contract says. One made after a failure of the group, on all ranks, renews the connections."""
        if self._made_after_failure:
            self._made_after_failure = False
            if self.life.cause is not None:
                self.connections.reopen(self.timeout_s)
        return super().open(header)

    def _send(self, message: torch.Tensor, where: Where) -> GroupWork:
        self._count_words(message, where)
        # Not allgather, which passes the words on from rank to rank: with eight ranks it took more than twice as long.
        return self._directly(message.repeat(self.world_size, 1), range(self.world_size), where)

    def _swap(self, parts: torch.Tensor, ranks: range, where: Where) -> GroupWork:
        self._count_parts(parts)
        return self._directly(parts, ranks, where)

    def _directly(self, parts: torch.Tensor, ranks: range, where: Where) -> GroupWork:
        heard = torch.empty_like(parts)
        begun = self._begin(
            lambda groups: groups.control_of[ranks].alltoall_base(heard, parts, [], [], self._options), where
        )
        return GroupWork(self, begun, where, parts, heard, on_host=True)

    @property
    def _grid(self) -> Grid:
        return self.connections.grid

    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        rows, where = exchange.rows, exchange.where()
        send, recv = exchange.counts()
        self._count_rows(exchange, send)
        moved, into = (rows, out) if rows.dtype in GLOO_DTYPES else (rows.view(torch.uint8), out.view(torch.uint8))
        begun = self._begin(lambda groups: groups.payload.alltoall_base(into, moved, recv, send, self._options), where)
        return GroupWork(self, begun, where, rows, out, on_host=self.backend == "gloo")

    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        begun = self._begin(lambda groups: groups.payload.allreduce([tensor]), where)
        return GroupWork(self, begun, where, tensor, tensor, on_host=self.backend == "gloo")

    def _begin(self, make: Any, where: Where) -> tuple[Any, int]:
        self._require_usable()
        self._seen = self.life.generation
        with self.connections.in_use():
            return self.connections.begin(make, where, self.timeout_s)

    def close(self, reason: str) -> None:
        self.connections.close(reason)

    def reopen(self) -> None:
        """Collective over the ranks of the group, and a barrier. Nothing is left to do where another transport of the
        group was reopened since this one was used."""
        if self._seen == self.life.generation or self.connections.failed():
            self.connections.reopen(self.timeout_s)
        self._seen = self.life.generation
