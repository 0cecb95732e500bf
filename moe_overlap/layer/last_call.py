"""What a layer keeps of its last forward call, and what it says about it."""

from __future__ import annotations

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.auto.auto import AutoSchedule, Outgrown
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.layer.experts import weights_of
from moe_overlap.layer.explain import explain
from moe_overlap.layer.stats import LastStep, LayerStats, layer_stats
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.nodes import Attach
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.run import Step
from moe_overlap.transport.base import Transport


class LastCall:
    """The half of MoELayer that outlives a call; the layer has the attributes that stand here for their types."""

    dispatcher: Dispatcher
    experts: nn.Module
    schedule: AnySchedule
    transport: Transport

    def _forget(self) -> None:
        """Before the first call."""
        self._last_step: LastStep | None = None
        self._aux_loss: torch.Tensor | None = None
        self._tail: torch.Tensor | None = None
        self._outgrown = Outgrown()

    def _end(self, step: Step, routing: RoutingDecision, y_TD: torch.Tensor) -> None:
        """At the end of a call: numbers for stats() and explain(), and the tail for attach(). Not of a recompute."""
        if step.phase != "forward":
            return
        self._outgrown.note(step)
        self._remember(LastStep.of(step, routing))
        if step.grad and self.transport.world_size > 1:
            self._tail = y_TD.reshape(-1)[:0]

    def _remember(self, last: LastStep) -> None:
        self._last_step = last
        self._aux_loss = last.routing.aux_loss

    def stats(self) -> LayerStats:
        """The last forward call. Raises RuntimeError before the first one."""
        if self._last_step is None:
            raise RuntimeError("no forward call yet")
        return layer_stats(self._last_step, self.dispatcher.placement, self._computes())

    def explain(self) -> str:
        """The schedules drawn as lanes, simulated from the last measured durations, and what computes, with reasons."""
        last = self._last_step
        if last is not None:
            return explain(last.pair, last.events, self.transport, computes=self._computes(), last=last)
        if isinstance(self.schedule, AutoSchedule):
            return 'schedule "auto": the first forward call calibrates, then chooses'
        return explain(self.schedule, [], self.transport, computes=self._computes())

    def _computes(self) -> list[str]:
        """What runs on the device and in the dtype of the experts, one line per op, with reasons."""
        # Not as an attribute, which may be computed, unless there is no other way.
        parameters = list(self.experts.parameters())
        weight = parameters[0] if parameters else weights_of(self.experts)[1]
        return ops.registry.explain(weight.device, weight.dtype)

    @property
    def last_events(self) -> list[TimelineEvent]:
        """The executed actions of the last forward call, and of its backward once that has run. On CUDA only steps
        inside `record()` are timed: without it there are none."""
        return [] if self._last_step is None else self._last_step.events

    @property
    def last_exchange(self) -> ExchangePlan:
        """The counts that the ranks agreed on in the last forward call. Raises RuntimeError where there are none."""
        if self._last_step is None or self._last_step.plan is None:
            raise RuntimeError("no forward call yet that exchanged rows")
        return self._last_step.plan.exchange

    def attach(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, made to reach this layer's last call with a zero gradient.

        For a rank whose loss does not depend on this layer: its experts computed other ranks' rows, so it has to take
        part in their backward.
        """
        if self._tail is None:
            return loss
        attached: torch.Tensor = Attach.apply(loss, self._tail)
        return attached

    def take_aux_loss(self) -> torch.Tensor | None:
        """The auxiliary loss of the last forward call, once: reading clears it."""
        loss, self._aux_loss = self._aux_loss, None
        return loss
