"""The executor: one call of one layer, forward and backward. The only file that sees ops and transport together.

`Step` walks the forward schedule: compute actions run inline, exchanges are started where they stand and waited for
just before the first action that reads their result (or at once, where the schedule pair is `joined`). The backward
schedule becomes a total order of the step's autograd nodes, written into their sequence numbers, so that the engine
itself executes it between the backwards of the user's modules.

Buffers of a step (rows of D elements; see `plan.ChunkPlan` for the orders):

    send  [R, D]    rows permuted into send order, all chunks          dsend  their gradients
    x     [Re, D]   rows received, in the experts' order               dy     gradients of the experts' outputs
    h     [Re, F']  pre-activation                                     dh, a  its gradient, the activation
    back  [R, D]    rows returned, in send order                       dback  their gradients
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import _StopRecomputationError  # type: ignore[attr-defined]

from moe_overlap import ops
from moe_overlap.autograd import Fork, Marker, Stage, reserve_sequence_numbers
from moe_overlap.errors import ConfigError, MoeTransportError, TransportTimeout
from moe_overlap.plan import ChunkPlan, RowLayout
from moe_overlap.schedule.actions import Action, dependencies
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.recorder import TimelineEvent, emit
from moe_overlap.transport.base import Transport, Work

Backbone = Sequence[Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Node:
    """One autograd node of a step, named by what its backward does: an action, or half of an exchange."""

    action: Action
    half: str = ""  # "start" or "wait" of an exchange

    def __str__(self) -> str:
        return f"{self.action}{'.' + self.half if self.half else ''}"


def node_of_forward(verb: str, index: int | None, half: str = "") -> Node:
    """The node that a forward action creates. The adjoint of waiting is starting: D0's wait is Dt0's start."""
    if verb in ("D", "C"):
        return Node(Action(verb + "t", index), {"start": "wait", "wait": "start"}[half])
    return Node(Action({"P": "Pt", "U": "Ut", "E": "Ed", "Ew": "Ew"}[verb], index))


def backward_groups(pair: SchedulePair) -> list[list[Node]]:
    """The step's nodes in the order of the backward schedule, cut at the backwards of the user's ops.

    Group 0 runs before the first of them, the last group after the last. Waits stand just before the first reader.
    """
    groups: list[list[Node]] = [[]]
    waited: set[int] = set()
    actions = pair.backward.actions
    for action, needs in zip(actions, dependencies(pair.backward), strict=True):
        for need in needs:
            if actions[need].lane == "wire" and need not in waited:
                waited.add(need)
                groups[-1].append(Node(actions[need], "wait"))
        if action.verb in ("Bt", "St"):
            groups.append([])
        elif action.lane == "wire":
            groups[-1].append(Node(action, "start"))
        else:
            groups[-1].append(Node(action))
    return groups


def split_tail(group: list[Node]) -> tuple[list[Node], list[Node]]:
    """(head, tail) of the last group: the tail begins at the first wait for a Dt and can let the router go first."""
    for position, node in enumerate(group):
        if node.action.verb == "Dt" and node.half == "wait":
            return group[:position], group[position:]
    return group, []


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The stacked weights of this rank's experts, in the dtype of the rows, and what their gradients need."""

    w_in: torch.Tensor
    w_out: torch.Tensor
    kind: str
    grad_scale: float = 1.0


@dataclass
class _Backward:
    """Buffers of one run of the backward schedule; freed when Fork has handed the gradients over."""

    dback: torch.Tensor
    dsend: torch.Tensor | None
    dy: torch.Tensor
    dx: torch.Tensor
    dh: torch.Tensor
    a: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    slot_to_row: torch.Tensor
    dw_in: torch.Tensor | None = None
    dw_out: torch.Tensor | None = None
    dx_TD: torch.Tensor | None = None
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    done: set[Node] = field(default_factory=set)


class Step:
    """One forward call of one layer, and its backward. Made anew for every call; nothing of it stays on the layer."""

    def __init__(self, pair: SchedulePair, transport: Transport, weights: ExpertWeights, *, phase: str) -> None:
        self.pair = pair
        self.transport = transport
        self.weights = weights
        self.phase = phase
        self.grad = torch.is_grad_enabled()
        self.events: list[TimelineEvent] = []
        self.hidden: torch.Tensor | None = None
        self.shared: torch.Tensor | None = None
        self._works: dict[Action, Work] = {}
        self._grad_works: dict[Action, Work] = {}
        self._tokens: dict[Action, torch.Tensor] = {}
        self._nodes: dict[Node, Any] = {}
        self._numbers: dict[Node, int] = {}
        self._position = 0
        self._needs = dependencies(pair.forward)
        self._waited: set[int] = set()
        self._orders: dict[int, torch.Tensor] = {}
        self._backward: _Backward | None = None
        self._open_op: tuple[str, float] | None = None
        self._output_node: weakref.ref[Any] | None = None
        self._groups = backward_groups(pair)
        self._ops_done = 0

    # ---------------------------------------------------------------- entry

    def enter(self, x_TD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, copies: int) -> list[torch.Tensor]:
        """The copies of x for its consumers; every gradient of this call ends in the node made here."""
        self._anchor = torch.empty(0, dtype=x_TD.dtype, device=x_TD.device, requires_grad=self.grad)
        self._token_like = self._anchor.detach()
        self._need_dw = self.grad and (w_in.requires_grad or w_out.requires_grad)
        self._need_dx = self.grad and x_TD.requires_grad
        *copied, self._weight_token = Fork.apply(self, copies, self._anchor, x_TD, w_in, w_out)
        head, tail = split_tail(self._groups[-1])
        self._groups[-1] = head
        self._reserve(tail)
        return copied if self._need_dx else [x_TD] * copies

    def bind(self, plan: ChunkPlan, x_TD: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The agreed plan and this rank's tokens: after this, the schedule can run."""
        self.plan = plan
        self.layout = RowLayout(width=x_TD.shape[1], dtype=x_TD.dtype)
        self._slots_TK = slots_TK
        self._weights_TK = weights_TK
        self._x_TD = x_TD
        self.step = plan.exchange.step

    # ---------------------------------------------------------------- forward

    def run(self, backbone: Backbone = (), shared: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """Walk the forward schedule from where it stands to its end; returns the routed output y_TD."""
        while self._position < len(self.pair.forward):
            action = self.pair.forward.actions[self._position]
            if action.verb == "B":
                assert action.index is not None
                self.run_op(action, lambda: self._run_backbone(backbone[action.index]))  # noqa: B023
            elif action.verb == "S":
                assert shared is not None
                self.run_op(action, lambda: self._run_shared(shared))
            else:
                self.run_next()
        return self.finish()

    def run_until_op(self) -> None:
        """Walk the forward schedule up to the next backbone op, exclusive (the ticket API's stopping points)."""
        while self._position < len(self.pair.forward):
            if self.pair.forward.actions[self._position].verb in ("B", "S"):
                return
            self.run_next()

    def run_next(self) -> None:
        """Execute the next action, after waiting for the exchanges it reads."""
        position, actions = self._position, self.pair.forward.actions
        action = actions[position]
        for need in self._needs[position]:
            if actions[need].lane == "wire" and need not in self._waited:
                self._waited.add(need)
                self._apply(actions[need], "wait")
        if action.lane == "wire":
            self._apply(action, "start")
            if self.pair.joined:
                self._join(self._works[action])
        else:
            self._apply(action)
        self._position += 1

    def run_op(self, action: Action, body: Callable[[], None]) -> None:
        """Execute a user's op at its place in the schedule, with the sequence numbers around it reserved."""
        self.before_op()
        start_s = time.perf_counter()
        with self._closing_on_error(action.text):
            body()
        self._note(action.text, "comp", start_s, time.perf_counter())
        self._position += 1

    def before_op(self) -> None:
        """Reserve the numbers of the nodes that run, in backward, right after the coming op."""
        self._ops_done += 1
        self._reserve(self._groups[len(self._groups) - self._ops_done])

    def skip_op(self) -> None:
        """The coming op is run by the caller (ticket API)."""
        self.before_op()
        self._position += 1

    def finish(self) -> torch.Tensor:
        """Fix the backward order and return the routed output."""
        y_TD = self._tokens.pop(Action("U"))
        if self.grad:
            self._reserve(self._groups[0])
            for node, number in self._numbers.items():
                self._nodes[node]._set_sequence_nr(number)
            self._output_node = weakref.ref(y_TD.grad_fn)
        # The graph now holds what backward needs; dropping these breaks the cycle between nodes and step.
        self._nodes.clear()
        self._numbers.clear()
        self._tokens.clear()
        del self._x_TD, self._slots_TK, self._weights_TK, self._anchor, self._weight_token
        return y_TD

    def _run_backbone(self, op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert self.hidden is not None
        hidden = op(self.hidden)
        if self.grad and hidden.requires_grad:
            index = self.pair.forward.actions[self._position].index
            hidden = Marker.apply(self, f"Bt{index}", hidden)
        self.hidden = hidden

    def _run_shared(self, shared: Callable[[], torch.Tensor]) -> None:
        y = shared()
        self.shared = Marker.apply(self, "St", y) if self.grad and y.requires_grad else y

    def _reserve(self, nodes: list[Node]) -> None:
        if self.grad and nodes:
            numbers = reserve_sequence_numbers(self._anchor, len(nodes))
            self._numbers.update(zip(nodes, reversed(numbers), strict=True))

    def _apply(self, action: Action, half: str = "") -> None:
        """Run one action (or half of an exchange) as an autograd node of its own."""
        verb, index = action.verb, action.index
        node = node_of_forward(verb, index, half)
        if verb == "P":
            inputs: tuple[torch.Tensor, ...] = (self._x_TD, self._weight_token)
        elif verb == "D":
            inputs = (self._tokens[Action("P") if half == "start" else action],)
        elif verb == "E":
            inputs = (self._tokens[Action("D", index)], *self._weight_gates())
        elif verb == "C":
            inputs = (self._tokens[Action("E", index) if half == "start" else action],)
        else:
            chunks = range(self.pair.chunks)
            inputs = (self._weights_TK, *(self._tokens[Action("C", c)] for c in chunks))
        output = Stage.apply(self, node, *inputs)
        self._tokens[action] = output
        self._nodes[node] = output.grad_fn

    def _weight_gates(self) -> list[torch.Tensor]:
        """One token per group of weight gradients, made once: every chunk's experts run, in backward, before them."""
        gates = [action for action in self.pair.backward if action.verb == "Ew"]
        for gate in gates:
            if gate not in self._tokens:
                node = Node(gate)
                self._tokens[gate] = Stage.apply(self, node, self._weight_token)
                self._nodes[node] = self._tokens[gate].grad_fn
        return [self._tokens[gate] for gate in gates]

    def run_forward(self, node: Node, ctx: Any, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The forward body of `node`; called by its autograd Function."""
        verb, index = node.action.verb, node.action.index
        body = self._FORWARD[verb, node.half]
        text = {"Pt": "P", "Ut": "U", "Ed": f"E{index}", "Dt": f"D{index}", "Ct": f"C{index}"}.get(verb, "")
        device_type = self._token_like.device.type
        with self._closing_on_error(text), _autocast_off(device_type):
            start_s = time.perf_counter()
            result = body(self, ctx, index, *tensors)
            if not node.half and text:
                self._note(text, "comp", start_s, time.perf_counter())
        return self._token_like.new_empty(0) if result is None else result

    def _permute(self, ctx: Any, _: int | None, x_TD: torch.Tensor, _token: torch.Tensor) -> None:
        keys_TK, num_keys = self.plan.send_keys(self._slots_TK)
        rows = self.plan.send_offsets[-1]
        _, offs, self.slot_to_row, _ = ops.row_map(keys_TK, num_experts=num_keys)
        self.send = ops.permute(x_TD, self.slot_to_row, offs, num_rows=rows)
        experts_rows = sum(self.plan.recv_rows)
        self.x = x_TD.new_empty(experts_rows, x_TD.shape[1])
        self.y = torch.empty_like(self.x)
        self.h = x_TD.new_empty(experts_rows, self.weights.w_in.shape[1])
        self.back = torch.empty_like(self.send)

    def _start_dispatch(self, ctx: Any, c: int, _token: torch.Tensor) -> None:
        rows = self.send[self.plan.send_offsets[c] : self.plan.send_offsets[c + 1]]
        self._works[Action("D", c)] = self._start(rows, c, f"D{c}", reverse=False)

    def _wait_dispatch(self, ctx: Any, c: int, _token: torch.Tensor) -> None:
        self._received = self._wait(self._works.pop(Action("D", c)), f"D{c}", "forward")

    def _experts(self, ctx: Any, c: int, *_tokens: torch.Tensor) -> None:
        order = self._order(c)
        ops.unpack(self._received, order, out=self.x)
        del self._received
        starts, ends = self.plan.expert_rows(c)
        w = self.weights
        ops.expert_mlp_forward(self.x, w.w_in, w.w_out, ends, starts=starts, kind=w.kind, y=self.y, h=self.h)
        self._out = ops.pack(self.y, order)

    def _start_combine(self, ctx: Any, c: int, _token: torch.Tensor) -> None:
        out = self.back[self.plan.send_offsets[c] : self.plan.send_offsets[c + 1]]
        self._works[Action("C", c)] = self._start(self._out, c, f"C{c}", reverse=True, out=out)
        del self._out

    def _wait_combine(self, ctx: Any, c: int, _token: torch.Tensor) -> None:
        self._wait(self._works.pop(Action("C", c)), f"C{c}", "forward")

    def _unpermute(self, ctx: Any, _: int | None, weights_TK: torch.Tensor, *_tokens: torch.Tensor) -> torch.Tensor:
        y_TD = ops.combine(self.back, self.slot_to_row, weights_TK)
        if self.grad:
            # One node saves everything, so that checkpointing sees every large tensor and Ut, the first node of the
            # backward schedule, is where a recompute happens. The digest shows whether it routed alike.
            digest = _routing_digest(self.slot_to_row)
            ctx.routing_digest = digest
            w = self.weights
            ctx.save_for_backward(self.back, self.slot_to_row, weights_TK, self.x, self.h, w.w_in, w.w_out, digest)
        del self.send, self.x, self.y, self.h, self.back, self.slot_to_row
        return y_TD

    def _pass(self, ctx: Any, _: int | None, *_tokens: torch.Tensor) -> None:
        """The forward of a weight-gradient gate: nothing."""

    # ---------------------------------------------------------------- backward

    def run_backward(self, node: Node, ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The backward body of `node`; returns the gradients of its tensors (None stands for an empty token)."""
        self._close_op()
        verb, index = node.action.verb, node.action.index
        with self._closing_on_error(str(node.action)):
            start_s = time.perf_counter()
            result = self._BACKWARD[verb, node.half](self, ctx, index, grad)
            if not node.half:
                self._note(node.action.text, "comp", start_s, time.perf_counter())
        assert self._backward is not None
        self._backward.done.add(node)
        padding = ctx.num_tensors - len(result)
        return (*result, *(self._token_like.new_empty(0) for _ in range(padding)))

    def _ut(self, ctx: Any, _: int | None, dy_TD: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        back, slot_to_row, weights_TK, x, h, w_in, w_out, digest = ctx.saved_tensors
        recomputed = digest.data_ptr() != ctx.routing_digest.data_ptr()
        if recomputed and not torch.equal(digest, ctx.routing_digest):
            raise ConfigError(
                "routing",
                "another choice of experts in the recompute",
                "a router that repeats its choice under activation checkpointing (save it with sac_policy(), and keep "
                "noise out of the router)",
            )
        if dy_TD is None:
            dy_TD = back.new_zeros(slot_to_row.shape[0], back.shape[1])
        dback, dweights = ops.combine_backward(dy_TD.contiguous(), back, slot_to_row, weights_TK)
        self._backward = _Backward(
            dback=dback,
            dsend=torch.empty_like(back) if self.plan.exchange.x_requires_grad else None,
            dy=torch.empty_like(x),
            dx=torch.empty_like(x),
            dh=torch.empty_like(h),
            a=x.new_empty(x.shape[0], w_out.shape[2]),
            x=x,
            h=h,
            w_in=w_in,
            w_out=w_out,
            slot_to_row=slot_to_row,
        )
        return (dweights if ctx.needs_input_grad[2] else None,)

    def _start_ct(self, ctx: Any, c: int, _: Any) -> tuple[()]:
        rows = self._grads.dback[self.plan.send_offsets[c] : self.plan.send_offsets[c + 1]]
        self._grad_works[Action("Ct", c)] = self._start_grad(rows, c, "Ct", reverse=False)
        return ()

    def _wait_ct(self, ctx: Any, c: int, _: Any) -> tuple[()]:
        self._grads.received[c] = self._wait(self._grad_works.pop(Action("Ct", c)), f"Ct{c}", "backward")
        return ()

    def _ed(self, ctx: Any, c: int, _: Any) -> tuple[()]:
        g, order = self._grads, self._order(c)
        starts, ends = self.plan.expert_rows(c)
        ops.unpack(g.received.pop(c), order, out=g.dy)
        ops.expert_mlp_dgrad(g.dy, g.h, g.w_in, g.w_out, ends, starts=starts, kind=self.weights.kind,
                             dx=g.dx, dh=g.dh, a=g.a)  # fmt: skip
        if g.dsend is not None:
            g.received[c] = ops.pack(g.dx, order)
        return ()

    def _start_dt(self, ctx: Any, c: int, _: Any) -> tuple[()]:
        g = self._grads
        if g.dsend is not None:
            out = g.dsend[self.plan.send_offsets[c] : self.plan.send_offsets[c + 1]]
            work = self._start_grad(g.received.pop(c), c, "Dt", reverse=True, out=out)
            self._grad_works[Action("Dt", c)] = work
        return ()

    def _wait_dt(self, ctx: Any, c: int, _: Any) -> tuple[()]:
        if self._grads.dsend is not None:
            self._wait(self._grad_works.pop(Action("Dt", c)), f"Dt{c}", "backward")
        return ()

    def _ew(self, ctx: Any, group: int, _: Any) -> tuple[()]:
        g = self._grads
        if self._need_dw:
            if g.dw_in is None or g.dw_out is None:
                g.dw_in, g.dw_out = torch.empty_like(g.w_in), torch.empty_like(g.w_out)
            groups, local = self.pair.backward.count("Ew"), self.plan.local_slots
            experts = (local * group // groups, local * (group + 1) // groups)
            ops.expert_mlp_wgrad(g.x, g.dy, g.dh, g.a, self.plan.expert_offs, dw_in=g.dw_in, dw_out=g.dw_out,
                                 experts=experts)  # fmt: skip
        return ()

    def _pt(self, ctx: Any, _: int | None, __: Any) -> tuple[torch.Tensor | None, ...]:
        g = self._grads
        if g.dsend is not None and self._need_dx:
            return (ops.combine(g.dsend, g.slot_to_row),)
        return (None,)

    def run_missing_backward(self) -> torch.Tensor | None:
        """Called by Fork: where the loss did not reach y, run the backward schedule with a zero gradient of y.

        Peers' rows went through this rank's experts and wait for their gradients. Returns dx of the rows where they
        had to be run here (all zero), else None.
        """
        if self._backward is not None:
            return None
        node = self._output_node() if self._output_node is not None else None
        if node is None:
            self.transport.close(f"rank {self.transport.rank}: the loss does not reach the layer's output")
            raise ConfigError(
                "loss",
                "a loss that reaches the layer's input but not its output, which is gone",
                "a loss that depends on the layer's output on every rank, or layer.attach(loss)",
            )
        contexts: dict[Node, Any] = {}
        dx: torch.Tensor | None = None
        for member in self._backward_order():
            ctx = contexts.setdefault(member, _Detached(node) if member.action.verb == "Ut" else _Detached(None))
            (dx,) = self.run_backward(member, ctx, None)[:1] or (None,)
        return dx

    def _backward_order(self) -> list[Node]:
        return [node for group in backward_groups(self.pair) for node in group]

    def take_weight_gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dw_in, dw_out), complete; frees the buffers of this run of the backward schedule."""
        self._close_op()
        g, self._backward = self._grads, None
        if g.dw_in is None or g.dw_out is None:
            return None, None
        if self.weights.grad_scale != 1.0:
            g.dw_in.mul_(self.weights.grad_scale)
            g.dw_out.mul_(self.weights.grad_scale)
        return g.dw_in, g.dw_out

    @property
    def _grads(self) -> _Backward:
        assert self._backward is not None, "the backward schedule begins at Ut"
        return self._backward

    # ---------------------------------------------------------------- exchanges

    def _order(self, chunk: int) -> torch.Tensor:
        if chunk not in self._orders:
            self._orders[chunk] = self.plan.buffer_order(chunk).to(self.weights.w_in.device)
        return self._orders[chunk]

    def _start(
        self, rows: torch.Tensor, chunk: int, action: str, *, reverse: bool, out: torch.Tensor | None = None
    ) -> Work:
        return self.transport.start(rows, self.plan, self.layout, chunk, reverse=reverse, out=out, action=action)

    def _start_grad(
        self, rows: torch.Tensor, chunk: int, verb: str, *, reverse: bool, out: torch.Tensor | None = None
    ) -> Work:
        work = self._start(rows, chunk, f"{verb}{chunk}", reverse=reverse, out=out)
        if self.pair.joined:
            self._join(work)
        return work

    def _join(self, work: Work) -> None:
        """Overlap off: stand still until the exchange is done. `_wait` then finds it done."""
        start_s = time.perf_counter()
        work.wait()
        self._note("join", "wait", start_s, time.perf_counter())

    def _wait(self, work: Work, action: str, phase: str) -> torch.Tensor:
        start_s = time.perf_counter()
        rows = work.wait()
        if not self.pair.joined:
            self._note(action, "wait", start_s, time.perf_counter())
        done_s = time.perf_counter()
        # A transport that cannot tell when bytes moved (one rank: none do) has an interval of length zero.
        self._note(action, "wire", *(work.interval() or (done_s, done_s)))
        return rows

    # ---------------------------------------------------------------- notes and failures

    def note_op_backward(self, action: str) -> None:
        """The backward of a user's op begins now; it ends when the next node of this step runs."""
        self._close_op()
        self._open_op = (action, time.perf_counter())

    def _close_op(self) -> None:
        if self._open_op is not None:
            action, start_s = self._open_op
            self._open_op = None
            self._note(action, "comp", start_s, time.perf_counter())

    def _note(self, action: str, lane: str, start_s: float, end_s: float) -> None:
        phase = "backward" if torch._C._current_graph_task_id() >= 0 and self.phase == "forward" else self.phase
        event = TimelineEvent(self.transport.rank, self.step, phase, action, lane, start_s, end_s)
        self.events.append(event)
        emit(event)

    @contextmanager
    def _closing_on_error(self, action: str) -> Iterator[None]:
        """A rank that fails on its own closes its transport first, so that its peers learn at once."""
        try:
            yield
        except _StopRecomputationError:
            raise
        except TransportTimeout as error:
            if self._backward is None or error.action is None or not error.action.startswith("Ct"):
                raise
            raise TransportTimeout(
                f"{error.message}; if no rank failed, the peer's loss does not reach this layer in backward: then call "
                "layer.attach(loss) on that rank",
                rank=error.rank,
                peer=error.peer,
                step=error.step,
                chunk=error.chunk,
                action=error.action,
                seconds=error.seconds,
            ) from error
        except MoeTransportError:
            raise
        except Exception as error:
            self.transport.close(f"rank {self.transport.rank}, {action}: {type(error).__name__}: {error}")
            raise

    _FORWARD = {
        ("Pt", ""): _permute,
        ("Dt", "wait"): _start_dispatch,
        ("Dt", "start"): _wait_dispatch,
        ("Ed", ""): _experts,
        ("Ct", "wait"): _start_combine,
        ("Ct", "start"): _wait_combine,
        ("Ut", ""): _unpermute,
        ("Ew", ""): _pass,
    }
    _BACKWARD = {
        ("Ut", ""): _ut,
        ("Ct", "start"): _start_ct,
        ("Ct", "wait"): _wait_ct,
        ("Ed", ""): _ed,
        ("Dt", "start"): _start_dt,
        ("Dt", "wait"): _wait_dt,
        ("Ew", ""): _ew,
        ("Pt", ""): _pt,
    }


class _Detached:
    """Stands for a node's context where a backward body is run without its node."""

    num_tensors = 0

    def __init__(self, node: Any) -> None:
        if node is not None:
            self.saved_tensors = node.saved_tensors
            self.routing_digest = node.routing_digest
        self.needs_input_grad = (False, False, False)


def _autocast_off(device_type: str) -> AbstractContextManager[object]:
    """The dtype of the rows was chosen at the entry; the bodies compute in it, whatever autocast says."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _routing_digest(slot_to_row: torch.Tensor) -> torch.Tensor:
    """A number that changes when the choice of experts does: int64 scalar, on the device, read by nobody's host."""
    flat = slot_to_row.reshape(-1).to(torch.int64)
    return ((flat + 1) * (torch.arange(flat.numel(), device=flat.device) * 2654435761 + 1)).sum()
