"""One rank and nothing to overlap: a layer as ops in a row, which torch.compile and torch.export see through."""

from __future__ import annotations

from typing import Any

import torch

from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.ops import raw
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.transport.base import Transport


def runs_inline(transport: Transport, schedule: AnySchedule) -> bool:
    """Whether a call runs its ops in a row: one rank, and one chunk."""
    return transport.name == "local" and isinstance(schedule, SchedulePair) and schedule.chunks == 1


def one_rank(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_TD, slot_to_row): ids_TK int32, checked, -1 = unused; y in the dtype of the weights. Differentiable."""
    experts, rows = w_out.shape[0], ids_TK.numel()
    way: Any = raw if raw.suffices(x_TD, w_in, w_out) else torch.ops.moe_overlap
    _, offs, slot_to_row, _ = way.row_map(ids_TK, experts, 0, experts, 1, None)
    x_RD = way.permute(x_TD.to(w_out.dtype), slot_to_row, offs, rows)
    y_RD = way.expert_mlp(x_RD, w_in, w_out, offs, kind, None, None, None)
    return way.combine(y_RD, slot_to_row, weights_TK, None), slot_to_row
