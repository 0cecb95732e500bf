"""Two micro-batches, or two halves of a sequence, through the same blocks: one computes while the other's rows travel.

Sources: two-batch overlap (TBO) of DeepSeek's and SGLang's inference, "DBO" in vLLM; two halves of a sequence: ISO
(arXiv 2409.11155). Here it is one more use of a layer's window: beside the exchanges of block l for the first stream
run the ops of block l of the second, beside those of the second the ops of block l + 1 of the first:

    comp | ops0(a) P ops0(b) E U   P ops1(a) E U   P ops1(b) E U ...
    wire |           D(a)    C(a)    D(b)    C(b)    D(a)    C(a)

Autograd runs all of it the other way round, with the exchanges of backward under the ops' backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.plan import ChunkBy
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.beside import Op, PlainFunction, as_module
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import AnySchedule, Beside
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shortcut import block_schedule
from moe_overlap.layer.static import is_static
from moe_overlap.schedule.builders import SchedulePair, window
from moe_overlap.schedule.nodes import Tap
from moe_overlap.schedule.user_ops import check_result
from moe_overlap.transport.closing import closing_on_error


class MoEBlock(nn.Module):
    """g = ops(h), then g + moe(norm(g)); h [..., D] -> the same shape.

    ops: callables h -> h, with norm and residual inside, such as an attention block (modules are registered).
    norm: on the experts' input, or None.
    """

    def __init__(self, ops: Sequence[Op], moe: MoELayer, *, norm: Op | None = None) -> None:
        super().__init__()
        self.ops = nn.ModuleList(as_module(op) for op in ops)
        self.moe = moe
        self.norm = None if norm is None else as_module(norm)

    def dense(self, h: torch.Tensor, ops: Iterable[Op] | None = None) -> torch.Tensor:
        """h after the ops, or after `ops` in their place."""
        mine: Iterable[Op] = self.ops if ops is None else ops
        with closing_on_error(self.moe.transport, "the ops of a block"):
            for index, op in enumerate(mine):
                before, h = h, op(h)
                check_result(f"op {index} of a block", h, before)
        return h

    def routed(self, g: torch.Tensor) -> torch.Tensor:
        """g + moe(norm(g)), with the layer's own schedule."""
        kept, tapped = self._tap(g)
        return kept + self._checked(self.moe(tapped))

    def routed_beside(self, g: torch.Tensor, beside: Beside) -> tuple[torch.Tensor, torch.Tensor]:
        """(g + moe(norm(g)), the result of the ops beside it)."""
        kept, tapped = self._tap(g)
        hidden, y = self.moe(tapped, beside)
        return kept + self._checked(y), hidden

    def _tap(self, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept, tapped = Tap.apply(g) if torch.is_grad_enabled() and g.requires_grad else (g, g)
        if self.norm is not None:
            with closing_on_error(self.moe.transport, "norm"):
                before, tapped = tapped, self.norm(tapped)
                check_result("norm", tapped, before)
        return kept, tapped

    def _checked(self, y: Any) -> torch.Tensor:
        if not isinstance(y, torch.Tensor):
            raise ConfigError("moe.router", type(self.moe.router).__name__, "a router without a state of its own")
        return y

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: [..., D] -> the same shape, with the layer's own schedule."""
        return self.routed(self.dense(h))


def check_blocks(blocks: Sequence[MoEBlock]) -> None:
    """Raises ConfigError unless these are blocks whose layers leave their schedule, and their call, to a caller."""
    if not blocks or not all(isinstance(block, MoEBlock) for block in blocks):
        raise ConfigError("blocks", [type(block).__name__ for block in blocks], "at least one MoEBlock")
    for block in blocks:
        if block.moe.shared_expert is not None:
            raise ConfigError("moe", "a layer with a shared expert", "a layer without one: make it one of the ops")
        if is_static(block.moe.dispatcher):
            raise ConfigError("moe.mode", "static", '"host": the schedules of a layer differ from call to call here')
        block_schedule(None, 0, block.moe.schedule, num_ops=0)


class Interleaved(nn.Module):
    """Blocks that two streams go through side by side. Module parameters are those of the blocks, once.

    forward(h): one stream, block after block. forward(first, second): both, interleaved; the same bits as two calls of
    one stream with the same cut of the exchanges, forward and backward, as long as nothing in the ops is random (they
    run in another order). The streams may differ in their tokens.

    slot: how many of the ops beside an exchange are issued before the experts, that is under the dispatch (at most as
    many as there are); None: half of them, rounded up. chunks, by: cut the exchanges as well. backward_slot: the same
    for backward, in forward order. schedule="auto" instead of all these: each window is measured at its first call, as
    ShortcutBlock's is. overlap=False: every exchange joined; equal results, bit for bit.
    carry=True: ops are called as op(h, past) and return (h, kept); past is None for the first stream, and what the same
    op of the same block kept for the first one when it runs for the second: keys and values of the first half of a
    sequence (ISO). Gradients flow through it.
    """

    def __init__(
        self,
        blocks: Sequence[MoEBlock],
        *,
        slot: int | None = None,
        backward_slot: int | None = None,
        chunks: int = 1,
        by: ChunkBy = "tokens",
        schedule: str | None = None,
        overlap: bool = True,
        carry: bool = False,
    ) -> None:
        super().__init__()
        check_blocks(blocks)
        if schedule not in (None, "auto"):
            raise ConfigError("schedule", schedule, "None (slot and chunks say it) or 'auto'")
        if schedule == "auto" and (slot, backward_slot, chunks) != (None, None, 1):
            raise ConfigError("schedule", schedule, "None, where slot or chunks are given")
        for name, value in (("slot", slot), ("backward_slot", backward_slot)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(name, value, "None or an integer from 0")
        if schedule == "auto" and any(block.moe.rows.hierarchical for block in blocks):
            raise ConfigError("schedule", schedule, "None, with hierarchical exchanges")
        self.blocks = nn.ModuleList(blocks)
        self.carry = carry
        following = [len(block.ops) for block in blocks[1:]] + [0]
        self._windows = [
            tuple(
                self._window(block, ops, slot, backward_slot, chunks, by, schedule == "auto", overlap)
                for ops in (len(block.ops), after)
            )
            for block, after in zip(blocks, following, strict=True)
        ]

    @staticmethod
    def _window(
        block: MoEBlock, ops: int, slot: int | None, backward_slot: int | None, chunks: int, by: ChunkBy, auto: bool,
        overlap: bool,
    ) -> AnySchedule:  # fmt: skip
        if auto and block.moe.plans:
            return AutoSchedule(op_verb="B", num_ops=ops, overlap=overlap, dedup=block.moe.rows.dedup,
                                offload=block.moe.host_link is not None)  # fmt: skip
        return fixed_window(block.moe, ops, slot, backward_slot, chunks, by).join(not overlap)

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> Any:
        """first, second: [..., D] -> the same shapes: one tensor, or two."""
        if second is None:
            return self._alone(first, [{} for _ in self.blocks], second=False)
        kept: list[dict[int, Any]] = [{} for _ in self.blocks]
        g, z = self._block(0).dense(first, self._ops(0, kept, second=False)), second
        for at, (of_first, of_second) in enumerate(self._windows):
            block = self._block(at)
            beside = Beside(hidden=z, schedule=of_first, backbone=self._ops(at, kept, second=True))
            g, z = block.routed_beside(g, beside)
            beside = Beside(hidden=g, schedule=of_second, backbone=self._ops(at + 1, kept, second=False))
            z, g = block.routed_beside(z, beside)
        return g, z

    def one_after_the_other(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same without interleaving: what `forward(first, second)` is compared with, in bits and in time."""
        kept: list[dict[int, Any]] = [{} for _ in self.blocks]
        return self._alone(first, kept, second=False), self._alone(second, kept, second=True)

    def _alone(self, h: torch.Tensor, kept: list[dict[int, Any]], *, second: bool) -> torch.Tensor:
        for at in range(len(self.blocks)):
            block = self._block(at)
            h = block.routed(block.dense(h, self._ops(at, kept, second=second)))
        return h

    def _block(self, at: int) -> MoEBlock:
        block = self.blocks[at]
        assert isinstance(block, MoEBlock)
        return block

    def _ops(self, at: int, kept: list[dict[int, Any]], *, second: bool) -> list[Op]:
        """The ops of block `at` for a stream; none behind the last block."""
        ops: list[Op] = list(self._block(at).ops) if at < len(self.blocks) else []
        if not self.carry:
            return ops
        return [carrying(op, index, kept[at], second) for index, op in enumerate(ops)]


def carrying(op: Callable[..., Any], index: int, kept: dict[int, Any], second: bool) -> Op:
    """op(h, past) as an op h -> h of one stream; the first one leaves in `kept` what the second one reads."""

    call: Callable[..., Any] = op.function if isinstance(op, PlainFunction) else op

    def run(h: torch.Tensor) -> torch.Tensor:
        result = call(h, kept[index] if second else None)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(f"op {index} of a block", type(result).__name__, "a pair (h, kept), with carry=True")
        h, left = result
        if not second:
            kept[index] = left
        return h

    return run


def fixed_window(
    moe: MoELayer, ops: int, slot: int | None, backward_slot: int | None = None, chunks: int = 1, by: ChunkBy = "tokens"
) -> SchedulePair:
    """The window of a layer with `ops` ops beside it, `slot` of them (at most all; None: half) before the experts."""
    early = (ops + 1) // 2 if slot is None else min(slot, ops)
    back = early if backward_slot is None else min(backward_slot, ops)
    pair = window(ops, early, chunks=chunks, by=by, backward_slot=back)
    return moe.rows.pair(pair)
