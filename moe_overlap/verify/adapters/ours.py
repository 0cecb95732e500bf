"""`moe_overlap.MoELayer` with a shared expert and an auxiliary loss: in a plain loop, with deduplicated rows, and
wrapped by DDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_overlap.layer.layer import MoELayer
from moe_overlap.parallel.clip import clip_grad_norm_
from moe_overlap.parallel.optimizer_state import load_optimizer_state_dict, optimizer_state_dict
from moe_overlap.parallel.prepare import prepare
from moe_overlap.verify.adapter import Adapter, size_of

TIMEOUT_S = 10.0


class Ours(Adapter):
    """In a plain loop, which averages the gradients of router and shared expert itself. schedule: any but "auto"."""

    schedule = "serial"
    dedup = "off"

    module: MoELayer

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        self.module = prepare(MoELayer(
            self.hidden, 24, self.experts, self.top_k, group=group, schedule=self.schedule, shared_expert_size=20,
            dedup=self.dedup, aux_loss_coef=0.1, z_loss_coef=0.01, timeout_s=TIMEOUT_S, dtype=dtype,
        ))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _without("an auxiliary loss was dropped"):  # most checks do not ask for it
            return super().forward(x)

    def routing_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decision = self.module.router(x)
        return decision.topk_ids_TK, decision.topk_weights_TK

    def sync_grads(self) -> None:
        for name, parameter in self.module.named_parameters():
            if self.group is not None and self.kind_of(name) != "experts":  # theirs are means already: `prepare`
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)
                parameter.grad /= size_of(self.group)

    def clip(self, max_norm: float) -> torch.Tensor:
        return clip_grad_norm_(self.module.parameters(), max_norm)

    def optimizer_step(self) -> None:
        self._optimizer().step()

    def save(self, folder: Path) -> None:
        with _without("torch.distributed is disabled"):  # by one rank on purpose
            dcp.save(self._state(), checkpoint_id=folder, process_group=self.group, no_dist=self.group is None)

    def load(self, folder: Path) -> None:
        state = self._state()
        with _without("torch.distributed is disabled"):  # by one rank on purpose
            dcp.load(state, checkpoint_id=folder, process_group=self.group, no_dist=self.group is None)
        self.module.load_state_dict(state["model"])
        load_optimizer_state_dict(self.module, self._optimizer(), state["optimizer"])

    def _state(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "optimizer": optimizer_state_dict(self.module, self._optimizer())}

    def _optimizer(self) -> torch.optim.AdamW:
        if not hasattr(self, "optimizer"):
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        return self.optimizer

    def aux_loss(self) -> torch.Tensor:
        loss = self.module.take_aux_loss()
        assert loss is not None
        return loss

    def checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.forward, x, use_reentrant=False)
        return y


class OursDeduplicated(Ours):
    """With one row for each (token, rank)."""

    top_k = 4
    schedule = "chunked(2)"
    dedup = "on"


class OursInDDP(Ours):
    """In DistributedDataParallel, which averages the gradients of router and shared expert during backward."""

    schedule = "shared_expert"

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        super().build(group, dtype)
        self.wrapped = self.module if group is None else DistributedDataParallel(self.module, process_group=group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _without("an auxiliary loss was dropped"):
            y: torch.Tensor = self.wrapped(x)
        return y

    def sync_grads(self) -> None:
        pass


@contextmanager
def _without(warning: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", warning)
        yield
