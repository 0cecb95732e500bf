"""What every transport shares: limits, the header it was opened with, the error that poisoned it, argument checks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.header import Header
from moe_overlap.agreement.plan import ChunkPlan, RowLayout
from moe_overlap.agreement.record import StepRecord
from moe_overlap.config import TIMEOUT_S
from moe_overlap.errors import ConfigError, TransportClosed
from moe_overlap.transport.base import TransportStats


@dataclass(frozen=True, kw_only=True)
class Where:
    """The operation that a wait or an error is about."""

    action: str
    step: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        chunk = "" if self.chunk is None else f" (chunk {self.chunk})"
        return f"{self.action}{step}{chunk}"


class Lifecycle:
    """Base of the transports: usable until an error, then poisoned until `reopen`."""

    name = "transport"

    def __init__(self, *, rank: int, world_size: int, timeout_s: float | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.global_ranks = tuple(range(world_size))
        self.timeout_s = checked_timeout(timeout_s)
        self.stats = TransportStats()
        self._header: Header | None = None
        self._cause: BaseException | None = None

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

    def _require_rows(
        self,
        rows: torch.Tensor,
        out: torch.Tensor | None,
        plan: ChunkPlan,
        layout: RowLayout,
        chunk: int,
        *,
        reverse: bool,
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """(rows to each rank, rows from each rank, sum of the latter) once `rows` and `out` fit them."""
        if self._cause is not None:
            self._require_usable()
        if not 0 <= chunk < plan.chunks:
            raise self._refusing(ConfigError("chunk", chunk, f"an integer from 0 to {plan.chunks - 1}"))
        send, recv = plan.send_counts[chunk], plan.recv_counts[chunk]
        send_rows, recv_rows = plan.send_rows[chunk], plan.recv_rows[chunk]
        if reverse:
            send, recv, send_rows, recv_rows = recv, send, recv_rows, send_rows
        if not _fits(rows, send_rows, layout):
            raise self._refusing(ConfigError("rows", _describe(rows), _expected(send_rows, layout)))
        if out is not None and not _fits(out, recv_rows, layout):
            raise self._refusing(ConfigError("out", _describe(out), _expected(recv_rows, layout)))
        return send, recv, recv_rows

    def _refusing(self, error: ConfigError) -> ConfigError:
        """A mistake of this rank alone: the peers learn of it before it is raised here."""
        self.close(str(error))
        return error

    def close(self, reason: str) -> None:
        self._poison(RuntimeError(reason))

    def _poison(self, cause: BaseException) -> None:
        if self._cause is None:
            self._cause = cause


def checked_timeout(timeout_s: float | None) -> float:
    """Seconds; None means the environment's default. Raises ConfigError unless finite and above zero."""
    if timeout_s is None:
        return TIMEOUT_S.read()
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not math.isfinite(timeout_s):
        raise ConfigError("timeout_s", timeout_s, "a finite number of seconds above 0")
    if timeout_s <= 0:
        raise ConfigError("timeout_s", timeout_s, "a finite number of seconds above 0")
    return float(timeout_s)


def _fits(tensor: torch.Tensor, count: int, layout: RowLayout) -> bool:
    return tensor.dtype == layout.dtype and tensor.shape == (count, layout.width) and tensor.is_contiguous()


def _expected(count: int, layout: RowLayout) -> str:
    return f"contiguous {layout.dtype} {(count, layout.width)}"


def _describe(tensor: torch.Tensor) -> str:
    contiguous = "contiguous" if tensor.is_contiguous() else "non-contiguous"
    return f"{contiguous} {tensor.dtype} {tuple(tensor.shape)}"
