"""The layers that `moe-overlap bench layer --device cuda --link staged` times: shapes, ways to overlap them, links."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moe_overlap import Experts, MoELayer, ShortcutBlock
from moe_overlap.routing import LinearRouter
from moe_overlap.transport import LocalTransport, NoCommTransport, StagedTransport, Transport

DEVICE, DTYPE = "cuda", torch.bfloat16
OPS = 4
WAYS = ("serial", "chunked(2)", "chunked(4)", "chunked(8)", "shortcut")
DRAWN = ("serial", "chunked(4)", "shortcut")


@dataclass(frozen=True)
class Shape:
    """A layer of a public model, and how many tokens the rank has."""

    short: str
    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int


SHAPES = (
    Shape("qwen3", "Qwen3-30B-A3B T=8192", tokens=8192, hidden=2048, ffn=768, experts=128, top_k=8),
    Shape("mixtral", "Mixtral-8x7B T=8192", tokens=8192, hidden=4096, ffn=14336, experts=8, top_k=2),
)
CASES = tuple(shape.short for shape in SHAPES)


class Dense(nn.Module):
    """A backbone op: h + down(silu(gate h) * up h), three times as wide as h."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 6 * hidden, bias=False, device=DEVICE, dtype=DTYPE)
        self.down = nn.Linear(3 * hidden, hidden, bias=False, device=DEVICE, dtype=DTYPE)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return h + self.down(functional.silu(gate) * up)


class Parts:
    """What all ways of one shape share: weights, input, gradient of the output; and the wires."""

    def __init__(self, shape: Shape, ranks: int) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.router = LinearRouter(
            shape.hidden, shape.experts, shape.top_k, renormalize=True, device=DEVICE, dtype=DTYPE
        )
        self.experts = Experts(shape.hidden, shape.ffn, shape.experts, device=DEVICE, dtype=DTYPE)
        self.ops = [Dense(shape.hidden) for _ in range(OPS)]
        self.x, self.dout = (torch.randn(shape.tokens, shape.hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.share = (ranks - 1) / ranks
        self.transports: dict[str, Transport] = {}

    def transport(self, link: str) -> Transport:
        """One for all layers of a link: they are alike to it."""
        if link not in self.transports:
            made: dict[str, Callable[[], Transport]] = {
                "staged": lambda: StagedTransport(DEVICE, share=self.share),
                "local": LocalTransport,
                "nocomm": lambda: NoCommTransport(LocalTransport()),
            }
            self.transports[link] = made[link]()
        return self.transports[link]

    def build(self, way: str, link: str, *, overlap: bool = True) -> nn.Module:
        shape = self.shape
        layer = MoELayer(
            shape.hidden, shape.ffn, shape.experts, shape.top_k, router=self.router, experts=self.experts,
            transport=self.transport(link), schedule="serial" if way == "shortcut" else way, overlap=overlap,
        )  # fmt: skip
        return ShortcutBlock(self.ops, layer, tap=0, slot=OPS // 2, overlap=overlap) if way == "shortcut" else layer


class Contender:
    """A model over one link, its forward and its backward."""

    def __init__(self, parts: Parts, way: str, link: str, *, overlap: bool = True) -> None:
        self._x, self._dout = parts.x, parts.dout
        self.transport = parts.transport(link)
        self.module = parts.build(way, link, overlap=overlap)
        self._names, self._parameters = zip(*self.module.named_parameters(), strict=True)

    def forward(self) -> tuple[torch.Tensor, Any]:
        x = self._x.detach().requires_grad_()
        out = self.module(x)
        return out, (x, out)

    def backward(self, saved: Any) -> tuple[torch.Tensor, ...]:
        """The gradients of x and of all parameters."""
        x, out = saved
        return torch.autograd.grad(out, [x, *self._parameters], self._dout)

    def once(self) -> dict[str, torch.Tensor]:
        """Every result, by its name."""
        out, saved = self.forward()
        return dict(zip(("y", "dx", *self._names), (out.detach(), *self.backward(saved)), strict=True))


def check(got: Contender, want: Contender) -> None:
    """Raises ValueError unless both give the same bits."""
    have, should = got.once(), want.once()
    wrong = [name for name in should if not torch.equal(_bits(have[name]), _bits(should[name]))]
    if wrong:
        raise ValueError(f"not the bits of local: {', '.join(wrong)}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
