"""Tickets: a layer call in three stages, for callers who put work of their own between them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import NOT_TRACEABLE, AnySchedule, Beside, Given
from moe_overlap.layer.assembly import Rows
from moe_overlap.layer.last_call import LastCall
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import window
from moe_overlap.schedule.dispatch import current_phase
from moe_overlap.schedule.run import Step


@dataclass
class Ticket:
    """A layer call under way: made by `begin`, used by `run_experts`, ended by `finish`. Holds tensors; may cross block
    boundaries; is good for one call of each, in this order."""

    layer: Tickets
    step: Step
    routing: RoutingDecision
    shape: torch.Size
    stage: str = "begun"

    @contextmanager
    def advance(self, before: str, after: str) -> Iterator[None]:
        if self.stage != before:
            raise RuntimeError(f"this ticket is {self.stage}; expected {before}: begin, run_experts, finish, once each")
        self.stage = "failed"
        yield
        self.stage = after


class Tickets(LastCall):
    """The ticket half of MoELayer, which has the attributes and the method that stand here for their types."""

    rows: Rows
    shared_expert: nn.Module | None
    _ticket: weakref.ref[Ticket] | None

    def _begin(
        self, x: torch.Tensor, schedule: AnySchedule, given: Given, beside: Beside | None = None, *,
        router_input: torch.Tensor | None = None,
    ) -> tuple[Step, RoutingDecision, torch.Tensor]:  # fmt: skip
        raise NotImplementedError

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def begin(self, x: torch.Tensor, router_input: torch.Tensor | None = None, **given: torch.Tensor | None) -> Ticket:
        """Route, agree, permute and start every dispatch; the returned ticket goes to `run_experts`. Arguments as
        `MoELayer.forward`.

        The layer's schedule says into how many chunks ("auto": one, as what stands between the stages is unknown).
        The agreement is waited for here, since dispatches follow. router_input: as in `forward`.
        """
        if self.shared_expert is not None:
            raise ConfigError("shared_expert_size", "set", "None for the ticket API: run the shared expert yourself")
        last = self._ticket() if self._ticket is not None else None
        if last is not None and last.stage in ("begun", "computed"):
            raise RuntimeError(f"this layer's last ticket is {last.stage}: finish it before the next begin")
        if isinstance(self.schedule, AutoSchedule):
            pair = window(2, 1).join(not self.schedule.overlap)
        else:
            pair = window(2, 1, chunks=self.schedule.chunks, by=self.schedule.by).join(self.schedule.joined)
        pair = self.rows.pair(pair)
        step, routing, _ = self._begin(x, pair, given, router_input=router_input)
        step.run_until_op()
        ticket = Ticket(self, step, routing, x.shape)
        # Weak: a ticket that was lost to an error between the stages must not block the layer for ever.
        self._ticket = weakref.ref(ticket) if current_phase() == 0 else None
        return ticket

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def run_experts(self, ticket: Ticket) -> None:
        """Wait for the rows of each chunk, compute the experts and start the combine."""
        with ticket.advance("begun", "computed"):
            ticket.step.run_until_op()

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def finish(self, ticket: Ticket) -> Any:
        """Wait for the returned rows and sum them: y of the shape that `begin` was given, or (y, state)."""
        with ticket.advance("computed", "finished"):
            y_TD = ticket.step.run()
        return self._end(ticket.step, ticket.routing, y_TD, ticket.shape)
