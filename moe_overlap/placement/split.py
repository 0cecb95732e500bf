"""Counts by expert to counts by slot, where an expert has several: prefixes of its tokens, in integers.

Of c tokens of an expert in one (source rank, block), slot j of its slots 0..r-1 gets those with

    bound[j - 1] <= t < bound[j],   bound[j] = (c * (share[0] + ... + share[j]) + phase) // (sum of the shares),

where t counts them in token order and the phase, from 0 to the sum of the shares - 1, is a fixed function of source,
block and expert. So bound[r - 1] is c, each slot gets its share up to one token, and who gets the odd one goes round
over blocks and sources: by Weyl's sequence, multiples of the golden ratio modulo 1, which are spread evenly from the
first on. Everything fits into 64 bits: counts of a step are below 2**31, those of many steps, which a controller adds
up, below 2**38, shares together at most 2**24.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moe_overlap.errors import ConfigError
from moe_overlap.placement.selectors import MOST_SHARES

GOLDEN = 2654435769  # 2**32 / golden ratio, odd
WORD = 2**32 - 1


class Split:
    """The split of one placement. Slots stand by expert, home first: X of them are of experts with several slots.

    order: [P], the slots in that order. single: [P], whether its expert has no other slot. expert: [P] in this order.
    several: [X], places in the order. first: [X], whether it is its expert's first slot. upper, total: [W, X], the sums
    of shares up to this slot, and of all.
    """

    def __init__(self, slots_of_expert: tuple[tuple[int, ...], ...], shares: np.ndarray) -> None:
        number = np.array([len(slots) for slots in slots_of_expert])
        self.order = np.array([slot for slots in slots_of_expert for slot in slots], dtype=np.int64)
        self.expert = np.repeat(np.arange(len(number)), number)
        self.single = number[self.expert] == 1
        self.several = np.nonzero(~self.single)[0]
        group = self.expert[self.several]
        self.first = np.diff(group, prepend=-1) != 0
        self.upper = np.cumsum(shares[:, self.order[self.several]], axis=1)
        ends = np.nonzero(np.diff(group, append=-1) != 0)[0]
        before = np.zeros((len(shares), len(ends)), dtype=np.int64)
        before[:, 1:] = self.upper[:, ends[:-1]]
        place = np.cumsum(self.first) - 1
        self.total = (self.upper[:, ends] - before)[:, place]
        self.upper -= before[:, place]
        outside = (self.total < 1) | (self.total > MOST_SHARES)
        if outside.any():
            rank, slot = np.argwhere(outside)[0]
            expected = f"shares of every expert's slots that sum to 1..{MOST_SHARES} on each rank"
            raise ConfigError("selector", f"expert {group[slot]} on rank {rank}: {self.total[rank, slot]}", expected)

    def counts(self, counts: np.ndarray, sources: tuple[int, ...]) -> np.ndarray:
        """int64 [S, B, P] of counts by expert, int64 [S, B, E], that the ranks `sources` have in each block."""
        found = np.empty((*counts.shape[:2], len(self.order)), dtype=np.int64)
        found[:, :, self.order[self.single]] = counts[:, :, self.expert[self.single]]
        if len(self.several):
            upper, total, phase = self.terms(sources, counts.shape[1])
            bounds = (counts[:, :, self.expert[self.several]] * upper + phase) // total
            before = np.roll(bounds, 1, axis=2)
            before[:, :, self.first] = 0
            found[:, :, self.order[self.several]] = bounds - before
        return found

    def terms(self, sources: tuple[int, ...], blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """upper and total, [S, 1, X], and phase, [S, B, X], of the formula above."""
        return _terms(self, sources, blocks)


@lru_cache(maxsize=64)
def _terms(split: Split, sources: tuple[int, ...], blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    upper, total = (one[list(sources)][:, None, :] for one in (split.upper, split.total))
    turn = np.array(sources, dtype=np.int64)[:, None] * blocks + np.arange(blocks)  # [S, B]
    turn = turn[:, :, None] + split.expert[split.several]
    phase = ((turn * GOLDEN & WORD) * total) >> 32
    return upper, total, phase
