"""The executor's second half: the bodies of the backward schedule's actions, which the nodes of a step run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from moe_overlap.agreement.copies import CopyPlan
from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import Action
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.distinct_rows import DistinctBackward, DistinctSaved
from moe_overlap.schedule.expert_copies import ReturnedGradients
from moe_overlap.schedule.host_experts import HostExperts
from moe_overlap.schedule.lanes import Lanes, autocast_off
from moe_overlap.schedule.nodes import DetachedNode, check_same_routing
from moe_overlap.schedule.order import Stretch, backward_stretches
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.rows import BackwardRows, Saved, experts_sms
from moe_overlap.schedule.tables import Tables
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error
from moe_overlap.transport.host_link import HostLink

Gradients = dict[str, torch.Tensor | None]
"""What a stretch of backward gives to the user's graph: of "x" [T, D], the rows; of "weights" [T, K], the router's."""


class Backward:
    """The backward of one call. `Step` says what is to be done before it can run: the schedules and the plans, whose
    gradients are needed, and the node of the output."""

    schedule: Schedules
    pair: SchedulePair
    plan: ChunkPlan
    _backward_tables: Tables
    _distinct: bool
    _weights_dtype: torch.dtype
    _empty: torch.Tensor
    _need_dw: bool
    _need_dx: bool
    _entered: bool
    _give_back: CopyPlan | None = None  # of the copies of experts, where the step has any

    def __init__(
        self,
        transport: Transport,
        weights: ExpertWeights,
        *,
        phase: str,
        probe: bool,
        caller: int,
        host_link: HostLink | None,
    ) -> None:
        self.transport = transport
        self._kind, self._grad_scale = weights.kind, weights.grad_scale
        device = weights.w_in.device if host_link is None else host_link.device
        self._device = device
        self.phase = phase
        self.lanes = Lanes(transport, phase, clock_for(device), probe=probe, caller=caller)
        self._host_link = host_link
        self._loaded: HostExperts | None = None  # of the half that runs, where experts are in host memory
        self._received: dict[int, torch.Tensor] = {}
        self._output_node: weakref.ref[Any] | None = None
        # The run under way.
        self._grads: BackwardRows | DistinctBackward | None = None
        self._grads_of = -1  # the run of the engine that they belong to

    @property
    def _num_sms(self) -> int | None:
        """Multiprocessors for the experts: all of them where nothing runs beside them. No bit depends on it."""
        return experts_sms(self._device, 0 if self.pair.joined else self.transport.exchange_sms)

    @property
    def events(self) -> list[TimelineEvent]:
        """What was executed so far."""
        return self.lanes.events

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward, and a recompute in it, may still come: none has begun, and the output's node is there."""
        return self._grads_of < 0 and self._output_node is not None and self._output_node() is not None

    # ---------------------------------------------------------------- the bodies

    def run_backward(self, stretch: Stretch, ctx: Any, grad: torch.Tensor | None) -> Gradients:
        """The bodies of a stretch; returns the gradients that they give. ctx: of its node; grad: of y, for Ut."""
        if self.phase == "recompute":
            # A recompute is for its tensors alone; only a reentrant checkpoint runs its backward too.
            raise ConfigError("checkpoint", "use_reentrant=True", "torch.utils.checkpoint.checkpoint(..., "
                              "use_reentrant=False): a reentrant one nests a backward in the backward")  # fmt: skip
        self.lanes.close_op()
        found: Gradients = {}
        with autocast_off(self._device.type):
            for action, half in stretch:
                if self._loaded is not None:
                    self._wait_for_host(action, self._loaded)
                if action.verb == "Ut":
                    found |= self.lanes.act(action, self._ut, ctx, grad)
                elif action.verb == "Pt":
                    found |= self.lanes.act(action, self._pt)
                else:
                    self.lanes.act(action, self._BACKWARD[action.verb, half], self, action)
        return found

    def _ut(self, ctx: Any, dy_TD: torch.Tensor | None) -> Gradients:
        routed, *saved = ctx.saved_tensors
        check_same_routing(routed, ctx.routing_digest)
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        told = retained and not isinstance(self.schedule, SchedulePair)
        self.lanes.begin_backward(self.pair.backward.text, retain_graph=told)  # after what a recompute had to say
        if not retained:
            self.schedule.begins_backward(self.plan.exchange)
        # Detached: the router's weights lead to the nodes, which hold this step.
        tensors = [tensor.detach() for tensor in saved]
        # What a detached node has saved stays with the node, for a backward that does come to it.
        kept = isinstance(ctx, DetachedNode) or retained
        needs = {
            "need_dx": self.plan.exchange.x_requires_grad,
            "need_dw": self._need_dw,
            "over_h": not kept,
        }
        tables = self._backward_tables
        if self._distinct:
            self._grads = DistinctBackward(tables, DistinctSaved.of(tensors), self._kind, dy_TD, **needs,
                                           num_sms=self._num_sms)  # fmt: skip
            self.lanes.gateway = self._grads.gateway
        else:
            of_forward = Saved.of(tensors)
            self._loaded = self._host_experts(tables.plan, of_forward.w_in, of_forward.w_out)
            needs["need_dw"] = self._need_dw and self._loaded is None
            self._grads = BackwardRows(tables, of_forward, self._kind, dy_TD, **needs, num_sms=self._num_sms,
                                       loaded=self._loaded)  # fmt: skip
        self._grads_of = torch._C._current_graph_task_id()
        if self._returns:
            assert self._give_back is not None
            self._returned = ReturnedGradients(self._give_back)
        return {} if self._distinct else {"weights": self._grads.dweights_TK}

    def _own_gradients(self, action: Action) -> None:
        self._rows_of_backward.own()

    def _start_ct(self, action: Action) -> None:
        self.lanes.start(action, self._rows_of_backward.outgoing(action.number))

    def _wait_ct(self, action: Action) -> None:
        self._received[action.number] = self.lanes.wait(action)

    def _ed(self, action: Action) -> None:
        gradients = self._rows_of_backward.dgrad(action.number, self._received.pop(action.number))
        if gradients is not None:
            self._received[action.number] = gradients

    def _start_dt(self, action: Action) -> None:
        g = self._rows_of_backward
        if g.need_dx:
            self.lanes.start(action, self._received.pop(action.number), out=g.incoming(action.number))

    def _wait_dt(self, action: Action) -> None:
        g = self._rows_of_backward
        if g.need_dx:
            g.returned(action.number, self.lanes.wait(action))

    def _start_mt(self, action: Action) -> None:
        g = self._rows_of_backward
        self.lanes.start(action, g.weight_gradients(), layout=g.gradient_layout)

    def _wait_mt(self, action: Action) -> None:
        self._rows_of_backward.take_weight_gradients(self.lanes.wait(action))

    def _host_experts(self, plan: ChunkPlan, w_in: torch.Tensor, w_out: torch.Tensor) -> HostExperts | None:
        """Those of one half of the step, where experts are in host memory."""
        if self._host_link is None:
            return None
        return HostExperts(self._host_link, (w_in, w_out), slots=plan.local_slots, chunks=plan.chunks,
                           joined=self.pair.joined, lanes=self.lanes)  # fmt: skip

    def _wait_for_host(self, action: Action, loaded: HostExperts) -> None:
        """Where experts are in host memory: wait for what an action needs, ahead of its own time."""
        if action.verb in ("E", "Ed"):
            self.lanes.act(action, loaded.arrive, action.number, timed=False)
        elif action.verb == "Ew" and self._need_dw:
            self.lanes.act(action, loaded.make_room, timed=False)

    def _hb(self, action: Action) -> None:
        assert self._loaded is not None
        self._loaded.fetch(action.text, action.number)

    def _hg(self, action: Action) -> None:
        if self._loaded is not None and self._need_dw:
            self._loaded.store(action.text, action.number)

    def _ew(self, action: Action) -> None:
        g, group, groups = self._rows_of_backward, action.number, self.pair.backward.count("Ew")
        homes = g.saved.w_in.shape[0]
        first, last = homes * group // groups, homes * (group + 1) // groups
        if self._loaded is None:
            self._weigh(first, last)
        elif self._need_dw:
            self._loaded.weigh(g, group, first, last)

    def _eg(self, action: Action) -> None:
        """Of the slots of chunk c of experts, those that are homes."""
        plan, homes, c = self._backward_tables.plan, self._rows_of_backward.saved.w_in.shape[0], action.number
        ends = [min(homes, plan.local_slots * i // plan.chunks) for i in (c, c + 1)]
        self._weigh(ends[0], ends[1])

    def _weigh(self, first: int, last: int) -> None:
        """The weight gradients of the experts first .. last-1."""
        g = self._rows_of_backward
        if self._returns and g.dw_in is not None:
            self._returned.weigh_homes(g, first, last)
        else:
            g.weight_gradient(first, last)

    def _wd(self, action: Action) -> None:
        self._returned.weigh_copies(self._rows_of_backward)

    def _start_wg(self, action: Action) -> None:
        r = self._returned
        self.lanes.start(action, r.outgoing, layout=r.layout, plan=self._give_back)

    def _wait_wg(self, action: Action) -> None:
        self._returned.take(self.lanes.wait(action))

    def _wa(self, action: Action) -> None:
        g = self._rows_of_backward
        if g.dw_in is not None:
            self._returned.add(g.dw_in, g.dw_out)

    def _pt(self) -> Gradients:
        g = self._rows_of_backward
        found: Gradients = {"x": g.dx_TD() if self._need_dx else None}
        if self._distinct:
            found["weights"] = g.dweights_TK.to(self._weights_dtype)
        return found

    @property
    def _returns(self) -> bool:
        """Whether gradients of copies go home."""
        return self.pair.backward.count("Wg") > 0

    @property
    def _rows_of_backward(self) -> Any:
        assert self._grads is not None, "the backward schedule begins at Ut"
        return self._grads

    # ---------------------------------------------------------------- the end

    def run_missing_backward(self) -> torch.Tensor | None:
        """Called by Fork: where the loss did not reach y, run the backward schedule with a zero gradient of y.

        Peers' rows went through this rank's experts and wait for their gradients. Returns the rows' gradient of x
        where the schedule had to be run here, else None.
        """
        if self._grads is not None and self._grads_of == torch._C._current_graph_task_id():
            return None
        self._grads = None
        node = self._output_node() if self._output_node is not None else None
        if node is None and self.transport.world_size == 1:
            return None
        if node is None:
            self.transport.close(f"rank {self.transport.rank}: the loss does not reach the layer's output")
            raise ConfigError(
                "loss",
                "a loss that reaches the layer's input but not its output, which is gone",
                "a loss that depends on the layer's output on every rank, or layer.attach(loss)",
            )
        dx_TD: torch.Tensor | None = None
        with closing_on_error(self.transport, "Ut"):
            detached = DetachedNode(node)  # once: what a checkpoint saved can be unpacked once
        for stretch in backward_stretches(self.pair):
            found = self.run_backward(stretch, detached, None)
            if self._entered:  # else Fork is not the node of these rows
                dx_TD = found.get("x", dx_TD)
        return dx_TD

    def take_weight_gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dw_in, dw_out), complete; frees the buffers of this run of the backward schedule."""
        self.lanes.close_op()
        g, self._grads = self._grads, None
        self.lanes.gateway = None
        loaded, self._loaded = self._loaded, None
        if g is None:
            return None, None
        dw_in, dw_out = (g.dw_in, g.dw_out) if loaded is None else loaded.finish()
        if dw_in is not None and dw_out is not None and self._grad_scale != 1.0:
            dw_in.mul_(self._grad_scale)
            dw_out.mul_(self._grad_scale)
        return dw_in, dw_out

    # (verb, half) -> what it does; Ut and Pt give gradients.
    _BACKWARD: ClassVar[dict[tuple[str, str], Callable[..., None]]] = {
        ("Od", ""): _own_gradients,
        ("Hb", ""): _hb,
        ("Hg", ""): _hg,
        ("Ct", "start"): _start_ct,
        ("Ct", "wait"): _wait_ct,
        ("Ed", ""): _ed,
        ("Dt", "start"): _start_dt,
        ("Dt", "wait"): _wait_dt,
        ("Mt", "start"): _start_mt,
        ("Mt", "wait"): _wait_mt,
        ("Wd", ""): _wd,
        ("Wg", "start"): _start_wg,
        ("Wg", "wait"): _wait_wg,
        ("Ew", ""): _ew,
        ("Eg", ""): _eg,
        ("Wa", ""): _wa,
    }
