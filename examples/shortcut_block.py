"""ScMoE's shortcut: whole ops of the model beside both exchanges.

python examples/shortcut_block.py, or torchrun --nproc-per-node 2 examples/shortcut_block.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from moe_overlap import MoELayer, ShortcutBlock


class Branch(nn.Module):
    """norm and MLP, with or without the residual: [..., D] -> [..., D]."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(h)
        return h + y if self.residual else y


group = None
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
torch.manual_seed(0)
moe = MoELayer(64, 256, num_experts=8, top_k=1, group=group)
# The experts read what stands after the first op; the other two and the shared expert run beside their exchanges.
backbone = [Branch(True) for _ in range(3)]
block = ShortcutBlock(backbone, moe, tap=1, slot=1, shared_expert=Branch(False), combine="gated")
block(torch.randn(128, 64)).square().mean().backward()
print(block.explain())
if group is not None:
    dist.destroy_process_group()
