"""What a layer's explanation says of experts in host memory."""

from __future__ import annotations

import torch

from moe_overlap.auto.planned import PlannedSchedule
from moe_overlap.layer.explain import measured_durations
from moe_overlap.layer.stats import LastStep
from moe_overlap.planning.explain import in_ms
from moe_overlap.planning.offload import OffloadShape, plan_offload
from moe_overlap.schedule.actions import SLOTS
from moe_overlap.transport.host_link import HostLink


def offload_text(link: HostLink, weights: tuple[torch.Tensor, torch.Tensor], last: LastStep | None = None) -> list[str]:
    """Where what is kept, and from how many rows an expert on the copies hide, by the times of the last step."""
    total = sum(weight.nbytes for weight in weights)
    lines = [
        "",
        f"experts in host memory: {total} bytes of weights, as many of gradients, and the optimizer's state; on "
        f"{link.device} at most {SLOTS} groups of them, {link.device_bytes} bytes now"
        + ("" if link.device_limit_bytes is None else f", and no more than {link.device_limit_bytes}"),
    ]
    shape = None if last is None else measured_shape(weights, last)
    if shape is None:
        return [
            *lines,
            "  from how many rows an expert on copies hide is known after a timed step (on CUDA: inside record())",
        ]
    lines.append(
        f"  a copy hides from {shape.crossover_rows:.0f} rows an expert on ({shape.bytes_per_s / 1e9:.3g} GB/s, "
        f"{shape.row_s * 1e6:.3g} us a row); this step had {shape.rows_per_expert:.4g}"
    )
    if last is not None and isinstance(last.schedule, PlannedSchedule):
        return [*lines, "  the number of groups is the planner's, whose predictions above have the copies in them"]
    best = plan_offload(shape)[0]
    return [
        *lines,
        f"  predicted best of equal loads: {best.text}, {in_ms(best.step_s)} forward and backward, "
        f"{in_ms(best.resident_s)} if weights were resident, {best.device_bytes} bytes on the device",
    ]


def measured_shape(weights: tuple[torch.Tensor, torch.Tensor], last: LastStep) -> OffloadShape | None:
    """From the actions of a step that ran; None where it was not timed, or had no rows."""
    took = measured_durations(last.events, "forward")
    by_verb: dict[str, float] = {"E": 0.0, "Hf": 0.0, "D": 0.0}
    for action, seconds in took.items():
        verb = action.rstrip("0123456789")
        by_verb[verb] = by_verb.get(verb, 0.0) + seconds
    rows = 0 if last.plan is None else sum(last.plan.recv_rows)
    if not rows or not by_verb["E"] or not by_verb["Hf"]:
        return None
    experts, total = weights[0].shape[0], sum(weight.nbytes for weight in weights)
    return OffloadShape(experts=experts, bytes_per_expert=total // experts, bytes_per_s=total / by_verb["Hf"],
                        rows_per_expert=rows / experts, row_s=by_verb["E"] / rows, exchange_s=by_verb["D"],
                        rows_s=took.get("P", 0.0))  # fmt: skip
