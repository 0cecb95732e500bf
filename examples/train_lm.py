"""A byte-level language model on any text, with experts whose exchanges hide under the backbone. Public API only.

    python examples/train_lm.py README.md
    torchrun --nproc-per-node 2 examples/train_lm.py README.md --steps 500

Each block pair is attention, MLP, attention, shared expert, and one routed expert per token that reads the activation
after the first attention (ScMoE Pos-2). Experts lie spread over the ranks; everything else is in plain DDP.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import moe_overlap as mo

HIDDEN, FFN, HEADS, EXPERTS, SEQ, BATCH = 128, 256, 2, 8, 128, 8


class Attention(nn.Module):
    """A backbone op: h -> h, its norm and residual inside."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, h):
        batch, seq, _ = h.shape
        q, k, v = self.qkv(self.norm(h)).view(batch, seq, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self.out(mixed.transpose(1, 2).reshape(h.shape))


def mlp():
    return nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, h):
        return h + self.branch(h)


def block_pair(group):
    return mo.ShortcutBlock(
        backbone=[Attention(), Residual(mlp()), Attention()],
        moe=mo.MoELayer(HIDDEN, FFN, EXPERTS, top_k=1, group=group, aux_loss_coef=0.01),
        tap=1,  # the experts read h after the first attention ...
        slot=2,  # ... and compute after two more ops, under which their rows have travelled
        shared_expert=mlp(),
        combine="gated",
        pre_norm=nn.RMSNorm(HIDDEN),
    )


class LanguageModel(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.embedding = nn.Embedding(256, HIDDEN)
        self.positions = nn.Embedding(SEQ, HIDDEN)
        self.blocks = nn.Sequential(block_pair(group), block_pair(group))
        self.head = nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256))

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens) + self.positions.weight))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a file of at least 1000 bytes")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    with open(options.text, "rb") as file:
        stream = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()

    rank, group = 0, None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, group = dist.get_rank(), dist.group.WORLD

    torch.manual_seed(0)
    model = LanguageModel(group)
    mo.prepare(model)
    trained = nn.parallel.DistributedDataParallel(model) if group else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(rank)  # every rank reads its own part of the text
    for step in range(options.steps):
        starts = torch.randint(len(stream) - SEQ, (BATCH, 1), generator=order)
        windows = stream[starts + torch.arange(SEQ + 1)]
        loss = F.cross_entropy(trained(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        (loss + mo.aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 20 == 0 or step == options.steps - 1):
            print(f"step {step:4d}  loss {loss.item():.3f} nats/byte", flush=True)
    if rank == 0:
        stats = model.blocks[0].moe.stats()
        counts = stats.tokens_per_expert.tolist()
        print(f"tokens per expert, first block: {counts}; payload {stats.payload_bytes} bytes")
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
