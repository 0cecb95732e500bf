"""The autograd nodes of one layer call: thin shells around the bodies in `schedule/run.py`.

Every action of the backward schedule is a node of its own in the user's graph, so that the engine can run them in the
planned order, between the backwards of the user's own modules. The nodes pass empty tensors ("tokens") to each other:
they carry the dependencies; the rows themselves lie in the buffers of the step. Written as the graph is built, so that
backward runs it from right to left:

    Fork -> [router] -> Pt -> Dt.wait -> Dt.start -> Ed -> Ct.wait -> Ct.start -> Ut -> y     (per chunk from Dt to Ct)
      \\______ Ew (weight gradients) _______________/

Fork is the last node of the layer's backward: it is the one consumer of x and of the expert weights, adds the gradients
of x in a fixed order, and hands the weight gradients over when all of them are complete.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from moe_overlap.errors import ConfigError

if TYPE_CHECKING:
    from moe_overlap.schedule.order import Node
    from moe_overlap.schedule.run import Step


class Fork(torch.autograd.Function):
    """The entry of a layer: copies of x for its consumers, and one token for the weight gradients.

    Inputs: step, number of copies, anchor (an empty leaf that makes the outputs require grad on every rank), x, w_in,
    w_out. Outputs: the copies of x, then the token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
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
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        step: Step = ctx.step
        dx_rows = step.run_missing_backward()
        dw_in, dw_out = step.take_weight_gradients()
        dx = sum_in_order(dx_rows, *grads[:-1]) if ctx.needs_input_grad[3] else None
        return None, None, None, dx, dw_in, dw_out


class Stage(torch.autograd.Function):
    """One action of the backward schedule, or half of an exchange. Its forward computes nothing."""

    @staticmethod
    def forward(ctx: Any, step: Step, node: Node, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.step, ctx.node, ctx.num_tensors = step, node, len(tensors)
        ctx.set_materialize_grads(False)
        return step.node_output(node, ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        grads = ctx.step.run_backward(ctx.node, ctx, grad)
        return (None, None, *grads)


class Tap(torch.autograd.Function):
    """The point of a backbone that feeds the experts: (for the backbone, for the experts); one fixed-order sum."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return h.view_as(h), h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_backbone: torch.Tensor | None, d_experts: torch.Tensor | None) -> torch.Tensor | None:
        return sum_in_order(d_backbone, d_experts)


class Marker(torch.autograd.Function):
    """An identity after backbone op `index`: its backward is the moment at which that op's backward begins."""

    @staticmethod
    def forward(ctx: Any, step: Step, action: str, h: torch.Tensor) -> torch.Tensor:
        ctx.step, ctx.action = step, action
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        ctx.step.lanes.open_op(ctx.action)
        return None, None, grad


class SameRouting(torch.autograd.Function):
    """y unchanged; its backward refuses a recompute that routed otherwise (where no `Ut` does: one rank, one chunk)."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, slot_to_row: torch.Tensor) -> torch.Tensor:
        ctx.routing_digest = routing_digest(slot_to_row)
        ctx.save_for_backward(ctx.routing_digest)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        check_same_routing(ctx.saved_tensors[0], ctx.routing_digest)
        return grad, None


def routing_digest(slot_to_row: torch.Tensor, *, cut: int = 0) -> torch.Tensor:
    """A number that changes when the choice of experts does, or the cut of backward, which is a number too: int64
    scalar, on the device, read by nobody's host."""
    flat = slot_to_row.reshape(-1).to(torch.int64)
    return ((flat + 1) * (torch.arange(flat.numel(), device=flat.device) * 2654435761 + 1)).sum() + cut


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
    """The loss unchanged, with a zero gradient for `tail`: the layer behind it takes part in backward."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        ctx.tail_like = (tail.shape, tail.dtype, tail.device)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.tail_like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def sum_in_order(*grads: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of the gradients that are there, from left to right; None where there is none."""
    total: torch.Tensor | None = None
    for grad in grads:
        if grad is not None:
            total = grad if total is None else total + grad
    return total


def reserve_sequence_numbers(anchor: torch.Tensor, count: int) -> list[int]:
    """`count` ascending sequence numbers of this thread that no other node has: each belongs to a node thrown away.

    The engine runs the ready node with the highest number first. Numbers reserved between two backbone ops let nodes
    that were created elsewhere run between the backwards of those two ops.
    """
    return [anchor.view(0).grad_fn._sequence_nr() for _ in range(count)]  # type: ignore[union-attr]


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """The dtype of the rows was chosen at the entry; the bodies compute in it, whatever autocast says."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
