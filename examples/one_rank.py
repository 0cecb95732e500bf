"""A layer on one rank: no process group, nothing to set up. python examples/one_rank.py"""

import torch

from moe_overlap import MoELayer, aux_loss

torch.manual_seed(0)
moe = MoELayer(64, 256, num_experts=8, top_k=2, aux_loss_coef=0.01)
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
x, target = torch.randn(256, 64), torch.randn(256, 64)
losses = []
for _ in range(20):
    loss = (moe(x) - target).square().mean()
    optimizer.zero_grad()
    (loss + aux_loss(moe)).backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print(moe.stats())
