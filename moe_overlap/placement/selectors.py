"""Which replica of an expert a token goes to, as shares of the slots: pure functions of the placement and the source.

A selector gives every (source rank, slot) an integer share. What a rank sends to an expert is split over the expert's
slots in these proportions, by prefixes in token order (`split.py`), so that counts alone say which token goes where.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moe_overlap.errors import ConfigError

MOST_SHARES = 2**24  # of one expert's slots together: products with counts (int32) stay within 64 bits


class Slots(Protocol):
    """What a selector reads of a placement."""

    @property
    def world_size(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def expert_of_slot(self) -> np.ndarray: ...
    @property
    def rank_of_slots(self) -> np.ndarray: ...


class Selector(Protocol):
    """How tokens are shared out over the slots of their expert. `text` names it in digests and files."""

    @property
    def text(self) -> str: ...

    def shares(self, slots: Slots) -> np.ndarray:
        """int64 [W, P], at least 0: the share of each slot in what a rank sends to the slot's expert."""
        ...


@dataclass(frozen=True)
class Modulo:
    """Every slot of an expert gets the same number of a block's tokens; what is left over goes round (as vLLM's choice
    of a replica by the token's position modulo their number)."""

    @property
    def text(self) -> str:
        return "modulo"

    def shares(self, slots: Slots) -> np.ndarray:
        return np.ones((slots.world_size, slots.num_slots), dtype=np.int64)


@dataclass(frozen=True)
class LocalFirst:
    """A rank with a slot of the expert sends to itself alone; the others send every slot the same number."""

    @property
    def text(self) -> str:
        return "local_first"

    def shares(self, slots: Slots) -> np.ndarray:
        own = slots.rank_of_slots[None, :] == np.arange(slots.world_size)[:, None]  # [W, P]
        expert = slots.expert_of_slot
        has_own = np.zeros((slots.world_size, int(expert.max()) + 1), dtype=bool)
        rank, slot = np.nonzero(own)
        has_own[rank, expert[slot]] = True
        return np.where(has_own[:, expert], own, True).astype(np.int64)


@dataclass(frozen=True)
class Weighted:
    """Shares as they are given, int [W, P]: a linear split of what each rank sends.

    Each rank has to give the slots of every expert more than 0 and at most 2**24 together.
    """

    table: tuple[tuple[int, ...], ...]
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        try:
            table = tuple(tuple(row) for row in self.table)
        except TypeError:
            raise ConfigError("table", self.table, "a row of integers for each rank") from None
        for row in table:
            for share in row:
                if isinstance(share, bool) or not isinstance(share, int) or not 0 <= share <= MOST_SHARES:
                    raise ConfigError("table", share, f"integers from 0 to {MOST_SHARES}")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_hash", hash(table))

    def __hash__(self) -> int:
        return self._hash

    @property
    def text(self) -> str:
        return "weighted " + ";".join(",".join(map(str, row)) for row in self.table)

    def shares(self, slots: Slots) -> np.ndarray:
        if len(self.table) != slots.world_size or any(len(row) != slots.num_slots for row in self.table):
            widths = sorted({len(row) for row in self.table})
            expected = f"{slots.world_size} ranks by {slots.num_slots} slots"
            raise ConfigError("table", f"{len(self.table)} rows of {widths}", expected)
        return np.array(self.table, dtype=np.int64)


def selector_of(text: object) -> Selector:
    """The selector that has this `text`. ConfigError for any other value."""
    if text in ("modulo", "local_first"):
        return Modulo() if text == "modulo" else LocalFirst()
    if isinstance(text, str) and text.startswith("weighted "):
        try:
            return Weighted(tuple(tuple(int(one) for one in row.split(",")) for row in text[9:].split(";")))
        except ValueError:
            pass
    raise ConfigError("selector", text, '"modulo", "local_first" or "weighted" with its shares')
