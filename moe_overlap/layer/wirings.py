"""Shortcut blocks as published models wire them: what reads which state, with any attention, MLP and norm.

LongCat-Flash (arXiv 2509.01322) and Snowflake Arctic are one `ShortcutBlock` each. FarSkip-Collective (arXiv
2511.11505) lets a layer's rows come back under the attention of the next layer, so it is a module over several.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_overlap.auto.beside import Op, as_module
from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shortcut import ShortcutBlock
from moe_overlap.layer.tickets import Ticket
from moe_overlap.schedule.user_ops import check_result
from moe_overlap.transport.base import Transport
from moe_overlap.transport.closing import closing_on_error


def arctic_block(attention: Op, mlp: Op, moe: MoELayer, *, norm: Op | None = None, **options: Any) -> ShortcutBlock:
    """h = attention(x); y = mlp(h) + moe(norm(x)): Pos-1 in every block. attention and mlp have norm and residual
    inside. The experts run between both, unless `options`, which go to ShortcutBlock, say otherwise."""
    options.setdefault("slot", None if options.get("schedule") is not None else 1)
    return ShortcutBlock([attention, mlp], moe, tap=0, pre_norm=norm, **options)


def longcat_block(
    attentions: Sequence[Op], mlps: Sequence[Op], moe: MoELayer, *, norm: Op | None = None, **options: Any
) -> ShortcutBlock:
    """h = attention 0(x); y = mlp 1(attention 1(mlp 0(h))) + moe(norm(h)): Pos-2 of a double block.

    Two of each, with norm and residual inside; norm: the one of MLP 0, which the model gives to the experts as well.
    The experts run behind MLP 0, unless `options`, which go to ShortcutBlock, say otherwise.
    """
    for name, given in (("attentions", attentions), ("mlps", mlps)):
        if len(given) != 2:
            raise ConfigError(name, len(given), "two of them")
    options.setdefault("slot", None if options.get("schedule") is not None else 1)
    ops = [attentions[0], mlps[0], attentions[1], mlps[1]]
    return ShortcutBlock(ops, moe, tap=1, pre_norm=norm, **options)


class FarSkip(nn.Module):
    """Layers with two residual streams, `full` and one that lacks the last routed output:

        a = attention(bare);  full = bare + routed of the layer before
        h = norm(full);  bare = full + a + shared(h);  routed = moe(h)

    attentions, shared experts and norms: callables [..., D] -> [..., D] without residual, norms of the attentions
    inside; one of each for every MoELayer, which has no shared expert of its own. The attention runs beside the combine
    of the layer before, or with attention_beside="dispatch" beside its own layer's dispatch, and the shared expert
    beside the dispatch: the same model and, but for the order of backward's sums, the same numbers.
    forward(x [..., D]) -> the full stream behind the last layer. Errors as MoELayer.forward.
    """

    def __init__(
        self, attentions: Sequence[Op], moes: Sequence[MoELayer], shared: Sequence[Op], norms: Sequence[Op], *,
        attention_beside: str = "combine",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, given in (("attentions", attentions), ("shared", shared), ("norms", norms)):
            if len(given) != len(moes):
                raise ConfigError(name, len(given), f"{len(moes)}, one for each MoELayer")
        if len({id(moe) for moe in moes}) != len(moes):
            raise ConfigError("moes", "the same layer twice", "layers of their own")
        if attention_beside not in ("combine", "dispatch"):
            raise ConfigError("attention_beside", attention_beside, "'combine' or 'dispatch'")
        for moe in moes:
            if not isinstance(moe, MoELayer) or moe.shared_expert is not None:
                what = "a layer with a shared expert" if isinstance(moe, MoELayer) else type(moe).__name__
                raise ConfigError("moes", what, "MoELayers without a shared expert: give those as shared")
        self.attentions = nn.ModuleList(map(as_module, attentions))
        self.shared = nn.ModuleList(map(as_module, shared))
        self.norms = nn.ModuleList(map(as_module, norms))
        self.moes = nn.ModuleList(moes)
        self.attention_beside = attention_beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full, bare = x, x
        before: tuple[MoELayer, Ticket] | None = None
        for attention, moe, shared, norm in zip(self.attentions, self.moes, self.shared, self.norms, strict=True):
            assert isinstance(moe, MoELayer)
            own = partial(part, moe.transport)
            a = own("attention", attention, bare) if self.attention_beside == "combine" else None
            if before is not None:
                layer, ticket = before
                full = bare + layer.finish(ticket)
            h = own("norm", norm, full)
            ticket = moe.begin(h)
            a = own("attention", attention, bare) if a is None else a
            bare = full + a + own("shared", shared, h)
            moe.run_experts(ticket)
            before = moe, ticket
        if before is None:
            return x
        layer, ticket = before
        y: torch.Tensor = bare + layer.finish(ticket)
        return y


def part(transport: Transport, name: str, op: Op, h: torch.Tensor) -> torch.Tensor:
    """op(h), checked. A rank whose op fails closes its transport, as its peers are in the exchanges beside it."""
    with closing_on_error(transport, name):
        result = op(h)
        check_result(name, result, h)
    return result
