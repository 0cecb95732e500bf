"""`--save-routing`: where a trained MoE layer sends the held-out text, for benchmarks with real routing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moe_overlap import aux_loss
from moe_overlap.commands.train.files import write_tensors
from moe_overlap.commands.train.loop import held_out_batches
from moe_overlap.commands.train.model import LanguageModel, moe_layers
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.text import Corpus
from moe_overlap.launch.launch import World
from moe_overlap.ops.gate import gate_topk
from moe_overlap.routing import LinearRouter

MAX_TOKENS = 16384  # Far more than a benchmark's batch; the rest would cost time only.


@torch.no_grad()
def save_routing(path: Path, model: LanguageModel, options: TrainOptions, corpus: Corpus, world: World) -> None:
    """Write `ids` int32 and `weights` float32, both [N, max(2, K)]: the best experts of the last MoE layer by score, or
    by score and bias where the router has one.

    A layer with K = 1 is asked for its second choice too, so that one file serves cases with one and two experts.
    Rows are held-out tokens, rank by rank, in order of the text. Metadata: E, K, kind, layer. Collective.
    """
    layer = len(moe_layers(model)) - 1
    router = moe_layers(model)[layer].router
    tokens = min(options.eval_tokens, MAX_TOKENS)
    assert isinstance(router, LinearRouter)
    ids: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
        logits_TE = F.linear(args[0].float(), router.weight.float())
        bias_E = router.expert_bias_E
        weights_TK, ids_TK, _, _ = gate_topk(logits_TE, bias_E, k=options.routing_width, score=router.score)
        ids.append(ids_TK)
        weights.append(weights_TK)

    model.eval()
    hook = router.register_forward_pre_hook(choose)
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
    metadata = {"E": options.experts, "K": options.top_k, "kind": options.kind, "layer": layer}
    if world.rank == 0:
        write_tensors(path, tensors, {key: str(value) for key, value in metadata.items()})
