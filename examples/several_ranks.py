"""Expert parallel training beside DDP. torchrun --nproc-per-node 2 examples/several_ranks.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import MoELayer, aux_loss, clip_grad_norm_, prepare

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)  # alike on all ranks before layers are built: routers are then equal
moe = MoELayer(64, 256, num_experts=8, top_k=2, group=dist.group.WORLD, schedule="chunked(2)", aux_loss_coef=0.01)
model = prepare(nn.Sequential(nn.Linear(64, 64), moe))  # the last step before DDP
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(128, 64, generator=torch.Generator().manual_seed(1 + rank))  # each rank has its own tokens
losses = []
for _ in range(5):
    loss = (wrapped(x) - x).square().mean()
    optimizer.zero_grad()
    (loss + aux_loss(model)).backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
if rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(moe.explain().splitlines()[0])
dist.destroy_process_group()
