"""Experts that are split over a tensor-parallel group, whose duplicates are dropped before the exchange.

With tensor parallelism P ranks next to each other have the same tokens. DeepSpeed-TED (arXiv 2303.06318) and Parm
(INFOCOM'24) drop the duplicates before the exchange, so that each of the P ranks sends 1 / P of the tokens, and gather
them afterwards. Each rank has a P-th of the width F of its experts.

Here an expert of width F is the sum of P experts of width F / P, one on each rank of a group, that are chosen together:
an activation acts on each of the F columns by itself. So what runs is a MoELayer over all ranks, under any schedule;
with `dedup="on", hierarchical=True` a token crosses to each group once and is gathered inside of it, as in TED and S1.

Letters: T tokens of a group, D hidden, F width, E experts, K choices, W ranks, P of them in a group, m = E P / W.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError

from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.errors import ConfigError
from moe_overlap.layer.assembly import ROUTER_DEFAULTS, make_router
from moe_overlap.layer.layer import MoELayer
from moe_overlap.routing.decision import RoutingDecision, as_decision
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error

WHOLE = ("shared_expert", "shared_expert_size", "latent_size")  # parts that would read a rank's share of the tokens


class TensorParallelMoE(nn.Module):
    """A MoE layer for tokens that the `tensor_ranks` ranks of a group all have: ranks [P g, P (g + 1)) are group g.

    Arguments as MoELayer's, for whole experts: ffn_hidden_size F is divided by P, and E by the groups. `router` is a
    module [T, D] -> RoutingDecision, or None or a score for a LinearRouter; it is dense, alike on all ranks, and reads
    all T tokens, so that its gradients, like that of x, are whole on every rank of a group. `moe` is the layer of the
    parts, with `experts` [m, ...] as `expert_parts` cuts them; their gradients are of the sum of the groups' losses.

    forward(x [..., D], the same on all ranks of a group) -> y, likewise. ConfigError for sizes that do not divide; a
    group whose ranks have other numbers of tokens meets the errors of an exchange. NotImplementedError: a shared expert
    and latent experts, whose gradients would be of a rank's share of the tokens; a router with a balance loss over all
    ranks, a state or zero-computation experts; gradients that are means over ranks (`prepare`).
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, num_experts: int, top_k: int, *, tensor_ranks: int,
        router: str | nn.Module | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(tensor_ranks, int) or tensor_ranks < 1 or ffn_hidden_size % tensor_ranks:
            raise ConfigError("tensor_ranks", tensor_ranks, f"a divisor of ffn_hidden_size, {ffn_hidden_size}")
        for name in WHOLE:
            if options.get(name) is not None:
                raise NotImplementedError(f"TensorParallelMoE with {name}: gradients of a share of the tokens")
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        known = signature(MoELayer).parameters.keys() - ROUTER_DEFAULTS.keys()
        of_router = {name: options.pop(name) for name in options.keys() - known}
        parts = num_experts * tensor_ranks, top_k * tensor_ranks
        self.moe = MoELayer(hidden_size, ffn_hidden_size // tensor_ranks, *parts, router=_Told(), **options)
        self.router = make_router(router, hidden_size, num_experts, top_k, of_router, factory)
        ranks = self.moe.transport.world_size
        if ranks % tensor_ranks or num_experts % (ranks // tensor_ranks):
            expected = f"a divisor of the {ranks} ranks, into groups whose number divides the {num_experts} experts"
            raise ConfigError("tensor_ranks", tensor_ranks, expected)
        self.tensor_ranks, self.each = tensor_ranks, num_experts * tensor_ranks // ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.moe.ownership.grad_scale != 1.0:
            raise NotImplementedError("TensorParallelMoE with gradients that are means over ranks (prepare)")
        told = self.moe.router
        assert isinstance(told, _Told)
        try:
            mine_TD = self._decide(x, told)
            y_TD = self.moe(mine_TD)
        finally:
            told.of = None
        tokens = x.shape[:-1].numel()
        y: torch.Tensor = _Gather.apply(y_TD, self.moe.transport, self.tensor_ranks, tokens)
        return y.reshape(x.shape)

    def _decide(self, x: torch.Tensor, told: _Told) -> torch.Tensor:
        """This rank's share of the tokens, with the decision for it in `told`; or x as it is, with what went wrong in
        `told`, which the layer says to all ranks."""
        try:
            x_TD = x.reshape(-1, x.shape[-1])
            whole = as_decision(self.router(x_TD))
            if whole.global_balance is not None or whole.state is not None or whole.zero_experts:
                raise NotImplementedError("TensorParallelMoE with this router: balance over ranks, state, zero experts")
            told.of = self._mine(whole)
        except _StopRecomputationError:  # a checkpoint has what it needs, on all ranks alike
            raise
        except Exception as error:
            told.of = error
            return x
        mine_TD: torch.Tensor = _Drop.apply(x_TD, self.moe.transport, self.tensor_ranks)
        return mine_TD

    def _mine(self, whole: RoutingDecision) -> RoutingDecision:
        """The decision for this rank's share of the tokens, with all parts of each expert in the place of it."""
        begin, end = _share(self.moe.transport.rank % self.tensor_ranks, self.tensor_ranks, whole.topk_ids_TK.shape[0])
        ids_TK = whole.topk_ids_TK[begin:end]
        first_TK = ids_TK // self.each * self.tensor_ranks * self.each + ids_TK % self.each
        part_P = torch.arange(self.tensor_ranks, device=ids_TK.device, dtype=torch.int32) * self.each
        ids_TKP = torch.where(ids_TK[..., None] >= 0, first_TK[..., None] + part_P, -1)
        counts_G1m = whole.tokens_per_expert_E.view(-1, 1, self.each)
        weights_TK = _Drop.apply(whole.topk_weights_TK, self.moe.transport, self.tensor_ranks)
        return replace(
            whole, topk_ids_TK=ids_TKP.flatten(1).to(torch.int32), chosen_ids_TK=None, logits_TE=None,
            topk_weights_TK=weights_TK[..., None].expand(-1, -1, self.tensor_ranks).flatten(1),
            tokens_per_expert_E=counts_G1m.repeat(1, self.tensor_ranks, 1).flatten(),
        )  # fmt: skip


class _Told(nn.Module):
    """A router that decides what stands in `of`, or raises it."""

    of: RoutingDecision | Exception | None = None

    def forward(self, x_TD: torch.Tensor) -> RoutingDecision:
        if isinstance(self.of, Exception):
            raise self.of
        if self.of is None:
            raise RuntimeError("call the TensorParallelMoE, not its layer")
        return self.of


def expert_parts(
    w_in: torch.Tensor, w_out: torch.Tensor, *, rank: int, ranks: int, tensor_ranks: int, gated: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank has of whole experts: [E, F', D] and [E, D, F] -> [m, F' / P, D] and [m, D, F / P].

    gated: F' = 2 F, [gate | up], of which both halves are cut; else F' = F.
    """
    each = w_in.shape[0] * tensor_ranks // ranks
    group, part = divmod(rank, tensor_ranks)
    mine = slice(group * each, (group + 1) * each)
    halves = w_in[mine].chunk(2 if gated else 1, dim=1)
    cut = torch.cat([half.chunk(tensor_ranks, dim=1)[part] for half in halves], dim=1)
    return cut, w_out[mine].chunk(tensor_ranks, dim=2)[part].contiguous()


class _Drop(torch.autograd.Function):
    """This rank's share of the rows that its group has in common; backward gathers their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, transport: Transport, size: int) -> torch.Tensor:
        ctx.of = transport, size, rows.shape[0]
        begin, end = _share(transport.rank % size, size, rows.shape[0])
        return rows[begin:end].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad.contiguous(), *ctx.of), None, None


class _Gather(torch.autograd.Function):
    """The rows of all ranks of a group; backward takes this rank's share, as the gradient is alike on all of them."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, transport: Transport, size: int, total: int) -> torch.Tensor:
        ctx.share = _share(transport.rank % size, size, total)
        return _gather(rows, transport, size, total)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        begin, end = ctx.share
        return grad[begin:end].contiguous(), None, None, None


def _share(part: int, size: int, total: int) -> tuple[int, int]:
    return total * part // size, total * (part + 1) // size


def _gather(rows: torch.Tensor, transport: Transport, size: int, total: int) -> torch.Tensor:
    """[share, n] of each rank of the group -> [total, n] on all of them. All ranks of the transport take part."""
    if size == 1:
        return rows
    with closing_on_error(transport, "gather"):
        layout = RowLayout(width=rows.shape[1], dtype=rows.dtype)
        plan = _to_the_group(transport.rank, transport.world_size, size, total)
        return transport.start(rows.repeat(size, 1), plan, layout, action="gather").wait()


def _to_the_group(rank: int, world_size: int, size: int, total: int) -> ChunkPlan:
    """A rank's share to every rank of its group. Counts of other groups are not known, and nobody asks for them."""
    first, part = rank // size * size, rank % size
    shares = np.diff([total * i // size for i in range(size + 1)])
    sent, received = np.zeros((BLOCKS, world_size), np.int64), np.zeros((world_size, BLOCKS, 1), np.int64)
    sent[0, first : first + size] = shares[part]
    received[first : first + size, 0, 0] = shares
    some = np.ones(BLOCKS, np.int64), np.ones(1, np.int64)  # other ranks may have rows: the exchange takes place
    counts = Counts(sent=sent, received=received, totals=sent.sum(axis=0), most_sent=total, away=some)
    return ExchangePlan(rank=rank, world_size=world_size, step=0, phase="forward", grad_enabled=False,
                        x_requires_grad=False, counts=counts).chunked(1)  # fmt: skip
