"""What the schedules of a step depend on, as a few rounded integers: its kind.

Steps of one kind get the same schedules; routing that only fluctuates hardly leaves its kind. Where rows may be
deduplicated a step has two kinds, plain and deduplicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts, Nodes
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.auto.calibrate import distinct_shape, gateways_keep, step_shape, travelling
from moe_overlap.auto.copied import CopiesKind, copies_kind
from moe_overlap.planning.shapes import MetadataBytes, StepShape, experts_per_chunk, without_own
from moe_overlap.schedule.offload import sensible_groups

CUTS = (1, 2, 4, 8, BLOCKS)
GROUPS = (2, 4, 8)
DIGITS = 5  # leading binary digits that rounding keeps: 3 % at most
SHARE_UNITS = 4  # an expert group's share of the rows is rounded to this part of an equal share

Shares = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DistinctKind:
    """What a deduplicated step is known by besides. `own_rows`: of the busiest rank's experts, those that stay.
    `out_shares` and `back_shares`: as `StepKind.shares`, of the rows that travel with each group, and come back with
    it.
    """

    own_rows: int
    out_shares: tuple[Shares, ...]
    back_shares: tuple[Shares, ...]
    metadata: MetadataBytes
    inside: InsideKind | None = None


@dataclass(frozen=True, kw_only=True)
class InsideKind:
    """Of the rows that are passed on inside nodes: bytes of the busiest rank, and `out_shares` and `back_shares` as
    those of `DistinctKind`. `kept`: bytes that gateways keep from chunk to chunk, where there are several."""

    bytes: int
    kept: int
    out_shares: tuple[Shares, ...]
    back_shares: tuple[Shares, ...]


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What is planned from: all that a step's schedules depend on, rounded.

    `rows`: of the busiest rank's experts. `slots_rows`: T * K of the rank with most tokens. `bytes_by_lane`: what
    leaves or enters the busiest rank on each wire. `local_experts`: of a rank. `shares`: for every number of expert
    groups, the rows of each group over all ranks, in SHARE_UNITS-ths of an equal share. `distinct`: where the step is
    deduplicated; `rows` are then those of others, and the bytes those of distinct rows. `copies`: of experts.
    `host_bytes`: of an expert's weights, where they are in host memory; 0: they are on the device.
    """

    grad: bool
    rows: int
    slots_rows: int
    bytes_by_lane: tuple[tuple[str, int], ...]
    local_experts: int
    shares: tuple[tuple[int, ...], ...]
    row_bytes: int
    distinct: DistinctKind | None = None
    copies: CopiesKind | None = None
    host_bytes: int = 0

    def shapes(self) -> list[StepShape]:
        """The step, cut in every way that is considered: tokens into equal chunks, experts into groups. Where experts
        are in host memory tokens are not cut: each chunk would fetch all of them."""
        equal = [(1,) * chunks for chunks in (CUTS[:1] if self.host_bytes else CUTS)]
        travels = [self.shares] * 4
        if self.distinct is not None:
            both = (self.distinct, self.distinct.inside or self.distinct)
            travels = [shares for one in both for shares in (one.out_shares, one.back_shares)]
        by_tokens = [self._cut(shares, (shares,) * 4, "tokens") for shares in equal]
        return by_tokens + [
            self._cut(own, others, "experts") for own, *others in zip(self.shares, *travels, strict=True)
        ]

    def _cut(self, shares: Shares, travels: Sequence[Shares], by: ChunkBy) -> StepShape:
        """travels: shares of the rows that go and that come back, across and inside the nodes."""
        out, back, *inside = travels
        shape = StepShape(
            chunks=len(shares),
            by=by,
            rows=_parts(self.rows, shares),
            experts=experts_per_chunk(self.local_experts, len(shares), by),
            bytes_by_lane={lane: _parts(count, out) for lane, count in self.bytes_by_lane},
            slots_rows=self.slots_rows,
            row_bytes=self.row_bytes,
            expert_bytes=self.host_bytes,
        )
        if self.distinct is None:
            return shape
        passed_on = self.distinct.inside
        return without_own(
            shape,
            own_rows=self.distinct.own_rows,
            rows=shape.rows,
            out_by_lane=shape.bytes_by_lane,
            back_by_lane={lane: _parts(count, back) for lane, count in self.bytes_by_lane},
            metadata=self.distinct.metadata,
            inside=None
            if passed_on is None
            else (_parts(passed_on.bytes, inside[0]), _parts(passed_on.bytes, inside[1])),
            kept=0 if passed_on is None else passed_on.kept,
        )


def _parts(count: int, shares: Shares) -> tuple[int, ...]:
    """`count` in parts of these shares."""
    ends = list(accumulate(shares))
    cuts = [count * end // ends[-1] for end in ends]
    return tuple(after - before for before, after in pairwise([0, *cuts]))


def step_kind(exchange: ExchangePlan, *, row_bytes: int, nodes: Nodes | None, host_bytes: int = 0) -> StepKind:
    """The kind of a step: a pure function of the agreed counts. host_bytes: see `StepKind`."""
    whole = step_shape(exchange.chunked(1, "tokens"), row_bytes=row_bytes, nodes=nodes)
    local = exchange.num_slots // exchange.world_size
    return StepKind(
        grad=exchange.grad_enabled,
        rows=rounded(whole.rows[0]),
        slots_rows=rounded(whole.slots_rows),
        bytes_by_lane=tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items()),
        local_experts=local,
        shares=_all_shares(exchange.counts, exchange.world_size,
                           sensible_groups(local, BLOCKS)[1:] if host_bytes else GROUPS),
        row_bytes=row_bytes,
        copies=copies_kind(exchange, nodes),
        host_bytes=host_bytes,
    )  # fmt: skip


def distinct_kind(plain: StepKind, exchange: ExchangePlan, *, nodes: Nodes | None, metadata: MetadataBytes) -> StepKind:
    """The kind of a step that is deduplicated, from that of the plain one."""
    plan = exchange.chunked(1, "tokens")
    whole = distinct_shape(plan, row_bytes=plain.row_bytes, nodes=nodes, metadata=metadata)
    assert whole.distinct is not None
    inside, world, (first, last) = whole.distinct.inside, exchange.world_size, travelling(exchange)
    passed_on = None
    if inside is not None and exchange.node_rows is not None:
        out, back = (_all_shares(counts, world) for counts in exchange.node_rows.inside)
        kept = gateways_keep(exchange, whole.bytes_by_lane["inter"][0], plain.row_bytes)
        passed_on = InsideKind(bytes=rounded(sum(inside.out)), kept=rounded(kept), out_shares=out, back_shares=back)
    return replace(
        plain,
        rows=rounded(whole.rows[0]),
        bytes_by_lane=tuple((lane, rounded(counts[0])) for lane, counts in whole.bytes_by_lane.items()),
        distinct=DistinctKind(
            own_rows=rounded(whole.distinct.own_rows),
            out_shares=_all_shares(first, world),
            back_shares=_all_shares(last, world),
            metadata=metadata,
            inside=passed_on,
        ),
    )


def _all_shares(counts: Counts, world_size: int, cuts: Sequence[int] = GROUPS) -> tuple[Shares, ...]:
    """For every number of expert groups, the rows of each."""
    rows_of = counts.totals.reshape(world_size, -1).sum(axis=0)
    return tuple(_shares(rows_of, groups) for groups in cuts if groups <= len(rows_of))


def _shares(rows_of: np.ndarray, groups: int) -> Shares:
    """The rows of each group of a rank's experts; rows_of: int64 [e], of each expert over all ranks."""
    ends = np.cumsum(rows_of)[len(rows_of) * np.arange(1, groups + 1) // groups - 1]
    rows, total = np.diff(ends, prepend=0), int(rows_of.sum())
    shares = (2 * SHARE_UNITS * groups * rows + total) // max(1, 2 * total)
    return tuple(int(share) for share in shares) if shares.any() else (1,) * groups


def rounded(count: int) -> int:
    """`count` to its DIGITS leading binary digits.

    >>> rounded(1023), rounded(33), rounded(7)
    (1024, 34, 7)
    """
    unit = 1 << max(0, count.bit_length() - DIGITS)
    return (count + unit // 2) // unit * unit
