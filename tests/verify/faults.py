"""Our layer's adapter with a fault in it, one for each check. What each should be found by, and in which words."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from moe_overlap.verify import gathered
from moe_overlap.verify.adapters.ours import Ours


class ReadsTheFirstRanksExperts(Ours):
    found_by, words = "values", "is that of the experts of rank 0 for the experts 6..11 of rank 1"

    def load_full(self, state):
        super().load_full({n: t.roll(6, 0) if self._wrong(n) else t for n, t in state.items()})

    def _wrong(self, name):
        return self.kind_of(name) == "experts" and self.group is not None and self.group.rank() == 1


class RoutesByLocalIds(Ours):
    found_by, words = "routing", "tokens go to other experts"

    def routing_of(self, x):
        ids, weights = super().routing_of(x)
        return (ids if self.group is None else (ids + 6 * self.group.rank()) % self.experts), weights


class WeighsTwice(Ours):
    found_by, words = "output", "differs by up to"

    def forward(self, x):
        y = super().forward(x)
        if self.group is None:
            return y
        shared = self.module.shared_expert(x)
        _, weights = self.routing_of(x)
        return shared + (y - shared) * weights.sum(dim=1, keepdim=True)


class ExpertsTimesRanks(Ours):
    found_by, words = (
        "gradients",
        "the gradient of the experts (experts.gate_up_proj and 1 more) is 2 times (= EP) what it should be",
    )

    def sync_grads(self):
        super().sync_grads()
        for name, parameter in self.module.named_parameters():
            if self.group is not None and self.kind_of(name) == "experts":
                parameter.grad *= self.group.size()


class RouterOfOneRank(Ours):
    found_by, words = (
        "gradients",
        "the gradient of the router (router.weight) has the part of the tokens of rank 0 alone",
    )

    def sync_grads(self):
        own = self.module.router.weight.grad.clone()
        super().sync_grads()
        if self.group is not None:
            self.module.router.weight.grad.copy_(own / self.group.size())


class NormOfThisRank(Ours):
    found_by, words = "norm and clip", "that of this rank's experts and the rest"

    def clip(self, max_norm):
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)


class StepsWithoutExperts(Ours):
    found_by, words = (
        "training",
        "on one rank already, the experts (experts.gate_up_proj, experts.down_proj) did not change in 6 steps",
    )

    def optimizer_step(self):
        if not hasattr(self, "optimizer"):
            dense = [p for n, p in self.module.named_parameters() if self.kind_of(n) != "experts"]
            self.optimizer = torch.optim.AdamW(dense, lr=1e-2)
        self.optimizer.step()


class DecaysByRank(Ours):
    found_by, words = "AdamW step", "after step 1, the value of the experts"

    def optimizer_step(self):
        super().optimizer_step()
        if self.group is not None and self.group.rank() == 1:
            with torch.no_grad():
                self.module.experts.down_proj *= 0.999


class CountsInRecompute(Ours):
    found_by, words = "recompute", "the value of the buffers (tokens_seen) is 2 times what it should be"

    def build(self, group, dtype):
        super().build(group, dtype)
        self.module.register_buffer("tokens_seen", torch.zeros(self.experts, dtype=torch.int64))
        self.module.router.register_forward_hook(self._count)

    def _count(self, router, args, decision):
        total = decision.tokens_per_expert_E.clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        self.module.tokens_seen += total


class AuxOverRanks(Ours):
    found_by, words = "auxiliary loss", "the auxiliary loss is 0.5 times (= 1/EP)"

    def aux_loss(self):
        return super().aux_loss() / (1 if self.group is None else self.group.size())


class ForgetsTheFirstBatch(Ours):
    found_by, words = "two micro-batches", "with two micro-batches, the gradient of the shared part"

    def forward(self, x):
        if self.group is not None:
            self.module.shared_expert.zero_grad()
        return super().forward(x)


class NeedsTokens(Ours):
    found_by, words = "a rank without tokens", "raised IndexError"

    def forward(self, x):
        x[0]
        return super().forward(x)


class AveragesByTokens(Ours):
    """Right only where all ranks have as many tokens."""

    may_be_empty = False
    found_by, words = "uneven tokens", "with 24, 5 tokens on the ranks, the gradient of the router"

    def forward(self, x):
        self.count = len(x)
        return super().forward(x)

    def sync_grads(self):
        if self.group is not None:
            counts = gathered(torch.tensor([float(self.count)]), self.group)
            for name, parameter in self.module.named_parameters():
                if self.kind_of(name) != "experts":
                    parameter.grad *= self.count / counts.mean()
        super().sync_grads()


class Draws(Ours):
    found_by, words = "determinism", "differs between runs of the same step"

    def forward(self, x):
        return super().forward(x) * (1 + 1e-15 * (time.monotonic_ns() % 997))


class RaisesOnOneRank(Ours):
    found_by, words = "output", "raised ValueError (no more) at"

    def forward(self, x):
        if self.group is not None and self.group.rank() == 1:
            raise ValueError("no more")
        return super().forward(x)


class Dead(Ours):
    """Nothing is learned on either side, so the two agree."""

    found_by, words = "gradients", "is zero or missing: nothing is compared"

    def full_grads(self):
        return {name: torch.zeros_like(grad) for name, grad in super().full_grads().items()}
