"""One rank: no collective, no copy."""

from __future__ import annotations

import torch

from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.transport.base import Work
from moe_overlap.transport.endpoint import E, Endpoint
from moe_overlap.transport.exchange import Exchange
from moe_overlap.transport.where import Where
from moe_overlap.transport.work import DoneWork


class LocalTransport(Endpoint):
    """The transport of a single rank. `start` returns the rows themselves, or copies them into `out`."""

    name = "local"

    def __init__(self, *, timeout_s: float | None = None) -> None:
        super().__init__(rank=0, world_size=1, timeout_s=timeout_s)

    def _send(self, message: torch.Tensor, where: Where) -> DoneWork:
        self._count_words(message, where)
        return DoneWork(message[None])

    def _swap(self, parts: torch.Tensor, ranks: range, where: Where) -> DoneWork:
        self._count_parts(parts)
        return DoneWork(parts)

    def _stays(self, plan: ChunkPlan, chunk: int) -> bool:
        return True  # the plan would say so too, but asking it takes longer than a step's exchanges

    def _move(self, exchange: Exchange, out: torch.Tensor) -> Work:
        raise AssertionError("the rows of a single rank stay")

    def _all_reduce(self, tensor: torch.Tensor, where: Where) -> Work:
        return DoneWork(tensor)

    def _poisoned(self, error: E) -> E:
        """One rank is out of step with nobody: counts that cannot be leave it usable."""
        return error
