"""What has to travel from one placement to another: integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Move(NamedTuple):
    """An expert's weights from a slot of the old placement to one of the new, each on its rank."""

    expert: int
    from_slot: int
    to_slot: int
    from_rank: int
    to_rank: int


@dataclass(frozen=True, kw_only=True)
class MigrationPlan:
    """From the placement of epoch `old_epoch` to that of `new_epoch`.

    home_moves: experts whose home is another rank's then: weights and optimizer state travel, and the old home's end.
    copies: other slots that get weights they have not got: from a slot of the old placement on the same rank, else from
    the old home. relabels: slots whose weights are on their rank already, in a slot of another number. Slots that
    keep both rank and expert are in none of them. All ascending by the new slot.
    """

    world_size: int
    old_epoch: int
    new_epoch: int
    home_moves: tuple[Move, ...]
    copies: tuple[Move, ...]
    relabels: tuple[Move, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing crosses a link; slots may still have other numbers."""
        return not self.home_moves and not self.copies

    @property
    def moves(self) -> int:
        """Expert weights that cross a link."""
        return len(self.home_moves) + len(self.copies)

    def link_bytes(self, weight_bytes: int, state_bytes: int = 0) -> np.ndarray:
        """int64 [W, W], from rank to rank. weight_bytes: of one expert's weights; state_bytes: of what else a home has
        of it (optimizer state, weights of higher precision)."""
        found = np.zeros((self.world_size, self.world_size), dtype=np.int64)
        for moves, size in ((self.copies, weight_bytes), (self.home_moves, weight_bytes + state_bytes)):
            for move in moves:
                found[move.from_rank, move.to_rank] += size
        return found
