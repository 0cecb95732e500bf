"""The arguments of `mode="static"`, and the half of MoELayer that looks at what its steps have left to be said."""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_overlap.agreement.static_plan import NO_DROP
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import check_choice
from moe_overlap.layer.tickets import Tickets
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.static_dispatch import StaticDispatcher


def static_options(
    mode: str, capacity: object, max_in_flight_bytes: int | None, *, dedup: str, schedule: object, dispatcher: object
) -> dict[str, Any]:
    """What a StaticDispatcher has beside a Dispatcher; {} where the mode is another one. Raises ConfigError."""
    if mode != "static":
        if capacity is not None:
            raise ConfigError("static_capacity", capacity, 'None, or mode="static" beside it')
        return {}
    if capacity != NO_DROP and not _is_factor(capacity):
        expected = f'a finite number above 0, or "{NO_DROP}", with mode="static"'
        raise ConfigError("static_capacity", capacity, expected)
    if dedup != "off":
        raise ConfigError("dedup", dedup, '"off" with mode="static": how many rows a token has is read by the host')
    if schedule == "auto" or isinstance(schedule, AutoSchedule):
        raise ConfigError("schedule", "auto", 'a fixed schedule with mode="static": nothing is known to choose by')
    if dispatcher is not None:
        raise ConfigError("dispatcher", type(dispatcher).__name__, 'None with mode="static", which has its own')
    return {"capacity": capacity, "most_bytes": max_in_flight_bytes}


def _is_factor(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def is_static(dispatcher: Dispatcher) -> bool:
    return isinstance(dispatcher, StaticDispatcher)


class Static(Tickets):
    """The half of MoELayer that differs with `mode="static"`."""

    @torch.compiler.disable(reason="it reads what a step left behind: one graph break")
    def check_static(self) -> None:
        """Raises what the last steps have left to be said, as the next forward call would: CapacityExceeded where rows
        did not fit, ConfigError for bad logits or ids. Waits for the device. For the end of a run, and beside the
        replays of a CUDA graph, which run no Python. On several ranks all call it, or none."""
        if not isinstance(self.dispatcher, StaticDispatcher):
            raise ConfigError("mode", "host", '"static": in this mode every step says at once what is wrong')
        device = self.expert_weights[1].device if self.host_link is None else self.host_link.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self.dispatcher.look_back()

    def _look_back(self) -> None:
        if isinstance(self.dispatcher, StaticDispatcher) and not torch.compiler.is_compiling():
            self.dispatcher.look_back()

    def _check_choice(self, routing: RoutingDecision) -> None:
        """Of one rank whose ops run in a row: at once, or with the next call."""
        ids_TK, d = routing.topk_ids_TK, self.dispatcher
        if isinstance(d, StaticDispatcher) and not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() < 0:
                d.note_choice(ids_TK, routing.status)
            return
        check_choice(ids_TK, d.placement.num_experts, routing.status)
