"""Small helpers over index maps, used by the reference implementations of permute, combine, pack and the expert MLP.

A map entry of -1 means "nothing here". Rows a map leaves out are written as zeros, never multiplied by zero: what they
would be read from may hold NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import checks, workspace


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values`, integers that the host has made, on `device`. The host does not wait for work on a CUDA stream: it
    copies from pinned memory, which torch keeps until the copy is done."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def all_to_device(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """`to_device` for several tensors of int32 or int64, in one copy; themselves where that is a CPU."""
    if device.type != "cuda":
        return list(values)
    # Those of int64 first, so that all begin at a multiple of their size.
    kinds = [[value for value in values if value.dtype == dtype] for dtype in (torch.int64, torch.int32)]
    words = [torch.cat([value.reshape(-1) for value in kind]).view(torch.int32) for kind in kinds if kind]
    moved = to_device(torch.cat(words), device).split([value.nbytes // 4 for kind in kinds for value in kind])
    found = {id(value): words for value, words in zip([*kinds[0], *kinds[1]], moved, strict=True)}
    return [found[id(value)].view(value.dtype).view(value.shape) for value in values]


def invert(slot_to_row_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
    """row -> slot (= token * K + k) as int64 [num_rows], -1 where no slot points.

    Example: slot_to_row [[1, -1], [0, 2]] and 4 rows give [2, 0, 3, -1]. ConfigError (on CPU) for two slots on one row.
    """
    rows = slot_to_row_TK.reshape(-1).long()
    # Unused slots write to one row more, which is cut off: no selection whose size the host would have to know.
    row_to_slot = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=rows.device)
    slots = torch.arange(rows.numel(), dtype=torch.int64, device=rows.device)
    row_to_slot.index_copy_(0, torch.where(rows < 0, num_rows, rows), slots)
    found = row_to_slot[:num_rows]
    if rows.device.type == "cpu" and int((found >= 0).sum()) < int((rows >= 0).sum()):
        refuse_twice(int(rows[rows >= 0].bincount().argmax()))
    return found


def refuse_twice(row: int) -> None:
    """ConfigError for a row that two slots of a map point to; -1 means that there is none."""
    if row >= 0:
        raise ConfigError("slot_to_row", f"row {row} more than once", "one slot at most on each row")


def zero_rows(out_RD: torch.Tensor, unused_R: torch.Tensor) -> torch.Tensor:
    """Set the marked rows of `out_RD` to zero, in place."""
    if out_RD.device.type != "cpu":
        return out_RD.masked_fill_(unused_R[:, None], 0)
    rows = unused_R.nonzero().reshape(-1)
    return out_RD.index_fill_(0, rows, 0) if rows.numel() else out_RD


def pick_rows(
    field: str, x_ND: torch.Tensor, index_R: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x[index] into `out` (None: a new contiguous tensor) [R, D], where every index is to be a row of x.

    Raises ConfigError for `field` where one is not, on a CPU.
    """
    out_RD = workspace.empty((index_R.shape[0], x_ND.shape[1]), like=x_ND) if out is None else out
    if index_R.shape[0] == 0:
        return out_RD
    try:
        if x_ND.shape[0] == 0:
            raise IndexError
        return torch.index_select(x_ND, 0, index_R, out=out_RD)
    except IndexError:
        checks.check_values(field, index_R, 0, x_ND.shape[0], why="the rows of x")
        raise


def take_rows(x_TD: torch.Tensor, index_R: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x[index] into `out` (None: a new contiguous tensor) [R, D]; -1 gives a row of zeros. `x` may have no rows."""
    out_RD = workspace.empty((index_R.shape[0], x_TD.shape[1]), like=x_TD) if out is None else out
    if x_TD.shape[0] == 0:
        return out_RD.zero_()
    torch.index_select(x_TD, 0, index_R.clamp(min=0), out=out_RD)
    return zero_rows(out_RD, index_R < 0)


def add_rows(rows_RD: torch.Tensor, index_R: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """out[index[r]] += rows[r], in the order of r, summed in `dtype`; [num_rows, D]. An index of -1 adds nothing."""
    out_TD = torch.zeros(num_rows + 1, rows_RD.shape[1], dtype=dtype, device=rows_RD.device)
    index = torch.where(index_R < 0, num_rows, index_R).long()
    if out_TD.device.type == "cpu":
        out_TD.index_add_(0, index, rows_RD.to(dtype))
    else:
        # index_add_ uses atomics there; this one sorts and sums in order.
        out_TD.index_put_((index,), rows_RD.to(dtype), accumulate=True)
    return out_TD[:num_rows]


def live_rows(offs: torch.Tensor | None, num_rows: int) -> int:
    """How many leading rows need computing: offs[-1] on CPU, all of them where reading it would be a sync."""
    if offs is None or offs.device.type != "cpu":
        return num_rows
    return min(int(offs[-1]), num_rows) if offs.numel() else 0


def clear_tail(out_RD: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """Set the rows from offs[-1] on to zero, in place."""
    if offs is None:
        return out_RD
    if out_RD.device.type == "cpu" or offs.numel() == 0:
        out_RD[live_rows(offs, out_RD.shape[0]) if offs.numel() else 0 :].zero_()
        return out_RD
    tail_R = torch.arange(out_RD.shape[0], device=out_RD.device) >= offs[-1]
    return out_RD.masked_fill_(tail_R.view(-1, *(1,) * (out_RD.dim() - 1)), 0)
