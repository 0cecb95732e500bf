"""The adapter: what the kit has to know of a Mixture-of-Experts module, ours or any other.

Write a subclass with `build` and `routing_of` and, where the module is not as described below, what differs. Every
method after these two has a default, or is optional: the kit then says "not checked" and names it.

The kit makes several modules of one adapter class: on n ranks, and on one rank that holds all experts. It computes the
same tokens on both. A rank's loss is a sum over its own tokens, and what is trained is the MEAN over the ranks of their
losses: that is the convention of DistributedDataParallel, and `full_grads` answers in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

State = dict[str, torch.Tensor]


class Adapter:
    """One MoE module. The defaults are for an nn.Module whose expert parameters have the experts in dim 0, rank r of n
    holding the r-th n-th of them, and whose other parameters every rank has whole.

    hidden, experts, top_k: sizes of the module that `build` makes: small ones, `experts` a multiple of the ranks.
    same_tokens: True where all ranks of the group compute the same tokens (as under tensor parallelism), not their own.
    may_be_empty: whether a rank may have no tokens (a block with attention may not).
    coarsest: the dtype of the coarsest arithmetic inside, whatever the dtype of the values (a router in float32).
    together: True where one call sees all ranks' tokens (a global capacity, an auxiliary loss over all tokens): then
    one rank computes all tokens in one call, else each rank's tokens in a call of their own.
    """

    hidden = 16
    experts = 12
    top_k = 2
    same_tokens = False
    together = False
    may_be_empty = True
    coarsest: torch.dtype | None = None

    module: nn.Module
    group: dist.ProcessGroup | None = None

    # ------------------------------------------------------------------------------------ to be written

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        """Make `self.module` on the CPU. group: the ranks of this module (gloo), all of which call this; None: one rank
        with all experts, which must not communicate. Values do not matter, `load_full` follows."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def routing_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> (ids [T, K] of experts of the whole layer, -1 for none; their weights [T, K]). Collective
        where the module's own routing is."""
        raise NotImplementedError(f"{type(self).__name__}.routing_of")

    # ------------------------------------------------------------------------------------ with defaults

    @property
    def name(self) -> str:
        return type(self).__name__

    def kind_of(self, name: str) -> str:
        """What a name of `full_state` is: "router", "experts", "shared", "other", or "buffer" (nothing is trained)."""
        if name in dict(self.module.named_buffers()):
            return "buffer"
        for kind, words in (("shared", ("shared",)), ("experts", ("expert",)), ("router", ("router", "gate"))):
            if any(word in name for word in words):
                return kind
        return "other"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], this rank's tokens -> y [T, hidden]. Collective."""
        y: torch.Tensor = self.module(x)
        return y

    def load_full(self, state: State) -> None:
        """Take this rank's part of full tensors (experts of the whole layer in dim 0)."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(own_part(state[name], self.group) if self.kind_of(name) == "experts" else state[name])

    def full_state(self) -> State:
        """Copies of all parameters and of the buffers that a checkpoint has, as full tensors: the experts' gathered
        from the ranks, all others as this rank has them. Collective."""
        return {
            name: gathered(tensor, self.group) if self.kind_of(name) == "experts" else tensor.detach().clone()
            for name, tensor in self._tensors().items()
        }

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.module.zero_grad(set_to_none=True)

    def sync_grads(self) -> None:
        """What the recipe does between backward and the optimizer, in place, once per step; nothing where hooks of a
        wrapper do it. Collective. Default: gradients of what is not experts are averaged over the ranks, and those of
        experts, which are sums over all ranks' tokens, divided by the number of ranks."""
        ranks = size_of(self.group)
        for name, parameter in self.module.named_parameters():
            if self.group is None:
                return
            if self.kind_of(name) == "experts":
                if parameter.grad is not None:
                    parameter.grad /= ranks
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad /= ranks

    def full_grads(self) -> State:
        """Copies of the gradients as they are now, as full tensors under the names of `full_state`; a parameter without
        gradient is left out. Read after `sync_grads`: the gradients of the mean of the ranks' losses. Collective."""
        found: State = {}
        for name, parameter in self.module.named_parameters():
            if self.kind_of(name) == "experts":
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[name] = gathered(grad, self.group)
            elif parameter.grad is not None:
                found[name] = parameter.grad.detach().clone()
        return found

    def _tensors(self) -> State:
        """This rank's parameters and persistent buffers themselves: a state dict may show them otherwise."""
        own = dict(self.module.named_parameters())
        return own | {n: t for n, t in self.module.state_dict(keep_vars=True).items() if n not in own}

    # ------------------------------------------------------------------------------------ optional

    def clip(self, max_norm: float) -> torch.Tensor | float:
        """Clip the gradients to a total norm, as torch.nn.utils.clip_grad_norm_ does, and return the norm that they
        had over all parameters of the whole module. Called after `sync_grads`. Collective."""
        raise NotImplementedError

    def optimizer_step(self) -> None:
        """One AdamW step by the module's recipe, and what belongs to a step (an update of the router's bias). The
        adapter makes its optimizer at the first call. Called after `sync_grads`."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write model and optimizer state. Collective over the module's group alone: with `group` None one rank calls
        it while others wait, even where torch.distributed is initialised."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on this or another number of ranks, into a module without optimizer steps so far.
        With `group` None several ranks may call it at once, each for itself."""
        raise NotImplementedError

    def aux_loss(self) -> torch.Tensor:
        """The auxiliary loss of the last `forward`, a scalar with a graph, to be added to this rank's loss."""
        raise NotImplementedError

    def checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` whose backward computes the module again (activation checkpointing, by the module's recipe)."""
        raise NotImplementedError

    def has(self, *methods: str) -> bool:
        """Whether this adapter has optional methods of these names."""
        return all(getattr(type(self), name) is not getattr(Adapter, name) for name in methods)


def size_of(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group; 1 for None."""
    return 1 if group is None else group.size()


def own_part(full: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Of a full tensor [E, ...] the experts of this rank, [E / ranks, ...]."""
    return full if group is None else full.chunk(group.size())[group.rank()]


def gathered(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The opposite of `own_part`, a copy. Collective."""
    own = own.detach().clone(memory_format=torch.contiguous_format)
    if group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts)
