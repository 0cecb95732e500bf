"""What it costs to agree on the counts of a step, in closed form: messages, bytes, and seconds by a simple model.

Every collective of an agreement is a direct exchange: a round, in which each rank sends one message to every other one
and waits for theirs. Gathered (up to `gathered_ranks`), there is one round:

    head and capacity words of 8 bytes (`message.py`); the capacity is that of the group's largest record

Exchanged, there are four, each of which needs what the one before brought:

    fields      as above, with a short capacity, since no record has its counts in it
    counts      tables * 16 * slots / ranks * 4 bytes
    reduction   two rounds: every rank reduces one slice of the sums and maxima, and sends it to all
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.header import HEADER_WORDS
from moe_overlap.agreement.loads import KINDS, PARTS
from moe_overlap.agreement.message import HEAD_WORDS
from moe_overlap.agreement.record import RECORD_FIELDS, record_words

GATHERED_RANKS = 64  # with more ranks counts are exchanged


@dataclass(frozen=True, kw_only=True)
class AgreementCost:
    """Of one agreement, on each rank. bytes_to_each: what it sends to every one of its `peers`, in all rounds."""

    rounds: int
    peers: int
    bytes_to_each: int

    @property
    def messages(self) -> int:
        return self.rounds * self.peers

    @property
    def bytes(self) -> int:
        return self.bytes_to_each * self.peers

    def seconds(self, *, latency_s: float, message_s: float, bytes_per_s: float) -> float:
        """Rounds follow one another, each with one latency; a rank's messages leave it one by one, and cost `message_s`
        each beside their bytes; peers do not disturb each other, nobody is late, and computing the sums is free."""
        if not self.peers:
            return 0.0
        return self.rounds * latency_s + self.messages * message_s + self.bytes / bytes_per_s


def agreement_cost(
    *, ranks: int, experts: int, slots: int | None = None, dedup: int = 0, gathered_ranks: int = GATHERED_RANKS,
    capacity: int = 0,
) -> AgreementCost:  # fmt: skip
    """slots: of all ranks (None: one for each expert). dedup: a position in `record.DEDUP`. capacity: words that other
    layers of the group made room for."""
    slots = experts if slots is None else slots
    gathered = ranks <= gathered_ranks
    words = HEAD_WORDS + max(capacity, record_capacity(experts, slots, dedup, gathered=gathered))
    if gathered:
        return AgreementCost(rounds=1, peers=ranks - 1, bytes_to_each=8 * words)
    tables, local = 3 if dedup == 1 else 1, slots // ranks
    sums = tables * (slots + (BLOCKS + local) * len(KINDS))
    most = 1 + tables * (1 + 2 * PARTS * len(KINDS))
    slices = -(-sums // ranks) - (-most // ranks)
    to_each = 8 * words + 4 * tables * BLOCKS * local + 2 * 8 * slices
    return AgreementCost(rounds=4, peers=ranks - 1, bytes_to_each=to_each)


def record_capacity(experts: int, slots: int, dedup: int, *, gathered: bool) -> int:
    """Words that the messages of a group need room for, for the records of this layer."""
    return max(HEADER_WORDS, record_words(experts, slots, dedup) if gathered else len(RECORD_FIELDS))
