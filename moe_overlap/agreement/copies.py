"""Copies of experts, as integers: which ones a step has to fetch, and how many go from rank to rank.

A copy is weights alone; the parameters, their optimizer state and the sum of the gradients are at the expert's home.
A rank's copy is valid for (expert, version of its home's weights). Every rank says the version of its weights in the
record of the step, so all ranks know alike which copies of which ranks are not valid any more: those are fetched (Wf),
and where there are none nothing is. The gradients of all copies return in every backward (Wg).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan
from moe_overlap.agreement.seats import Copy

Wanted = tuple[tuple[Copy, ...], ...]  # by rank, in the order of its seats


COUNTED = "_moe_overlap_counted"  # an attribute of parameters, see `CopyStore.trust`: how often they were stepped


def count_steps(parameters: Iterable[object]) -> None:
    """An optimizer has stepped: fused ones (torch 2.13.0) write parameters without raising their version."""
    for one in parameters:
        if hasattr(one, COUNTED):
            setattr(one, COUNTED, getattr(one, COUNTED) + 1)


@dataclass(frozen=True, kw_only=True)
class CopyPlan(ChunkPlan):
    """The exchange of the weights of `wanted` copies, in `chunks` groups; its adjoint is that of their gradients.

    A row is one expert. Send order of a rank: group, rank of the copy, then as that rank has them. Receive order:
    group, home, expert: that of the copies' seats.
    """

    wanted: Wanted

    def group(self, rank: int, chunk: int) -> tuple[Copy, ...]:
        """The copies of `rank` in a group."""
        mine = self.wanted[rank]
        return mine[len(mine) * chunk // self.chunks : len(mine) * (chunk + 1) // self.chunks]

    def sent_experts(self, chunk: int) -> tuple[int, ...]:
        """The experts of the rows that this rank sends."""
        ranks = range(self.world_size)
        return tuple(one.expert for rank in ranks for one in self.group(rank, chunk) if one.home == self.rank)

    def counts(self, chunk: int, *, reverse: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = self._rows[chunk]
        send, recv = tuple(rows[self.rank].tolist()), tuple(rows[:, self.rank].tolist())
        return (recv, send) if reverse else (send, recv)

    @cached_property
    def stays_local(self) -> tuple[bool, ...]:
        return tuple(int(rows.sum() - np.trace(rows)) == 0 for rows in self._rows)

    @cached_property
    def _rows(self) -> np.ndarray:
        """int64 [C, W, W]: rows from home to rank."""
        rows = np.zeros((self.chunks, self.world_size, self.world_size), dtype=np.int64)
        for chunk in range(self.chunks):
            for rank in range(self.world_size):
                for one in self.group(rank, chunk):
                    rows[chunk, one.home, rank] += 1
        return rows


def copy_plan(exchange: ExchangePlan, wanted: Wanted, chunks: int = 1) -> CopyPlan:
    """Of a step."""
    nothing = np.zeros(0, dtype=np.int64)
    return CopyPlan(exchange=exchange, chunks=chunks, by="tokens", sent=nothing, received=nothing, wanted=wanted)


class CopyBook:
    """Which copies are valid on which rank: the same on all ranks, as it follows from what they have agreed on."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No copy is valid: after a failure, whoever has got what."""
        self._held: list[dict[int, int]] = []  # by rank: expert -> the version of the home's weights
        self._kind: object = None

    def wanted(self, exchange: ExchangePlan, kind: object) -> Wanted:
        """The copies that a step has to fetch, by rank. kind: what weights are besides their version (their dtype)."""
        assert exchange.seats is not None
        held = self._held if kind == self._kind and self._held else [{}] * exchange.world_size
        versions = exchange.weight_versions
        return tuple(
            tuple(one for one in copies if known.get(one.expert) != versions[one.home])
            for known, copies in zip(held, exchange.seats.copies, strict=True)
        )

    def hold(self, exchange: ExchangePlan, kind: object) -> None:
        """A step has fetched what it wanted: the copies of its placement are valid, and no others."""
        assert exchange.seats is not None
        versions = exchange.weight_versions
        self._kind = kind
        self._held = [{one.expert: versions[one.home] for one in copies} for copies in exchange.seats.copies]
