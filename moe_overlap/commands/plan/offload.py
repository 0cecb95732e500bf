"""Experts in host memory (--expert-offload): whether their copies would be waited for, and what the card then holds."""

from __future__ import annotations

import math

from moe_overlap.commands.plan.machine import expert_params, local_experts, shapes, weights_read_s
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import Prediction, rate_text
from moe_overlap.planning.explain import in_ms
from moe_overlap.planning.offload import OffloadPlan, OffloadShape, plan_offload


def offload_shape(options: PlanOptions, point: Prediction) -> OffloadShape | None:
    """The busiest rank's experts of one layer and their link; None where they are on the device."""
    if options.expert_offload is None:
        return None
    experts, rows = local_experts(options, point.at), sum(shapes(options, point.kind, point.at)[0].rows)
    added = options.cost_model is None and options.weights == "added"
    expert_s = weights_read_s(options) if added else 0.0  # beside the matmuls it is within their time
    rows_s = point.phases[0].window.chunking(1, "tokens").experts_s[0] - experts * expert_s
    return OffloadShape(experts=experts, bytes_per_expert=expert_params(options) * options.dtype_bytes,
                        bytes_per_s=options.expert_offload, rows_per_expert=rows / experts,
                        row_s=max(0.0, rows_s) / rows if rows else 0.0, expert_s=expert_s)  # fmt: skip


def offloaded(options: PlanOptions, point: Prediction) -> OffloadPlan | None:
    """The fastest number of groups; None where experts are on the device."""
    shape = offload_shape(options, point)
    return None if shape is None else plan_offload(shape)[0]


def offload_lines(options: PlanOptions, point: Prediction) -> list[str]:
    """Whether experts in host memory would be waited for."""
    shape, best = offload_shape(options, point), offloaded(options, point)
    if shape is None or best is None:
        return []
    total_gb = 2e-9 * shape.experts * shape.bytes_per_expert
    rows = shape.crossover_rows
    hides = f"from {rows:.0f} rows an expert on" if math.isfinite(rows) else "behind no rows, which take no time here"
    return [
        f"Experts in host memory over {rate_text(shape.bytes_per_s)} (--expert-offload):",
        f"  a copy hides {hides}; here each has {shape.rows_per_expert:.0f}",
        f'  best: MoELayer(..., schedule="{best.text}", expert_offload="host"): {in_ms(best.step_s)} for forward and '
        f"backward of the experts, {in_ms(best.resident_s)} if they were resident",
        f"  {best.device_bytes / 1e9:.3g} GB of experts on the device at a time beside {total_gb:.3g} GB of weights "
        f"and gradients, which the host pins; the optimizer's state is the host's too",
        "  all other times here are of experts on the device, and rows for every choice: beside experts in host memory "
        "a layer has no deduplication and no copies",
    ]
