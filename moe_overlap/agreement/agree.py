"""From what the ranks said to the plan of the step, or the same error on all of them: in two forms.

Gathered: every rank has the records of all ranks and reads everything from them (`agree_on`). For many ranks that is
much: all counts go to all ranks. Exchanged (`Exchanged`): every rank hears the named fields of all and only the counts
that concern its own slots; the sums and maxima beside them (`loads.py`) are reduced. Both forms end in the same plan,
up to what `Counts` says of the numbers of others, and in the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import KINDS, PARTS, Counts, Loads, impossible_rows, of_rank
from moe_overlap.agreement.node_counts import NodeCounts, doubted, heard_inside, impossible, parts_of, sent_across
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.agreement.record import DEDUP, PHASES, RECORD_FIELDS, StepRecord, compare, record_words
from moe_overlap.agreement.seats import Seats, StepRule, seats_of_step
from moe_overlap.errors import PlanMismatch


def agree_on(records: torch.Tensor, *, rank: int, num_slots: int, seats: Seats | None = None,
             rule: StepRule | None = None) -> ExchangePlan:  # fmt: skip
    """The plan that follows from the gathered records, int64 [W, n] on the CPU: words of `StepRecord.to_tensor`, behind
    which there may be anything. num_slots: of the header, those that tables have; `seats`: None: expert i in slot i;
    `rule`: which are in their place in this step.

    Every rank calls this with the same data and so comes to the same end: the plan, or the same error. Raises
    ConfigError where a rank refused the step, PlanMismatch where the ranks differ or a count cannot be.
    """
    world_size = records.shape[0]
    column = compare(records, rank=rank)
    experts = num_slots if seats is None else seats.num_experts
    nodes = max(0, _nodes(column))
    node_slots = nodes * num_slots // world_size
    words = record_words(experts, num_slots, int(column["dedup"][0]), node_slots)
    said = records.numpy()[:, len(RECORD_FIELDS) : words].copy().view(np.int32).astype(np.int64)
    logical, ends, of_nodes = np.split(said, [BLOCKS * experts, said.shape[1] - 2 * BLOCKS * node_slots], axis=1)
    logical = logical.reshape(world_size, BLOCKS, experts)
    tables = [logical if seats is None else seats.counts(logical, range(world_size))]
    tables += list(ends.reshape(world_size, -1, BLOCKS, num_slots).swapaxes(0, 1)) if ends.size else []
    bad = impossible_rows(*(one.reshape(world_size, BLOCKS, world_size, -1) for one in tables))
    node_rows = None
    if nodes:
        pairs = of_nodes.reshape(world_size, 2, BLOCKS, node_slots)
        bad |= impossible(pairs, tables[1:])
        node_rows = NodeCounts.of(pairs, tables[1:], rank)
    _require_possible(np.nonzero(bad)[0], column, rank)
    kept, relayed = True, False
    if rule is not None and seats is not None:
        base, (seats, relayed) = seats, seats_of_step(rule, logical, seats)
        kept = seats is base
        if not kept:  # deduplicated: first and last follow, `second_gather.py`
            tables = [seats.counts(logical, range(world_size))]
    return _plan(column, [Counts.of(one, rank) for one in tables], rank=rank, node_rows=node_rows, seats=seats,
                 kept=kept, relayed=relayed)  # fmt: skip


class Exchanged:
    """What one rank does to agree without knowing all counts. In this order, each a collective of all ranks: `parts`
    are exchanged and `hear` gets those of the others; `sums` are added up and `most` reduced to maxima; `plan`.

    record: this rank's. column: the named fields of all ranks (`compare`).
    """

    def __init__(self, record: StepRecord, column: dict[str, np.ndarray], *, rank: int) -> None:
        self._column, self._rank, self._nodes = column, rank, record.nodes
        self._world = len(column["step"])
        counts, *ends = (one.numpy().astype(np.int64) for one in record.tables if one is not record.node_rows)
        self._seats = record.seats
        if self._seats is not None:
            counts = self._seats.counts(counts[None], [rank])[0]
        self._sent, self._ends = [counts, *ends], ends
        self._received: list[np.ndarray] = []
        self._bad = 0
        self._num_nodes = 0
        if record.node_rows is not None:
            self._num_nodes = record.node_rows.shape[2] * self._world // ends[0].shape[1]
            pairs = record.node_rows.numpy().astype(np.int64)
            both = zip(ends, pairs, strict=True)
            self._sent += [sent_across(rows[None], one[None], [rank], self._world)[0] for rows, one in both]

    def parts(self) -> torch.Tensor:
        """int32 [W, n]: for every rank the counts of its slots, tables * BLOCKS * e; with `node_rows`, `parts_of` them
        beside these."""
        tables = np.stack([one.reshape(BLOCKS, self._world, -1) for one in self._sent])  # [tables, BLOCKS, W, e]
        parts = tables.transpose(2, 0, 1, 3).reshape(self._world, -1)
        if self._num_nodes:
            passed_on = parts_of(self._ends, self._num_nodes, self._rank, self._world)
            parts = np.concatenate([parts, passed_on], axis=1)
        return torch.from_numpy(np.ascontiguousarray(parts.astype(np.int32)))

    def hear(self, parts: torch.Tensor) -> None:
        """The parts of all ranks that are for this one, int32 [W, n]."""
        said = parts.numpy().astype(np.int64)
        tables, passed_on = np.split(said, [self._sent[0].size // self._world * len(self._sent)], axis=1)
        tables = tables.reshape(self._world, len(self._sent), BLOCKS, -1)
        self._received = [tables[:, i] for i in range(len(self._sent))]
        odd = impossible_rows(*(one[:, :, None] for one in self._received[:3]))
        if self._num_nodes:
            _, first, last, *across = self._received
            odd |= doubted(passed_on, across, self._num_nodes, self._rank)
            for sent, received in heard_inside(passed_on, (first, last), self._num_nodes, self._rank):
                self._sent.append(sent)
                self._received.append(received)
        bad = np.nonzero(odd)[0]
        # The maximum over the ranks is then the first rank that one of them doubts.
        self._bad = self._world - int(bad[0]) if len(bad) else 0

    def sums(self) -> torch.Tensor:
        """int64 [n], to be added up over the ranks."""
        parts = []
        for sent, loads in zip(self._sent, self._loads(), strict=True):
            parts += [sent.sum(axis=0), loads.blocks.reshape(-1), loads.slots.reshape(-1)]
        return torch.from_numpy(np.concatenate(parts))

    def most(self) -> torch.Tensor:
        """int64 [m], of which the maximum over the ranks is to be taken."""
        parts = [np.array([self._bad])]
        for sent, loads in zip(self._sent, self._loads(), strict=True):
            parts += [np.array([sent.sum()]), loads.most.reshape(-1)]
        return torch.from_numpy(np.concatenate(parts))

    def plan(self, sums: torch.Tensor, most: torch.Tensor) -> ExchangePlan:
        """From the reduced numbers. Raises PlanMismatch alike on all ranks where one of them heard what cannot be."""
        bad, *maxima = np.split(most.numpy(), np.arange(1, most.numel(), 2 * PARTS * len(KINDS) + 1))
        _require_possible([self._world - int(bad[0])] if bad[0] else [], self._column, self._rank)
        tables = []
        for sent, received, summed, maximum in zip(
            self._sent, self._received, np.split(sums.numpy(), len(self._sent)), maxima, strict=True
        ):
            totals, blocks, slots = np.split(summed, [sent.shape[1], sent.shape[1] + BLOCKS * len(KINDS)])
            loads = Loads(
                most=maximum[1:].reshape(2, PARTS, len(KINDS)), blocks=blocks.reshape(BLOCKS, -1),
                slots=slots.reshape(-1, len(KINDS)), nodes=self._nodes,
            )  # fmt: skip
            tables.append(
                Counts(sent=sent, received=received, totals=totals, most_sent=int(maximum[0]), away=loads.away,
                       reduced=loads)
            )  # fmt: skip
        node_rows = None
        if self._num_nodes:
            first, last, *inside = tables[3:]
            node_rows = NodeCounts(across=(first, last), inside=(inside[0], inside[1]))
        return _plan(self._column, tables[:3], rank=self._rank, node_rows=node_rows, seats=self._seats)

    def _loads(self) -> list[Loads]:
        return [of_rank(sent, received, rank=self._rank, nodes=self._nodes)
                for sent, received in zip(self._sent, self._received, strict=True)]  # fmt: skip


def _nodes(column: dict[str, np.ndarray]) -> int:
    """For how many nodes the ranks count rows; -1 where that cannot be."""
    world_size, size = len(column["step"]), int(column["ranks_per_node"][0])
    if not 0 <= size <= world_size or world_size % max(1, size):
        return -1
    if not column["hierarchical"][0]:
        return 0
    return world_size // size if size and column["dedup"][0] == 1 else -1


def _plan(
    column: dict[str, np.ndarray], tables: list[Counts], *, rank: int, node_rows: NodeCounts | None,
    seats: Seats | None,
    kept: bool = True,
    relayed: bool = False,
) -> ExchangePlan:  # fmt: skip
    phase = int(column["phase"][0])
    return ExchangePlan(
        rank=rank,
        world_size=len(column["step"]),
        step=int(column["step"][0]),
        phase=PHASES[phase] if 0 <= phase < len(PHASES) else "unknown",
        grad_enabled=bool(column["grad_enabled"][0]),
        x_requires_grad=bool(column["x_requires_grad"].any()),
        counts=tables[0],
        dedup=int(column["dedup"][0]),
        first=tables[1] if len(tables) > 1 else None,
        last=tables[2] if len(tables) > 1 else None,
        ranks_per_node=int(column["ranks_per_node"][0]),
        node_rows=node_rows,
        seats=seats,
        copies_kept=kept,
        copies_relayed=relayed,
        weight_versions=tuple(column["weight_version"].tolist()),
        weights_require_grad=bool(column["weights_require_grad"].any()),
    )


def _require_possible(bad: Sequence[int] | np.ndarray, column: dict[str, np.ndarray], rank: int) -> None:
    """bad: the ranks whose counts no routing can have."""
    if not 0 <= int(column["dedup"][0]) < len(DEDUP) or _nodes(column) < 0:
        bad = [0]
    if len(bad):
        peer = int(bad[0])
        raise PlanMismatch(f"rank {peer} announced an impossible row count; nothing was sent", rank=rank, peer=peer,
                           step=int(column["step"][rank]), action="N")  # fmt: skip
