"""row_map: where each (token, k) slot goes when rows are sorted by expert.

A stable counting sort: rows of one expert lie together, in the order of token, then k (equal to a stable argsort of
the expert ids). Worked example: ids [[2, 0], [0, -1], [2, 2]], 3 experts. Expert 0 gets slots 1 and 2, expert 1 none,
expert 2 slots 0, 4 and 5, so tokens_per_expert = [2, 0, 3], offs = [2, 2, 5], slot_to_row = [[2, 0], [1, -1], [3, 4]]
and row_to_slot = [1, 2, 0, 4, 5, -1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, compiled, registry
from moe_overlap.ops.library import LIBRARY, define, implement

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RowMap(NamedTuple):
    """What `row_map` returns; a tuple, which can be taken apart as ever. int32; shapes and meanings as there."""

    tokens_per_expert: torch.Tensor
    offs: torch.Tensor
    slot_to_row: torch.Tensor
    row_to_slot: torch.Tensor


def row_map(
    ids_TK: torch.Tensor,
    *,
    num_experts: int,
    first: int = 0,
    last: int | None = None,
    align: int = 1,
    capacity: int | None = None,
) -> RowMap:
    """Sort the slots of `ids_TK` by expert.

    Args:
        ids_TK: [T, K] int32, -1 = unused.
        num_experts: ids lie in [-1, num_experts).
        first, last: only experts [first, last) get rows (last = None: num_experts). E' = last - first.
        align: the rows of each expert begin at a multiple of this.
        capacity: an expert keeps its first `capacity` slots, later ones are unused. None: all.

    Returns:
        tokens_per_expert int32 [E'] (rows kept), offs int32 [E'] (inclusive ends, with padding), slot_to_row int32
        [T, K] (-1 = no row) and row_to_slot int32 [R] (-1 = padding), R = (T*K + E'*(align-1)) rounded down to a
        multiple of align: an upper bound that needs no look at the data. slot = token * K + k.

    Raises:
        ConfigError: naming the argument, its value and what was expected. Ids out of range are refused on CPU.
    """
    checks.check_tensor("ids", ids_TK, (None, None), torch.int32, what="[T, K]")
    last = num_experts if last is None else last
    if num_experts < 1:
        raise ConfigError("num_experts", num_experts, "at least 1")
    if not 0 <= first <= last <= num_experts:
        raise ConfigError("first, last", (first, last), f"0 <= first <= last <= num_experts = {num_experts}")
    if align < 1:
        raise ConfigError("align", align, "at least 1")
    if capacity is not None and capacity < 0:
        raise ConfigError("capacity", capacity, "at least 0, or None for no limit")
    return RowMap(*torch.ops.moe_overlap.row_map.default(ids_TK, num_experts, first, last, align, capacity))


def max_rows(slots: int, experts: int, align: int) -> int:
    """The most rows that `slots` slots of `experts` experts can take when each expert is padded to `align`."""
    return (slots + experts * (align - 1)) // align * align


def _row_map(ids_TK: torch.Tensor, num_experts: int, first: int, last: int, align: int, capacity: int | None) -> Maps:
    experts, slots, device = last - first, ids_TK.numel(), ids_TK.device
    num_rows = max_rows(slots, experts, align)
    ids = ids_TK.reshape(-1).long()
    key = torch.where((ids >= first) & (ids < last), ids - first, experts)
    order = key.sort(stable=True).indices
    sorted_key = key[order]
    slot_count = torch.zeros(experts + 1, dtype=torch.int64, device=device).index_add_(0, key, torch.ones_like(key))
    place = torch.arange(slots, device=device) - (slot_count.cumsum(0) - slot_count)[sorted_key]
    kept_count = slot_count[:experts] if capacity is None else slot_count[:experts].clamp(max=capacity)
    padded = (kept_count + (align - 1)) // align * align
    offs = padded.cumsum(0)
    # One entry more, for slots without an expert: they are never kept, whatever it says.
    begin = torch.cat([offs - padded, offs.new_zeros(1)])
    kept = sorted_key < experts
    if capacity is not None:
        kept = kept & (place < capacity)
    row = torch.where(kept, begin[sorted_key] + place, -1)
    slot_to_row = torch.empty(slots, dtype=torch.int32, device=device).index_copy_(0, order, row.to(torch.int32))
    row_to_slot = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    row_to_slot.index_copy_(0, torch.where(kept, row, num_rows), torch.where(kept, order, -1).to(torch.int32))
    return (
        kept_count.to(torch.int32),
        offs.to(torch.int32),
        slot_to_row.view_as(ids_TK),
        row_to_slot[:num_rows],
    )


def _row_map_fake(
    ids_TK: torch.Tensor, num_experts: int, first: int, last: int, align: int, capacity: int | None
) -> Maps:
    num_rows = max_rows(ids_TK.shape[0] * ids_TK.shape[1], last - first, align)
    return (
        ids_TK.new_empty((last - first,)),
        ids_TK.new_empty((last - first,)),
        ids_TK.new_empty(ids_TK.shape),
        ids_TK.new_empty((num_rows,)),
    )


def _cpp(ids_TK: torch.Tensor, *args: Any) -> Maps:
    result: Maps = torch.ops.moe_overlap._row_map_cpp.default(ids_TK.contiguous(), *args)
    return result


def _checked(*args: Any) -> Maps:
    """Values of ids are looked at here, below the dispatcher, so that torch.compile does not meet the check."""
    checks.check_values("ids", args[0], -1, args[1], why="-1 = unused, num_experts is the end")
    result: Maps = _run(*args)
    return result


_ARGUMENTS = "(Tensor ids, SymInt num_experts, SymInt first, SymInt last, SymInt align, SymInt? capacity)"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"
define(f"row_map{_ARGUMENTS} -> {_RESULTS}")
# Its implementation is in the compiled part, where there is one; see csrc/bindings.
define(f"_row_map_cpp{_ARGUMENTS} -> {_RESULTS}")
registry.add(
    "row_map", "cpp", _cpp, obstacle=compiled.obstacle("row_map"), merit="compiled: one pass to count, one to place"
)
registry.add("row_map", "reference", _row_map, merit="pure PyTorch, runs everywhere")
_run = registry.kernel("row_map")
implement("row_map", _checked, _row_map_fake)
torch.library.register_fake("moe_overlap::_row_map_cpp", _row_map_fake, lib=LIBRARY)
