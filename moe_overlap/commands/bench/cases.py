"""The timed unit: one block pair, attention, dense MLP, attention, experts; everything pre-norm with a residual.

    top2              two (top_k) routed experts
    shared1           one (top_k - 1) routed expert and a shared one
    scmoe_pos1|2|3    the same, but the routed expert reads an earlier activation (ScMoE, arXiv 2404.05019, 3.1)

Letters: T tokens here, D hidden, S tokens of a sequence, H heads of 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_overlap.agreement.plan import ChunkBy
from moe_overlap.commands.bench.routing import ForcedRouter
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shared_expert import SharedExpert
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.schedule.builders import SchedulePair, deduplicate, serial, shortcut, tap_of_position
from moe_overlap.schedule.recorder import TimelineEvent, emit
from moe_overlap.transport.base import Transport

CASES = ("top2", "shared1", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3")
HEAD = 64
MAX_SEQUENCE = 256
ACTIVATION = "swiglu"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of one rank, hidden size, width of every MLP and expert, experts over all ranks, experts per token."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


class Attention(nn.Module):
    """h + causal attention of norm(h) over sequences of min(256, T) tokens; the last one may be shorter. [T, D]."""

    def __init__(self, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, bias=False, **factory)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, **factory)
        self.out = nn.Linear(hidden, hidden, bias=False, **factory)

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(h_TD))
        whole = h_TD.shape[0] // MAX_SEQUENCE * MAX_SEQUENCE
        parts = [self._mix(qkv[:whole], MAX_SEQUENCE)] if whole else []
        if whole < h_TD.shape[0]:
            parts.append(self._mix(qkv[whole:], h_TD.shape[0] - whole))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return h_TD + self.out(mixed)

    def _mix(self, qkv_T3D: torch.Tensor, seq: int) -> torch.Tensor:
        hidden = qkv_T3D.shape[1] // 3
        q, k, v = qkv_T3D.view(-1, seq, 3, hidden // HEAD, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHSd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed_BHSd.transpose(1, 2).reshape(-1, hidden)


class Branch(nn.Module):
    """A dense MLP of norm(h), without the residual: the form a shared expert has. [T, D]."""

    def __init__(self, hidden: int, ffn: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, bias=False, **factory)
        self.mlp = SharedExpert(hidden, ffn, ACTIVATION, **factory)

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.mlp(self.norm(h_TD))
        return y_TD


class Residual(nn.Module):
    """h + branch(h)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        return h_TD + self.branch(h_TD)


class Observed(nn.Module):
    """An op outside the layer's schedule, which tells the recorder when it ran while `watching` is set."""

    def __init__(self, name: str, op: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.name, self.op, self.watch = name, op, watch

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        if not self.watch.on:
            return self.op(h_TD)
        start_s = time.perf_counter()
        backward = h_TD.requires_grad
        y_TD = self.op(_Edge.apply(h_TD, self, False) if backward else h_TD)
        y_TD = _Edge.apply(y_TD, self, True) if backward else y_TD
        self.emit("forward", start_s)
        return y_TD

    def emit(self, phase: str, start_s: float) -> None:
        emit(TimelineEvent(self.watch.rank, 0, phase, self.name, "comp", start_s, time.perf_counter()))


@dataclass
class Watch:
    """Whether the ops outside the schedule are to be recorded, and the rank they belong to."""

    rank: int
    on: bool = False


class _Edge(torch.autograd.Function):
    """An identity whose backward is the moment at which an op's backward begins (`first`) or ends."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, op: Observed, first: bool) -> torch.Tensor:
        ctx.op, ctx.first = op, first
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.first:
            ctx.op._backward_start_s = time.perf_counter()
        else:
            ctx.op.emit("backward", ctx.op._backward_start_s)
        return grad, None, None


class BlockPair(nn.Module):
    """One case on this rank. `pair` (the schedules) and `transport` can be exchanged between calls; both are what the
    rows of a benchmark differ in, the weights are not. ids_TK, weights_TK: routing, as wide as --top-k. dedup: one of
    options.DEDUP; then rows are measured by `as_asked` pairs."""

    def __init__(
        self,
        case: str,
        sizes: Sizes,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        transport: Transport,
        *,
        dtype: torch.dtype,
        dedup: str = "off",
        ranks_per_node: int | None = None,
        seed: int = 0,
        wrap: Callable[[str, nn.Module], nn.Module] = lambda name, op: op,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        factory: dict[str, Any] = {"dtype": dtype}
        hidden, ffn = sizes.hidden, sizes.ffn
        self.case, self.sizes, self.dtype, self.dedup = case, sizes, dtype, dedup
        self.watch = Watch(transport.rank)
        self.position = int(case[-1]) if case.startswith("scmoe") else 0
        routed = sizes.top_k if case == "top2" else sizes.top_k - 1
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        router = ForcedRouter(ids_TK[:, :routed], weights_TK[:, :routed].to(wide), sizes.experts)
        named: list[tuple[str, nn.Module]] = [
            ("attn1", Attention(hidden, **factory)),
            ("mlp", Residual(Branch(hidden, ffn, **factory))),
            ("attn2", Attention(hidden, **factory)),
        ]
        shared = None if case == "top2" else Branch(hidden, ffn, **factory)
        self.moe = MoELayer(
            hidden,
            ffn,
            sizes.experts,
            routed,
            router=router,
            activation=ACTIVATION,
            schedule=serial(shared=case == "shared1"),
            shared_expert_size=ffn if case == "shared1" else None,
            transport=transport,
            dedup="off" if dedup == "off" else "on",
            ranks_per_node=ranks_per_node,
            hierarchical=dedup == "hierarchical",
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(hidden, bias=False, **factory)
        tap = tap_of_position(self.position) if self.position else len(named)
        ops = [wrap(name, op) for name, op in named]
        ops[:tap] = [Observed(name, op, self.watch) for (name, _), op in zip(named, ops[:tap], strict=False)]
        self.op_names = [name for name, _ in named[tap:]] + (["shared"] if self.position else [])
        if self.position:
            assert shared is not None
            self.block: nn.Module = ShortcutBlock(
                ops, self.moe, tap=tap, slot=0, shared_expert=wrap("shared", shared), pre_norm=self.norm
            )
        else:
            if self.moe.shared_expert is not None:
                self.moe.shared_expert = wrap("shared", self.moe.shared_expert)
            self.block = nn.Sequential(*ops, Residual(nn.Sequential(self.norm, self.moe)))

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.block(h_TD)
        return y_TD

    @property
    def num_slots(self) -> int:
        """How many places the experts can have among the ops beside the exchanges."""
        return self.position + 2 if self.position else 2

    def window_pair(
        self, slot: int, backward_slot: int | None = None, *, chunks: int = 1, by: ChunkBy = "tokens"
    ) -> SchedulePair:
        """The shortcut schedule of this case."""
        return shortcut(self.position, slot, backward_slot=backward_slot, chunks=chunks, by=by)

    def as_asked(self, pair: SchedulePair) -> SchedulePair:
        """The same strategy, deduplicated where --dedup says so."""
        return pair if self.dedup == "off" else deduplicate(pair)

    def use(self, pair: SchedulePair, transport: Transport) -> None:
        """Run the coming calls by `pair` over `transport`. The same on all ranks."""
        if isinstance(self.block, ShortcutBlock):
            self.block.schedule = pair
        else:
            self.moe.schedule = pair
        self.moe.transport = transport
        self.moe.dispatcher.transport = transport
