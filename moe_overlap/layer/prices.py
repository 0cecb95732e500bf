"""Prices for rules and controllers of copies from what a layer with schedule="auto" has measured."""

from __future__ import annotations

from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.planning.copy_costs import PhaseCosts, costs_of, on_all_wires
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.weights import row_width


def measured_costs(module: MoELayer | ShortcutBlock, *, training: bool = True) -> tuple[PhaseCosts, ...]:
    """The costs of a call of a layer, or of a block, from the cost model of its schedule="auto": measured in its first
    forward call (with gradients for training=True, without them for False), or kept from an earlier run. Forward, and
    in training backward. Chunks, and whether exchanges overlap, are those of the last call.

    Equal on all ranks, as the model is and as all ran one schedule; so are rules made of it. They hold for every layer
    of these sizes on this machine. Raises ConfigError for a module with another schedule, on one rank, where nothing is
    measured, and before such a call.
    """
    if not isinstance(module, MoELayer | ShortcutBlock):
        raise ConfigError("module", type(module).__name__, "a MoELayer or a ShortcutBlock")
    schedule, layer = module.schedule, module if isinstance(module, MoELayer) else module.moe
    if not isinstance(schedule, AutoSchedule):
        expected = 'schedule="auto" on several ranks, which measures; else nominal_costs(...) of the machine\'s figures'
        raise ConfigError("schedule", schedule.name, expected)
    found = [one for (opening, grad, _), one in schedule.found.items()
             if opening == layer.dispatcher.openings and grad == training]  # fmt: skip
    last = layer._last_step
    if not found or last is None:
        how = "with gradients" if training else "without gradients"
        raise ConfigError("module", f"no forward call {how} yet", "one before, in which it measures")
    w_in, w_out = layer.expert_weights
    phases: tuple[Phase, ...] = ("forward", "backward") if training else ("forward",)
    return costs_of(
        on_all_wires(found[-1].model),
        phases,
        row_bytes=found[-1].row_bytes,
        expert_params=row_width(w_in, w_out),
        param_bytes=w_in.element_size(),
        chunks=last.pair.chunks,
        joined=last.pair.joined,
    )
