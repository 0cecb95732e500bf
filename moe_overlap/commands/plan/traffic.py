"""The traffic of a saved routing at any number of ranks, in the place of tokens that want all experts equally often.

Every rank has `--tokens` tokens of the file, as `moe-overlap bench layer --routing` gives them out, and the experts lie
in order on the ranks. So counts, bytes and the busiest rank are those that such a step would agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from moe_overlap.agreement.counts import block_counts, block_counts_of_rows
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkBy, ExchangePlan
from moe_overlap.agreement.seats import Seats, seats_of
from moe_overlap.auto.calibrate import distinct_shape, step_shape
from moe_overlap.auto.replicate import placement_of
from moe_overlap.commands.bench.routing import RoutingFile, read_file
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from moe_overlap.planning.copy_load import Load
from moe_overlap.planning.replication import Decision
from moe_overlap.planning.shapes import MetadataBytes, StepShape

FLAG = "--routing"


@dataclass(frozen=True, eq=False, kw_only=True)
class Traffic:
    """One step of W ranks. `exchange`: its counts, as rank 0 would know them. nodes: the node of each rank.
    distinct_WW: int64 [W, W], tokens of a rank with an expert on another one; None where only plain rows were asked
    for."""

    exchange: ExchangePlan
    nodes: tuple[int, ...]
    tokens: int
    distinct_WW: np.ndarray | None

    def shape(self, chunks: int, by: ChunkBy, *, row_bytes: int, metadata: MetadataBytes | None) -> StepShape:
        """The integers of the step in so many chunks; metadata: it is deduplicated."""
        plan = self.exchange.chunked(chunks, by)
        if metadata is None:
            return step_shape(plan, row_bytes=row_bytes, nodes=self.nodes)
        return distinct_shape(plan, row_bytes=row_bytes, metadata=metadata, nodes=self.nodes)

    @property
    def choices_WW(self) -> np.ndarray:
        """int64 [W, W], choices of a rank for the experts of another one."""
        ranks = len(self.nodes)
        found: np.ndarray = self.rows_WE.reshape(ranks, ranks, -1).sum(axis=2)
        return found

    @property
    def rows_WE(self) -> np.ndarray:
        """int64 [W, E], choices of each rank's tokens for each expert; experts in order, without copies."""
        table = self.exchange.counts.table
        assert table is not None
        found: np.ndarray = table.sum(axis=1)
        return found

    @property
    def rows_per_token(self) -> float:
        """Choices for other ranks."""
        return _away(self.choices_WW) / max(1, self.tokens)

    @property
    def distinct_rows_per_token(self) -> float:
        """Other ranks that a token goes to."""
        assert self.distinct_WW is not None
        return _away(self.distinct_WW) / max(1, self.tokens)

    @property
    def kept(self) -> float:
        """Distinct rows for each choice, those that stay included."""
        assert self.distinct_WW is not None
        return float(self.distinct_WW.sum() / max(1, self.choices_WW.sum()))

    @property
    def max_over_mean(self) -> float:
        """Choices of the most wanted expert over the mean."""
        totals = self.exchange.counts.totals
        return float(totals.max() * len(totals) / max(1, totals.sum()))

    @property
    def local_share(self) -> float:
        """Of the choices, those for experts on the token's node."""
        node, choices_WW = np.array(self.nodes), self.choices_WW
        return float(choices_WW[node[:, None] == node[None, :]].sum() / max(1, choices_WW.sum()))

    def to_json(self) -> dict[str, float]:
        return {"rows_per_token": self.rows_per_token, "max_over_mean": self.max_over_mean,
                "local_share": self.local_share}  # fmt: skip


def _away(pairs_WW: np.ndarray) -> int:
    return int(pairs_WW.sum() - np.trace(pairs_WW))


@lru_cache(maxsize=4)
def saved(path: str, experts: int, top_k: int) -> RoutingFile:
    """The file, read once. Raises ConfigError("--routing")."""
    return read_file(Path(path), experts=experts, top_k=top_k)


@lru_cache(maxsize=256)
def traffic(
    file: RoutingFile, path: str, *, experts: int, top_k: int, tokens: int, ranks: int, per_node: int, distinct: bool,
    seats: Seats | None = None,
) -> Traffic:  # fmt: skip
    """Of `tokens` tokens on each of so many ranks, top_k choices each. distinct: of rows for each (token, rank) too.
    seats: where the experts are, copies too; None: in order. Raises ConfigError("--routing") where a token then has an
    expert twice."""
    slots = experts if seats is None else seats.num_seats
    tables: list[tuple[torch.Tensor, ...]] = []
    distinct_WW = np.zeros((ranks, ranks), dtype=np.int64)
    for rank in range(ranks):
        ids_TK, _ = file.of_rank(rank, ranks, tokens=tokens, top_k=top_k)
        ids_TK = ids_TK if seats is None else seats.of_ids(ids_TK, rank)
        if not distinct:
            tables.append((block_counts(ids_TK, slots),))
            continue
        try:
            counts, first, last = block_counts_of_rows(ids_TK, slots, ranks)
        except ConfigError:
            raise ConfigError(FLAG, path, "no expert twice in a token, beside --dedup") from None
        tables.append((counts, first, last))
        distinct_WW[rank] = first.sum(dim=0).reshape(ranks, -1).sum(dim=1).numpy()
    found = [Counts.of(torch.stack(parts).numpy(), 0) for parts in zip(*tables, strict=True)]
    exchange = ExchangePlan(
        rank=0, world_size=ranks, step=1, phase="forward", grad_enabled=True, x_requires_grad=True, counts=found[0],
        dedup=int(distinct), first=found[1] if distinct else None, last=found[2] if distinct else None,
        ranks_per_node=per_node, seats=seats,
    )  # fmt: skip
    return Traffic(exchange=exchange, nodes=tuple(rank // per_node for rank in range(ranks)), tokens=ranks * tokens,
                   distinct_WW=distinct_WW if distinct else None)  # fmt: skip


def seats_with_copies(load: Load, decision: Decision) -> Seats:
    """Experts in order on their ranks, beside them the copies of a decision, among which rows are shared out as it
    says."""
    ranks, experts = load.counts.shape
    return seats_of(placement_of(load, decision, Placement.identity(experts, ranks)))
