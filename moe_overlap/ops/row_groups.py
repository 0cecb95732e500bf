"""The rows of each expert, and what every loop over experts does with them.

Operands of a matmul begin at multiples of 64 bytes, since a BLAS may round differently otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import maps, workspace

Bounds = torch.Tensor | Sequence[int]
ALIGNMENT_BYTES = 64


@dataclass(eq=False)
class Groups:
    """Expert i has the rows [starts[i], ends[i]); with starts = None groups are adjacent, and `ends` is `offs`.

    num_rows: how many rows there are, at least those of the groups. num_experts: how many groups there should be.
    """

    ends: Bounds
    starts: Bounds | None
    num_rows: int
    num_experts: int
    _ranges: list[tuple[int, int]] | None = field(default=None, init=False, repr=False)
    _longest: int | None = field(default=None, init=False, repr=False)
    _hits: list[tuple[int, int, int]] | None = field(default=None, init=False, repr=False)

    @property
    def on_host(self) -> bool:
        """Whether the host knows the groups without waiting for a device."""
        return _on_host(self.ends) and (self.starts is None or _on_host(self.starts))

    @property
    def adjacent(self) -> bool:
        """Whether the groups follow each other from row 0 on, as far as the host can see."""
        if self.starts is None or not self.on_host:
            return self.starts is None
        begins, stops = torch.as_tensor(self.starts), torch.as_tensor(self.ends)
        return bool((begins[:1] == 0).all()) and torch.equal(begins[1:], stops[:-1])

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The (begin, end) of each expert as integers, checked against the rows there are."""
        # Kept by hand: functools.cached_property takes a lock, as long as everything else here.
        if self._ranges is None:
            self._ranges = self._read()
        return self._ranges

    @property
    def hits(self) -> list[tuple[int, int, int]]:
        """(expert, begin, end) of those that have rows."""
        if self._hits is None:
            self._hits = [(i, begin, end) for i, (begin, end) in enumerate(self.ranges) if begin < end]
        return self._hits

    def cut(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each of `hits`, views of a tensor of `num_rows`."""
        return [rows[begin:end] for _, begin, end in self.hits]

    @property
    def used(self) -> int:
        """The end of the last group: all rows in use where the groups are adjacent."""
        return self.ranges[-1][1] if self.ranges else 0

    @property
    def longest(self) -> int:
        """Rows of the expert with the most."""
        if self._longest is None:
            self._longest = max([end - begin for begin, end in self.ranges], default=0)
        return self._longest

    @property
    def total(self) -> int:
        """Rows of all experts."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def most_rows(self) -> int:
        """Rows of all experts at most: a sum of the groups only where the host knows them and they may lie apart."""
        return self.num_rows if self.starts is None or not self.on_host else self.total

    def new_rows(self, width: int, *, like: torch.Tensor) -> torch.Tensor:
        """[num_rows, width] for someone who writes the groups: zero outside them."""
        if like.device.type != "cpu":
            return like.new_zeros((self.num_rows, width))
        rows = workspace.empty((self.num_rows, width), like=like)
        position = 0
        for begin, end in sorted(self.ranges):
            if begin > position:
                rows[position:begin].zero_()
            position = max(position, end)
        rows[position:].zero_()
        return rows

    def _read(self) -> list[tuple[int, int]]:
        stops = _integers(self.ends)
        if self.starts is None:
            begins = [0, *stops[:-1]] if stops else []
        else:
            begins = _integers(self.starts)
        if len(stops) != self.num_experts or len(begins) != self.num_experts:
            raise ConfigError("starts, ends", (len(begins), len(stops)), f"one entry per expert, {self.num_experts}")
        ranges = list(zip(begins, stops, strict=True))
        for begin, end in ranges:
            if not 0 <= begin <= end <= self.num_rows:
                raise ConfigError("starts, ends", (begin, end), f"0 <= start <= end <= {self.num_rows} rows")
        return ranges


class RowReader:
    """The rows that each expert reads: of x [N, D] as they lie, or x[index] through a map into one buffer for all.

    So what it returns holds until the next call. index: int32 [R] or None. Where entries may be -1 (`padded`) these are
    rows of zeros; others are refused on a CPU, when they are read.
    """

    def __init__(self, x_ND: torch.Tensor, index_R: torch.Tensor | None, groups: Groups, *, padded: bool) -> None:
        self._index_R, self._groups, self._padded = index_R, groups, padded
        self._x_ND = x_ND
        self._parts = groups.cut(aligned(x_ND)) if index_R is None else None
        self._buffer_nD: torch.Tensor | None = None

    def __call__(self, place: int) -> torch.Tensor:
        """The rows of an expert by its place in `hits`."""
        if self._parts is not None:
            return self._parts[place]
        assert self._index_R is not None
        if self._buffer_nD is None:
            self._buffer_nD = workspace.empty((self._groups.longest, self._x_ND.shape[1]), like=self._x_ND)
        _, begin, end = self._groups.hits[place]
        index_n, out_nD = self._index_R[begin:end], self._buffer_nD[: end - begin]
        if self._padded:
            return maps.take_rows(self._x_ND, index_n, out=out_nD)
        return maps.pick_rows("rows", self._x_ND, index_n, out=out_nD)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """The tensor itself when it is contiguous and begins at a multiple of 64 bytes, else a copy that does."""
    if rows.is_contiguous() and rows.data_ptr() % ALIGNMENT_BYTES == 0:
        return rows
    return workspace.empty(rows.shape, like=rows).copy_(rows)


def clear_others(groups: Groups, dw_ENK: torch.Tensor, first: int, last: int) -> None:
    """Zeros for those of the experts first .. last-1 that have no rows, as many as stand in a row in one call."""
    position = first
    for expert in [*(expert for expert, _, _ in groups.hits if first <= expert < last), last]:
        if position < expert:
            dw_ENK[position:expert].zero_()
        position = expert + 1


def _integers(bounds: Bounds) -> list[int]:
    return bounds.tolist() if isinstance(bounds, torch.Tensor) else list(bounds)


def _on_host(bounds: Bounds) -> bool:
    return not isinstance(bounds, torch.Tensor) or bounds.device.type == "cpu"
