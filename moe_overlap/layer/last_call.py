"""What a layer keeps of its last forward call, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_overlap import ops
from moe_overlap.agreement.copies import trust
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.auto.auto import AutoSchedule, Outgrown
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.layer.balance import loss_alone, loss_of_ranks
from moe_overlap.layer.experts import weights_of
from moe_overlap.layer.explain import copies_text, explain
from moe_overlap.layer.latent import project
from moe_overlap.layer.left import Left, leave_compiled
from moe_overlap.layer.offload_text import offload_text
from moe_overlap.layer.stats import LastStep, LayerStats, layer_stats
from moe_overlap.layer.tape import Tape
from moe_overlap.layer.told import hand_on
from moe_overlap.ops.checks import inside_transform
from moe_overlap.parallel.ownership import Ownership
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.dispatch import Dispatcher, current_phase
from moe_overlap.schedule.nodes import Attach, routing_digest
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.run import Step
from moe_overlap.schedule.static_dispatch import StaticDispatcher
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error
from moe_overlap.transport.host_link import HostLink


class LastCall:
    """The half of MoELayer that outlives a call; the layer has the attributes that stand here for their types."""

    dispatcher: Dispatcher
    ownership: Ownership
    experts: nn.Module
    host_link: HostLink | None
    hidden_size: int
    latent_in: nn.Module | None
    latent_out: nn.Module | None
    schedule: AnySchedule
    transport: Transport

    def _forget(self) -> None:
        """Before the first call."""
        trust(self.experts.parameters())
        self._left = Left()
        self._tape = Tape()
        self._outgrown = Outgrown()

    def _end(
        self,
        step: Step,
        routing: RoutingDecision,
        y_TD: torch.Tensor,
        shape: torch.Size,
        shared_TD: torch.Tensor | None = None,
    ) -> Any:
        """At the end of a call: its result (see `hand_on`), and what it leaves behind. A recompute leaves nothing."""
        recompute = step.phase != "forward"
        if not recompute:
            self.dispatcher.end_step()
            self._outgrown.note(step)
            self._left.note(LastStep.of(step, routing))
        node = y_TD.grad_fn
        loss = loss_of_ranks(routing, step, self.dispatcher.placement, self.ownership)
        with closing_on_error(self.transport, "latent_out"):
            y_TD = project("latent_out", self.latent_out, y_TD, shape[-1])
        tail = y_TD.reshape(-1)[:0] if step.grad and self.transport.world_size > 1 else None
        y_TD = y_TD if shared_TD is None else y_TD + shared_TD
        y_TD = y_TD if routing.identity is None else routing.identity.added_to(y_TD)
        held = self._tape.take_held()
        y = self._left.keep(y_TD, shape, loss=loss, tail=tail, node=node, recompute=recompute, held=held)
        return hand_on(y, routing.state)

    def _end_inline(
        self, routing: RoutingDecision, y_TD: torch.Tensor, shape: torch.Size, slot_to_row: torch.Tensor
    ) -> Any:
        """The same where one rank ran its ops in a row, traced by torch.compile or not."""
        assert isinstance(self.schedule, SchedulePair)
        loss = loss_alone(routing)
        y_TD = y_TD if routing.identity is None else routing.identity.added_to(y_TD)
        if torch.compiler.is_compiling():
            if not torch.compiler._is_exporting_flag:  # 2.11 says is_exporting() in torch.compile too
                leave_compiled(self._left, self.schedule, routing, loss)
            return hand_on(y_TD.reshape(shape), routing.state)
        recompute = current_phase() > 0
        if not recompute:
            what = (routing.topk_ids_TK, routing.tokens_per_expert_E, routing.dropped_tokens)
            self._left.note(LastStep.of_one_rank(self.schedule, *what))
        digest = routing_digest(slot_to_row) if y_TD.requires_grad and not inside_transform() else None
        held = self._tape.take_held()
        y = self._left.keep(y_TD, shape, loss=loss, digest=digest, recompute=recompute, held=held)
        return hand_on(y, routing.state)

    def watch(self, watcher: Callable[[LastStep], None]) -> None:
        """Call `watcher` at the end of every forward call of this layer, compiled ones too, but for recomputes. A copy
        of the layer has no watchers."""
        self._left.watchers.append(watcher)

    def forget_copies(self) -> None:
        """Fetch the weights of this layer's copies anew in the next step; on all ranks alike. For expert weights that
        were written where torch does not see it, through `.data`."""
        self.dispatcher.copy_store.forget()

    @property
    def _last_step(self) -> LastStep | None:
        return self._left.last

    @torch.compiler.disable(reason="it reads what calls left behind: one graph break")
    def stats(self) -> LayerStats:
        """The last forward call. Raises RuntimeError before the first one."""
        if self._last_step is None:
            raise RuntimeError("no forward call yet")
        return layer_stats(self._last_step, self.dispatcher.placement, self._computes())

    @torch.compiler.disable(reason="it reads what calls left behind: one graph break")
    def explain(self, *, verbose: bool = False) -> str:
        """What runs and why: the answer in a sentence, the line of Python that fixes it, what the letters mean, and the
        schedules drawn as lanes, simulated from the last measured durations. verbose: with the reasons of every op's
        implementation."""
        return self.explain_schedule(self.schedule, verbose=verbose)

    def explain_schedule(self, schedule: AnySchedule, *, verbose: bool = False) -> str:
        """`explain` for a caller whose schedule orders this layer's calls, which is ShortcutBlock."""
        last, computes = self._last_step, self._computes(verbose=verbose)
        if last is not None:
            text = explain(last.pair, last.events, self.transport, computes=computes, last=last)
            more = self._offload_text(last)
            return "\n".join([text, *copies_text(self.dispatcher, lambda: self.expert_weights), *more])
        if isinstance(schedule, AutoSchedule):
            return 'Nothing is chosen yet: with schedule "auto" the first forward call calibrates, then chooses.'
        text = explain(schedule, [], self.transport, computes=computes)
        return "\n".join([text, *self._offload_text(None)])

    def _offload_text(self, last: LastStep | None) -> list[str]:
        """Of experts in host memory; weights are looked at where there are such alone, as they may be computed."""
        return [] if self.host_link is None else offload_text(self.host_link, self.expert_weights, last)

    @property
    def expert_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up_proj or up_proj, down_proj) of `experts`."""
        return weights_of(self.experts)

    def _computes(self, *, verbose: bool = False) -> list[str]:
        """What runs on the device and in the dtype of the experts, one line per implementation, or, verbose, per op
        with reasons; and that rows are latents, where they are."""
        # Not as an attribute, which may be computed, unless there is no other way.
        parameters = list(self.experts.parameters())
        weight = parameters[0] if parameters else weights_of(self.experts)[1]
        lines = (ops.registry.explain if verbose else ops.registry.grouped)(weight.device, weight.dtype)
        if isinstance(self.dispatcher, StaticDispatcher):
            lines.append(self.dispatcher.says)
        if self.latent_in is not None:
            lines.append(f"rows: latents of width {self.dispatcher.hidden} instead of {self.hidden_size}, by latent_in "
                         "before dispatch; back by latent_out after combine")  # fmt: skip
        return lines

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

    @torch.compiler.disable(reason="it reads what calls left behind: one graph break")
    def attach(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, made to reach with a zero gradient this layer's last call, and the calls before it that no `attach`
        has reached yet, but for those whose backward is over or whose output is gone (the last call's may be).

        For a rank whose loss does not depend on this layer: its experts computed other ranks' rows, so it has to take
        part in their backward.
        """
        tails = self._left.tails()
        if not tails:
            return loss
        attached: torch.Tensor = Attach.apply(loss, *tails)
        return attached

    @torch.compiler.disable(reason="it reads what calls left behind: one graph break")
    def take_aux_loss(self) -> torch.Tensor | None:
        """The sum of the auxiliary losses of all forward calls since the last time, once.

        None: there is none. Calls without gradients and recomputes do not count. A loss is dropped, with one warning a
        layer, when the output of its call is gone or its backward is over, except that of the very last call.
        """
        return self._left.take_losses()
