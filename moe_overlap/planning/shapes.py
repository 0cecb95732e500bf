"""The integers of a step that its durations depend on: of an agreed one, or of one in which all is balanced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from moe_overlap.agreement.loads import PLANNED_BY, ChunkBy
from moe_overlap.agreement.sizes import BLOCKS
from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InsideShape:
    """Bytes that leave or enter the busiest rank inside its node, after an exchange across and before one: of the first
    exchange of each chunk and of the second one, and of M and Mt. `narrow_out`: of the first exchanges of forward,
    where rows have a narrower dtype on that way; None: they do not."""

    out: tuple[int, ...]
    back: tuple[int, ...]
    metadata: int
    gradients: int
    narrow_out: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GatewayShape:
    """Of the busiest gateway, where rows cross nodes once, in bytes. `kept`: of the buffers in which it keeps the rows
    of all chunks until the last rank has them, and their sums until the last one has come; 0 in one chunk. `moved`:
    what it reads and writes in memory for each chunk; empty where nobody prices it apart."""

    kept: int
    moved: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DistinctShape:
    """What a deduplicated step has beside its chunks. `own_rows`: rows of the busiest rank's experts that stay there;
    `own_experts`: how many compute them. `back_by_lane`: bytes of the second exchanges, as `bytes_by_lane` of the first
    ones: by groups of experts a row goes with another chunk than it comes back with. `metadata_by_lane`: bytes of M,
    and `gradients_by_lane` of Mt. `inside`: where rows cross nodes once, what is passed on inside them;
    `gateway`: what those do who pass it on."""

    own_rows: int
    own_experts: int
    back_by_lane: Mapping[str, tuple[int, ...]]
    metadata_by_lane: Mapping[str, int]
    gradients_by_lane: Mapping[str, int]
    inside: InsideShape | None = None
    gateway: GatewayShape | None = None


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The integers of one step under one chunking, which all ranks derive from the same agreed counts.

    `rows`: rows that the busiest rank's experts have in each chunk. `experts`: experts of a rank that compute in each
    chunk. `bytes_by_lane`: by wire, the bytes that leave or
    enter the busiest rank in one exchange of each chunk; the way back moves the same. `slots_rows`: T * K of the rank
    with most tokens. `row_bytes`: of one row, for the bytes that an exchange holds in buffers. `distinct`: where the
    step is deduplicated; `rows` are then those of others, and `bytes_by_lane` those of distinct rows. `narrow_by_lane`:
    bytes of the first exchanges of forward, where rows have a narrower dtype on that way; None: they do not.
    `expert_bytes`: of one expert's weights, where they lie in the host's memory; 0: they are on the device.
    """

    chunks: int
    by: ChunkBy
    rows: tuple[int, ...]
    experts: tuple[int, ...]
    bytes_by_lane: Mapping[str, tuple[int, ...]]
    slots_rows: int
    row_bytes: int
    distinct: DistinctShape | None = None
    narrow_by_lane: Mapping[str, tuple[int, ...]] | None = None
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        back = () if self.distinct is None else self.distinct.back_by_lane.items()
        narrow = () if self.narrow_by_lane is None else self.narrow_by_lane.items()
        wires = (*self.bytes_by_lane.items(), *back, *narrow)
        for name, per_chunk in (("rows", self.rows), ("experts", self.experts), *wires):
            if len(per_chunk) != self.chunks:
                raise ConfigError(name, per_chunk, f"one number for each of {self.chunks} chunks")


@dataclass(frozen=True, kw_only=True)
class MetadataBytes:
    """Of one row of a deduplicated step: what goes beside it (M), and what comes back for that (Mt)."""

    out: int
    back: int


def metadata_bytes(top_k: int, weight_bytes: int) -> MetadataBytes:
    """An int32 id and a weight for every choice of a token; back, the gradients of the weights."""
    return MetadataBytes(out=top_k * (4 + weight_bytes), back=top_k * weight_bytes)


def balanced_shape(
    *,
    tokens: int,
    top_k: int,
    hidden: int,
    dtype_bytes: int,
    ranks: int,
    ranks_per_node: int,
    local_experts: int,
    chunks: int,
    by: ChunkBy,
    metadata: MetadataBytes | None = None,
    busiest: float = 1.0,
) -> StepShape:
    """The shape of a step in which every rank has `tokens` tokens and every expert gets the same number of rows.

    Chunks are cut as `ChunkPlan` cuts them: blocks [16c//r, 16(c+1)//r) of the tokens, or the experts
    [e*c//r, e*(c+1)//r) of every rank. Of a rank's rows, (W - L) / W go to other nodes and (L - 1) / W to the other
    ranks of its node (W ranks, L of them on a node). With few tokens not every expert is chosen: `hit_experts`.
    `metadata`: the step is deduplicated, and all sets of `top_k` experts are equally likely. `busiest`: rows of the
    busiest rank's experts over the mean, at least 1; what enters that rank is then what an exchange waits for.
    """
    if by not in PLANNED_BY:
        raise ConfigError("by", by, f"one of {PLANNED_BY}")
    most = BLOCKS if by == "tokens" else local_experts
    if not 1 <= chunks <= most:
        raise ConfigError("chunks", chunks, f"from 1 to {most}, by {by}")
    if not busiest >= 1:
        raise ConfigError("busiest", busiest, "a factor of at least 1")
    ends = [tokens * (BLOCKS * c // chunks) // BLOCKS if by == "tokens" else tokens for c in range(chunks + 1)]
    if by == "tokens":
        cuts = [end * top_k for end in ends]
    else:
        cuts = [tokens * top_k * (local_experts * c // chunks) // local_experts for c in range(chunks + 1)]
    rows = tuple(math.ceil((after - before) * busiest) for before, after in pairwise(cuts))
    every = ranks * local_experts
    experts = tuple(
        hit_experts(count, every, top_k, ranks * (ends[c + 1] - ends[c] if by == "tokens" else tokens))
        for c, count in enumerate(experts_per_chunk(local_experts, chunks, by))
    )
    row_bytes = hidden * dtype_bytes
    peers = {"inter": ranks - ranks_per_node, "intra": ranks_per_node - 1}
    shape = StepShape(
        chunks=chunks,
        by=by,
        rows=rows,
        experts=experts,
        bytes_by_lane={
            lane: tuple(-(-n * row_bytes * count // ranks) for n in rows) for lane, count in peers.items() if count
        },  # fmt: skip
        slots_rows=tokens * top_k,
        row_bytes=row_bytes,
    )
    if metadata is None:
        return shape
    out, back = _distinct_rows(tokens, top_k, ranks * local_experts, local_experts, chunks, by)
    busiest = min(busiest, tokens / max(sum(out), 1e-9)) if tokens else busiest  # a token has one row there
    return without_own(
        shape,
        own_rows=sum(n // ranks for n in rows),
        rows=tuple(n - n // ranks for n in rows),
        out_by_lane=_spread(out, peers, busiest, row_bytes),
        back_by_lane=_spread(back, peers, busiest, row_bytes),
        metadata=metadata,
    )


def _spread(
    rows: Sequence[float], peers: Mapping[str, int], busiest: float, row_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Bytes by wire, from rows for one other rank by chunk."""
    return {lane: tuple(round(n * count * busiest) * row_bytes for n in rows) for lane, count in peers.items() if count}


def _distinct_rows(
    tokens: int, top_k: int, experts: int, local: int, chunks: int, by: ChunkBy
) -> tuple[list[float], list[float]]:
    """Rows of a rank's tokens for one other rank, by the chunk that they go with and by that which they come back with:
    by groups of a rank's `local` experts, those of the lowest and of the highest expert that a token chose there."""
    if by == "tokens":
        ends = [tokens * (BLOCKS * c // chunks) // BLOCKS for c in range(chunks + 1)]
        rows = [(end - begin) * (1 - chance_of_none(experts, local, top_k)) for begin, end in pairwise(ends)]
        return rows, rows
    cuts = list(pairwise(local * c // chunks for c in range(chunks + 1)))

    def chosen(begin: int, end: int) -> float:
        """Tokens that chose none of `begin` experts, but one of the next `end` - `begin`."""
        return tokens * (chance_of_none(experts, begin, top_k) - chance_of_none(experts, end, top_k))

    return [chosen(begin, end) for begin, end in cuts], [chosen(local - end, local - begin) for begin, end in cuts]


def without_own(
    shape: StepShape,
    *,
    own_rows: int,
    rows: tuple[int, ...],
    out_by_lane: Mapping[str, tuple[int, ...]],
    back_by_lane: Mapping[str, tuple[int, ...]],
    metadata: MetadataBytes,
    inside: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    kept: int = 0,
) -> StepShape:
    """The deduplicated form of a shape: `own_rows` stay, each chunk's experts have `rows` of others, and what travels
    is `out_by_lane` and, the other way, `back_by_lane`; inside nodes, where rows cross them once, `inside`, and what
    gateways keep from chunk to chunk, where there are several."""

    def beside(row_bytes: int) -> dict[str, int]:
        return {lane: sum(sizes) // shape.row_bytes * row_bytes for lane, sizes in out_by_lane.items()}

    passed_on = None
    if inside is not None:
        rows_inside = sum(inside[0]) // shape.row_bytes
        passed_on = InsideShape(out=inside[0], back=inside[1], metadata=rows_inside * metadata.out,
                                gradients=rows_inside * metadata.back)  # fmt: skip

    distinct = DistinctShape(
        own_rows=own_rows,
        own_experts=max(shape.experts) if shape.by == "tokens" else sum(shape.experts),
        back_by_lane=back_by_lane,
        metadata_by_lane=beside(metadata.out),
        gradients_by_lane=beside(metadata.back),
        inside=passed_on,
        gateway=None if inside is None else GatewayShape(kept=kept if shape.chunks > 1 else 0),
    )
    return replace(shape, rows=rows, bytes_by_lane=out_by_lane, distinct=distinct)


def experts_per_chunk(local_experts: int, chunks: int, by: ChunkBy) -> tuple[int, ...]:
    """How many of a rank's experts compute in each chunk: all of them, or the group [e*c//r, e*(c+1)//r)."""
    if by == "tokens":
        return (local_experts,) * chunks
    return tuple(local_experts * (c + 1) // chunks - local_experts * c // chunks for c in range(chunks))


def hit_experts(count: int, experts: int, top_k: int, tokens: int) -> int:
    """How many of `count` of all `experts` are expected to be chosen by so many tokens of all ranks, which choose
    independently, every expert equally likely; rounded up.

    >>> hit_experts(32, 256, 8, 8), hit_experts(32, 256, 8, 4096), hit_experts(4, 4, 1, 1), hit_experts(4, 4, 1, 0)
    (8, 32, 1, 0)
    """
    return math.ceil(count * (1 - (1 - min(1.0, top_k / experts)) ** tokens) - 1e-9)


def with_narrow_rows(shape: StepShape, row_bytes: int) -> StepShape:
    """The shape where rows have `row_bytes` on their way to the experts in forward."""

    def narrowed(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size * row_bytes // shape.row_bytes) for size in sizes)

    narrow, distinct = {lane: narrowed(sizes) for lane, sizes in shape.bytes_by_lane.items()}, shape.distinct
    if distinct is not None and distinct.inside is not None:
        inside = replace(distinct.inside, narrow_out=narrowed(distinct.inside.out))
        distinct = replace(distinct, inside=inside)
    return replace(shape, narrow_by_lane=narrow, distinct=distinct)


def with_rows_for_nodes(shape: StepShape, *, distinct_nodes: float, tokens: int, ranks_per_node: int) -> StepShape:
    """A deduplicated shape where one row for each (token, node) crosses nodes, and is passed on there to each rank that
    wants it, which was what crossed before: of `ranks_per_node` one needs no wire, as it is the gateway itself.
    distinct_nodes: of a token, others. By chunks of tokens alone. What gateways move in memory: `gateway_bytes`."""
    if shape.distinct is None or shape.by != "tokens":
        raise ConfigError("shape", shape.by, "a deduplicated shape by tokens")
    before, known, several = shape.bytes_by_lane["inter"], shape.distinct, shape.chunks > 1
    total = max(1, sum(before))
    crossing = round(distinct_nodes * tokens) * shape.row_bytes
    inter = tuple(min(size, size * crossing // total) for size in before)
    by_lane = {**shape.bytes_by_lane, "inter": inter}
    there = tuple(size * (ranks_per_node - 1) // ranks_per_node for size in before)

    def of_nodes(sizes: Mapping[str, int]) -> dict[str, int]:
        return {**sizes, "inter": round(sum(inter) / total * sizes["inter"])}

    def passed_on(sizes: Mapping[str, int]) -> int:
        return sizes["inter"] * (ranks_per_node - 1) // ranks_per_node

    inside = InsideShape(out=there, back=there, metadata=passed_on(known.metadata_by_lane),
                         gradients=passed_on(known.gradients_by_lane))  # fmt: skip
    gateway = GatewayShape(
        kept=sum(inter) + sum(before) if several else 0,
        moved=tuple(gateway_bytes(*sizes, keeps=several) for sizes in zip(inter, before, strict=True)),
    )
    distinct = replace(known, inside=inside, gateway=gateway, back_by_lane=by_lane,
                       metadata_by_lane=of_nodes(known.metadata_by_lane),
                       gradients_by_lane=of_nodes(known.gradients_by_lane))  # fmt: skip
    return replace(shape, bytes_by_lane=by_lane, distinct=distinct)


def gateway_bytes(crossing: int, passed_on: int, *, keeps: bool) -> int:
    """Bytes that a gateway reads and writes in memory for the rows of one chunk, on their way to the experts and back.

    crossing: of the rows that come across, one for each token. passed_on: of those that it makes of them, one for each
    rank of the node that wants the token. Each of these is read and written; on the way back their sums are read, added
    up, and one for each token is written. keeps: there are several chunks, so both go through a buffer. Bringing rows
    into another order, as every exchange does, is not in it.

    >>> gateway_bytes(100, 250, keeps=False), gateway_bytes(100, 250, keeps=True)
    (850, 1550)
    """
    moved = 2 * passed_on + passed_on + crossing
    return moved + 2 * (crossing + passed_on) if keeps else moved


def chance_of_none(experts: int, of_these: int, top_k: int) -> float:
    """How likely a token chooses none of `of_these` experts, when all sets of `top_k` are equally likely."""
    return math.comb(experts - of_these, top_k) / math.comb(experts, top_k)


def distinct_ranks(experts: int, ranks: int, top_k: int) -> float:
    """How many other ranks a token goes to on average, when all sets of `top_k` experts are equally likely.

    >>> round(distinct_ranks(32, 2, 8), 4), round(distinct_ranks(64, 8, 2), 3), distinct_ranks(8, 8, 8)
    (0.9988, 1.653, 7.0)
    """
    return (ranks - 1) * (1 - chance_of_none(experts, experts // ranks, top_k))
