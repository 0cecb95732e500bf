"""`--save-routing`: where a trained MoE layer sends the held-out text, for benchmarks with real routing."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_overlap import aux_loss
from moe_overlap.commands.train.files import write_tensors
from moe_overlap.commands.train.loop import held_out_batches
from moe_overlap.commands.train.model import LanguageModel, moe_layers
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.text import Corpus
from moe_overlap.launch.launch import World
from moe_overlap.routing import HashRouter, LinearRouter, SmileRouter

MAX_TOKENS = 16384  # Far more than a benchmark's batch; the rest would cost time only.


@torch.no_grad()
def save_routing(path: Path, model: LanguageModel, options: TrainOptions, corpus: Corpus, world: World) -> None:
    """Write `ids` int32 and `weights` float32, both [N, max(2, K)]: the best experts of the last MoE layer, as its
    router chooses before capacity.

    A layer with K = 1 is asked for its second choice too, so that one file serves cases with one and two experts. That
    of a hash router, which has none, is the next expert.
    Rows are held-out tokens, rank by rank, in order of the text. Metadata: E, K, kind, layer, router, mu, and how many
    rows are whose. Collective.
    """
    layer = len(moe_layers(model)) - 1
    router = moe_layers(model)[layer].router
    tokens = min(options.eval_tokens, MAX_TOKENS)
    ids: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        decision = _wide(module, options.routing_width).forward(*args, **told)
        ids.append(decision.topk_ids_TK)
        weights.append(decision.topk_weights_TK)

    model.eval()
    hook = router.register_forward_pre_hook(choose, with_kwargs=True)
    try:
        for windows in held_out_batches(replace(options, eval_tokens=tokens), corpus, world):
            model(windows[:, :-1])
            aux_loss(model)
    finally:
        hook.remove()
    tensors = {
        "ids": torch.cat(world.gather(torch.cat(ids))),
        "weights": torch.cat(world.gather(torch.cat(weights))),
    }
    counts = [int(one) for one in torch.cat(world.gather(torch.tensor([sum(len(one) for one in ids)])))]
    metadata = {
        "E": options.experts,
        "K": options.top_k,
        "kind": options.kind,
        "layer": layer,
        "router": options.router,
        "mu": options.mu,
        "rank_tokens": json.dumps(counts),
    }
    if world.rank == 0:
        write_tensors(path, tensors, {key: str(value) for key, value in metadata.items()})


def _wide(router: nn.Module, width: int) -> nn.Module:
    """The router with `width` choices and no capacity, on the same parameters, where it has scores to choose by."""
    wide = copy(router)
    if isinstance(wide, LinearRouter | SmileRouter):
        wide.top_k = min(width, wide.num_experts // getattr(wide, "num_nodes", 1))
    if isinstance(wide, LinearRouter):
        wide.capacity_factor = None
    if isinstance(wide, HashRouter) and wide.top_k < width:
        following_VK = wide.table_VK[:, -1:] + torch.arange(1, width - wide.top_k + 1, device=wide.table_VK.device)
        wide._buffers = dict(wide._buffers)  # the copy's own
        wide.table_VK = torch.cat([wide.table_VK, following_VK.to(torch.int32) % wide.num_experts], dim=1)
        wide.top_k = width
    return wide
