"""The executor's second half: the bodies of the backward schedule's actions, which the nodes of a step run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from moe_overlap.agreement.copies import CopyPlan
from moe_overlap.agreement.plan import ChunkPlan
from moe_overlap.errors import ConfigError
from moe_overlap.schedule.actions import COMP, Action
from moe_overlap.schedule.builders import SchedulePair, Schedules
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.distinct_rows import DistinctBackward, DistinctSaved
from moe_overlap.schedule.expert_copies import ReturnedGradients
from moe_overlap.schedule.host_experts import HostExperts
from moe_overlap.schedule.lanes import Lanes
from moe_overlap.schedule.nodes import DetachedNode, check_same_routing
from moe_overlap.schedule.order import Node, backward_groups
from moe_overlap.schedule.recorder import TimelineEvent
from moe_overlap.schedule.rows import BackwardRows, Saved, experts_sms
from moe_overlap.schedule.tables import Tables
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error
from moe_overlap.transport.host_link import HostLink

Tensors = tuple[torch.Tensor | None, ...]


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

    def run_backward(self, node: Node, ctx: Any, grad: torch.Tensor | None) -> Tensors:
        """The backward body of `node`; returns the gradients of its tensors, empty ones for its tokens."""
        if self.phase == "recompute":
            # A recompute is for its tensors alone; only a reentrant checkpoint runs its backward too.
            raise ConfigError("checkpoint", "use_reentrant=True", "torch.utils.checkpoint.checkpoint(..., "
                              "use_reentrant=False): a reentrant one nests a backward in the backward")  # fmt: skip
        self.lanes.close_op()
        self._wait_for_host(node.action)
        with self.lanes.acting(node.action.text, self._empty.device.type, timed=node.action.lane == COMP):
            result = self._BACKWARD[node.action.verb, node.half](self, ctx, node.action.index, grad)
        return (*result, *(self._empty.new_empty(0) for _ in range(ctx.num_tensors - len(result))))

    def _ut(self, ctx: Any, _: int | None, dy_TD: torch.Tensor | None) -> Tensors:
        routed, *saved = ctx.saved_tensors
        check_same_routing(routed, ctx.routing_digest)
        self.lanes.begin_backward(self.pair.backward.text)  # after what a recompute had to say
        if self._grads_of < 0:
            self.schedule.begins_backward(self.plan.exchange)
        # Detached: the router's weights lead to the nodes, which hold this step.
        tensors = [tensor.detach() for tensor in saved]
        # What a detached node has saved stays with the node, for a backward that does come to it.
        kept = isinstance(ctx, DetachedNode) or torch._C._autograd._get_current_graph_task_keep_graph()
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
        return () if self._distinct else (self._grads.dweights_TK if ctx.needs_input_grad[2] else None,)

    def _own_gradients(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        self._rows_of_backward.own()
        return ()

    def _start_ct(self, ctx: Any, c: int, _: Any) -> Tensors:
        self.lanes.start(Action("Ct", c), self._rows_of_backward.outgoing(c))
        return ()

    def _wait_ct(self, ctx: Any, c: int, _: Any) -> Tensors:
        self._received[c] = self.lanes.wait(Action("Ct", c))
        return ()

    def _ed(self, ctx: Any, c: int, _: Any) -> Tensors:
        gradients = self._rows_of_backward.dgrad(c, self._received.pop(c))
        if gradients is not None:
            self._received[c] = gradients
        return ()

    def _start_dt(self, ctx: Any, c: int, _: Any) -> Tensors:
        g = self._rows_of_backward
        if g.need_dx:
            self.lanes.start(Action("Dt", c), self._received.pop(c), out=g.incoming(c))
        return ()

    def _wait_dt(self, ctx: Any, c: int, _: Any) -> Tensors:
        g = self._rows_of_backward
        if g.need_dx:
            g.returned(c, self.lanes.wait(Action("Dt", c)))
        return ()

    def _start_mt(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        g = self._rows_of_backward
        self.lanes.start(Action("Mt"), g.weight_gradients(), layout=g.gradient_layout)
        return ()

    def _wait_mt(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        self._rows_of_backward.take_weight_gradients(self.lanes.wait(Action("Mt")))
        return ()

    def _host_experts(self, plan: ChunkPlan, w_in: torch.Tensor, w_out: torch.Tensor) -> HostExperts | None:
        """Those of one half of the step, where experts are in host memory."""
        if self._host_link is None:
            return None
        return HostExperts(self._host_link, (w_in, w_out), slots=plan.local_slots, chunks=plan.chunks,
                           joined=self.pair.joined, lanes=self.lanes)  # fmt: skip

    def _wait_for_host(self, action: Action) -> None:
        """Where experts are in host memory: wait for what an action needs, ahead of its own time."""
        if self._loaded is None or action.verb not in ("E", "Ed", "Ew"):
            return
        with self.lanes.acting(action.text, self._empty.device.type, timed=False):
            if action.verb != "Ew":
                assert action.index is not None
                self._loaded.arrive(action.index)
            elif self._need_dw:
                self._loaded.make_room()

    def _hb(self, ctx: Any, c: int, _: Any) -> Tensors:
        assert self._loaded is not None
        self._loaded.fetch(f"Hb{c}", c)
        return ()

    def _hg(self, ctx: Any, group: int, _: Any) -> Tensors:
        if self._loaded is not None and self._need_dw:
            self._loaded.store(f"Hg{group}", group)
        return ()

    def _ew(self, ctx: Any, group: int, _: Any) -> Tensors:
        g, groups = self._rows_of_backward, self.pair.backward.count("Ew")
        homes = g.saved.w_in.shape[0]
        first, last = homes * group // groups, homes * (group + 1) // groups
        if self._loaded is None:
            self._weigh(first, last)
        elif self._need_dw:
            self._loaded.weigh(g, group, first, last)
        return ()

    def _eg(self, ctx: Any, c: int, _: Any) -> Tensors:
        """Of the slots of chunk c of experts, those that are homes."""
        plan, homes = self._backward_tables.plan, self._rows_of_backward.saved.w_in.shape[0]
        ends = [min(homes, plan.local_slots * i // plan.chunks) for i in (c, c + 1)]
        self._weigh(ends[0], ends[1])
        return ()

    def _weigh(self, first: int, last: int) -> None:
        """The weight gradients of the experts first .. last-1."""
        g = self._rows_of_backward
        if self._returns and g.dw_in is not None:
            self._returned.weigh_homes(g, first, last)
        else:
            g.weight_gradient(first, last)

    def _wd(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        self._returned.weigh_copies(self._rows_of_backward)
        return ()

    def _start_wg(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        r = self._returned
        self.lanes.start(Action("Wg"), r.outgoing, layout=r.layout, plan=self._give_back)
        return ()

    def _wait_wg(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        self._returned.take(self.lanes.wait(Action("Wg")))
        return ()

    def _wa(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        g = self._rows_of_backward
        if g.dw_in is not None:
            self._returned.add(g.dw_in, g.dw_out)
        return ()

    def _pt(self, ctx: Any, _: int | None, __: Any) -> Tensors:
        g = self._rows_of_backward
        dx_TD = g.dx_TD() if self._need_dx else None
        if not self._distinct:
            return (dx_TD,)
        return dx_TD, g.dweights_TK.to(self._weights_dtype)

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
        for member in (member for group in backward_groups(self.pair) for member in group):
            results = self.run_backward(member, detached, None)
            if member.action.verb == "Pt" and self._entered:  # else Fork is not the node of these rows
                dx_TD = results[0]
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

    # (verb, half) -> what it does.
    _BACKWARD: ClassVar[dict[tuple[str, str], Callable[..., Tensors]]] = {
        ("Ut", ""): _ut,
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
        ("Pt", ""): _pt,
    }
