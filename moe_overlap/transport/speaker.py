"""Words from every rank to all, others to each, and numbers reduced over the ranks: with few messages for many ranks.

What is for all ranks goes along the rows of a grid of ranks (`agreement/cost.py`) and then along its columns: about two
times the square root of the ranks in messages, where one to each of them would be as many as there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from moe_overlap.agreement.cost import Grid
from moe_overlap.transport.where import Where


class Words(Protocol):
    """Words under way between some ranks, or all."""

    def wait(self) -> torch.Tensor:
        """What every rank said to this one, [W, n]. Bounded; the host waits."""


class AlongColumns:
    """Words that have been told along the rows of the grid; to wait for them tells them along its columns."""

    def __init__(self, speaker: Speaker, words: Words, where: Where) -> None:
        self._speaker, self._words, self._where = speaker, words, where

    def wait(self) -> torch.Tensor:
        return self._speaker._along_column(self._words.wait(), self._where)


class Speaker(ABC):
    """One rank among `world_size`. A transport says how words get from some ranks to each other (`_swap`)."""

    rank: int
    world_size: int

    @property
    def _grid(self) -> Grid:
        """How the ranks stand."""
        return Grid.of(self.world_size)

    @abstractmethod
    def _swap(self, parts: torch.Tensor, ranks: range, where: Where) -> Words:
        """Start to send row i of `parts` [len(ranks), n], int32 or int64, to rank ranks[i]. All of `ranks`, of which
        this is one, give equal shapes and dtypes."""

    def _reduced(self, sums: torch.Tensor, most: torch.Tensor, where: Where) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [n] added up over the ranks, int64 [m] reduced to the maximum: every rank reduces a slice for all."""
        parts = [_slices(one, self.world_size) for one in (sums, most)]
        width = parts[0].shape[1]
        heard = self._to_each(torch.cat(parts, dim=1), where)
        slice_ = torch.cat([heard[:, :width].sum(dim=0), heard[:, width:].amax(dim=0)])
        heard = self._to_all(slice_, where).wait()
        return heard[:, :width].reshape(-1)[: len(sums)], heard[:, width:].reshape(-1)[: len(most)]

    def _to_all(self, words: torch.Tensor, where: Where) -> Words:
        """Tell [n] to all ranks; what all say, [W, n]."""
        grid = self._grid
        along = self._swap(words.repeat(grid.columns, 1), grid.row(self.rank), where)
        return along if grid.rows == 1 else AlongColumns(self, along, where)

    def _along_column(self, heard: torch.Tensor, where: Where) -> torch.Tensor:
        """[W, n], from what the ranks of this one's row said [columns, n]."""
        grid = self._grid
        told = self._swap(heard.reshape(1, -1).repeat(grid.rows, 1), grid.column(self.rank), where).wait()
        return told.reshape(self.world_size, -1)

    def _to_each(self, parts: torch.Tensor, where: Where) -> torch.Tensor:
        """Row r of `parts` [W, n] to rank r; what each rank has for this one, [W, n]."""
        grid = self._grid
        if grid.rows == 1:
            return self._swap(parts, grid.row(self.rank), where).wait()
        by_column = parts.reshape(grid.rows, grid.columns, -1).transpose(0, 1).reshape(grid.columns, -1)
        heard = self._swap(by_column, grid.row(self.rank), where).wait()
        by_row = heard.reshape(grid.columns, grid.rows, -1).transpose(0, 1).reshape(grid.rows, -1)
        return self._swap(by_row, grid.column(self.rank), where).wait().reshape(self.world_size, -1)


def _slices(words: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [count, n]: `words` and zeros."""
    each = -(-len(words) // count)
    return torch.cat([words, words.new_zeros(count * each - len(words))]).reshape(count, each)
