"""A plain Mixture-of-Experts layer over an all-to-all: what one writes with nothing but torch.distributed.

Rows go to the ranks of their experts, come back, and are added up; one exchange each way, no overlap. It is here to be
read, and to have something other than our own layer that the checks are known to pass.

Letters: T tokens of this rank, D hidden size, F expert hidden size, E experts, K experts per token, W ranks, e = E / W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint


class AllToAll(torch.autograd.Function):
    """rows [R, D], the first send[0] of them for rank 0, the next send[1] for rank 1 -> those received, by source."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: list[int], recv: list[int], group: Any) -> torch.Tensor:
        ctx.splits = send, recv, group
        got = rows.new_empty(sum(recv), *rows.shape[1:])
        dist.all_to_all_single(got, rows.contiguous(), recv, send, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        send, recv, group = ctx.splits
        back = grad.new_empty(sum(send), *grad.shape[1:])
        dist.all_to_all_single(back, grad.contiguous(), send, recv, group=group)
        return back, None, None, None


class PlainMoE(nn.Module):
    """Softmax router with top-k, stacked experts (up, activation, down), a shared expert of the same size.

    normalize: the K weights of a token add up to one.
    group: None for one process that holds all experts; else rank r holds experts [r * e, (r + 1) * e).
    capacity_factor: an expert takes at most ceil(factor * tokens of all ranks * K / E) rows, those of highest weight;
    between equal weights the earlier token wins, counted through all ranks in their order.
    aux_coef: of the balancing loss, from the counts of all ranks; its mean over ranks is that of one process.
    recompute: keep the input of the layer only, and run it again in backward.

    forward(x [T, D]) -> (y [T, D], aux loss, a scalar). `bias` [E] is added for the choice of experts and never to
    their weights; `update_bias` moves it by the counts since the last call.
    """

    bias: torch.Tensor
    counts: torch.Tensor

    def __init__(
        self, hidden: int, ffn: int, experts: int, top_k: int, *, group: Any = None, shared: bool = True,
        normalize: bool = True, capacity_factor: float | None = None, aux_coef: float = 0.0, recompute: bool = False,
        activation: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group, self.experts, self.top_k = group, experts, top_k
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.capacity_factor, self.aux_coef, self.recompute = capacity_factor, aux_coef, recompute
        self.activation, self.normalize = activation, normalize
        self.router = nn.Linear(hidden, experts, bias=False, dtype=dtype)
        self.expert_up = nn.Parameter(torch.randn(experts // self.ranks, ffn, hidden, dtype=dtype) * hidden**-0.5)
        self.expert_down = nn.Parameter(torch.randn(experts // self.ranks, hidden, ffn, dtype=dtype) * ffn**-0.5)
        self.shared_up = nn.Linear(hidden, ffn, bias=False, dtype=dtype) if shared else None
        self.shared_down = nn.Linear(ffn, hidden, bias=False, dtype=dtype) if shared else None
        self.register_buffer("bias", torch.zeros(experts, dtype=dtype))
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64))
        self._again = False

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every rank of the group calls it, with any number of tokens."""
        if not self.recompute:
            return self._forward(x_TD)
        result: tuple[torch.Tensor, torch.Tensor] = checkpoint(
            self._forward, x_TD, use_reentrant=False, context_fn=self._contexts
        )
        return result

    def _forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs_TE, ids_TK, weights_TK = self.route(x_TD)
        counts_E = self.sum_over_ranks(torch.bincount(ids_TK.flatten(), minlength=self.experts))
        if self.training and not self._again:
            self.counts += counts_E
        aux = self._aux_loss(probs_TE, counts_E)
        keep_TK = self.within_capacity(ids_TK, weights_TK)
        y_TD = self._routed(x_TD, ids_TK, weights_TK, keep_TK)
        if self.shared_up is not None and self.shared_down is not None:
            y_TD = y_TD + self.shared_down(self.activation(self.shared_up(x_TD)))
        return y_TD, aux

    def route(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(probabilities [T, E], ids [T, K], weights [T, K]); ties go to the lower id."""
        probs_TE = self.router(x_TD).softmax(dim=-1)
        by_score = (probs_TE.detach() + self.bias).argsort(dim=-1, descending=True, stable=True)
        ids_TK = by_score[:, : self.top_k]
        weights_TK = probs_TE.gather(1, ids_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return probs_TE, ids_TK, weights_TK

    def _aux_loss(self, probs_TE: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """coef * E * sum_i f_i * P_i over all ranks' tokens; times W, as gradients are averaged over ranks."""
        f_E = counts_E.to(probs_TE.dtype) / counts_E.sum()
        tokens = counts_E.sum() / self.top_k
        return self.aux_coef * self.experts * (f_E * probs_TE.sum(dim=0) * self.ranks / tokens).sum()

    def within_capacity(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """bool [T, K]: what is sent. All ranks sort the slots of all ranks: their number does not matter."""
        if self.capacity_factor is None:
            return torch.ones_like(ids_TK, dtype=torch.bool)
        sizes = self.gather(torch.tensor([ids_TK.numel()]), [1] * self.ranks).tolist()
        ids_S, weights_S = (self.gather(t.detach().flatten(), sizes) for t in (ids_TK, weights_TK))
        capacity = math.ceil(self.capacity_factor * len(ids_S) / self.experts)
        order_S = weights_S.argsort(descending=True, stable=True)
        order_S = order_S[ids_S[order_S].argsort(stable=True)]
        counts_E = torch.bincount(ids_S, minlength=self.experts)
        place_S = torch.arange(len(ids_S)) - (counts_E.cumsum(0) - counts_E)[ids_S[order_S]]
        keep_S = torch.empty_like(ids_S, dtype=torch.bool).scatter(0, order_S, place_S < capacity)
        return keep_S.split(sizes)[self.rank].view_as(ids_TK)

    def _routed(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, keep_TK: torch.Tensor
    ) -> torch.Tensor:
        """Rows to their experts and back. The K of a token are added up by expert, on any number of ranks."""
        kept_S = keep_TK.flatten().nonzero().flatten()
        kept_S = kept_S[ids_TK.flatten()[kept_S].argsort(stable=True)]
        token_R = kept_S // self.top_k
        send_We = torch.bincount(ids_TK.flatten()[kept_S], minlength=self.experts).view(self.ranks, -1)
        recv_We = send_We
        if self.ranks > 1:
            recv_We = torch.empty_like(send_We)
            dist.all_to_all_single(recv_We, send_We, group=self.group)
        send, recv = send_We.sum(1).tolist(), recv_We.sum(1).tolist()
        rows = self._exchange(x_TD[token_R], send, recv)
        # They come by source rank, then expert; the experts want them by expert, then source rank.
        expert = torch.arange(recv_We.shape[1]).repeat(self.ranks).repeat_interleave(recv_We.flatten())
        order = expert.argsort(stable=True)
        of_expert = rows[order].split(recv_We.sum(0).tolist())
        outputs = [
            nn.functional.linear(self.activation(nn.functional.linear(x_RD, up_FD)), down_DF)
            for x_RD, up_FD, down_DF in zip(of_expert, self.expert_up, self.expert_down, strict=True)
        ]
        back = self._exchange(torch.cat(outputs)[order.argsort()], recv, send)
        weighted = back * weights_TK.flatten()[kept_S, None]
        return torch.zeros_like(x_TD).index_add(0, token_R, weighted)

    def update_bias(self, rate: float) -> None:
        """Towards balance by `rate`: up for experts with fewer tokens than the mean, down for those with more."""
        counts_E = self.counts.to(self.bias.dtype)
        self.bias += rate * torch.sign(counts_E.mean() - counts_E)
        self.counts.zero_()

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """`value` added up over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def gather(self, own: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The tensors of all ranks, `sizes[r]` entries along dim 0 from rank r, one behind the other."""
        if self.ranks == 1:
            return own
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        whole = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(whole, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])

    def _exchange(self, rows: torch.Tensor, send: list[int], recv: list[int]) -> torch.Tensor:
        if self.ranks == 1:
            return rows
        exchanged: torch.Tensor = AllToAll.apply(rows, send, recv, self.group)
        return exchanged

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self._recomputing()

    @contextmanager
    def _recomputing(self) -> Any:
        self._again = True
        try:
            yield
        finally:
            self._again = False
