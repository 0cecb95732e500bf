"""The executor: one call of one layer, forward and, in `backward.py`, backward. Here ops (by `rows.py`, or by
`distinct_rows.py` where rows are deduplicated) and transport meet.

`Step` walks the forward schedule: compute actions run inline, exchanges are started where they stand and waited for
just before the first action that reads their result (or at once, where the schedule pair is `joined`). At its end it
makes one autograd node for every stretch of the backward schedule between the backwards of the user's modules, which
may be cut into other chunks than forward. The order of these nodes is written into their sequence numbers
(`numbers.py`), so that the engine itself executes it. The arithmetic is in `rows.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch

from moe_overlap.agreement.copies import copy_plan
from moe_overlap.agreement.node_plan import rows_plan
from moe_overlap.agreement.plan import ExchangePlan, RowLayout
from moe_overlap.errors import PlanMismatch
from moe_overlap.schedule.actions import Action
from moe_overlap.schedule.agreeing import Agreeing
from moe_overlap.schedule.backward import Backward
from moe_overlap.schedule.builders import SchedulePair, Schedules, with_copies
from moe_overlap.schedule.check import check_over_gateways
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.distinct_rows import DistinctForward
from moe_overlap.schedule.expert_copies import StepCopies
from moe_overlap.schedule.lanes import autocast_off, payload_of
from moe_overlap.schedule.nodes import Fork, Marker, Stage, routing_digest
from moe_overlap.schedule.numbers import SequenceNumbers
from moe_overlap.schedule.offload import with_host_experts
from moe_overlap.schedule.order import OPS, Stretch, backward_stretches, halves
from moe_overlap.schedule.rows import ForwardRows
from moe_overlap.schedule.tables import tables_of
from moe_overlap.schedule.user_ops import Mistakes
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.base import Agreement, Transport
from moe_overlap.transport.host_link import HostLink


class Step(Backward):
    """One forward call of one layer, and its backward. Made anew for every call; nothing of it stays on the layer.
    `probe`: it is a calibration's; `caller`, `payload_dtype`: the dispatcher's; `host_link`: what the weights come up
    by, where they are in the host's memory."""

    def __init__(
        self,
        transport: Transport,
        weights: ExpertWeights,
        *,
        phase: str,
        probe: bool = False,
        caller: int = 0,
        payload_dtype: torch.dtype | None = None,
        host_link: HostLink | None = None,
    ) -> None:
        super().__init__(transport, weights, phase=phase, probe=probe, caller=caller, host_link=host_link)
        self._weights = weights
        self._payload_dtype = payload_dtype
        self.grad = torch.is_grad_enabled()
        self.hidden: torch.Tensor | None = None
        self.shared: torch.Tensor | None = None
        # What is still to be done, and where the walk stands in it.
        self._order: Stretch = ()
        self._position = 0
        self._agreeing: Agreeing | None = None
        self._mistakes = Mistakes(transport)
        self._numbers: SequenceNumbers | None = None  # of the nodes of backward; None without gradients

    # ---------------------------------------------------------------- entry

    def enter(self, x_TD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, copies: int) -> list[torch.Tensor]:
        """The copies of x for its consumers; every gradient of this call ends in the node made here. `anchor` is a leaf
        of that node, whatever else requires a gradient."""
        self.anchor = torch.empty(0, dtype=x_TD.dtype, device=x_TD.device, requires_grad=self.grad)
        self._empty = self.anchor.detach()
        self._need_dw = self.grad and (w_in.requires_grad or w_out.requires_grad)
        self._need_dx = self.grad and x_TD.requires_grad
        *copied, self._weight_token = Fork.apply(self, copies, self.anchor, x_TD, w_in, w_out)
        self._numbers = SequenceNumbers(self.anchor) if self.grad else None
        return copied if self._need_dx else [x_TD] * copies

    def ask(self, schedule: Schedules, dispatcher: Dispatcher, agreement: Agreement) -> None:
        """Ranks agree on the step from now on. What `schedule` puts ahead runs before it is waited for, or after,
        where it is `joined`: in one order with what follows, so that backward is the same."""
        self.schedule, self.lanes.step = schedule, dispatcher.steps
        self._agreeing, self._store = Agreeing(dispatcher, agreement, self.lanes), dispatcher.copy_store
        if schedule.joined:
            self._agreeing.hear()

    def give(self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, entered: bool = True) -> None:
        """This rank's tokens: [T, D] rows in the dtype that they are computed in, and where they go. entered: they are
        a copy that `enter` gave; else the step was entered with what the router read."""
        self._x_TD, self._ids_TK, self._weights_TK = x_TD, ids_TK, weights_TK
        self._need_dx, self._entered = self.grad and x_TD.requires_grad, entered
        if not self.schedule.ahead:
            self._bind()

    def _bind(self) -> None:
        """The agreed counts: after this, the schedule can run."""
        assert self._agreeing is not None
        exchange, self._agreeing = self._agreeing.hear(), None
        x_TD, seats = self._x_TD, exchange.seats
        self._slots_TK = self._ids_TK if seats is None else seats.of_ids(self._ids_TK, exchange.rank)
        self.pair = pair = self._with_copies(self.schedule.pair_for(exchange), exchange)
        self._distinct = pair.deduplicated
        self.plan = (
            rows_plan(exchange, pair.chunks, pair.by) if self._distinct else exchange.chunked(pair.chunks, pair.by)
        )
        if exchange.node_rows is not None and self._distinct:
            check_over_gateways(pair)
        backward_plan = self.plan.cut(pair.backward_chunks, pair.backward_by)
        plans = (self.plan, backward_plan) if self.grad else (self.plan, self.plan)
        self._tables, self._backward_tables = tables_of(plans, x_TD.device, x_TD.shape[0])
        assert pair.ahead == self.schedule.ahead
        # N is over, and what stands beside it.
        over = 1 + len(pair.ahead) if pair.forward.actions[0].verb == "N" else 0
        self._order = halves(pair.forward, over)
        self.layout = RowLayout(width=x_TD.shape[1], dtype=payload_of(x_TD.dtype, self._payload_dtype))
        self.lanes.bind(self.plan, backward_plan, self.layout, joined=pair.joined, joined_copies=pair.joined_copies)
        self._weights_dtype = self._weights_TK.dtype
        self._weights.loaded = self._loaded = self._host_experts(self.plan, self._weights.w_in, self._weights.w_out)

    def _with_copies(self, pair: SchedulePair, exchange: ExchangePlan) -> SchedulePair:
        """The pair in a step that has copies of experts, which it is made ready for, or experts in host memory."""
        if self._host_link is not None:
            return with_host_experts(pair)
        if exchange.seats is None or not exchange.seats.has_copies:
            return pair
        relayed = exchange.copies_relayed if pair.relayed_copies is None else pair.relayed_copies
        self._copies = StepCopies(exchange, self._weights, self._store, relayed=relayed)
        self._give_back = copy_plan(exchange, exchange.seats.copies)
        returns = exchange.grad_enabled and exchange.weights_require_grad
        return with_copies(pair, self._copies.groups, returns)

    # ---------------------------------------------------------------- forward: the walk

    def run(
        self,
        backbone: Sequence[Callable[[torch.Tensor], torch.Tensor]] = (),
        shared: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Walk the forward schedule from where it stands to its end; returns the routed output y_TD."""

        def op_of(action: Action) -> Callable[[Any], torch.Tensor]:
            if action.verb == "B":
                assert action.index is not None
                return backbone[action.index]
            assert shared is not None
            return lambda _: shared()

        with self.releasing_on_error():
            if self._agreeing is not None:
                for action in self.schedule.ahead:
                    self._run_op(action, op_of(action))
                self._bind()
            while self._position < len(self._order):
                action = self._order[self._position].action
                if action.verb in OPS:
                    self._run_op(action, op_of(action))
                    self._position += 1
                else:
                    self._walk()
            self._mistakes.raise_first()
            return self._finish()

    def run_until_op(self) -> None:
        """Walk up to the next op of the user, exclusive, and get ready for the caller to run it (ticket API)."""
        with self.releasing_on_error():
            self._walk()
            self._before_op()
            self._position += 1

    def _walk(self) -> None:
        """Do what comes next, up to an op of the user or the end."""
        with torch.no_grad(), autocast_off(self._device.type):
            for action, half in self._order[self._position :]:
                if action.verb in OPS:
                    return
                if self._loaded is not None:
                    self._wait_for_host(action, self._loaded)
                self.lanes.act(action, self._FORWARD[action.verb, half], self, action)
                self._position += 1

    def _run_op(self, action: Action, op: Callable[[Any], torch.Tensor]) -> None:
        """Execute a user's op at its place in the schedule, with the sequence number before it reserved."""
        self._before_op()
        start = self.lanes.now()
        result = self._mistakes.result_of(action, op, self.hidden)
        if result is None:
            return
        self.lanes.note(action.text, "comp", start, self.lanes.now())
        if self.grad and result.requires_grad:
            backward = f"{action.verb}t{'' if action.index is None else action.index}"
            result = Marker.apply(partial(self.lanes.open_op, backward), result)
        if action.verb == "B":
            self.hidden = result
        else:
            self.shared = result

    def _before_op(self) -> None:
        """Reserve the number of the node that runs, in backward, right after the coming op."""
        if self._numbers is not None:
            self._numbers.before_op()

    def _finish(self) -> torch.Tensor:
        """Fix the backward order and return the routed output."""
        y_TD = self._y_TD
        loaded, self._loaded = self._loaded, None
        if loaded is not None and not self.grad:  # else the end of backward waits
            loaded.let_go()
        if self._numbers is not None:
            y_TD = self._make_nodes(self._numbers)
            self._output_node = weakref.ref(y_TD.grad_fn)
        # The graph now holds what backward needs.
        self._release()
        return y_TD

    def take_hidden(self) -> torch.Tensor:
        """The output of the last backbone op, once: kept here it would keep its graph, which holds this step."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden

    def take_shared(self) -> torch.Tensor | None:
        """The output of the shared expert, once."""
        shared, self.shared = self.shared, None
        return shared

    def _release(self) -> None:
        """Drop what only the walk needs: nodes hold their step, so a step that held them would never be freed."""
        self._numbers = None
        self.lanes.gateway = None
        self._agreeing = None
        for name in ("_x_TD", "_ids_TK", "_slots_TK", "_weights_TK", "anchor", "_weight_token", "_rows", "_tables",
                     "_weights", "_y_TD", "_copies", "_store"):  # fmt: skip
            self.__dict__.pop(name, None)

    @contextmanager
    def releasing_on_error(self) -> Iterator[None]:
        """Also where a step ends early: by an error, or in U by the end of a checkpoint's recompute."""
        try:
            yield
        except BaseException as error:
            self._release()
            self.hidden = self.shared = None
            self._mistakes.replace(error)
            raise

    # ---------------------------------------------------------------- forward: the bodies

    def _permute(self, action: Action) -> None:
        given = (self._weights, self._x_TD, self._slots_TK, self._weights_TK)
        self._rows: Any
        if self._distinct:
            self._rows = DistinctForward(self._tables, *given, num_sms=self._num_sms)
            self.lanes.gateway = self._rows.gateway
        else:
            self._rows = ForwardRows(self._tables, *given, num_sms=self._num_sms)

    def _start_metadata(self, action: Action) -> None:
        self.lanes.start(action, self._rows.metadata(), layout=self._rows.metadata_layout)

    def _wait_metadata(self, action: Action) -> None:
        received = self.lanes.wait(action)
        peer = self._rows.odd_source(received)
        if peer is not None:
            text = f"rank {peer} sent ids of experts that are not those that it announced"
            self.transport.close(text)
            here = {"rank": self.transport.rank, "step": self.plan.exchange.step}
            raise PlanMismatch(text, peer=peer, action="M", **here)
        self._rows.take_metadata(received)

    def _start_fetch(self, action: Action) -> None:
        copies = self._copies
        self.lanes.start(action, copies.outgoing(action.number), layout=copies.layout, plan=copies.fetch)

    def _wait_fetch(self, action: Action) -> None:
        self._copies.arrived(action.number, self.lanes.wait(action))

    def _fetch_from_host(self, action: Action) -> None:
        assert self._loaded is not None
        self._loaded.fetch(action.text, action.number)

    def _own(self, action: Action) -> None:
        self._rows.own(0, 1 + self.pair.forward.count("Or"))

    def _own_rest(self, action: Action) -> None:
        self._rows.own(1, 2)

    def _start_dispatch(self, action: Action) -> None:
        self.lanes.start(action, self._rows.outgoing(action.number))

    def _wait_dispatch(self, action: Action) -> None:
        self._received[action.number] = self.lanes.wait(action)

    def _experts(self, action: Action) -> None:
        self._received[action.number] = self._rows.experts(action.number, self._received.pop(action.number))

    def _start_combine(self, action: Action) -> None:
        self.lanes.start(action, self._received.pop(action.number), out=self._rows.incoming(action.number))

    def _wait_combine(self, action: Action) -> None:
        self._rows.returned(action.number, self.lanes.wait(action))

    def _unpermute(self, action: Action) -> None:
        self._y_TD = self._rows.combine()

    # ---------------------------------------------------------------- forward: the nodes

    def _make_nodes(self, numbers: SequenceNumbers) -> torch.Tensor:
        """The nodes of backward, from that of Pt, the last but Fork, to that of Ut, whose forward gives y_TD."""
        tensors = {"x": self._x_TD, "weights": self._weights_TK}
        gives = {"Pt": ("x", "weights"), "Ut": ()} if self._distinct else {"Pt": ("x",), "Ut": ("weights",)}
        token, nodes = self._weight_token, []
        for stretch in reversed(backward_stretches(self.pair)):
            names = [name for action, _ in stretch for name in gives.get(action.verb, ())]
            if stretch:
                token = Stage.apply(self, stretch, names, token, *(tensors[name] for name in names))
            nodes.append(token.grad_fn if stretch else None)
        numbers.write(nodes)
        return token

    def node_output(self, stretch: Stretch, ctx: Any) -> torch.Tensor:
        """The forward of a node: y_TD for that of Ut, an empty token for all others."""
        if stretch[0].action.verb != "Ut":
            return self._empty.new_empty(0)
        # One node saves everything, so that checkpointing sees every large tensor and Ut, the first action of the
        # backward schedule, is where a recompute happens. The digest shows whether it routed alike.
        saved = self._rows.saved(self._backward_tables)
        plan = self._backward_tables.plan
        ctx.routing_digest = routing_digest(saved.choice, cut=2 * plan.chunks + (plan.by == "experts"))
        ctx.save_for_backward(ctx.routing_digest, *saved.tensors())
        del self._rows
        return self._y_TD

    # (verb, half) -> what it does.
    _FORWARD: ClassVar[dict[tuple[str, str], Callable[..., None]]] = {
        ("P", ""): _permute,
        ("M", "start"): _start_metadata,
        ("M", "wait"): _wait_metadata,
        ("Hf", ""): _fetch_from_host,
        ("Wf", "start"): _start_fetch,
        ("Wf", "wait"): _wait_fetch,
        ("O", ""): _own,
        ("Or", ""): _own_rest,
        ("D", "start"): _start_dispatch,
        ("D", "wait"): _wait_dispatch,
        ("E", ""): _experts,
        ("C", "start"): _start_combine,
        ("C", "wait"): _wait_combine,
        ("U", ""): _unpermute,
    }
