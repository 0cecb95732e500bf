"""`expert_offload`: a layer whose experts' weights lie in the memory of the host.

The parameters, their gradients and with them the state of any optimizer are the host's, where the optimizer runs; of
the weights the device has SLOTS groups at a time (`schedule/offload.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.copies import COUNTED, GATHERED
from moe_overlap.auto.planned import Settled
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.layer.balance import sums_over_replicas
from moe_overlap.layer.experts import weights_of
from moe_overlap.layer.one_rank import runs_inline
from moe_overlap.parallel.ownership import Ownership
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.offload import check_cut, held_by
from moe_overlap.transport.base import Transport
from moe_overlap.transport.host_link import HostLink, open_host_link
from moe_overlap.transport.link import rows_travel

Offload = str | HostLink | None


def make_host_link(given: Offload, factory: dict[str, Any]) -> tuple[HostLink | None, dict[str, Any]]:
    """The link that the experts' weights come up by, given or of the device of the rows, and what experts are built
    with beside it; factory: what the other parts are built with. Raises ConfigError."""
    if given is None:
        return None, factory
    device = torch.empty(0, device=factory["device"]).device
    if given != "host" and not isinstance(given, HostLink):
        raise ConfigError("expert_offload", given, 'None, "host", or a HostLink')
    link = given if isinstance(given, HostLink) else open_host_link(device)
    if link.device.type != device.type:
        raise ConfigError("expert_offload", f"a link of {link.device}", f"one of {device}, the device of the layer")
    return link, factory | {"device": torch.device("cpu")}


class Offloads:
    """The half of MoELayer that knows where its experts' weights are; the layer has the attributes that stand here."""

    dispatcher: Dispatcher
    experts: nn.Module
    host_link: HostLink | None
    ownership: Ownership
    router: nn.Module
    schedule: AnySchedule
    transport: Transport

    @property
    def plans(self) -> bool:
        """Whether a schedule can be faster than another: there are exchanges, or copies of experts from the host."""
        return rows_travel(self.transport) or self.host_link is not None

    @property
    def _runs_inline(self) -> bool:
        whole = self.ownership.grad_scale == 1.0 and not sums_over_replicas(self.router, self.ownership)
        return whole and self.host_link is None and runs_inline(self.transport, self.schedule)

    def _offload(self, schedule: Schedules, w_in: torch.Tensor, w_out: torch.Tensor) -> HostLink | None:
        """The link of the coming step, for which this rank's weights are made ready. Raises ConfigError for what does
        not go with it: a schedule whose chunks share experts, weights that are not the layer's parameters."""
        link = self.host_link
        if link is None:
            return None
        check_offload(schedule, self.dispatcher)
        if isinstance(schedule, SchedulePair):
            _check_room(schedule, self.dispatcher, w_in.nbytes + w_out.nbytes, len(w_in), link.device_limit_bytes)
        for name, weight, own in zip(("w_in", "w_out"), (w_in, w_out), weights_of(self.experts), strict=True):
            if weight.dtype != own.dtype:
                raise ConfigError("autocast", weight.dtype, f"{own.dtype}, or off: expert_offload computes in it")
            if own.device.type != "cpu":
                text = "the host's memory (expert_offload): layer.experts.cpu() after what has moved or loaded them"
                raise ConfigError(f"experts.{name}", f"weights on {own.device}", text)
            if not hasattr(own, COUNTED) or hasattr(own, GATHERED):
                text = (
                    "parameters of layer.experts that are neither sharded by FSDP nor parametrized; others come in "
                    "their place by layer.load_state_dict(..., assign=True) (expert_offload)"
                )
                raise ConfigError(f"experts.{name}", "weights put in their place", text)
            link.pin(own)
        return link


def check_offload(schedule: Schedules, dispatcher: Dispatcher) -> None:
    """Raises ConfigError for what does not go with expert_offload."""
    if dispatcher.dedup or (isinstance(schedule, Settled) and schedule.dedup != "off"):
        raise ConfigError("dedup", "on or auto", '"off" beside expert_offload')
    if dispatcher.placement.has_replicas:
        raise ConfigError("placement", "copies of experts", "one slot of each beside expert_offload")
    if dispatcher.rule is not None:
        raise ConfigError("rule", type(dispatcher.rule).__name__, "None beside expert_offload, which has no copies")
    if isinstance(schedule, SchedulePair):
        check_cut(schedule)


def _check_room(pair: SchedulePair, dispatcher: Dispatcher, weights: int, experts: int, limit: int | None) -> None:
    """Raises ConfigError for a pair whose groups take more than `limit` bytes of the device; weights: bytes of all the
    `experts` of this rank."""
    held = held_by(dispatcher.seats.width, pair) * (weights // max(1, experts))
    if limit is not None and held > limit:
        expected = f"groups of which at most {limit} bytes are on the device (device_limit_bytes), not {held}"
        raise ConfigError("schedule", pair.name, expected)
