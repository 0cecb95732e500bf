"""One rank and nothing to overlap: a layer as ops in a row, which torch.compile and torch.export see through."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from moe_overlap import ops
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.ops.checks import inside_transform
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
    seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or inside_transform()
    # Without gradients torch's Python in front of each differentiable operator would do this, once for each.
    with nullcontext() if seen else torch._C._AutoDispatchBelowAutograd():
        _, offs, slot_to_row, _ = ops.row_map(ids_TK, num_experts=w_out.shape[0])
        x_RD = ops.permute(x_TD.to(w_out.dtype), slot_to_row, offs, num_rows=ids_TK.numel())
        y_RD = ops.expert_mlp(x_RD, w_in, w_out, offs, kind=kind)
        return ops.combine(y_RD, slot_to_row, weights_TK), slot_to_row
