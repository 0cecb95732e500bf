"""Which schedule a call of a layer runs where that is "auto"."""

from __future__ import annotations

import torch

from moe_overlap.auto.auto import AutoSchedule, Outgrown
from moe_overlap.auto.probes import ProbeInputs
from moe_overlap.layer.left import Left
from moe_overlap.schedule.builders import Schedules
from moe_overlap.schedule.dispatch import Dispatcher


class Chooses:
    """The half of MoELayer that asks its AutoSchedule; the layer has the attributes that stand here."""

    dispatcher: Dispatcher
    _outgrown: Outgrown
    _left: Left

    def _planned(self, schedule: AutoSchedule, inputs: ProbeInputs, phase: int) -> Schedules:
        """What the coming step of "auto" runs. The first one calibrates, on its own tokens and with its own ops."""
        self.dispatcher.open()
        found = schedule.get(self.dispatcher.openings, inputs.dtype)
        if found is not None and (phase > 0 or found not in self._outgrown):
            return found
        if found is not None and torch.is_grad_enabled():
            self._left.forget_last_tail()  # which this call follows: without it that call may be seen to be over
        before = self.dispatcher.steps
        chosen = schedule.calibrate(inputs, old=found, waiting=self._outgrown.waiting)
        self.dispatcher.probes += self.dispatcher.steps - before
        return chosen
