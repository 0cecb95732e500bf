"""The two sides of every comparison: a module on n ranks, and one on one rank that computes all ranks' tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_overlap.verify.adapter import Adapter, State

TOKENS = 24
SEEDS = 16


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens x [T, D] and what its output is multiplied with, c [T, D]: its loss is sum(y * c)."""

    x: torch.Tensor
    c: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one step, for each `Tokens` that was computed: output, gradient of x, loss; and the auxiliary losses."""

    outputs: list[torch.Tensor]
    input_grads: list[torch.Tensor]
    losses: list[float]
    aux: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A module with the kit's values. share: what its losses are multiplied with, so that the mean over its ranks is
    the mean over all ranks' losses: 1 on n ranks, 1/n on one rank that computes the tokens of n."""

    adapter: Adapter
    share: float

    def backward(
        self, tokens: Sequence[Tokens], *, aux: bool = False, checkpointed: bool = False, factor: float = 1.0
    ) -> Result:
        """Forward and backward of `factor` times the loss; gradients are added to those that are there. The input
        gradients returned are those of the sum of all ranks' losses, on either side."""
        xs = [one.x.clone().requires_grad_() for one in tokens]
        calls = [torch.cat(xs)] if self.adapter.together else xs
        ys, auxes = [], []
        for x in calls:
            ys.append(self.adapter.checkpointed(x) if checkpointed else self.adapter.forward(x))
            if aux:
                auxes.append(self.adapter.aux_loss())
        y = torch.cat(ys)
        products = (y * torch.cat([one.c for one in tokens])).sum(dim=1)
        loss = products.sum()
        for one in auxes:  # of one call: where that is for several ranks, it stands for the mean of theirs
            loss = loss + one / (self.share if self.adapter.together else 1.0)
        (loss * (self.share * factor)).backward()
        counts = [len(x) for x in xs]
        return Result(
            outputs=list(y.detach().split(counts)),
            input_grads=[torch.zeros_like(x) if x.grad is None else x.grad / self.share for x in xs],
            losses=[float(one.sum()) for one in products.detach().split(counts)],
            aux=[one.detach() for one in auxes],
        )

    def grads(self, *batches: Sequence[Tokens], aux: bool = False) -> tuple[list[Result], State]:
        """A step of several micro-batches up to the optimizer; the loss is their mean."""
        self.adapter.zero_grad()
        results = [self.backward(tokens, aux=aux, factor=1 / len(batches)) for tokens in batches]
        self.adapter.sync_grads()
        return results, self.adapter.full_grads()

    def step(self, tokens: Sequence[Tokens], *, checkpointed: bool = False) -> Result:
        """A step with the optimizer."""
        self.adapter.zero_grad()
        result = self.backward(tokens, checkpointed=checkpointed)
        self.adapter.sync_grads()
        self.adapter.optimizer_step()
        return result


def built(factory: Callable[[], Adapter], group: dist.ProcessGroup | None, dtype: torch.dtype) -> Adapter:
    """An adapter with its module, the random numbers at the same point on every rank."""
    adapter = factory()
    adapter.group = group
    torch.manual_seed(0)
    adapter.build(group, dtype)
    return adapter


def random_state(adapter: Adapter) -> State:
    """Values for all that is trained: random, none like another; norms and the like stay near what they were."""
    generator = torch.Generator().manual_seed(7)
    state = adapter.full_state()
    for name in sorted(state):
        value = state[name]
        if adapter.kind_of(name) == "buffer" or not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.dim() < 2:
            state[name] = (value.double() + 0.1 * drawn).to(value.dtype)
        else:
            state[name] = (drawn * (value.shape[-1] * value.shape[-2]) ** -0.25).to(value.dtype)
    return state


def tokens_for(
    counts: Sequence[int], hidden: int, dtype: torch.dtype, *, seed: int, same: bool = False
) -> list[Tokens]:
    """Tokens for every rank: `counts[r]` for rank r. Each rank's lie around a direction of its own, so that they
    prefer different experts and no local count is the global one. same: all ranks get those of rank 0."""
    found = []
    for rank, count in enumerate(counts):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        own = torch.randn(1, hidden, generator=generator, dtype=torch.float64)
        x = torch.randn(count, hidden, generator=generator, dtype=torch.float64) + own
        c = torch.randn(count, hidden, generator=generator, dtype=torch.float64)
        found.append(Tokens(x.to(dtype), c.to(dtype)))
    return [found[0]] * len(found) if same else found


def seed_for(one: Adapter, counts: Sequence[int], dtype: torch.dtype) -> int:
    """Of a few seeds the one under which most pairs of rank and expert meet, by the routing of one rank: an expert that
    no token wants is an expert that nothing is known of."""
    best, most = 0, -1
    for seed in range(SEEDS):
        tokens = tokens_for(counts, one.hidden, dtype, seed=seed)
        met = sum(len({int(i) for i in routed(one, t.x)[0].flatten() if i >= 0}) for t in tokens)
        if met > most:
            best, most = seed, met
    return best


def routed(adapter: Adapter, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`routing_of` without a graph."""
    with torch.no_grad():
        ids, weights = adapter.routing_of(x)
    return ids, weights


def dense_weights(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """[T, K] ids and weights as [T, E], so that the order of the K does not matter; ids of -1 count as nothing."""
    dense = weights.new_zeros(len(ids), experts + 1)
    return dense.scatter_add_(1, ids.long() % (experts + 1), weights)[:, :experts]
