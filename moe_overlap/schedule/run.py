"""The executor: one call of one layer, forward and, in `backward.py`, backward. Here ops (by `rows.py`, or by
`distinct_rows.py` where rows are deduplicated) and transport meet.

`Step` walks the forward schedule: compute actions run inline, exchanges are started where they stand and waited for
just before the first action that reads their result (or at once, where the schedule pair is `joined`). At its end it
makes one autograd node for every action of the backward schedule, which may be cut into other chunks than forward. The
total order of these nodes (`order.py`) is written into their sequence numbers, so that the engine itself executes it
between the backwards of the user's modules. The arithmetic is in `rows.py`.
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
from moe_overlap.schedule.actions import COMP, Action, dependencies
from moe_overlap.schedule.agreeing import Agreeing
from moe_overlap.schedule.backward import Backward
from moe_overlap.schedule.builders import SchedulePair, Schedules, with_copies
from moe_overlap.schedule.check import check_over_gateways
from moe_overlap.schedule.dispatch import Dispatcher
from moe_overlap.schedule.distinct_rows import DistinctForward
from moe_overlap.schedule.expert_copies import StepCopies
from moe_overlap.schedule.lanes import payload_of
from moe_overlap.schedule.nodes import Fork, Marker, Stage, routing_digest
from moe_overlap.schedule.numbers import HOST_NODES, SequenceNumbers
from moe_overlap.schedule.offload import with_host_experts
from moe_overlap.schedule.order import Node
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
        # Where the walk stands.
        self._position = 0
        self._waited: set[int] = set()
        self._agreeing: Agreeing | None = None
        self._mistakes = Mistakes(transport)
        # The nodes of backward and their order (None without gradients).
        self._numbers: SequenceNumbers | None = None
        self._nodes: dict[Node, Any] = {}

    # ---------------------------------------------------------------- entry

    def enter(self, x_TD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, copies: int) -> list[torch.Tensor]:
        """The copies of x for its consumers; every gradient of this call ends in the node made here. `anchor` is a leaf
        of that node, whatever else requires a gradient."""
        self.anchor = torch.empty(0, dtype=x_TD.dtype, device=x_TD.device, requires_grad=self.grad)
        self._empty = self.anchor.detach()
        self._need_dw = self.grad and (w_in.requires_grad or w_out.requires_grad)
        self._need_dx = self.grad and x_TD.requires_grad
        *copied, self._weight_token = Fork.apply(self, copies, self.anchor, x_TD, w_in, w_out)
        more = 0 if self._host_link is None else HOST_NODES
        self._numbers = SequenceNumbers(self.anchor, more=more) if self.grad else None
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
        halves = (self.plan, backward_plan) if self.grad else (self.plan, self.plan)
        self._tables, self._backward_tables = tables_of(halves, x_TD.device, x_TD.shape[0])
        self._needs = dependencies(pair.forward)
        if Action("N") in pair.forward.actions:  # it is over, and what stands beside it
            assert pair.ahead == self.schedule.ahead
            self._position = 1 + len(pair.ahead)
            self._waited.add(0)
        if self._numbers is not None:
            self._numbers.bind(pair)
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

        with self._releasing_on_error():
            if self._agreeing is not None:
                for action in self.schedule.ahead:
                    self._run_op(action, op_of(action))
                self._bind()
            while self._position < len(self.pair.forward):
                action = self.pair.forward.actions[self._position]
                if action.verb in ("B", "S"):
                    self._run_op(action, op_of(action))
                    self._position += 1
                else:
                    self._run_next()
            self._mistakes.raise_first()
            return self._finish()

    def run_until_op(self) -> None:
        """Walk up to the next op of the user, exclusive, and get ready for the caller to run it (ticket API)."""
        with self._releasing_on_error():
            while self.pair.forward.actions[self._position].verb not in ("B", "S"):
                self._run_next()
            self._before_op()
            self._position += 1

    def _run_next(self) -> None:
        """Execute the next action, after waiting for the exchanges it reads."""
        position, actions = self._position, self.pair.forward.actions
        action = actions[position]
        # M first: what is passed on to other ranks of a node follows from it.
        for need in sorted(self._needs[position], key=lambda need: actions[need].verb != "M"):
            if actions[need].lane == "wire" and need not in self._waited:
                self._waited.add(need)
                self._forward(actions[need], "wait")
        self._wait_for_host(action)
        self._forward(action, "start" if action.lane == "wire" else "")
        self._position += 1

    def _forward(self, action: Action, half: str) -> None:
        """Run the body of one forward action, or of half of an exchange."""
        with self.lanes.acting(action.text, self._empty.device.type, timed=action.lane == COMP), torch.no_grad():
            self._FORWARD[action.verb, half](self, action.index)

    def _run_op(self, action: Action, op: Callable[[Any], torch.Tensor]) -> None:
        """Execute a user's op at its place in the schedule, with the sequence numbers around it reserved."""
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
        """Reserve the numbers of the nodes that run, in backward, right after the coming op."""
        if self._numbers is None:
            return
        if self._agreeing is not None:
            self._numbers.before_early_op(self.schedule)
        else:
            self._numbers.before_op()

    def _finish(self) -> torch.Tensor:
        """Fix the backward order and return the routed output."""
        y_TD = self._y_TD
        loaded, self._loaded = self._loaded, None
        if loaded is not None and not self.grad:  # else the end of backward waits
            loaded.let_go()
        if self._numbers is not None:
            y_TD = self._make_nodes()
            self._numbers.write(self._nodes)
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
        self._nodes.clear()
        self._numbers = None
        self.lanes.gateway = None
        self._agreeing = None
        for name in ("_x_TD", "_ids_TK", "_slots_TK", "_weights_TK", "anchor", "_weight_token", "_rows", "_tables",
                     "_weights", "_y_TD", "_copies", "_store"):  # fmt: skip
            self.__dict__.pop(name, None)

    @contextmanager
    def _releasing_on_error(self) -> Iterator[None]:
        """Also where the walk ends early: by an error, or in U by the end of a checkpoint's recompute."""
        try:
            yield
        except BaseException as error:
            self._release()
            self.hidden = self.shared = None
            self._mistakes.replace(error)
            raise

    # ---------------------------------------------------------------- forward: the bodies

    def _permute(self, _: int | None) -> None:
        given = (self._weights, self._x_TD, self._slots_TK, self._weights_TK)
        self._rows: Any
        if self._distinct:
            self._rows = DistinctForward(self._tables, *given, num_sms=self._num_sms)
            self.lanes.gateway = self._rows.gateway
        else:
            self._rows = ForwardRows(self._tables, *given, num_sms=self._num_sms)

    def _start_metadata(self, _: int | None) -> None:
        self.lanes.start(Action("M"), self._rows.metadata(), layout=self._rows.metadata_layout)

    def _wait_metadata(self, _: int | None) -> None:
        received = self.lanes.wait(Action("M"))
        peer = self._rows.odd_source(received)
        if peer is not None:
            text = f"rank {peer} sent ids of experts that are not those that it announced"
            self.transport.close(text)
            here = {"rank": self.transport.rank, "step": self.plan.exchange.step}
            raise PlanMismatch(text, peer=peer, action="M", **here)
        self._rows.take_metadata(received)

    def _start_fetch(self, group: int) -> None:
        copies = self._copies
        self.lanes.start(Action("Wf", group), copies.outgoing(group), layout=copies.layout, plan=copies.fetch)

    def _wait_fetch(self, group: int) -> None:
        self._copies.arrived(group, self.lanes.wait(Action("Wf", group)))

    def _fetch_from_host(self, c: int) -> None:
        assert self._loaded is not None
        self._loaded.fetch(f"Hf{c}", c)

    def _own(self, _: int | None) -> None:
        self._rows.own(0, 1 + self.pair.forward.count("Or"))

    def _own_rest(self, _: int | None) -> None:
        self._rows.own(1, 2)

    def _start_dispatch(self, c: int) -> None:
        self.lanes.start(Action("D", c), self._rows.outgoing(c))

    def _wait_dispatch(self, c: int) -> None:
        self._received[c] = self.lanes.wait(Action("D", c))

    def _experts(self, c: int) -> None:
        self._received[c] = self._rows.experts(c, self._received.pop(c))

    def _start_combine(self, c: int) -> None:
        self.lanes.start(Action("C", c), self._received.pop(c), out=self._rows.incoming(c))

    def _wait_combine(self, c: int) -> None:
        self._rows.returned(c, self.lanes.wait(Action("C", c)))

    def _unpermute(self, _: int | None) -> None:
        self._y_TD = self._rows.combine()

    # ---------------------------------------------------------------- forward: the nodes

    def _node(self, node: Node, *tensors: torch.Tensor) -> torch.Tensor:
        """Make the autograd node of a backward action (or half of an exchange): what it feeds comes first."""
        output: torch.Tensor = Stage.apply(self, node, *tensors)
        self._nodes[node] = output.grad_fn
        return output

    def _make_nodes(self) -> torch.Tensor:
        """All nodes of the backward schedule, from Pt to Ut, whose forward gives y_TD."""
        late, early = ((self._weights_TK,), ()) if self._distinct else ((), (self._weights_TK,))
        pt = self._node(Node(Action("Pt")), self._x_TD, *late, self._weight_token)
        last, after_experts = self._weight_token, []
        if self._returns:
            last = self._node(Node(Action("Wa")), self._weight_token)
            start = self._node(Node(Action("Wg"), "start"), self._node(Node(Action("Wg"), "wait"), last))
            after_experts.append(self._node(Node(Action("Wd")), start))
        ends = {a.index: self._node(Node(a), last) for a in self.pair.backward if a.verb == "Hg"}
        after_experts += [self._node(Node(a), ends.get(a.index, last)) for a in self.pair.backward if a.verb == "Ew"]
        starts, gates = [], tuple(after_experts)
        if self._distinct:
            metadata = self._node(Node(Action("Mt"), "start"), self._node(Node(Action("Mt"), "wait"), pt))
            after_experts = [metadata, *after_experts]
        filled = self.pair.backward.count("Eg") > 0
        for c in range(self.pair.backward_chunks):
            dt, ed, ct = Action("Dt", c), Action("Ed", c), Action("Ct", c)
            rows = self._node(Node(dt, "start"), self._node(Node(dt, "wait"), pt))
            own = [self._node(Node(Action("Eg", c)), last)] if filled else []
            gates += tuple(own)
            rows = self._node(Node(ed), rows, *after_experts, *own)
            starts += [self._node(Node(a), rows) for a in self.pair.backward.actions if a == Action("Hb", c)]
            starts.append(self._node(Node(ct, "start"), self._node(Node(ct, "wait"), rows)))
        if self._distinct:
            starts.append(self._node(Node(Action("Od")), pt, *gates))
        return self._node(Node(Action("Ut")), *early, *starts)

    def node_output(self, node: Node, ctx: Any) -> torch.Tensor:
        """The forward of a node: y_TD for Ut, an empty token for all others."""
        if node.action.verb != "Ut":
            return self._empty.new_empty(0)
        # One node saves everything, so that checkpointing sees every large tensor and Ut, the first node of the
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
