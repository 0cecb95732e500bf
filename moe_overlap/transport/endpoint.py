"""What every transport that moves bytes itself shares: its life, the checks, the counting, what ranks agree on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import StepRecord, agree_on
from moe_overlap.config import TIMEOUT_S
from moe_overlap.errors import ConfigError, PlanMismatch, TransportClosed
from moe_overlap.transport.base import TransportStats, Work
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.where import Where
from moe_overlap.transport.work import DoneWork

SHORTEST_S, LONGEST_S = 1e-3, 1e7  # of a limit; the libraries below count in milliseconds
E = TypeVar("E", bound=BaseException)


class Endpoint(ABC):
    """One rank's end of a transport: usable until an error, then poisoned until `reopen`.

    The public methods of the contract (`base.py`) are here. A transport says how words are gathered (`gather`), rows
    moved (`_move`) and tensors summed (`_all_reduce`), and adds what is its own to `close` and `reopen`.
    """

    name = "transport"
    group: Any = None  # the group of torch.distributed whose ranks these are
    _device_type: str | None = None  # where rows must be; None: anywhere

    def __init__(self, *, rank: int, world_size: int, timeout_s: float | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.global_ranks = tuple(range(world_size))
        self.timeout_s = checked_timeout(timeout_s)
        self.stats = TransportStats()
        self._header: Header | None = None
        self._cause: BaseException | None = None

    def open(self, header: Header) -> bool:
        if self._is_open_for(header):
            return False
        table = self.gather(header.to_tensor(world_size=self.world_size), Where(action="open"))
        different = (table != table[0]).any(dim=1).nonzero()
        if len(different):
            odd = int(different[0])
            text = f"rank {odd} opened this transport for another configuration than rank 0; nothing was sent"
            peer = odd if odd != self.rank else 0
            raise self._poisoned(PlanMismatch(text, rank=self.rank, peer=peer, action="open"))
        self._header = header
        return True

    def agree(self, record: StepRecord) -> ExchangePlan:
        words = self._require_record(record)
        table = self.gather(words, Where(action="N", step=record.step))
        try:
            return agree_on(table, rank=self.rank, num_slots=record.counts.shape[1])
        except PlanMismatch as error:
            self._poisoned(error)
            raise

    def start(
        self,
        rows: torch.Tensor,
        plan: ChunkPlan,
        layout: RowLayout,
        chunk: int = 0,
        *,
        reverse: bool = False,
        out: torch.Tensor | None = None,
        action: str = "D",
    ) -> Work:
        self._require_startable()
        if not 0 <= chunk < plan.chunks:
            raise self._refusing(ConfigError("chunk", chunk, f"an integer from 0 to {plan.chunks - 1}"))
        send_rows, recv_rows = plan.send_rows[chunk], plan.recv_rows[chunk]
        if reverse:
            send_rows, recv_rows = recv_rows, send_rows
        if not _fits(rows, send_rows, layout):
            raise self._refusing(ConfigError("rows", _describe(rows), _expected(send_rows, layout)))
        if out is not None and not _fits(out, recv_rows, layout):
            raise self._refusing(ConfigError("out", _describe(out), _expected(recv_rows, layout)))
        if self._device_type is not None and rows.device.type != self._device_type:
            expected = f"a tensor on {self._device_type}: {self.name} moves no other (copy it first, or use NCCL)"
            raise self._refusing(ConfigError("rows.device", rows.device, expected))
        if self._stays(plan, chunk):
            self.stats.exchanges += 1
            return DoneWork(rows if out is None else out.copy_(rows))
        if out is None:
            out = rows.new_empty(recv_rows, layout.width)
        return self._move(Exchange(rows, plan, layout, chunk, reverse, out, action), out)

    def all_reduce(self, tensor: torch.Tensor, *, action: str = "R") -> Work:
        """The sum of `tensor` over the ranks, in place. Equal shape and dtype on all ranks are the caller's duty."""
        self._require_usable()
        return self._all_reduce(tensor, Where(action=action))

    def close(self, reason: str) -> None:
        self._poison(RuntimeError(reason))

    def reopen(self) -> None:
        self._header = None
        self._cause = None

    @abstractmethod
    def gather(self, words: torch.Tensor, where: Where) -> torch.Tensor:
        """int64 [n] of every rank, as [W, n]; n must be equal on all ranks. Bounded; the host waits."""

    @abstractmethod
    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        """Count a checked exchange (`_count_rows`) and move its rows into `out`. Returns at once."""

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        """`all_reduce` on a transport that is usable."""

    def _stays(self, plan: ChunkPlan, chunk: int) -> bool:
        """Whether no row of the chunk leaves its rank, on any rank: nothing is moved then, and nobody waited for."""
        return plan.stays_local[chunk]

    def _require_startable(self) -> None:
        """Raises what forbids any `start`, before its arguments are looked at."""
        if self._cause is not None:
            self._require_usable()

    def _require_usable(self) -> None:
        if self._cause is not None:
            raise TransportClosed(
                f"this transport failed or was closed before ({self._cause}); reopen() it on all ranks", rank=self.rank
            ) from self._cause

    def _is_open_for(self, header: Header) -> bool:
        """Whether it is open for `header` already. Raises ConfigError when it is open for another one."""
        self._require_usable()
        if self._header is not None and self._header != header:
            raise ConfigError("header", header, f"the header this transport is open for, {self._header}")
        return self._header is not None

    def _require_record(self, record: StepRecord) -> torch.Tensor:
        """The words of `record`, whose length must be the one that the header fixed."""
        self._require_usable()
        if self._header is None:
            raise self._refusing(ConfigError("transport", self.name, "a transport that open(header) was called on"))
        shape = (BLOCKS, self._header.num_slots)
        if tuple(record.counts.shape) != shape or record.counts.dtype != torch.int64:
            given = (tuple(record.counts.shape), record.counts.dtype)
            raise self._refusing(ConfigError("record.counts", given, f"int64 {shape}"))
        return record.to_tensor()

    def _count_words(self, words: torch.Tensor, where: Where) -> None:
        """Called by `gather`: a network counts what it is about to send, virtual ranks what has arrived."""
        self.stats.agreements += where.action == "N"
        self.stats.meta_bytes += words.nbytes * (self.world_size - 1)

    def _count_rows(self, exchange: Exchange, send: tuple[int, ...]) -> None:
        """Called by `_move`, which alone knows when nothing forbids the exchange any longer."""
        self.stats.exchanges += 1
        self.stats.payload_bytes += (exchange.rows.shape[0] - send[self.rank]) * exchange.layout.row_bytes

    def _refusing(self, error: ConfigError) -> ConfigError:
        """A mistake of this rank alone: the peers learn of it before it is raised here."""
        self.close(str(error))
        return error

    def _poisoned(self, error: E) -> E:
        """An error that every rank raises by itself: nothing to tell, and the connections must stay until all have."""
        self._poison(error)
        return error

    def _poison(self, cause: BaseException) -> None:
        if self._cause is None:
            self._cause = cause


def checked_timeout(timeout_s: float | None) -> float:
    """Seconds; None means the environment's default. Raises ConfigError for what no wait can have."""
    if timeout_s is None:
        return TIMEOUT_S.read()
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not SHORTEST_S <= timeout_s <= LONGEST_S:
        raise ConfigError("timeout_s", timeout_s, f"a finite number of seconds from {SHORTEST_S:g} to {LONGEST_S:g}")
    return float(timeout_s)


def _fits(tensor: torch.Tensor, count: int, layout: RowLayout) -> bool:
    return tensor.dtype == layout.dtype and tensor.shape == (count, layout.width) and tensor.is_contiguous()


def _expected(count: int, layout: RowLayout) -> str:
    return f"contiguous {layout.dtype} {(count, layout.width)}"


def _describe(tensor: torch.Tensor) -> str:
    contiguous = "contiguous" if tensor.is_contiguous() else "non-contiguous"
    return f"{contiguous} {tensor.dtype} {tuple(tensor.shape)}"
