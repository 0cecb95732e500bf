"""The autograd nodes of one layer call: thin shells around the bodies in `run.py`.

Each stretch of the backward schedule, which is what stands between the backwards of the user's own modules, is a node
in the user's graph, so that the engine can run them all in the planned order. A node costs as much as several actions,
so there are no more than that order needs. They pass empty tensors ("tokens") to each other, without gradients, which
make a chain of them; the rows themselves lie in the buffers of the step. Written as the graph is built, so that
backward runs it from right to left, with one user's op between:

    Fork -> [router] -> (Dt0.wait Pt) -> [op] -> (Ct0.wait Ed0 Dt0.start Ew0) -> (Ut Ct0.start) -> y

Fork is the last node of the layer's backward: it is the one consumer of x and of the expert weights, adds the gradients
of x in a fixed order, and hands the weight gradients over when all of them are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.order import Stretch


class BackwardStep(Protocol):
    """The layer call that a node belongs to, as far as nodes know it (`run.Step`)."""

    def node_output(self, stretch: Stretch, ctx: Any) -> torch.Tensor:
        """What the forward of a node returns."""

    def run_backward(self, stretch: Stretch, ctx: Any, grad: torch.Tensor | None) -> Mapping[str, torch.Tensor | None]:
        """The backward bodies of a node: the gradients that it gives, by name."""

    def run_missing_backward(self) -> torch.Tensor | None:
        """The whole backward schedule, where the loss did not reach the output; the rows' gradient of x."""

    def take_weight_gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dw_in, dw_out), complete."""


def only_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For a backward without a derivative. torch's `once_differentiable` lets a gradient pass as a constant where the
    one that came in needs none: here a second derivative is refused there too, as the ops of one rank do."""

    @wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        text = b"trying to differentiate twice a function that was marked with @once_differentiable"
        refused = torch._C._functions.DelayedError(text, len(results))
        leaves = [None if one is None else one.detach().requires_grad_() for one in results]
        return tuple(refused(*leaves))  # type: ignore[arg-type]

    return wrapper


class Fork(torch.autograd.Function):
    """The entry of a layer: copies of x for its consumers, and one token for the weight gradients.

    Inputs: step, number of copies, anchor (an empty leaf that makes the outputs require grad on every rank), x, w_in,
    w_out. Outputs: the copies of x, then the token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: BackwardStep,
        copies: int,
        anchor: torch.Tensor,
        x: torch.Tensor,
        w_in: torch.Tensor,
        w_out: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        return (*(x.view_as(x) for _ in range(copies)), anchor.new_empty(0))

    @staticmethod
    @only_once
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        step: BackwardStep = ctx.step
        dx_rows = step.run_missing_backward()
        dw_in, dw_out = step.take_weight_gradients()
        dx = sum_in_order(dx_rows, *grads[:-1]) if ctx.needs_input_grad[3] else None
        return None, None, None, dx, dw_in, dw_out


class Stage(torch.autograd.Function):
    """One stretch of the backward schedule. Its forward computes nothing.

    Inputs: step, stretch, the names of the gradients that it gives, the token of the stretch that follows it in
    backward, and the tensors of those names.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: BackwardStep,
        stretch: Stretch,
        names: tuple[str, ...],
        token: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.step, ctx.stretch, ctx.names = step, stretch, names
        ctx.set_materialize_grads(False)
        return step.node_output(stretch, ctx)

    @staticmethod
    @only_once
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        found = ctx.step.run_backward(ctx.stretch, ctx, grad)
        return (None, None, None, None, *(found[name] for name in ctx.names))


class DetachedNode:
    """Stands for a node's context where backward bodies are run outside the engine, for Fork."""

    def __init__(self, output_node: Any) -> None:
        self.saved_tensors = output_node.saved_tensors
        self.routing_digest = output_node.routing_digest


class Tap(torch.autograd.Function):
    """The point of a backbone that feeds the experts: (for the backbone, for the experts); one fixed-order sum."""

    @staticmethod
    def forward(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return h.view_as(h), h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_backbone: torch.Tensor | None, d_experts: torch.Tensor | None) -> torch.Tensor | None:
        return sum_in_order(d_backbone, d_experts)


class Marker(torch.autograd.Function):
    """An identity after a user's op: its backward, which calls `begins`, is the moment at which the op's begins."""

    @staticmethod
    def forward(ctx: Any, begins: Callable[[], None], h: torch.Tensor) -> torch.Tensor:
        ctx.begins = begins
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.begins()
        return None, grad


class Keep(torch.autograd.Function):
    """The output of a call: y in the shape of x, and no view, so that it may be changed in place like any result.

    As long as this node is there, and no longer, `kept` is: what the call leaves behind (see `layer/left.py`), to which
    a layer itself has a weak reference. `digest` (one rank and one chunk, where no `Ut` does it; else None):
    backward refuses a recompute that routed otherwise. An identity, also to a second derivative.
    """

    @staticmethod
    def forward(y_TD: torch.Tensor, digest: torch.Tensor | None, kept: object, shape: torch.Size) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._unsafe_view.default(y_TD, shape)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        y_TD, ctx.routing_digest, ctx.kept, _ = inputs
        ctx.shape = y_TD.shape
        ctx.save_for_backward(ctx.routing_digest)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (digest,) = ctx.saved_tensors
        if digest is not None:
            check_same_routing(digest, ctx.routing_digest)
        return grad.reshape(ctx.shape), None, None, None


def routing_digest(slot_to_row: torch.Tensor, *, cut: int = 0) -> torch.Tensor:
    """A number that changes when the choice of experts does, or the cut of backward, which is a number too: int64
    scalar, on the device, read by nobody's host."""
    flat, step = slot_to_row.reshape(-1), 2654435761
    digest = (flat * torch.arange(1, flat.numel() * step + 1, step, device=flat.device)).sum()
    return digest + cut if cut else digest


def check_same_routing(saved: torch.Tensor, kept: torch.Tensor) -> None:
    """`saved` is the digest that went through save_for_backward: another tensor than `kept` after a recompute.

    Raises ConfigError where the two say that the recompute routed otherwise.
    """
    if saved.data_ptr() != kept.data_ptr() and not torch.equal(saved, kept):
        raise ConfigError(
            "routing",
            "another choice of experts in the recompute",
            "a router that repeats its choice under activation checkpointing (save it with sac_policy(), and keep "
            "noise out of the router)",
        )


class Attach(torch.autograd.Function):
    """The loss unchanged, with a zero gradient for each of `tails`: the layer behind them takes part in backward."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *tails: torch.Tensor) -> torch.Tensor:
        ctx.tails_like = [(tail.shape, tail.dtype, tail.device) for tail in tails]
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.tails_like)
        return (grad, *zeros)


def sum_in_order(*grads: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of the gradients that are there, from left to right; None where there is none."""
    total: torch.Tensor | None = None
    for grad in grads:
        if grad is not None:
            total = grad if total is None else total + grad
    return total
