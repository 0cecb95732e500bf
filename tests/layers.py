"""A layer of the tests' usual sizes, and tokens for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_overlap import MoEBlock, MoELayer
from tests.tolerances import same_bits

D, F, E, K = 16, 24, 8, 2


def make(transport=None, **options):
    torch.manual_seed(3)
    options = {"dtype": torch.float64, "top_k": K, **options}
    return MoELayer(D, F, E, transport=transport, **options)


def tokens(count, seed=0, dtype=torch.float64):
    return torch.randn(count, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Op(nn.Module):
    """h + tanh(h w)."""

    def __init__(self, width=D):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, h):
        return h + torch.tanh(self.linear(h))


def block_stack(kind, transport, *, blocks, ops=1, op=Op, layer=None, **options):
    """kind(blocks, **options) of `blocks` blocks, each of `ops` ops, a norm and a layer; `layer`: its options."""
    torch.manual_seed(5)
    made = []
    for _ in range(blocks):
        dense = [op() for _ in range(ops)]
        made.append(MoEBlock(dense, make(transport, **(layer or {})), norm=nn.LayerNorm(D, dtype=torch.float64)))
    return kind(made, **options)


def executed(events, phase):
    """What a rank did in a phase, in order: "P", and of an exchange of rows "D0.wire", its start, and "D0.wait"."""
    rows = ("D", "C")
    mine = [e for e in sorted(events, key=lambda e: e.start_s) if e.phase == phase]
    mine = [e for e in mine if e.lane == "comp" or e.action.startswith(rows)]
    return [e.action if e.lane == "comp" else f"{e.action}.{e.lane}" for e in mine]


def results(model, x, call=None):
    """y and all gradients of a call of the model, or of `call` in its place."""
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def check_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        same_bits(one, other)


@contextmanager
def exchange_fails(transport, action) -> Iterator[None]:
    """The start of this action's exchange raises an OSError, on this rank alone."""
    plain = transport.start

    def failing(*args, **kwargs):
        if kwargs["action"] == action:
            raise OSError("no memory")
        return plain(*args, **kwargs)

    transport.start = failing
    try:
        yield
    finally:
        del transport.start
