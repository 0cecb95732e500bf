"""What the calls of a layer leave behind until somebody takes it: auxiliary losses, and ways into their backward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from moe_overlap.layer.stats import LastStep
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.nodes import Keep

COMPILED_CALLS = 8
"""So many compiled calls are held at most: nothing in their graph could hold what they leave behind."""

DROPPED = (
    "an auxiliary loss was dropped that nobody had taken: the output of its call is gone, or the backward of that call "
    "is over. Add aux_loss(model) to the loss of every step, or make calls that need no gradient in torch.no_grad()"
)


class Call:
    """One call: its loss and its tail, a part without numbers of its output, until it is taken."""

    def __init__(self, loss: torch.Tensor | None, tail: torch.Tensor | None, *, compiled: bool = False) -> None:
        self.loss, self.tail, self.compiled = loss, tail, compiled
        self.attached = False
        self.held: object = None
        self._node: weakref.ref[Any] | None = None

    def watch(self, node: Any) -> None:
        """`node`: the one of the call whose saved tensors a backward frees."""
        self._node = None if node is None else weakref.ref(node)

    @property
    def is_over(self) -> bool:
        """Whether its backward has run and freed the graph, or the transform of torch.func that it ran in is over."""
        if self.loss is not None and torch._C._functorch.is_dead_tensor_wrapper(  # type: ignore[attr-defined]
            self.loss
        ):
            return True
        node = self._node() if self._node is not None else None
        if self.compiled and self.loss is not None:
            node = self.loss.grad_fn
        try:
            getattr(node, "_raw_saved_tensors", None)
        except RuntimeError:
            return True
        return False


class Left:
    """What the calls of one layer left behind.

    The last call is held here; the calls before it are held by the graphs of their outputs, so that a loss lives as
    long as somebody can still call backward, and untaken ones cost no memory. A copy begins anew.
    """

    def __init__(self) -> None:
        self.last: LastStep | None = None
        self.watchers: list[Callable[[LastStep], None]] = []  # see `LastCall.watch`
        self._calls: list[tuple[weakref.ref[Call], bool]] = []  # and whether the call has a loss
        self._held: list[Call] = []
        self._warned = False

    def __reduce__(self) -> tuple[type[Left], tuple[()]]:
        return Left, ()

    def note(self, last: LastStep) -> None:
        """The end of a forward call that is no recompute."""
        self.last = last
        for watcher in self.watchers:
            watcher(last)

    def keep(
        self,
        y_TD: torch.Tensor,
        shape: torch.Size,
        *,
        loss: torch.Tensor | None,
        tail: torch.Tensor | None = None,
        digest: torch.Tensor | None = None,
        node: Any = None,
        recompute: bool = False,
        held: object = None,
    ) -> torch.Tensor:
        """The end of an eager call: y in `shape`, which holds the rest. `node`: see `Call.watch`; None: that of y.
        `held`: lives as long as the graph of y does, for a recompute of the call."""
        if loss is not None and not loss.requires_grad:
            loss = None  # a call without gradients leaves none behind, and takes nothing away
        call = Call(loss, tail)
        call.held = held
        if y_TD.requires_grad:
            y_TD = Keep.apply(y_TD, digest, call, shape)
            call.watch(y_TD.grad_fn if node is None else node)
        elif y_TD.shape != shape:
            y_TD = torch.ops.aten._unsafe_view.default(y_TD, shape)
        if not recompute:
            self._add(call)
        return y_TD

    def receive(
        self,
        schedule: SchedulePair,
        loss: torch.Tensor | None,
        ids: torch.Tensor,
        chosen: torch.Tensor,
        dropped: torch.Tensor,
    ) -> None:
        """The end of a compiled call, after its graph has run."""
        if torch._C._current_graph_task_id() >= 0:
            return  # a recompute
        self.note(LastStep.of_one_rank(schedule, ids, chosen, dropped))
        self._add(Call(loss if loss is not None and loss.requires_grad else None, None, compiled=True))

    def take_losses(self) -> torch.Tensor | None:
        """The sum of the losses of all calls since the last time, in the order of the calls; None: none."""
        _hand_over()  # a compilation may hold the `Arrival` of the call before for a while
        total: torch.Tensor | None = None
        for call in self._alive():
            if call.loss is not None:
                total = call.loss if total is None else total + call.loss
                call.loss = None
        self._calls = [(ref, False) for ref, _ in self._calls]
        self._held = [call for call in self._held if call.tail is not None]
        return total

    def tails(self) -> list[torch.Tensor]:
        """The tails of the calls whose backward is still to come: of the last one, and of those that nobody has asked
        for. What is returned may be thrown away, so the last one's stays."""
        wanted = []
        calls = self._alive()
        for call in calls:
            if call.tail is not None and not call.is_over and (call is calls[-1] or not call.attached):
                wanted.append(call.tail)
                call.attached = True
        return wanted

    def forget_last_tail(self) -> None:
        """The last call may be over then: nothing here keeps the way into its backward."""
        for call in self._held:
            call.tail = None

    def _add(self, call: Call) -> None:
        if call.loss is None and call.tail is None:
            return
        self._calls.append((weakref.ref(call), call.loss is not None))
        if call.compiled:
            self._held = [*self._held, call][-COMPILED_CALLS:]
        else:
            self._held = [*(one for one in self._held if one.compiled), call]
        self._alive()

    def _alive(self) -> list[Call]:
        """The calls that are not over; the very last one is kept even so, as its loss may still be read."""
        alive: list[Call] = []
        kept: list[tuple[weakref.ref[Call], bool]] = []
        lost = False
        for at, (ref, has_loss) in enumerate(self._calls):
            call = ref()
            if call is None or (at + 1 < len(self._calls) and call.is_over):
                lost = lost or has_loss
                self._held = [one for one in self._held if one is not call]
            else:
                alive.append(call)
                kept.append((ref, has_loss))
        self._calls = kept
        if lost and not self._warned:
            self._warned = True
            warnings.warn(DROPPED, stacklevel=2)
        return alive


def _hand_over() -> None:
    """What compiled calls left behind, to their layers."""
    for key in list(_arrived or ()):
        left, *what = _arrived.pop(key)
        left.receive(*what)


class Arrival:
    """A compiled graph cannot call Python, but it can write a global, and what stood there before dies of it: so ends
    a compiled call. See `leave_compiled`. The last one dies with the interpreter, when this module's names are gone."""

    def __del__(self, hand_over: Callable[[], None] = _hand_over) -> None:
        hand_over()


_arrived: dict[torch.Tensor, Any] = {}
_arrival = Arrival()


def leave_compiled(left: Left, schedule: SchedulePair, routing: RoutingDecision, loss: torch.Tensor | None) -> None:
    """The end of a call that torch.compile traces: what it leaves behind becomes outputs of the graph, with gradients.

    Nothing that a call changes is read here, so there is nothing to guard on: a graph is compiled once, whatever was
    left behind before, and layers of one shape share it. Both writes happen after the graph has run; that of the global
    comes last, as it was traced first, and frees the `Arrival` of the call before, which then hands over this one.
    """
    global _arrival
    ids, chosen, dropped = routing.topk_ids_TK, routing.tokens_per_expert_E, routing.dropped_tokens
    _arrival = Arrival()
    _arrived[ids if loss is None else loss] = (left, schedule, loss, ids, chosen, dropped)
