"""The forward of one micro-batch under the backward of another (1F1B with merged steps), on one rank's blocks.

Sources: DualPipe (DeepSeek-V3, arXiv 2412.19437, figure 4); Megatron-Core's overlap of expert-parallel exchanges.
Every block is cut into two graphs with detached boundaries: its ops ("dense"), and its layer with the residual
("routed"). Per block, with micro-batch b going forward and a backward:

    comp | Ut  dense(b)  Ed Ew Pt  P  dense'(a)  E  U
    wire |     Ct(a)     Dt(a)        D(b)       C(b)

Exchanges of backward are hidden by the ops of the one forward, exchanges of forward by the backward of the other's ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from moe_overlap.agreement.plan import ChunkBy
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import Beside
from moe_overlap.layer.interleaved import MoEBlock, check_blocks, fixed_window
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error

Work = Callable[[], None]


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What enters the autocast that is on now, or its absence."""
    return partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


class Meanwhile(torch.autograd.Function):
    """An op of a window that does somebody else's work: in backward what its `Piece` has to do meanwhile."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, token: torch.Tensor) -> torch.Tensor:
        ctx.piece = piece
        return token.view_as(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.piece.work_beside()
        return None, grad


@dataclass
class Piece:
    """One graph of a micro-batch: from a leaf to results that its backward begins with."""

    leaf: torch.Tensor
    results: list[torch.Tensor] = field(default_factory=list)  # the first one is what the next piece reads
    beside: Work | None = None  # for `Meanwhile`
    autocast: Callable[[], AbstractContextManager[Any]] | None = None  # that of the caller, for `beside`

    def work_beside(self) -> None:
        work, self.beside = self.beside, None
        if work is not None:
            assert self.autocast is not None
            with torch.enable_grad(), self.autocast():  # nodes of backward run without
                work()

    def backward(self, grad: torch.Tensor, beside: Work | None = None) -> torch.Tensor:
        """The gradient of the leaf; `beside` is done while rows travel. Frees the piece. Without autocast,
        as behind the `with` of a forward."""
        self.beside, self.autocast = beside, autocast_now(self.leaf.device)
        results, self.results = self.results, []
        results = results[:1] + [one for one in results[1:] if one.requires_grad]
        with torch.autocast(self.leaf.device.type, enabled=False):
            torch.autograd.backward(results, [grad, *(torch.ones_like(one) for one in results[1:])])
        self.work_beside()  # where there was no exchange to do it under
        return torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad


@dataclass
class Held:
    """A micro-batch between its forward and its backward: `output` [..., D], and a graph for each piece of the way."""

    output: torch.Tensor
    aux_loss: (
        torch.Tensor
    )  # the sum of its layers' auxiliary losses, float32, detached: their gradients are taken care of
    pieces: list[Piece]


class ForwardBackward(nn.Module):
    """Blocks whose forward of one micro-batch and backward of another run side by side.

    A schedule of micro-batches (1F1B) or of pipeline stages calls `forward_one`, `forward_and_backward` and
    `backward_one`, or `run` does it for one rank's model. Gradients are those of the micro-batches one after the other,
    bit for bit, as long as nothing in the ops is random and no parameter is in two blocks. These calls may stand inside
    of autocast: what they run of backward runs without it. Between `forward_one` and `backward_one` a micro-batch holds
    what autograd saves for it; side by side the two of them hold that of one micro-batch and one block at most, as a
    block's backward frees its graphs before the other's is made whole. What a block begins with may not write into its
    input, which is a leaf here. After an error in `forward_and_backward` neither micro-batch can go on.

    slot: whether the other's work stands under the dispatch (1) or under the combine (0) of forward, `backward_slot`
    likewise for backward (1: under the second exchange, 0: under the first). chunks, by: as elsewhere.
    overlap=False: every exchange joined.

    Graphs end at every block's boundary, so wrappers that act on a model's whole backward do not fit around it: not DDP
    (reduce the dense gradients yourself, see docs/parallel.md) and not FSDP.
    """

    def __init__(
        self,
        blocks: Sequence[MoEBlock],
        *,
        slot: int = 1,
        backward_slot: int = 0,
        chunks: int = 1,
        by: ChunkBy = "tokens",
        overlap: bool = True,
    ) -> None:
        super().__init__()
        check_blocks(blocks)
        for name, value in (("slot", slot), ("backward_slot", backward_slot)):
            if value not in (0, 1) or isinstance(value, bool):
                raise ConfigError(name, value, "0 or 1")
        self.blocks = nn.ModuleList(blocks)
        self._pairs = [
            fixed_window(block.moe, 1, slot, backward_slot, chunks, by).join(not overlap) for block in blocks
        ]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: [..., D] -> the same shape, block after block in one graph: for evaluation."""
        for block in self.blocks:
            h = block(h)
        return h

    # ---------------------------------------------------------------- the three steps

    def forward_one(self, h: torch.Tensor) -> Held:
        """The forward of a micro-batch with nothing beside it. h: [..., D]."""
        return self._side_by_side(h)

    def backward_one(self, held: Held, grad: torch.Tensor) -> torch.Tensor:
        """The backward of a micro-batch: grad [..., D] of its output -> gradient of its input. Auxiliary losses are in
        the total with the factor 1."""
        self._check(held, grad)
        while held.pieces:
            grad = held.pieces.pop().backward(grad)
        return grad

    def forward_and_backward(self, h: torch.Tensor, held: Held, grad: torch.Tensor) -> tuple[Held, torch.Tensor]:
        """The forward of h and the backward of `held`, side by side: (what the one leaves, the gradient of the other's
        input). All ranks make the same calls in the same order."""
        self._check(held, grad)
        way = _Way(held.pieces, grad)
        return self._side_by_side(h, way), way.grad

    # ---------------------------------------------------------------- all micro-batches of a step

    def run(self, batches: Iterable[torch.Tensor], loss_of: Callable[[torch.Tensor, int], torch.Tensor]) -> list[float]:
        """Forward and backward of all micro-batches, each but the first beside the backward of the one before.

        loss_of(output [..., D], which) -> scalar loss, with what comes after the blocks (its own parameters get their
        gradients here). Returns the losses without auxiliary ones. Inputs that require a gradient get it in `.grad`.
        """
        losses: list[float] = []
        before: tuple[torch.Tensor, Held, torch.Tensor] | None = None
        for which, h in enumerate(batches):
            if before is None:
                held = self.forward_one(h)
            else:
                fed, last, grad = before
                held, dx = self.forward_and_backward(h, last, grad)
                _hand_back(fed, dx)
            loss, grad = self._head(held, loss_of, which)
            losses.append(loss)
            before = h, held, grad
        if before is None:
            raise ConfigError("batches", "none", "at least one micro-batch")
        fed, last, grad = before
        _hand_back(fed, self.backward_one(last, grad))
        return losses

    def _head(self, held: Held, loss_of: Callable[..., torch.Tensor], which: int) -> tuple[float, torch.Tensor]:
        output = held.output.requires_grad_()
        with closing_on_error(self._transport, "the loss"), torch.enable_grad():
            loss = loss_of(output, which)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise ConfigError("loss_of", type(loss).__name__, "a scalar loss as a tensor")
            with torch.autocast(output.device.type, enabled=False):
                loss.backward()
        grad = torch.zeros_like(output) if output.grad is None else output.grad
        return float(loss.detach()), grad

    # ---------------------------------------------------------------- details

    def _side_by_side(self, h: torch.Tensor, way: _Way | None = None) -> Held:
        with closing_on_error(self._transport, "a micro-batch to go forward"):
            if not isinstance(h, torch.Tensor) or not h.is_floating_point():
                given = h.dtype if isinstance(h, torch.Tensor) else type(h).__name__
                raise ConfigError("h", given, "a floating-point tensor [..., D]")
        pieces: list[Piece] = []
        aux = torch.zeros((), dtype=torch.float32, device=h.device)
        for block, pair in zip(self.blocks, self._pairs, strict=True):
            dense = Piece(leaf=h.detach().requires_grad_())

            def run_dense(block: Any = block, dense: Piece = dense) -> None:
                dense.results = [block.dense(dense.leaf)]

            if way is not None:
                way.back(beside=run_dense)
            if not dense.results:
                with torch.enable_grad():
                    run_dense()
            routed = Piece(leaf=dense.results[0].detach().requires_grad_())
            pieces += [dense, routed]
            with torch.enable_grad():
                h = self._routed(block, pair, routed, None if way is None else way.back)  # type: ignore[arg-type]
            for loss in routed.results[2:]:
                aux = aux + loss.detach()
        return Held(output=h, aux_loss=aux, pieces=pieces)

    @staticmethod
    def _routed(block: MoEBlock, pair: Any, piece: Piece, beside: Work | None) -> torch.Tensor:
        token = torch.zeros(1, dtype=piece.leaf.dtype, device=piece.leaf.device, requires_grad=True)

        def meanwhile(token: torch.Tensor) -> torch.Tensor:
            if beside is not None:
                beside()
            result: torch.Tensor = Meanwhile.apply(piece, token)
            return result

        out, after = block.routed_beside(piece.leaf, Beside(hidden=token, schedule=pair, backbone=[meanwhile]))
        loss = block.moe.take_aux_loss()
        piece.results = [one for one in (out, after, loss) if one is not None]
        return out.detach()

    def _check(self, held: Held, grad: torch.Tensor) -> None:
        with closing_on_error(self._transport, "a micro-batch to go backward"):
            if not held.pieces:
                raise ConfigError("held", "a micro-batch whose backward has run", "one whose forward alone has")
            if len(held.pieces) != 2 * len(self.blocks):
                expected = f"one of {len(self.blocks)} blocks, as this model has, none of whose backward has run"
                raise ConfigError("held", f"a micro-batch with {len(held.pieces) / 2:g} blocks left", expected)
            if not isinstance(grad, torch.Tensor) or grad.shape != held.output.shape:
                shape = tuple(grad.shape) if isinstance(grad, torch.Tensor) else type(grad).__name__
                raise ConfigError("grad", shape, f"a tensor {tuple(held.output.shape)}, as the output is")

    @property
    def _transport(self) -> Transport:
        block = self.blocks[-1]
        assert isinstance(block, MoEBlock)
        return block.moe.transport


class _Way:
    """The backward of a micro-batch, piece by piece."""

    def __init__(self, pieces: list[Piece], grad: torch.Tensor) -> None:
        self._pieces, self.grad = pieces, grad

    def back(self, beside: Work | None = None) -> None:
        self.grad = self._pieces.pop().backward(self.grad, beside)


def _hand_back(fed: torch.Tensor, dx: torch.Tensor) -> None:
    if fed.requires_grad:
        torch.autograd.backward(fed, dx)
