"""What it costs to agree on the counts of a step, in closed form: messages, bytes, and seconds by a simple model.

A round is a direct exchange: each rank sends one message to every other one of a group and waits for theirs. Gathered
(up to `gathered_ranks`), there is one round, of all ranks:

    head and capacity words of 8 bytes (`message.py`); the capacity is that of the group's largest record

Exchanged, the ranks lie on a grid, and what goes to all ranks goes along the rows and then along the columns: a message
to every rank of the row, each of which has the words for a whole column in it, and then one to every rank of the
column. So two rounds and about 2 sqrt(W) messages are an exchange of all ranks (`Grid`). Four of these follow one
another, each of which needs what the one before brought:

    fields      as above, with a short capacity, since no record has its counts in it; the same to all
    counts      tables * 16 * slots / ranks * 4 bytes, others to each rank; where rows cross nodes once, two tables
                more, and two for each rank of a node
    reduction   every rank gets a slice of everybody's sums and maxima (others to each), and sends what it made of it
                to all
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from moe_overlap.agreement.loads import KINDS, PARTS
from moe_overlap.agreement.sizes import BLOCKS, HEAD_WORDS, HEADER_WORDS, RECORD_WORDS, record_words

GATHERED_RANKS = 64  # with more ranks counts are exchanged


@dataclass(frozen=True)
class Grid:
    """W = rows * columns ranks; rank r stands in row r // columns and column r % columns. A single row: all ranks talk
    to all in one round."""

    rows: int
    columns: int

    @classmethod
    def of(cls, ranks: int) -> Grid:
        """The squarest one.

        >>> Grid.of(4096), Grid.of(7), Grid.of(6)
        (Grid(rows=64, columns=64), Grid(rows=1, columns=7), Grid(rows=2, columns=3))
        """
        rows = max(n for n in range(1, math.isqrt(ranks) + 1) if ranks % n == 0)
        return cls(rows, ranks // rows)

    def row(self, rank: int) -> range:
        """The ranks of its row, itself too."""
        first = rank - rank % self.columns
        return range(first, first + self.columns)

    def column(self, rank: int) -> range:
        return range(rank % self.columns, self.rows * self.columns, self.columns)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a rank: `bytes_to_each` to all others among `ranks`."""

    ranks: range
    bytes_to_each: int


@dataclass(frozen=True, kw_only=True)
class AgreementCost:
    """Of one agreement, on one rank; all have the same numbers."""

    rounds: tuple[Round, ...]

    @property
    def messages(self) -> int:
        return sum(len(one.ranks) - 1 for one in self.rounds)

    @property
    def bytes(self) -> int:
        return sum(one.bytes_to_each * (len(one.ranks) - 1) for one in self.rounds)

    def bytes_to(self, ranks: Collection[int]) -> int:
        """Bytes for some of the other ranks."""
        return sum(one.bytes_to_each * sum(rank in ranks for rank in one.ranks) for one in self.rounds)

    def seconds(self, *, latency_s: float, message_s: float, bytes_per_s: float) -> float:
        """Rounds follow one another, each with one latency; a rank's messages leave it one by one, and cost `message_s`
        each beside their bytes; peers do not disturb each other, nobody is late, and computing the sums is free."""
        if not self.messages:
            return 0.0
        return len(self.rounds) * latency_s + self.messages * message_s + self.bytes / bytes_per_s


def agreement_cost(
    *, ranks: int, experts: int, slots: int | None = None, dedup: int = 0, nodes: int = 0,
    gathered_ranks: int = GATHERED_RANKS, grid: Grid | None = None, capacity: int = 0, rank: int = 0,
) -> AgreementCost:  # fmt: skip
    """slots: of all ranks (None: one for each expert). dedup: a position in `record.DEDUP`. nodes: for which rows are
    counted. grid: None: the squarest.
    capacity: words that other layers of the group made room for."""
    slots = experts if slots is None else slots
    gathered = ranks <= gathered_ranks
    needed = record_capacity(experts, slots, dedup, ranks=ranks, nodes=nodes, gathered=gathered)
    fields = 8 * (HEAD_WORDS + max(capacity, needed))
    if gathered:
        return AgreementCost(rounds=(Round(ranks=range(ranks), bytes_to_each=fields),))
    local, sent = slots // ranks, (5 if nodes else 3) if dedup == 1 else 1
    tables = sent + (2 if nodes else 0)
    sums = tables * (slots + (BLOCKS + local) * len(KINDS))
    most = 1 + tables * (1 + 2 * PARTS * len(KINDS))
    passed_on = 2 * ranks // nodes if nodes else 0
    counts, slice_ = 4 * BLOCKS * local * (sent + passed_on), 8 * (-(-sums // ranks) - (-most // ranks))
    grid = Grid.of(ranks) if grid is None else grid
    rounds = []
    for to_row, to_column in (
        (fields, grid.columns * fields),
        (grid.rows * counts, grid.columns * counts),
        (grid.rows * slice_, grid.columns * slice_),
        (slice_, grid.columns * slice_),
    ):
        rounds.append(Round(ranks=grid.row(rank), bytes_to_each=to_row))
        if grid.rows > 1:
            rounds.append(Round(ranks=grid.column(rank), bytes_to_each=to_column))
    return AgreementCost(rounds=tuple(rounds))


def second_gather_cost(*, ranks: int, slots: int) -> AgreementCost:
    """Of `second_gather.py`; slots: seats of all ranks in the step."""
    return AgreementCost(rounds=(Round(ranks=range(ranks), bytes_to_each=2 * BLOCKS * slots * 4),))


def record_capacity(experts: int, slots: int, dedup: int, *, ranks: int, nodes: int = 0, gathered: bool) -> int:
    """Words that the messages of a group need room for, for the records of this layer."""
    words = record_words(experts, slots, dedup, nodes * slots // ranks)
    return max(HEADER_WORDS, words if gathered else RECORD_WORDS)
