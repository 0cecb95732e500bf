"""The adapter of the plain all-to-all layer, with the whole recipe around it: an example of every method there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from moe_overlap.verify.adapter import Adapter, State
from moe_overlap.verify.adapters.plain_layer import PlainMoE


class PlainAdapter(Adapter):
    """PlainMoE under data parallelism by hand: gradients averaged, clipped to one norm, AdamW, safetensors.

    ffn: hidden size of an expert. options: what else PlainMoE takes. A subclass changes them.
    """

    ffn = 24
    options: ClassVar[dict[str, Any]] = {"aux_coef": 0.01}
    together = True  # the auxiliary loss and the capacity are over all ranks' tokens
    learning_rate = 1e-2
    bias_rate = 1e-3

    module: PlainMoE

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        self.group = group
        self.module = PlainMoE(
            self.hidden, self.ffn, self.experts, self.top_k, group=group, dtype=dtype, **self.options
        )
        torch.nn.init.normal_(self.module.bias, std=0.02)  # as after some steps: zeros would show nothing
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=self.learning_rate)

    def routing_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            _, ids_TK, weights_TK = self.module.route(x)
            dropped_TK = ~self.module.within_capacity(ids_TK, weights_TK)
        return ids_TK.masked_fill(dropped_TK, -1), weights_TK.masked_fill(dropped_TK, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_TD, self._aux = self.module(x)
        return y_TD

    def aux_loss(self) -> torch.Tensor:
        return self._aux

    def checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        self.module.recompute = True
        try:
            return self.forward(x)
        finally:
            self.module.recompute = False

    def clip(self, max_norm: float) -> torch.Tensor:
        """One norm for all: every rank has the same dense gradients and counts them once, the experts' are added up."""
        squares = {"experts": torch.zeros(()), "dense": torch.zeros(())}
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        for name, grad in gradients.items():
            kind = "experts" if self.kind_of(name) == "experts" else "dense"
            squares[kind] = squares[kind] + grad.square().sum()
        norm = (self.module.sum_over_ranks(squares["experts"]) + squares["dense"]).sqrt()
        for grad in gradients.values():
            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def optimizer_step(self) -> None:
        self._optimizer.step()
        self.module.update_bias(self.bias_rate)

    def save(self, folder: Path) -> None:
        """Each rank writes its experts, every one under its number in the whole layer; rank 0 also what all have."""
        own: State = {}
        for name, tensor in self._stored().items():
            if self._stacked(name, tensor):
                own |= {f"{name}.{expert}": tensor[at] for at, expert in enumerate(self._held())}
            elif self.module.rank == 0:
                own[name] = tensor
        save_file(
            {name: t.detach().contiguous() for name, t in own.items()}, folder / f"{self.module.rank}.safetensors"
        )
        if self.group is not None:
            dist.barrier(self.group)

    def load(self, folder: Path) -> None:
        """Reads of all files what this rank holds, whoever wrote it."""
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        found = {name: file for file in files for name in file.keys()}
        with torch.no_grad():
            for name, tensor in self._stored().items():
                if self._stacked(name, tensor):
                    parts = [f"{name}.{expert}" for expert in self._held()]
                    tensor.copy_(torch.stack([found[part].get_tensor(part) for part in parts]))
                else:
                    tensor.copy_(found[name].get_tensor(name))

    def _stored(self) -> State:
        """What a checkpoint has: parameters, the bias, and what AdamW keeps of each parameter (zeros before a step)."""
        found = dict(self._tensors())
        for name, parameter in self.module.named_parameters():
            state = self._optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found |= {f"{name}.{key}": value for key, value in state.items()}
        return found

    def _stacked(self, name: str, tensor: torch.Tensor) -> bool:
        return self.kind_of(name) == "experts" and tensor.dim() > 0

    def _held(self) -> range:
        """The experts of this rank."""
        count = self.experts // self.module.ranks
        return range(self.module.rank * count, (self.module.rank + 1) * count)
