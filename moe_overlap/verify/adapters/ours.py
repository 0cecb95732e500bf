"""`moe_overlap.MoELayer`, with a shared expert and an auxiliary loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_overlap.layer.layer import MoELayer
from moe_overlap.verify.adapter import Adapter

TIMEOUT_S = 10.0


class Ours(Adapter):
    """schedule: any that the layer takes as text, but "auto"."""

    schedule = "serial"

    module: MoELayer

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        self.module = MoELayer(
            self.hidden, 24, self.experts, self.top_k, group=group, schedule=self.schedule, shared_expert_size=20,
            aux_loss_coef=0.1, z_loss_coef=0.01, timeout_s=TIMEOUT_S, dtype=dtype,
        )  # fmt: skip

    def routing_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decision = self.module.router(x)
        return decision.topk_ids_TK, decision.topk_weights_TK

    def optimizer_step(self) -> None:
        if not hasattr(self, "optimizer"):
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.optimizer.step()

    def aux_loss(self) -> torch.Tensor:
        loss = self.module.take_aux_loss()
        assert loss is not None
        return loss

    def checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.module, x, use_reentrant=False)
        return y
